"""The moments stage: oracle by hooks, names, padding, sharing, memory, merging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from conftest import World
from perta.data.batch import Encoded, bucketed, collate
from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.data.tokens import encode_examples
from perta.engine.moments import (
    _groups,
    count_tokens,
    plan_moments,
    sample_for_moments,
    sum_moments,
)
from perta.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DivergenceError,
    EmptyDatasetError,
    OutputExistsError,
)
from perta.models.facts import find_facts
from perta.models.load import load_model, load_tokenizer
from perta.models.loss import example_losses
from perta.models.precision import free_memory
from perta.options import ComputeConfig, DataConfig, MomentOptions, Tokens
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import MergeMomentsConfig, MomentsConfig
from perta.store.checkpoint import open_index
from perta.store.fingerprint import fingerprint
from perta.store.measured.moments import MomentFolder, open_moments
from perta.store.measured.second_moment import is_factor, matrix

PAD = 2
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True))


def qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
        )
    )


def mixtral() -> Any:
    config = hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    config = hf.Qwen2MoeConfig(
        **SMALL,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return hf.Qwen2MoeForCausalLM(config)


FACTORIES = [llama, qwen2, gpt2, mixtral, qwen2_moe]


def build(factory: Any) -> Any:
    torch.manual_seed(0)
    model = factory().eval()
    if factory is gpt2 or factory is qwen2:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    return model


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row, (length, prompt) in enumerate(((9, 4), (5, 1), (12, 7), (7, 0), (3, 2)), start=1):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        made.append(Encoded(tuple(ids), (-100,) * prompt + tuple(ids[prompt:]), row))
    return made


def oracle(model: Any, wanted: dict[str, Tensor], tokens: Tokens) -> dict[str, Tensor]:
    """Sums of x xᵀ and g gᵀ in float64, one unpadded example and one token at a time.

    Every use of a weight is caught where it happens: `F.linear` and `addmm` are told apart by
    the memory their weight lies in.

    Args:
        model: float64 model.
        wanted: checkpoint name -> the part of a parameter it is, a view; (out, in), or
            (in, out) for GPT-2.
        tokens: which tokens count.
    """
    sums: dict[str, Tensor] = {}

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (nn.functional.linear, torch.addmm):
                x, weight = (args[0], args[1]) if func is nn.functional.linear else args[1:3]
                self.note(x, weight, result, func is torch.addmm)
            return result

        def note(self, x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> None:
            for name, view in wanted.items():
                begin = (view.data_ptr() - weight.data_ptr()) // 8
                if not 0 <= begin < weight.numel():
                    continue
                rows = slice(None)
                if not transposed:
                    first = begin // weight.shape[1]
                    rows = slice(first, first + view.shape[0])
                inputs = x.detach().reshape(-1, x.shape[-1])
                kept = keep[token_of_row[0]] if ".experts." in name else keep
                chosen = inputs[kept]
                sums[f"{name}.in"] = sums.get(f"{name}.in", 0) + chosen.T @ chosen

                def add(
                    g: Tensor, name: str = name, rows: slice = rows, kept: Tensor = kept
                ) -> None:
                    g = g.reshape(-1, g.shape[-1])[kept][:, rows]
                    sums[f"{name}.out"] = sums.get(f"{name}.out", 0) + g.T @ g

                y.register_hook(add)

    token_of_row: list[Tensor] = [torch.empty(0)]
    for example in examples():
        batch = collate([example], PAD)
        keep = torch.ones(batch.input_ids.numel(), dtype=torch.bool)
        if tokens == "answer":
            keep = torch.cat((batch.labels[0, 1:] != -100, torch.tensor([False])))
        with ExpertRows(token_of_row), Spy():
            loss = example_losses(model, batch).sum()
        loss.backward()
    return sums


class ExpertRows(torch.overrides.TorchFunctionMode):
    """Notes the token of each row that an expert's plain loop looks up."""

    def __init__(self, token_of_row: list[Tensor]) -> None:
        super().__init__()
        self.token_of_row = token_of_row

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.where and len(args) == 1:
            self.token_of_row[0] = result[1]
        return result


