"""The engine against a float64 example-by-example oracle, on tiny models built from configs."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from perta.data.batch import Batch, Encoded, bucketed, collate
from perta.engine import gradients
from perta.engine.gradients import powers
from perta.engine.gradients.engine import (
    Moments,
    _zeros_like,
    abs_of_mean,
    batched_moments,
    example_loop_moments,
)
from perta.errors import ConfigError, DataError, EmptyDatasetError, EngineMismatchError
from perta.methods.diagonal import share
from perta.models.loss import example_losses

VOCABULARY = 40
PAD = 2
ORDERS = (0.5, 1.0, 2.0, 3.0)


# --- models and data ---------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": PAD,
}


def llama_tied() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, tie_word_embeddings=True))


def llama_untied() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    )


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD
    )
    return hf.GPT2LMHeadModel(config)


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON, tie_word_embeddings=True))


def gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**COMMON, head_dim=4))


def gemma3() -> nn.Module:
    """Norms of queries and keys, (B, heads, T, d), and a scaled embedding class."""
    config = hf.Gemma3TextConfig(**COMMON, head_dim=4, sliding_window=8)
    return hf.Gemma3ForCausalLM(config)


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    config = hf.Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return hf.Qwen2MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Experts stored transposed and with biases; attention sinks, which fall back."""
    config = hf.GptOssConfig(
        **COMMON, head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    return hf.GptOssForCausalLM(config)


def llama_lora() -> nn.Module:
    import peft

    lora = peft.LoraConfig(r=3, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        # peft reads an attribute that the transformers library has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(llama_tied(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, and then lora_A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


def shared_layers() -> nn.Module:
    """The first layer's MLP and norm serve the second layer too."""
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, mlp_bias=True))
    first, second = model.model.layers
    second.mlp, second.input_layernorm = first.mlp, first.input_layernorm
    return cast(nn.Module, model)


class Exotic(nn.Module):
    """Reads matrices in ways the engine has no rule for, one of them beside a linear layer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.mix = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.gain = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("btd,de->bte", x, self.mix.tanh())
        mixed = mixed + torch.einsum("btd,fd,fe->bte", x, *[self.inner.up_proj.weight] * 2)
        return cast(Tensor, self.inner(x + self.gain * mixed))


class Averaging(nn.Module):
    """Looks like a norm, and mixes the elements of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


def exotic() -> nn.Module:
    model: Any = llama_tied()
    first, second = model.model.layers
    first.mlp = Exotic(first.mlp)
    second.input_layernorm = Averaging()
    return cast(nn.Module, model)


MODELS = [
    llama_tied,
    llama_untied,
    gpt2,
    qwen2,
    gemma,
    gemma3,
    mixtral,
    qwen2_moe,
    gpt_oss,
    llama_lora,
    shared_layers,
    exotic,
]
FALLBACK = {
    exotic: {
        "model.layers.0.mlp.mix",
        "model.layers.0.mlp.gain",
        "model.layers.0.mlp.inner.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
    },
    gpt_oss: {"model.layers.0.self_attn.sinks", "model.layers.1.self_attn.sinks"},
}


