"""Sums of adapters, and factors in place of matrices, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import World
from perta.models.formats.low_rank import Thin, open_tuned, read_thin, write_sum
from perta.store.checkpoint import open_index


def adapter(base: Path, folder: Path, seed: int, **settings: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    torch.manual_seed(seed)
    peft.get_peft_model(model, config).save_pretrained(str(folder), save_embedding_layers=False)


def weights(base: Path, *adapters: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """The base and what PEFT adds for each adapter, times a number, in float64."""
    found: dict[str, torch.Tensor] = {}
    for folder, weight in ((None, 1.0), *adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        if folder is None:
            found = start
            continue
        merged: Any = peft.PeftModel.from_pretrained(
            model, folder, autocast_adapter_dtype=False
        ).merge_and_unload()
        for name, parameter in merged.named_parameters():
            found[name] = found[name] + weight * (parameter.detach() - start[name])
    return found


def test_the_sum_of_adapters_is_an_adapter(world: World, tmp_path: Path) -> None:
    """Of other ranks, scales and layers; without a layer of one, and with none of another."""
    one, two, total = (tmp_path / name for name in ("one", "two", "sum"))
    adapter(world.base, one, 0, r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    adapter(world.base, two, 1, r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    left_out = "model.layers.1.mlp.down_proj.weight"
    total.mkdir()
    write_sum(total, [(one, 0.5, {left_out}), (two, 2.0, set())])
    wanted, found = weights(world.base, (one, 0.5), (two, 2.0)), weights(world.base, (total, 1.0))
    start = weights(world.base)
    for name, value in found.items():
        expected = start[name] if name == left_out else wanted[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    base = open_index(world.base)
    opened: dict[str, Any] = open_tuned(total, base).tensors
    changed = {name for name, entry in opened.items() if entry is not base.tensors[name]}
    assert changed == {n for n in start if n != left_out and not torch.equal(found[n], start[n])}
    for name in changed:
        step = read_thin(opened[name]).whole()
        torch.testing.assert_close(step, found[name] - start[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 3])
def test_factors_are_the_matrix(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, rank), (rank, 5))
    )
    thin = Thin(left, right)
    matrix = torch.stack(
        [
            sum(left[i, k] * right[k] for k in range(rank)) + torch.zeros(5).double()
            for i in range(7)
        ]
    )
    torch.testing.assert_close(thin.whole(), matrix)
    torch.testing.assert_close(thin.t().whole(), matrix.T)
    assert thin.norm() == pytest.approx(float(matrix.square().sum().sqrt()), rel=1e-12)
    flat = matrix.flatten().float()
    for begin in range(35):
        for count in range(1, 36 - begin):
            assert torch.equal(thin.part(begin, count), flat[begin : begin + count])