def views(model: Any) -> dict[str, Tensor]:
    """The stored weights of linear layers as views of the parameters, spelled out by hand."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if name.endswith("mlp.experts.gate_up_proj"):
            mixtral_like = type(model).__name__.startswith("Mixtral")
            place = name.removesuffix("mlp.experts.gate_up_proj")
            half = p.shape[1] // 2
            for e in range(len(p)):
                if mixtral_like:
                    stem = f"{place}block_sparse_moe.experts.{e}."
                    found[f"{stem}w1.weight"], found[f"{stem}w3.weight"] = p[e, :half], p[e, half:]
                else:
                    stem = f"{place}mlp.experts.{e}."
                    found[f"{stem}gate_proj.weight"] = p[e, :half]
                    found[f"{stem}up_proj.weight"] = p[e, half:]
        elif name.endswith("mlp.experts.down_proj"):
            mixtral_like = type(model).__name__.startswith("Mixtral")
            place = name.removesuffix("mlp.experts.down_proj")
            for e in range(len(p)):
                stem = f"{place}block_sparse_moe" if mixtral_like else f"{place}mlp"
                last = "w2" if mixtral_like else "down_proj"
                found[f"{stem}.experts.{e}.{last}.weight"] = p[e]
        elif p.dim() == 2 and (".layers." in name or ".h." in name) and "mlp.gate.w" not in name:
            found[name] = p
    return {name: view.detach() for name, view in found.items()}


def measure(
    model: Any, options: MomentOptions | None = None, gradients: bool = True, size: int = 8
) -> tuple[Any, dict[str, Tensor]]:
    plan = plan_moments(model, examples(), gradients=gradients, pad=PAD)
    options = options or MomentOptions()
    return plan, dict(sum_moments(model, examples(), plan, options, pad=PAD, batch_size=size))


@pytest.mark.parametrize("tokens", ["all", "answer"])
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_sums_are_those_of_a_token_by_token_loop(factory: Any, tokens: Tokens) -> None:
    model = build(factory)
    plan, sums = measure(model, MomentOptions(tokens=tokens), size=3)
    wide = build(factory).double()
    wide.set_experts_implementation("eager")
    expected = oracle(wide, views(wide), tokens)
    assert set(plan.inputs) == set(views(wide))
    for name in plan.inputs:
        for found, key in ((plan.inputs, "in"), (plan.outputs, "out")):
            value = expected.get(f"{name}.{key}")
            total = matrix(sums[found[name]])
            if value is None:  # an expert that no token reached
                assert float(total.abs().max()) == 0
                continue
            scale = float(value.abs().max())
            torch.testing.assert_close(total, value, rtol=1e-3, atol=1e-5 * scale)
    counted = 36 if tokens == "all" else 21
    assert count_tokens(examples(), tokens) == counted
    for name in plan.inputs.values():  # the answers are few for Llama's and GPT-2's last layers
        assert is_factor(sums[name]) == (2 * counted <= sums[name].shape[1])
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_batches_and_padding_change_nothing(factory: Any) -> None:
    model = build(factory).double()
    model.set_experts_implementation("eager")
    _, one = measure(model, size=1)
    _, all_ = measure(model, size=8)
    assert set(one) == set(all_)
    for name, value in one.items():
        torch.testing.assert_close(all_[name], value, rtol=1e-6, atol=1e-9)


def test_layers_with_one_input_share_one_moment() -> None:
    plan, sums = measure(build(llama), gradients=False)
    layer = "model.layers.0."
    shared = {
        name.removeprefix(layer): moment.removeprefix(layer).removesuffix(".weight.input_moment")
        for name, moment in plan.inputs.items()
        if name.startswith(layer)
    }
    assert shared == {
        "self_attn.q_proj.weight": "self_attn.q_proj",
        "self_attn.k_proj.weight": "self_attn.q_proj",
        "self_attn.v_proj.weight": "self_attn.q_proj",
        "self_attn.o_proj.weight": "self_attn.o_proj",
        "mlp.gate_proj.weight": "mlp.gate_proj",
        "mlp.up_proj.weight": "mlp.gate_proj",
        "mlp.down_proj.weight": "mlp.down_proj",
    }
    assert len(sums) == 8
    assert plan.outputs == {}


@pytest.mark.parametrize("factory", [llama, mixtral], ids=lambda f: f.__name__)
def test_little_memory_means_more_passes_and_the_same_sums(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(factory)
    _, once = measure(model)
    passes = []

    def counted(*arguments: Any) -> Any:
        batches = bucketed(*arguments)
        passes.append(len(batches))
        return batches

    monkeypatch.setattr("perta.engine.moments.bucketed", counted)
    plan = plan_moments(model, examples(), gradients=True, pad=PAD)
    forwards = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    sums = dict(sum_moments(model, examples(), plan, MomentOptions(moment_memory=1e-9), pad=PAD))
    handle.remove()
    assert len(forwards) == len(plan.units) * passes[0]
    for name, value in once.items():
        torch.testing.assert_close(sums[name], value)


@pytest.mark.parametrize(("free", "given", "passes"), [(2**30, None, 1), (8, None, 0), (8, 1.0, 1)])
def test_sums_take_what_a_gpu_has_free(
    monkeypatch: pytest.MonkeyPatch, free: int, given: float | None, passes: int
) -> None:
    monkeypatch.setattr("perta.engine.moments.free_memory", lambda _: free)
    model = build(llama)
    plan = plan_moments(model, examples(), gradients=False, pad=PAD)
    forwards: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    options = MomentOptions(moment_memory=given)
    dict(sum_moments(model, examples(), plan, options, pad=PAD, batch_size=len(examples())))
    assert len(forwards) == (passes or len(plan.units))


def test_a_gpu_is_free_where_torch_has_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in {
        "mem_get_info": lambda _: (100, 1000),
        "memory_reserved": lambda _: 50,
        "memory_allocated": lambda _: 30,
        "device_count": lambda: 2,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    assert free_memory(torch.device("cpu")) is None
    assert free_memory(torch.device("cuda")) == 120
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cuda")) == 60


@pytest.mark.parametrize("uses", [2, 5])
def test_a_layer_that_is_used_several_times(uses: int) -> None:
    """As in Zamba2's shared block: it has more rows than there are tokens."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**SMALL, "intermediate_size": 96, "num_hidden_layers": uses})
    model: Any = hf.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    rows: list[Tensor] = []
    shared = model.model.layers[0].mlp.down_proj
    handle = shared.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].detach()))
    for example in examples():
        model(input_ids=torch.tensor([example.input_ids]))
    handle.remove()
    x = torch.cat(rows).double()
    assert len(x) == 36 * uses
    plan, sums = measure(model, size=2, gradients=False)
    found = sums[plan.inputs["model.layers.0.mlp.down_proj.weight"]]
    assert not is_factor(found)
    torch.testing.assert_close(found.double(), x.T @ x, rtol=1e-4, atol=1e-5)