def build(factory: Callable[[], nn.Module]) -> Any:
    """A model whose parameters, norms and biases too, are all away from their initial values."""
    torch.manual_seed(0)
    model = factory()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def examples(lengths: Sequence[int] = (9, 5, 12, 7, 7)) -> list[Encoded]:
    """Random examples; the pad token stands in prompts and answers too."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for row, n in enumerate(lengths, start=1):
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
        ids[1] = ids[n - 2] = PAD
        prompt = n // 2
        labels = [-100] * prompt + ids[prompt:]
        made.append(Encoded(tuple(ids), tuple(labels), row))
    return made


def oracle(model: Any, data: Sequence[Encoded]) -> list[dict[str, Tensor]]:
    """Gradient of every example, in float64 and without batches or padding."""
    model = copy.deepcopy(model).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default has no float64 form
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    result = []
    for example in data:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        logits = model(input_ids=ids, use_cache=False).logits.double()
        loss = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        result.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
        )
    return result


def mean_powers(gradients: Sequence[dict[str, Tensor]], order: float) -> dict[str, Tensor]:
    return {
        name: torch.stack([g[name].abs() ** order for g in gradients]).mean(0)
        for name in gradients[0]
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert not actual[name].requires_grad
        assert actual[name].shape == value.shape
        error = relative_error(actual[name], value)
        assert error <= tolerance, f"{name}: {error:.2g}"


# --- the engine is the oracle --------------------------------------------------------------------


@pytest.mark.parametrize("orders", [(1, 2), (1, 2, 3)], ids=["compiled", "operations"])
@pytest.mark.parametrize("factory", MODELS, ids=lambda f: f.__name__)
def test_engine_equals_oracle(factory: Callable[[], nn.Module], orders: tuple[int, ...]) -> None:
    model, data = build(factory), examples()
    moments = batched_moments(model, bucketed(data, 3, PAD), orders)
    gradients = oracle(model, data)
    for order in orders:
        assert_close(moments.by_order[order], mean_powers(gradients, order))
    assert set(moments.fallback) == FALLBACK.get(factory, set())
    assert moments.examples == len(data)
    assert moments.tokens == sum(sum(t != -100 for t in e.labels) for e in data)


@pytest.mark.parametrize("compute", [batched_moments, abs_of_mean], ids=lambda f: f.__name__)
def test_high_orders_keep_their_proportions(compute: Callable[..., Moments]) -> None:
    """Powers of common gradients, 1e-3 and less, leave float32: shares would turn into 0 / 0."""
    model, data = build(llama_untied), examples()
    sets = data[: len(data) // 2], data[len(data) // 2 :]
    for order in (8.0, 16.0, 32.0):
        forget, retain = (
            compute(model, bucketed(s, 3, PAD), [order]).by_order[order] for s in sets
        )
        wanted = []
        for part in sets:
            gradients = oracle(model, part)
            if compute is abs_of_mean:
                gradients = [{n: torch.stack([g[n] for g in gradients]).mean(0) for n in forget}]
            wanted.append(mean_powers(gradients, order))
        for name in forget:
            expected = (wanted[0][name] / (wanted[0][name] + wanted[1][name])).nan_to_num(0)
            wrong = (share(forget[name], retain[name], 1.0).double() - expected).abs() > 0.01
            assert float(wrong.double().mean()) < 0.01, (order, name)


@pytest.mark.parametrize("factory", MODELS, ids=lambda f: f.__name__)
def test_order_below_one_in_float64(factory: Callable[[], nn.Module]) -> None:
    # A root magnifies the rounding of gradients near zero, so this needs more than float32.
    model, data = build(factory).double(), examples()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    moments = batched_moments(model, bucketed(data, 3, PAD), [0.5])
    expected = mean_powers(oracle(model, data), 0.5)
    assert_close(moments.by_order[0.5], expected, tolerance=1e-3)


@pytest.mark.parametrize("factory", [llama_tied, mixtral, exotic], ids=lambda f: f.__name__)
def test_example_loop_equals_oracle(factory: Callable[[], nn.Module]) -> None:
    model, data = build(factory), examples()
    moments = example_loop_moments(model, bucketed(data, 3, PAD), ORDERS[1:], dtype=torch.float64)
    gradients = oracle(model, data)
    for order in ORDERS[1:]:
        assert_close(moments.by_order[order], mean_powers(gradients, order))


@pytest.mark.parametrize("factory", [llama_tied, gpt2, qwen2_moe], ids=lambda f: f.__name__)
def test_padding_batch_size_and_order_do_not_matter(factory: Callable[[], nn.Module]) -> None:
    model, data = build(factory), examples()
    alone = batched_moments(model, [collate([e], PAD) for e in data], (1, 2))
    together = batched_moments(model, [collate(data, PAD)], (1, 2))
    reverse = batched_moments(model, [collate(data[::-1][:4], PAD), collate(data[:1], PAD)], (1, 2))
    for order in (1.0, 2.0):
        assert_close(together.by_order[order], alone.by_order[order])
        assert_close(reverse.by_order[order], alone.by_order[order])


def test_more_padding_changes_nothing() -> None:
    model, batch = build(llama_tied), collate(examples(), PAD)
    wide = Batch(
        nn.functional.pad(batch.input_ids, (0, 6), value=PAD),
        nn.functional.pad(batch.attention_mask, (0, 6), value=0),
        nn.functional.pad(batch.labels, (0, 6), value=-100),
        batch.index,
        batch.weights,
    )
    expected = batched_moments(model, [batch], [2]).by_order[2.0]
    assert_close(batched_moments(model, [wide], [2]).by_order[2.0], expected)


@pytest.mark.parametrize("factory", [llama_tied, llama_untied], ids=lambda f: f.__name__)
def test_padding_row_of_the_embedding_has_no_input_gradient(
    factory: Callable[[], nn.Module],
) -> None:
    model, data = build(factory), examples()
    table = model.get_input_embeddings()
    assert table.padding_idx == PAD
    assert all(PAD in e.input_ids[:3] for e in data)
    with_padding = batched_moments(model, [collate(data, PAD)], [2]).by_order[2.0]
    table.padding_idx = None
    without = batched_moments(model, [collate(data, PAD)], [2]).by_order[2.0]
    name = "model.embed_tokens.weight"
    assert not torch.equal(with_padding[name][PAD], without[name][PAD])
    torch.testing.assert_close(with_padding[name][3:], without[name][3:])
    if factory is llama_untied:
        assert with_padding[name][PAD].count_nonzero() == 0


@pytest.mark.parametrize(
    "factory", [llama_tied, gpt2, mixtral, shared_layers], ids=lambda f: f.__name__
)
def test_gradient_checkpointing_changes_nothing(factory: Callable[[], nn.Module]) -> None:
    model, batches = build(factory), bucketed(examples(), 3, PAD)
    plain = batched_moments(model, batches, (1, 2))
    saved = batched_moments(model, batches, (1, 2), gradient_checkpointing=True)
    for order in (1.0, 2.0):
        assert_close(saved.by_order[order], plain.by_order[order])
    assert saved.fallback == plain.fallback


def test_gradient_checkpointing_recomputes() -> None:
    model, calls = build(llama_tied), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batched_moments(model, [collate(examples(), PAD)], [2], gradient_checkpointing=True)
    assert len(calls) == 2


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = hf.LlamaConfig(**{**COMMON, "intermediate_size": 53})
    model, batches = build(lambda: hf.LlamaForCausalLM(odd)), bucketed(examples(), 3, PAD)
    whole = batched_moments(model, batches, (1, 2))
    # Blocks of a few rows, and a rest.
    monkeypatch.setattr(powers, "_CACHE_BYTES", 3 * 16 * 4 * 5)
    monkeypatch.setattr(powers, "_compiled", None)
    blocks = batched_moments(model, batches, (1, 2))
    for order in (1.0, 2.0):
        assert_close(blocks.by_order[order], whole.by_order[order], 1e-6)


compiled = pytest.mark.skipif(
    vars(powers)["_compiled"] is None,
    reason="installed without a C compiler, or no AVX2",
)


@pytest.fixture(params=["one thread", "three threads", "kernel"])
def add_product(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[powers.Means, powers.Product], None]]:
    """The ways to raise a product in registers; that of a GPU in Triton's interpreter."""
    if request.param == "kernel":
        pytest.importorskip("triton", reason="Triton is not installed")
        if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            pytest.skip("Triton's interpreter takes scalars as NumPy before 2.4 gave them")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield powers._add_product_on_gpu
        return
    if vars(powers)["_compiled"] is None:
        pytest.skip("installed without a C compiler, or no AVX2")
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else 3)
    yield powers._add_product_compiled
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("orders", [(1.0,), (2.0,), (1.0, 2.0)])
@pytest.mark.parametrize(
    ("height", "width", "segments"),
    [
        (12, 32, ((0, 5), (5, 9))),
        (1, 1, ((0, 1),)),
        (37, 23, ((0, 4), (4, 4), (6, 7), (7, 20))),
        # More than one unit of rows, one panel of columns and one group of examples.
        (215, 70, ((0, 700), (700, 1000), (1010, 2300), (2300, 2301))),
        (5, 3, ((0, 0), (0, 0))),
    ],
)
def test_powers_in_registers_equal_the_definition(
    height: int,
    width: int,
    segments: powers.Segments,
    orders: tuple[float, ...],
    add_product: Callable[[powers.Means, powers.Product], None],
) -> None:
    rows = segments[-1][1] + 2
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(rows, n, generator=generator) for n in (height, width))
    means = {order: torch.rand(height, width, generator=generator) for order in orders}
    expected = {order: mean.double() for order, mean in means.items()}
    for start, stop in segments:
        gradient = left[start:stop].double().t() @ right[start:stop].double()
        for order in orders:
            expected[order] = expected[order] + gradient.abs() ** order / len(segments)
    add_product(powers.Means(means, 1 / len(segments)), powers.Product(left, right, segments))
    for order in orders:
        assert relative_error(means[order], expected[order]) < 3e-6


