"""Edits written as adapters: what PEFT makes of them, their rank, and what is cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import tiny_llama
from perta.errors import CheckpointError, ConfigError
from perta.models.resolve import resolve_checkpoint
from perta.options import WeightingConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest

ALPHA = 0.5
LAYERS = ["up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model: Any = tiny_llama(tied=True, hidden_size=64, intermediate_size=96)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def moved(base: Path, folder: Path, seed: int, picked: str = "_proj") -> Path:
    """The base with small random steps, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if picked in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def lora(base: Path, folder: Path, seed: int, rank: int, **more: Any) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, target_modules=LAYERS, init_lora_weights=False, **more)
    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def edit(base: Path, full: Path, forget: Path, output: Path, **more: Any) -> Path:
    weighting = WeightingConfig(method="tv", scaling_coef=ALPHA, layers="all", **more.pop("to", {}))
    return edit_checkpoint(
        EditConfig(
            full=str(full),
            base=str(base),
            forget_checkpoint=str(forget),
            output=output,
            output_format="adapter",
            weighting=weighting,
            **more,
        )
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}


def weights(folder: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """Of a checkpoint, with an adapter on it as PEFT merges it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {n: p.detach().double() for n, p in model.named_parameters()}


def test_a_step_of_low_rank_is_exact(base: Path, tmp_path: Path) -> None:
    full = moved(base, tmp_path / "full", 1)
    forget = lora(base, tmp_path / "forget", 2, rank=2, rank_pattern={"down_proj": 3})
    output = edit(base, full, forget, tmp_path / "out")
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        str(full.resolve())
    )
    base_weights, full_weights, tuned = weights(base), weights(full), weights(base, forget)
    found = weights(full, output)
    for name, weight in full_weights.items():
        wanted = weight - ALPHA * (tuned[name] - base_weights[name])
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
    record = (read_manifest(output) or {})["adapter"]
    assert all(rank == (3 if "down" in name else 2) for name, rank in record["ranks"].items())
    assert record["truncated"] == []
    assert record["stored"]["stored_share"] == pytest.approx(1, abs=1e-6)
    assert (output / "README.md").exists()
    assert not (output / "config.json").exists()


def test_what_exceeds_the_rank_is_cut_off_and_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, forget = moved(base, tmp_path / "full", 1), moved(base, tmp_path / "forget", 2)
    output = edit(base, full, forget, tmp_path / "out", adapter_rank=12)
    before, tuned = tensors(base), tensors(forget)
    found, plain = weights(full, output), weights(full)
    kept = whole = 0.0
    for name in (n for n in before if "_proj" in n):
        step = ALPHA * (tuned[name] - before[name])
        u, s, v = torch.linalg.svd(step, full_matrices=False)
        truncated = (u[:, :12] * s[:12]) @ v[:12]
        torch.testing.assert_close(plain[name] - found[name], truncated, rtol=1e-3, atol=1e-5)
        kept, whole = kept + float((s[:12] ** 2).sum()), whole + float((s**2).sum())
    share = (read_manifest(output) or {})["adapter"]["stored"]["stored_share"]
    assert share == pytest.approx(kept / whole, rel=1e-5)
    told = capsys.readouterr().err
    assert f"holds {share:.1%} of the step; 14 layers are cut off" in told
    assert "Raise --adapter-rank" in told
    with pytest.raises(CheckpointError, match="At this rank the adapter would hold"):
        edit(base, full, forget, tmp_path / "none", adapter_rank=1)
    assert not (tmp_path / "none").exists()


def test_ones_own_adapter_gives_an_adapter_of_its_base(base: Path, tmp_path: Path) -> None:
    own, forget = lora(base, tmp_path / "own", 1, 3), lora(base, tmp_path / "forget", 2, 2)
    output = edit(base, own, forget, tmp_path / "out")
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    # The base is bfloat16: nothing of its rounding may be in the factors.
    assert set(settings["rank_pattern"].values()) == {5}
    plain, full, tuned = weights(base), weights(base, own), weights(base, forget)
    found = weights(base, output)
    for name, weight in full.items():
        wanted = weight - ALPHA * (tuned[name] - plain[name])
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
    merged = tensors(resolve_checkpoint(output, exact=True))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)


def test_norms_are_held_whole(base: Path, tmp_path: Path) -> None:
    full = moved(base, tmp_path / "full", 1)
    forget = moved(base, tmp_path / "forget", 2, picked="layers.0")
    output = edit(base, full, forget, tmp_path / "out", to={"include": ("*layers.0*",)})
    settings = json.loads((output / "adapter_config.json").read_text())
    assert "model.layers.0.input_layernorm" in settings["modules_to_save"]
    found, old, tuned, before = (
        weights(full, output), weights(full), weights(forget), weights(base),
    )  # fmt: skip
    name = "model.layers.0.input_layernorm.weight"
    wanted = old[name] - ALPHA * (tuned[name] - before[name])
    torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)


def test_a_tied_embedding_has_no_place_in_an_adapter(base: Path, tmp_path: Path) -> None:
    full, forget = moved(base, tmp_path / "full", 1), moved(base, tmp_path / "forget", 2, "embed")
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight, which an adapter cannot"):
        edit(base, full, forget, tmp_path / "out", to={"include": ("*embed*",)})
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


def test_options_without_an_adapter_are_refused(tmp_path: Path) -> None:
    settings = EditConfig(full="a", base="b", output=tmp_path)
    for change in (
        {"adapter_rank": 8},
        {"output_format": "adapter", "adapter_rank": 0},
        {"output_format": "adapter", "save_dtype": "bfloat16"},
    ):
        with pytest.raises(ConfigError, match="--output-format adapter"):
            replace(settings, **change)


def test_an_adapter_is_known_by_its_own_record(base: Path, tmp_path: Path) -> None:
    from perta.stages.stage import evaluated

    full, forget = moved(base, tmp_path / "full", 1), lora(base, tmp_path / "forget", 2, rank=2)
    output = edit(base, full, forget, tmp_path / "out")
    merged = resolve_checkpoint(output)
    content = (read_manifest(output) or {})["content"]
    assert evaluated(output, merged) == {"checkpoint": content, "merged": fingerprint(merged)}
    assert evaluated(full, full) == {"checkpoint": fingerprint(full)}