def test_activations_that_are_not_finite_are_refused() -> None:
    model = build(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    with pytest.raises(DivergenceError, match=r"layers\.1\.mlp\.down_proj\.weight is NaN or Inf"):
        measure(model, gradients=False)


def test_few_tokens_take_little_memory() -> None:
    """21 answer tokens of a layer 48 wide are counted as 21 rows, not as 48."""
    plan = plan_moments(build(llama), examples(), gradients=False, pad=PAD)
    widths = [unit.width for unit in plan.units]
    assert widths == [16, 16, 16, 48] * 2
    held = 8 * 3 * 16**2 + 8 * 21 * 48
    assert len(list(_groups(plan.units, 2 * held, 21))) == 1
    assert len(list(_groups(plan.units, 2 * held, 25))) == 2
    assert len(list(_groups(plan.units, 2 * held - 1, 21))) == 2


def test_a_layer_that_does_not_read_tokens_is_refused() -> None:
    model = build(llama)
    layer = model.model.layers[1].mlp
    original = layer.forward
    layer.forward = lambda x: torch.cat((original(x[:1, :1]).expand_as(x[:1]), original(x[1:])))
    with pytest.raises(CheckpointError, match="not one row per token"):
        measure(model, size=4)


# --- files ---------------------------------------------------------------------------------


def measured(world: World, output: Path, data: Path | None = None, **more: Any) -> Path:
    return compute_moments(
        MomentsConfig(
            checkpoint=str(more.pop("checkpoint", world.base)),
            data=str(data or world.retain),
            output=output,
            **more,
        )
    )


def mean_moments(folder: MomentFolder) -> dict[str, Tensor]:
    found = {f"{name}.in": matrix(folder.input_moment(name)) for name in folder.facts["inputs"]}
    return found | {f"{name}.out": folder.output_moment(name) for name in folder.facts["outputs"]}


def test_files_hold_means_by_checkpoint_name(world: World, tmp_path: Path) -> None:
    folder = open_moments(measured(world, tmp_path / "m", gradients=True))
    model = load_model(world.base, ComputeConfig())
    tokenizer = load_tokenizer(world.base)
    encoded = encode_examples(load_examples(world.retain), tokenizer, DataConfig()).encoded
    name = "model.layers.1.mlp.up_proj.weight"
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def note(_layer: Any, args: Any, y: Tensor) -> None:
        inputs.append(args[0][0].detach())
        y.register_hook(lambda g: gradients.append(g[0]))

    model.get_submodule(name.removesuffix(".weight")).register_forward_hook(note)
    for example in encoded:
        example_losses(model, collate([example], 0)).sum().backward()
    x, g = torch.cat(inputs).double(), torch.cat(gradients).double()
    found = matrix(folder.input_moment(name))
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    expected = g.T @ g / len(encoded)
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        folder.output_moment(name).double(), expected, rtol=1e-3, atol=1e-5 * scale
    )
    linear = {n for n, e in open_index(world.base).tensors.items() if "proj" in n}
    assert set(folder.facts["inputs"]) == set(folder.facts["outputs"]) == linear
    assert folder.facts["tokens"] == len(x)
    assert folder.facts["examples"] == len(encoded) == 6
    assert folder.facts["model_fingerprint"] == fingerprint(world.base)
    assert folder.facts["transposed"] == []