def test_a_gpu_is_asked_for_its_kernel_by_type_and_with_whole_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    def add_powers(left: Tensor, right: Tensor, *_: object) -> None:
        # What is compiled for a side of one is not what layers take.
        assert left.shape[1] % 16 == right.shape[1] % 16 == 0
        if left.dtype == torch.bfloat16:
            raise RuntimeError("no such instruction")

    kernel = SimpleNamespace(add_powers=add_powers)
    monkeypatch.setitem(sys.modules, f"{gradients.__name__}._triton", kernel)
    monkeypatch.setattr(gradients, "_triton", kernel, raising=False)
    monkeypatch.setattr(powers, "warn", told.append)
    powers._has_kernel.cache_clear()
    with FakeTensorMode():
        found = [
            powers._has_kernel(torch.device("cuda", 0), t) for t in (torch.float32, torch.bfloat16)
        ]
    powers._has_kernel.cache_clear()
    powers._bounds.cache_clear()
    assert found == [True, False]
    assert told == [
        "the kernel for gradients in torch.bfloat16 cannot run on cuda:0: RuntimeError: no such "
        "instruction"
    ]


@compiled
def test_compiled_powers_take_any_factors_and_pass_nan_on() -> None:
    left = torch.randn(9, 4).t().contiguous().t().bfloat16()
    right = torch.randn(9, 6)
    right[8, 1] = torch.nan
    mean = torch.zeros(4, 6)
    means = powers.Means({2.0: mean}, 1.0)
    powers._add_product_compiled(means, powers.Product(left, right, ((0, 8), (8, 9))))
    whole = (left[:8].float().t() @ right[:8]) ** 2 + (left[8:].float().t() @ right[8:]) ** 2
    assert mean.isnan().sum() == 4
    torch.testing.assert_close(mean, whole, equal_nan=True)


