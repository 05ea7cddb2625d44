"""A model in memory at any strength holds the bytes that the edit would write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from conftest import World
from helpers import tiny_llama, tiny_tokenizer
from helpers import weighting as chosen
from perta.models.load import load_model
from perta.options import ComputeConfig
from perta.recipes.strength.edited_model import EditedModel, load_changes
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store.checkpoint import open_index, read_tensor, write_tensors

CPU = ComputeConfig(device="cpu")


def mixtral() -> Any:
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def write_models(folder: Path, model: Any, dtype: torch.dtype) -> EditConfig:
    """Base, full and forget checkpoint that differ a little, in one type; constant W."""
    tokenizer = tiny_tokenizer()
    for place, name in enumerate(("base", "full", "forget")):
        torch.manual_seed(place)
        moved = {
            key: (value + 1e-3 * torch.randn_like(value)).to(dtype)
            for key, value in model.state_dict().items()
        }
        saved = type(model)(model.config).to(dtype)
        saved.load_state_dict(moved)
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return EditConfig(
        full=str(folder / "full"),
        base=str(folder / "base"),
        forget_checkpoint=str(folder / "forget"),
        output=folder / "out",
        weighting=chosen(method="constant", constant=0.7, scaling_coef=1.9),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, mixtral])
def test_what_is_tried_is_what_is_stored(tmp_path: Path, dtype: torch.dtype, make: Any) -> None:
    """Mixtral's experts are stored one by one, and joined in memory."""
    edit = write_models(tmp_path, make(), dtype)
    edit_checkpoint(edit)
    written = load_model(tmp_path / "out", CPU, dtype=torch.float32)
    full = load_model(tmp_path / "full", CPU, dtype=torch.float32)
    before = [parameter.detach().clone() for parameter in full.parameters()]
    (tmp_path / "scratch").mkdir()
    edited = EditedModel(full, load_changes(tmp_path / "scratch", edit, CPU))
    for strength in (0.4, 1.9):  # where it comes from makes no difference
        edited.move(strength)
    for (name, value), expected in zip(full.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(value, expected), name
    pairs = list(zip(before, full.parameters(), strict=True))
    moved = sum(int((a != b).sum()) for a, b in pairs)
    assert moved > 0.2 * sum(value.numel() for value in before)
    edited.move(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, full.parameters(), strict=True))


@pytest.mark.parametrize(("dtype", "save"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_type_is_tried_as_it_is_stored(tmp_path: Path, dtype: str, save: Any) -> None:
    edit = write_models(tmp_path, tiny_llama(), getattr(torch, dtype))
    weighting = replace(edit.weighting, include=("*.mlp.*",))
    edit = replace(edit, save_dtype=save, weighting=weighting)
    edit_checkpoint(edit)
    written = load_model(tmp_path / "out", CPU, dtype=torch.float32)
    full = load_model(tmp_path / "full", CPU, dtype=torch.float32)
    (tmp_path / "scratch").mkdir()
    edited = EditedModel(full, load_changes(tmp_path / "scratch", edit, CPU))
    edited.move(1.9)
    for value, expected in zip(full.parameters(), written.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_a_tied_head_that_is_stored_first(tmp_path: Path) -> None:
    """The rounding goes by the first of two names."""
    edit = write_models(tmp_path, tiny_llama(), torch.bfloat16)
    tensors = {n: read_tensor(e) for n, e in open_index(tmp_path / "full").tensors.items()}
    embedding = tensors.pop("model.embed_tokens.weight")
    both = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone(), **tensors}
    write_tensors(tmp_path / "full", both)
    edit_checkpoint(edit)
    written = load_model(tmp_path / "out", CPU, dtype=torch.float32)
    (tmp_path / "scratch").mkdir()
    full = load_model(tmp_path / "full", CPU, dtype=torch.float32)
    edited = EditedModel(full, load_changes(tmp_path / "scratch", edit, CPU))
    edited.move(1.9)
    for value, expected in zip(full.parameters(), written.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_a_change_is_the_weighted_task_vector(world: World, tmp_path: Path) -> None:
    edit = EditConfig(
        full=str(world.full),
        base=str(world.base),
        forget_checkpoint=str(world.full),
        output=tmp_path / "out",
        weighting=chosen(method="constant", constant=0.5, include=("*.mlp.*",)),
    )
    (tmp_path / "scratch").mkdir()
    changes = load_changes(tmp_path / "scratch", replace(edit), CPU)
    full, base = (load_model(folder, CPU) for folder in (world.full, world.base))
    pairs = zip(full.named_parameters(), base.parameters(), changes, strict=True)
    for (name, value), start, change in pairs:
        expected = 0.5 * (value - start) if ".mlp." in name else torch.zeros_like(value)
        torch.testing.assert_close(change.delta, expected.detach())