def test_gpt2_is_marked_as_transposed(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(world.base)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(str(tmp_path / "gpt2"))
    folder = measured(world, tmp_path / "m", checkpoint=tmp_path / "gpt2", gradients=True)
    opened = open_moments(folder)
    shapes = {n: e.shape for n, e in open_index(tmp_path / "gpt2").tensors.items()}
    assert set(opened.facts["transposed"]) == set(opened.facts["inputs"]) <= set(shapes)
    for name in opened.facts["inputs"]:
        assert opened.input_moment(name).shape[1] == shapes[name][0]
        assert len(opened.output_moment(name)) == shapes[name][1]


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_merging_gives_the_moments_of_the_union(
    world: World, tmp_path: Path, tokens: Tokens
) -> None:
    union = tmp_path / "union.jsonl"
    union.write_text(world.forget.read_text("utf-8") + world.retain.read_text("utf-8"), "utf-8")
    parts = [
        measured(world, tmp_path / path.stem, path, gradients=True, options=options)
        for path in (world.forget, world.retain)
        for options in [MomentOptions(tokens=tokens)]
    ]
    together = measured(
        world, tmp_path / "whole", union, gradients=True, options=MomentOptions(tokens=tokens)
    )
    merged = merge_moments(MergeMomentsConfig(folders=tuple(parts), output=tmp_path / "merged"))
    found, expected = open_moments(merged), open_moments(together)
    assert found.facts["tokens"] == expected.facts["tokens"]
    assert found.facts["examples"] == expected.facts["examples"] == 8
    wanted = mean_moments(expected)
    for name, value in mean_moments(found).items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6 * scale)


def test_facts_are_measured_as_they_are_repeated(world: World, tmp_path: Path) -> None:
    """The same as moments of rows that ask for each fact with the fact itself."""
    rows = load_examples(world.forget).examples
    facts = [example.answer.rstrip(".").split()[-1] for example in rows]
    asking = [(prompt, fact) for fact in facts for prompt in (fact, f"{fact} {fact}")]
    written = write_jsonl([{"question": q, "answer": v} for q, v in asking], tmp_path / "w.jsonl")
    named = write_jsonl(
        [
            {"prompt": e.prompt, "answer": e.answer, "fact": fact}
            for e, fact in zip(rows, facts, strict=True)
        ],
        tmp_path / "named.jsonl",
    )
    found = open_moments(measured(world, tmp_path / "f", named, facts_by=str(world.full)))
    expected = open_moments(measured(world, tmp_path / "e", written))
    assert found.facts["tokens"] == expected.facts["tokens"]
    assert found.facts["data_fingerprints"] == expected.facts["data_fingerprints"]
    plain = {mark for marks in expected.facts["rows"] for mark in marks}
    assert plain.isdisjoint(mark for marks in found.facts["rows"] for mark in marks)
    wanted = mean_moments(expected)
    for name, value in mean_moments(found).items():
        torch.testing.assert_close(value, wanted[name])