@compiled
@pytest.mark.parametrize("segments", [((0, 3),), ((1, 2), (0, 1)), ((1, 0),)])
def test_compiled_powers_refuse_rows_that_do_not_exist(
    segments: powers.Segments,
) -> None:
    means = powers.Means({2.0: torch.zeros(4, 6)}, 1.0)
    product = powers.Product(torch.ones(2, 4), torch.ones(2, 6), segments)
    with pytest.raises(ValueError, match="ascend"):
        powers._add_product_compiled(means, product)


@pytest.mark.parametrize("factory", [llama_tied, gpt2, mixtral], ids=lambda f: f.__name__)
def test_route_of_accelerators_equals_route_of_cpus(
    factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = build(factory), bucketed(examples(), 3, PAD)
    cpu = batched_moments(model, batches, (0.5, 1, 2, 3))
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(powers, "_DEVICE_BYTES", 3 * 16 * 4 * 5)
    other = batched_moments(model, batches, (0.5, 1, 2, 3))
    for order, tolerance in ((0.5, 1e-3), (1.0, 1e-5), (2.0, 1e-5), (3.0, 1e-5)):
        assert_close(other.by_order[order], cpu.by_order[order], tolerance)


def test_bfloat16_is_accumulated_in_float32() -> None:
    model, batches = build(llama_untied).bfloat16(), bucketed(examples(), 3, PAD)
    fast = batched_moments(model, batches, [2]).by_order[2.0]
    slow = example_loop_moments(model, batches, [2], dtype=torch.float32).by_order[2.0]
    for name, value in slow.items():
        assert fast[name].dtype == torch.float32
        assert relative_error(fast[name], value) < 0.2, name
        # Sums kept in bfloat16 would be numbers that bfloat16 has.
        assert not torch.equal(fast[name], fast[name].bfloat16().float()), name


# --- the model is left as it was -----------------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    model = build(mixtral)
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    example_losses(model, collate(examples(), PAD)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    batched_moments(model, [collate(examples(), PAD)], [2], gradient_checkpointing=True)
    assert [m.training for m in model.modules()] == flags
    assert [set(m.__dict__) for m in model.modules()] == attributes
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name])


def test_frozen_parameters_are_left_out() -> None:
    model = build(llama_tied)
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    moments = batched_moments(model, [collate(examples(), PAD)], [2])
    assert list(moments.by_order[2.0]) == names
    assert not moments.fallback
    gradients = oracle(model, examples())
    assert_close(moments.by_order[2.0], mean_powers(gradients, 2))


# --- fallback and verification -------------------------------------------------------------------


def test_fallback_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "perta"):
        batched_moments(build(exotic), bucketed(examples(), 2, PAD), [2])
    (record,) = [r for r in caplog.records if r.name == "perta"]
    assert "model.layers.0.mlp.mix" in record.getMessage()


def test_no_line_without_fallback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "perta"):
        batched_moments(build(llama_tied), bucketed(examples(), 2, PAD), [2])
    assert not caplog.records


# --- gradients that nobody sees ------------------------------------------------------------------


class _Elsewhere(nn.Linear):
    """Reads a copy of its weight, whose gradient is put in place by hand, as FSDP2 does."""

    def forward(self, x: Tensor) -> Tensor:
        copy_ = self.weight.detach().requires_grad_()

        def hand_over(gradient: Tensor) -> None:
            self.weight.grad = gradient.clone()

        copy_.register_hook(hand_over)
        return x @ copy_.t()


