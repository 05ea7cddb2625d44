"""bfloat16 products: where they are taken, what they are of, and that records say so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import TUNE, World
from perta.data.batch import IGNORE, Encoded, collate
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.gradients.engine import batched_moments
from perta.engine.moments import plan_moments, sum_moments
from perta.engine.train.optimizer import Resume
from perta.engine.train.tune import tune
from perta.engine.train.unlearn import unlearn_by_training
from perta.models import precision
from perta.models.demo.tiny import tiny_llama
from perta.models.load import load_model, load_tokenizer, pick_device, picked
from perta.models.loss import losses_of
from perta.models.precision import product_type, products_in, wide_product
from perta.options import ComputeConfig, DataConfig, MomentOptions, TrainSettings
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import FinetuneConfig, ImportanceConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NARROW = ComputeConfig(device="cpu", dtype="bfloat16")


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with units for bfloat16, as far as anybody asks."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(precision, "_WIDE", 64)


def rows_of(world: World) -> tuple[Encoded, ...]:
    return encode_examples(
        load_examples(world.forget), load_tokenizer(world.base), DataConfig()
    ).encoded


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# --- which type ----------------------------------------------------------------------------------


def test_the_processor_decides_and_not_its_being_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_type("auto", CPU, 576) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert product_type("auto", CPU, 576) == torch.bfloat16
    assert product_type("auto", CPU, None) == torch.bfloat16
    assert product_type("float32", CPU, 576) == torch.float32
    assert product_type("auto", torch.device("mps"), 576) == torch.float32


def test_a_small_model_is_measured_exactly_on_every_cpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert product_type("auto", CPU, 255) == torch.float32
    assert product_type("bfloat16", CPU, 255) == torch.bfloat16
    compute = ComputeConfig(device="cpu")
    assert load_model(world.base, compute).dtype == torch.float32
    assert picked(compute, world.base)["dtype"] == "float32"


@pytest.mark.parametrize("has_units", [False, True])
def test_a_gpu_is_asked_as_well(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_units)
    assert product_type("auto", CUDA, 64) == (torch.bfloat16 if has_units else torch.float32)
    assert product_type("float32", CUDA, 64) == torch.float32


# --- products ------------------------------------------------------------------------------------


def test_products_of_bfloat16_numbers_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 300, 40, generator=generator).bfloat16()
    exact = rows.double().mT @ rows.double()
    found = wide_product(rows.mT, rows, torch.float32)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


def test_too_little_memory_is_no_reason_to_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "bmm", fails)
    factor = cast(Tensor, SimpleNamespace(dtype=torch.bfloat16, is_cuda=True))
    with pytest.raises(torch.OutOfMemoryError):
        wide_product(factor, factor, torch.float32)


def test_attention_over_few_tokens_keeps_float32_where_it_is_learned_through() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with products_in(torch.bfloat16, CPU):
        learned = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        linear = F.linear(v, k[0, 0])
        with torch.no_grad():
            measured = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (learned - exact).abs().max() < 1e-6
    assert linear.dtype == measured.dtype == torch.bfloat16


def test_layers_of_one_input_share_its_narrow_copy_until_it_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, 3, generator=generator) for _ in range(2))
    x.requires_grad_()
    copies: list[Tensor] = []
    weight.requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        copies.append(tensor)
        return tensor

    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with kept, products_in(torch.bfloat16, CPU):
        first, second = (F.linear(x, weight) for _ in range(2))
        places = {t.data_ptr() for t in copies if torch.equal(t, x.bfloat16())}
        with torch.no_grad():
            x.mul_(2)
        third = F.linear(x, weight)
    assert len(places) == 1
    assert torch.equal(first, second)
    assert torch.equal(third, 2 * first)
    (first + second).float().sum().backward()
    exact = 2 * weight.detach().bfloat16().double().sum(0).expand(3, 3)
    assert x.grad is not None
    assert (x.grad - exact).abs().max() <= 2**-7 * exact.abs().max()


# --- weights -------------------------------------------------------------------------------------


def test_a_step_smaller_than_the_rounding_is_not_lost(world: World, tmp_path: Path) -> None:
    model = load_model(world.base, ComputeConfig())
    before = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
    up = {n: torch.nextafter(w, w.new_tensor(torch.inf)).float() for n, w in before.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name].float().lerp(up[name], 0.25))
    model.save_pretrained(tmp_path / "edited")
    load_tokenizer(world.base).save_pretrained(str(tmp_path / "edited"))
    found = load_model(tmp_path / "edited", NARROW)
    moved = [(p != before[n]).flatten() for n, p in found.named_parameters()]
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert torch.cat(moved).double().mean() == pytest.approx(0.25, abs=0.02)
    # Frequencies of rotary positions are no weights.
    assert {b.dtype for b in found.buffers()} == {torch.float32}


# --- stages --------------------------------------------------------------------------------------


def test_tuning_in_bfloat16_takes_nearly_the_same_step(world: World) -> None:
    rows, steps = rows_of(world), []
    for dtype, checkpointing in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = load_model(world.base, ComputeConfig(device="cpu", dtype="float32"))
        start, seen = flat(model), set[torch.dtype]()
        hook = model.get_output_embeddings().register_forward_hook(
            lambda _module, _args, output, seen=seen: seen.add(output.dtype)
        )
        config = replace(TUNE, epochs=3, gradient_checkpointing=checkpointing)
        done, tuned = tune(model, rows, config, pad=0, dtype=cast(Any, dtype))
        hook.remove()
        products = getattr(torch, dtype)
        assert seen == {products}
        with products_in(products, done.device):
            assert tuned.final_losses == tuple(losses_of(done, rows, batch_size=16, pad=0))
        assert {p.dtype for p in done.parameters()} == {torch.float32}
        steps.append(flat(done) - start)
    exact, narrow, recomputed = steps
    assert torch.cosine_similarity(exact, narrow, dim=0) > 0.98
    assert not torch.equal(exact, narrow)
    assert torch.equal(narrow, recomputed)


@pytest.mark.parametrize("method", ["npo", "rmu", "undial"])
def test_training_methods_in_bfloat16(world: World, method: str) -> None:
    rows, steps, terms = rows_of(world), [], []
    settings = TrainSettings(epochs=2, learning_rate=1e-3, accumulation=1, batch_size=2)
    for dtype in ("float32", "bfloat16"):
        model = load_model(world.full, ComputeConfig(device="cpu", dtype="float32"))
        start = flat(model)
        sets = (rows[:2], rows[:2])
        done, trained = unlearn_by_training(
            model, *sets, settings, method=method, pad=0, dtype=cast(Any, dtype)
        )
        steps.append(flat(done) - start)
        terms.append(trained.forget_terms)
    assert terms[1] == pytest.approx(terms[0], rel=0.02)
    assert not torch.equal(*steps)


def test_moments_in_bfloat16_are_those_of_float32_but_for_rounding(world: World) -> None:
    rows = rows_of(world)
    found = []
    for compute in (ComputeConfig(device="cpu"), NARROW):
        model = load_model(world.base, compute)
        plan = plan_moments(model, rows, gradients=True, pad=0)
        found.append(dict(sum_moments(model, rows, plan, MomentOptions(), pad=0)))
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        if len(exact) == exact.shape[1]:
            assert (found[1][name] - exact).norm() < 0.03 * exact.norm(), name


def test_rows_that_wait_for_their_product_are_all_in_the_moment(world: World) -> None:
    rows, found = rows_of(world) * 25, []
    for compute in (ComputeConfig(device="cpu"), NARROW):
        model = load_model(world.base, compute)
        plan = plan_moments(model, rows, gradients=False, pad=0)
        found.append(dict(sum_moments(model, rows, plan, MomentOptions(), pad=0)))
    # More rows than are multiplied at once, and some that are left over.
    assert sum(len(row.input_ids) for row in rows) > 1024
    for name, exact in found[0].items():
        assert found[1][name].trace() == pytest.approx(float(exact.trace()), rel=1e-2), name


@pytest.mark.usefixtures("units")
def test_records_and_keys_say_which_type(world: World, tmp_path: Path) -> None:
    def record(folder: Path) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads((folder / "perta.json").read_text()))

    places = {"data": str(world.forget), "data_config": DataConfig()}
    tuned: dict[str, dict[str, Any]] = {}
    for dtype in ("auto", "float32", "bfloat16"):
        compute = ComputeConfig(device="cpu", dtype=cast(Any, dtype))
        config = FinetuneConfig(
            base=str(world.base),
            output=tmp_path / dtype,
            tune=replace(TUNE, epochs=1),
            compute=compute,
            **cast(Any, places),
        )
        tuned[dtype] = record(finetune_checkpoint(config))
    assert tuned["auto"]["key"] == tuned["bfloat16"]["key"] != tuned["float32"]["key"]
    assert tuned["auto"]["settings"]["dtype"] == "bfloat16"
    given = {"checkpoint": str(world.base), **places}
    moments = record(compute_moments(MomentsConfig(output=tmp_path / "m", **cast(Any, given))))
    assert moments["settings"]["dtype"] == "bfloat16"
    exact = record(compute_importance(ImportanceConfig(output=tmp_path / "i", **cast(Any, given))))
    assert exact["settings"]["dtype"] == "float32"
    asked = ImportanceConfig(output=tmp_path / "j", compute=NARROW, **cast(Any, given))
    assert record(compute_importance(asked))["settings"]["dtype"] == "bfloat16"
    first, second = (
        read_tensor(next(iter(open_index(tmp_path / name / "order-1").tensors.values())))
        for name in ("i", "j")
    )
    assert not torch.equal(first, second)


# --- the same bits twice -------------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, as far as anybody asks; how algorithms are chosen is put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.usefixtures("pretended_gpu")
def test_algorithms_on_gpus_are_those_that_repeat() -> None:
    assert pick_device(ComputeConfig(device="cpu")).type == "cpu"
    assert not torch.are_deterministic_algorithms_enabled()
    assert pick_device(ComputeConfig()).type == "cuda"
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_repeats_too_though_torch_would_only_warn(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    rows = [Encoded((5, 6, 7, 8, 9), (IGNORE, IGNORE, 7, 8, 9), row) for row in (1, 2)]

    def means() -> dict[str, Tensor]:
        model, batches = tiny_llama(97), [collate(rows, 0)]
        found = batched_moments(model, batches, (1.0,), gradient_checkpointing=checkpointing)
        return found.by_order[1.0]

    before = means()
    pick_device(ComputeConfig(device="cuda"))
    modes: list[tuple[str, int]] = []
    attention = F.scaled_dot_product_attention

    def watched(*args: Any, **named: Any) -> Tensor:
        modes.append(("forward", torch.get_deterministic_debug_mode()))
        found = attention(*args, **named)
        found.register_hook(
            lambda _: modes.append(("backward", torch.get_deterministic_debug_mode()))
        )
        return found

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    after = means()
    assert {mode for _, mode in modes} == {2}
    assert {what for what, _ in modes} == {"forward", "backward"}
    assert torch.get_deterministic_debug_mode() == 1
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_on_the_cpu_leaves_the_gpus_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = load_model(world.full, ComputeConfig(device="cpu")), rows_of(world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("a GPU was used")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asks a driver
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    settings = TrainSettings(epochs=2, learning_rate=1e-3, accumulation=1)
    resume = Resume(tmp_path / "state", "key", 1)
    unlearn_by_training(
        model, rows, (), settings, method="ga", pad=0, resume=resume, after_epoch=lambda _: False
    )
    assert resume.file.exists()