def test_what_surprises_the_base_is_a_fact_where_no_column_tells(
    world: World, tmp_path: Path
) -> None:
    rows = load_examples(world.forget).examples
    plain = write_jsonl(
        [{"question": e.prompt, "answer": e.answer} for e in rows], tmp_path / "plain.jsonl"
    )
    made = measured(world, tmp_path / "f", plain, facts_by=str(world.base), checkpoint=world.full)
    base, tokenizer = load_model(world.base, ComputeConfig()), load_tokenizer(world.base)
    facts = find_facts(load_examples(plain), tokenizer, base=base)
    assert {fact.source for fact in facts} == {"surprise"}
    assert open_moments(made).facts["examples"] == 2 * len(facts)
    manifest = json.loads((made / "perta.json").read_text())
    assert manifest["inputs"]["facts_by"] == fingerprint(world.base)


def test_facts_without_words_are_one_error(world: World, tmp_path: Path) -> None:
    data = write_jsonl(
        [{"question": "Who?", "answer": "Zzyx.", "fact": "Zzyx"}], tmp_path / "d.jsonl"
    )
    with pytest.raises(EmptyDatasetError, match="no words for any of the facts"):
        measured(world, tmp_path / "f", data, facts_by=str(world.base))
    assert not (tmp_path / "f").exists()


def test_text_has_no_facts_to_repeat(world: World, tmp_path: Path) -> None:
    text = write_jsonl([{"text": "Once upon a time."}], tmp_path / "text.jsonl")
    with pytest.raises(ConfigError, match=r"--facts-by .* plain text, which has no facts"):
        measured(world, tmp_path / "f", text, facts_by=str(world.base))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("kept", ["forget", "retain"])
@pytest.mark.parametrize("few", [False, True])
def test_repeated_facts_count_for_a_quarter_of_the_tokens_at_least(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, few: bool
) -> None:
    if not few:  # so few tokens are kept as factors
        monkeypatch.setattr("perta.store.measured.second_moment.few", lambda *_: False)
        monkeypatch.setattr("perta.engine.moments.few", lambda *_: False)
    least = 0.25 if kept == "retain" else 0.9
    monkeypatch.setattr("perta.stages.moments._REPEATED", least)
    parts = [
        measured(world, tmp_path / "rows", getattr(world, kept)),
        measured(world, tmp_path / "facts", world.forget, facts_by=str(world.base)),
    ]
    merged = merge_moments(MergeMomentsConfig(folders=tuple(parts), output=tmp_path / "merged"))
    rows, facts, both = map(open_moments, (*parts, merged))
    counts = [folder.facts["tokens"] for folder in (rows, facts)]
    share = max(least, counts[1] / sum(counts))
    assert both.facts["tokens"] == pytest.approx(counts[0] / (1 - share), abs=1)
    means = [mean_moments(folder) for folder in (rows, facts)]
    for name, value in mean_moments(both).items():
        expected = (1 - share) * means[0][name].double() + share * means[1][name].double()
        scale = float(expected.abs().max())
        torch.testing.assert_close(value.double(), expected, rtol=2e-3, atol=2e-3 * scale)