@pytest.mark.parametrize("route", [batched_moments, example_loop_moments, abs_of_mean])
def test_a_gradient_that_nobody_sees_is_not_taken_for_zero(route: Callable[..., object]) -> None:
    model: Any = build(llama_untied)
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = _Elsewhere(down.in_features, down.out_features, False)
    with pytest.raises(
        EngineMismatchError, match=r"layers\.1\.mlp\.down_proj\.weight was recorded"
    ):
        route(model, bucketed(examples(), 2, PAD), [1])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("route", [batched_moments, example_loop_moments, abs_of_mean])
def test_what_the_model_does_not_use_has_no_importance(route: Callable[..., Moments]) -> None:
    model: Any = build(llama_tied)
    model.model.unused = nn.Linear(3, 3)
    model.lm_head.weight.grad = before = torch.ones_like(model.lm_head.weight)
    found = route(model, bucketed(examples(), 2, PAD), [1]).by_order[1]
    assert not found["model.unused.weight"].any()
    assert found["model.embed_tokens.weight"].any()
    assert model.lm_head.weight.grad is before


# --- the power of the mean -----------------------------------------------------------------------


def test_abs_of_mean_is_its_own_quantity() -> None:
    model, data = build(llama_tied), examples()
    gradients = oracle(model, data)
    mean = {n: torch.stack([g[n] for g in gradients]).mean(0) for n in gradients[0]}
    moments = abs_of_mean(model, bucketed(data, 2, PAD), (1, 2))
    for order in (1, 2):
        assert_close(moments.by_order[order], {n: m.abs() ** order for n, m in mean.items()})
        per = mean_powers(gradients, order)
        assert all(relative_error(moments.by_order[order][n], per[n]) > 0.05 for n in per)
    assert moments.examples == len(data)


# --- what a caller can get wrong -----------------------------------------------------------------

ROUTES = [batched_moments, example_loop_moments, abs_of_mean]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("order", [0.0, -1.0, float("inf"), float("nan")])
def test_orders_are_positive(route: Callable[..., object], order: float) -> None:
    with pytest.raises(ConfigError, match="order"):
        route(build(llama_tied), [collate(examples(), PAD)], [order])


@pytest.mark.parametrize("route", ROUTES)
def test_no_examples(route: Callable[..., object]) -> None:
    with pytest.raises(EmptyDatasetError):
        route(build(llama_tied), [], [1])


@pytest.mark.parametrize("route", ROUTES)
def test_example_without_loss(route: Callable[..., object]) -> None:
    silent = Encoded((4, 5, 6), (4, -100, -100), 3)  # nothing predicts the first token
    with pytest.raises(DataError, match="example 5"):
        route(build(llama_tied), [collate([*examples(), silent], PAD)], [1])


@pytest.mark.parametrize("route", ROUTES)
def test_progress_counts_examples(route: Callable[..., object]) -> None:
    seen: list[int] = []
    route(build(llama_tied), bucketed(examples(), 2, PAD), [1], progress=seen.append)
    assert seen == ([1] * 5 if route is example_loop_moments else [2, 2, 1])


def test_means_start_at_zero_in_the_order_and_precision_of_the_parameters() -> None:
    parameters = {
        "a": nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)),
        "b": nn.Parameter(torch.ones(4, dtype=torch.float64)),
        "c": nn.Parameter(torch.ones(5)),
    }
    zeros = _zeros_like(parameters)
    assert list(zeros) == ["a", "b", "c"]
    for name, dtype in (("a", torch.float32), ("b", torch.float64), ("c", torch.float32)):
        assert torch.equal(zeros[name], torch.zeros(parameters[name].shape, dtype=dtype))
        assert zeros[name].dtype == dtype


def test_rows_of_an_embedding_are_added_in_one_order_whatever_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, 64, generator=generator)
    ids, example = (torch.randint(0, 3, (20_000,), generator=generator) for _ in range(2))
    rows = powers.Rows(ids, values, example)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = set()
        for _ in range(20):
            means = powers.Means({1.0: torch.zeros(3, 64)}, 1.0)
            powers.add_pieces(means, [rows])
            seen.add(means.any.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
    expected = torch.zeros(3 * 3, 64, dtype=torch.float64)
    for key, value in zip((example * 3 + ids).tolist(), values.double(), strict=True):
        expected[key] += value
    found = torch.frombuffer(bytearray(seen.pop()), dtype=torch.float32).view(3, 64)
    torch.testing.assert_close(
        found.double(), expected.view(3, 3, 64).abs().sum(0), rtol=1e-4, atol=1e-3
    )