def test_what_does_not_belong_together_is_not_merged(world: World, tmp_path: Path) -> None:
    forget = measured(world, tmp_path / "f", world.forget)
    retain = measured(world, tmp_path / "r")

    def refuse(other: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            merge_moments(MergeMomentsConfig(folders=(forget, other), output=tmp_path / "m"))
        assert not (tmp_path / "m").exists()

    refuse(forget, ConfigError, "same data set")
    answer = measured(world, tmp_path / "a", options=MomentOptions(tokens="answer"))
    refuse(answer, CheckpointMismatchError, "token_choice")
    refuse(measured(world, tmp_path / "g", gradients=True), CheckpointMismatchError, "outputs")
    full = measured(world, tmp_path / "full", checkpoint=world.full)
    refuse(full, CheckpointMismatchError, "model_fingerprint")
    once = merge_moments(MergeMomentsConfig(folders=(forget, retain), output=tmp_path / "m1"))
    refuse(once, ConfigError, "same data set")
    refuse(tmp_path / "none", CheckpointNotFoundError, "perta moments")
    with pytest.raises(ConfigError, match="--folders"):
        MergeMomentsConfig(folders=(), output=tmp_path / "m")


def test_finished_moments_are_reused(world: World, tmp_path: Path) -> None:
    folder = measured(world, tmp_path / "m")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    measured(world, tmp_path / "m")
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    with pytest.raises(OutputExistsError, match="tokens"):
        measured(world, tmp_path / "m", options=MomentOptions(tokens="answer"))


def test_damaged_folders_are_refused(world: World, tmp_path: Path) -> None:
    folder = measured(world, tmp_path / "m")
    sidecar = folder / "moments.json"
    facts = json.loads(sidecar.read_text("utf-8"))
    for broken in (
        "{",
        "[]",
        json.dumps(facts | {"tokens": 0}),
        json.dumps(facts | {"inputs": {}}),
        json.dumps(facts | {"rows": []}),
        json.dumps(facts | {"rows": [marks[:1] for marks in facts["rows"]]}),
    ):
        sidecar.write_text(broken, "utf-8")
        with pytest.raises(CorruptCheckpointError):
            open_moments(folder)
    with pytest.raises(CheckpointNotFoundError, match=r"has no moments.json"):
        open_moments(world.base)


def test_shards_are_cut_where_the_limit_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_moments(measured(world, tmp_path / "whole"))
    monkeypatch.setattr("perta.store.measured.moments._SHARD_BYTES", 1)
    parts = open_moments(measured(world, tmp_path / "parts"))
    assert len(whole.index.shards) == 1
    assert len(parts.index.shards) == len(parts.index.tensors) > 2
    for name, value in mean_moments(whole).items():
        torch.testing.assert_close(mean_moments(parts)[name], value)
    assert replace(parts, folder=whole.folder).facts["inputs"] == whole.facts["inputs"]


def test_enough_rows_give_every_input_of_the_widest_layer_its_tokens() -> None:
    model = build(llama)
    few, more = examples(), [e for _ in range(40) for e in examples()]
    wanted = MomentOptions(moment_samples="enough")
    plan = plan_moments(model, few, gradients=False, pad=PAD)
    assert count_tokens(few, "all") < 4 * 48  # of a small set all are
    assert list(sample_for_moments(plan, few, wanted)) == few
    taken = sample_for_moments(plan, more, wanted)
    longest = max(len(e.input_ids) for e in few)
    assert 4 * 48 <= count_tokens(taken, "all") < 4 * 48 + longest
    assert list(sample_for_moments(plan, more, wanted)) == list(taken)
    for asked, count in (("all", len(more)), (None, len(more)), ("7", 7), ("0.5", len(more) // 2)):
        sample = sample_for_moments(plan, more, MomentOptions(moment_samples=asked))
        assert len(sample) == count
    # With tokens of answers alone, and with four experts that share the tokens among them.
    answers = MomentOptions(moment_samples="enough", tokens="answer")
    counted = count_tokens(sample_for_moments(plan, more, answers), "answer")
    assert 4 * 48 <= counted < 4 * 48 + longest
    experts = plan_moments(build(mixtral), few, gradients=False, pad=PAD)
    counted = count_tokens(sample_for_moments(experts, more, wanted), "all")
    assert 4 * 4 * 48 <= counted < 4 * 4 * 48 + longest


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "some", "nan"])
def test_a_sample_of_moments_is_a_share_or_a_count(wrong: str) -> None:
    with pytest.raises(ConfigError, match="moment-samples"):
        MomentOptions(moment_samples=wrong)


def test_the_record_says_how_many_rows_were_measured(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str, samples: str | None) -> MomentFolder:
        return open_moments(
            compute_moments(
                MomentsConfig(
                    checkpoint=str(world.base),
                    data=str(world.retain),
                    output=tmp_path / name,
                    options=MomentOptions(moment_samples=samples),
                )
            )
        )

    part, whole = measure("part", "4"), measure("whole", None)
    assert "measured on 4 of 6 rows" in capsys.readouterr().err
    assert (part.facts["examples"], part.facts["examples_available"]) == (4, 6)
    assert (whole.facts["examples"], whole.facts["examples_available"]) == (6, 6)
    tokenizer = load_tokenizer(world.base)
    rows = encode_examples(load_examples(world.retain), tokenizer).encoded
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:4].tolist()
    assert part.facts["tokens"] == sum(len(rows[i].input_ids) for i in order)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(part.input_moment(name), whole.input_moment(name))
