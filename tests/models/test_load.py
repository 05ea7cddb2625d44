"""From what users name to a local checkpoint: folders, adapters, GGUF files, hub ids."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import World
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from perta.models.load import load_model, load_tokenizer, round_weights, save_model, stored_dtype
from perta.models.loss import losses_of
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, DataConfig, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.fingerprint import fingerprint

CPU = ComputeConfig(device="cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def adapter(world: World, folder: Path, std: float = 0.1) -> Path:
    """A LoRA adapter with random matrices on the world's base."""
    model: Any = get_peft_model(
        load_model(world.base, CPU), LoraConfig(r=2, target_modules="all-linear")
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.peft_config["default"].base_model_name_or_path = str(world.base)
    model.save_pretrained(folder)
    return folder


def test_a_folder_is_taken_as_it_is(world: World) -> None:
    assert resolve_checkpoint(world.base) == world.base


def test_an_adapter_is_merged_once(world: World, tmp_path: Path, cache: Path) -> None:
    lora = adapter(world, tmp_path / "lora")
    before = fingerprint(lora), fingerprint(world.base)
    merged = resolve_checkpoint(lora, base=str(world.base))
    assert (fingerprint(lora), fingerprint(world.base)) == before
    assert merged.is_relative_to(cache)
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert resolve_checkpoint(lora) == merged  # the adapter names its base itself
    assert (merged / "model.safetensors").stat().st_mtime_ns == written

    name = "model.layers.0.mlp.up_proj"
    a, b = (
        read_tensor(open_index_of(lora)[f"base_model.model.{name}.lora_{side}.weight"])
        for side in "AB"
    )
    scale = json.loads((lora / "adapter_config.json").read_text())["lora_alpha"] / 2
    expected = read_tensor(open_index(world.base).tensors[f"{name}.weight"]) + scale * b @ a
    found = read_tensor(open_index(merged).tensors[f"{name}.weight"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (merged / "tokenizer.json").exists()
    assert set(open_index(merged).tensors) == set(open_index(world.base).tensors)


def open_index_of(lora: Path) -> Any:
    from perta.store.checkpoint import read_header

    return {entry.name: entry for entry in read_header(lora / "adapter_model.safetensors")[0]}


def test_a_merged_model_keeps_the_type_of_its_base(world: World, tmp_path: Path) -> None:
    base = tmp_path / "half"
    half = load_model(world.base, ComputeConfig(device="cpu", dtype="bfloat16"))
    half.save_pretrained(base)
    load_tokenizer(world.base).save_pretrained(str(base))
    merged = resolve_checkpoint(adapter(world, tmp_path / "lora"), base=base)
    assert stored_dtype(merged) == torch.bfloat16


def test_what_an_adapter_adds_is_not_rounded_to_its_base(world: World, tmp_path: Path) -> None:
    """On bfloat16 weights the task vector is scale · B A, which that type would lose much of."""
    half = load_model(world.base, ComputeConfig(device="cpu", dtype="bfloat16"))
    half.save_pretrained(tmp_path / "half")
    load_tokenizer(world.base).save_pretrained(str(tmp_path / "half"))
    lora = adapter(world, tmp_path / "lora", std=0.01)
    config = EditConfig(
        full=str(tmp_path / "half"),
        base=str(tmp_path / "half"),
        forget_checkpoint=str(lora),
        output=tmp_path / "out",
        save_dtype="float32",
        weighting=WeightingConfig(method="tv", scaling_coef=0.5),
    )
    name = "model.layers.0.mlp.up_proj"
    a, b = (
        read_tensor(open_index_of(lora)[f"base_model.model.{name}.lora_{side}.weight"])
        for side in "AB"
    )
    before = read_tensor(open_index(tmp_path / "half").tensors[f"{name}.weight"]).double()
    for alpha in (8, 16):
        # The same weights with another scale are another adapter.
        settings = json.loads((lora / "adapter_config.json").read_text())
        (lora / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": alpha}))
        output = edit_checkpoint(replace(config, output=tmp_path / f"out{alpha}"))
        after = read_tensor(open_index(output).tensors[f"{name}.weight"]).double()
        tau = alpha / 2 * b.double() @ a.double()
        error = (before - after - 0.5 * tau).norm() / (0.5 * tau).norm()
        assert float(error) < 1e-3


@pytest.mark.parametrize("whole", [False, True])
def test_the_way_back_from_an_adapter_is_not_rounded(
    world: World, tmp_path: Path, whole: bool
) -> None:
    """θ_full − θ₀ is scale · B A; α = ½ of it, in float32, by the edit and by the whole run."""
    half = load_model(world.base, ComputeConfig(device="cpu", dtype="bfloat16"))
    half.save_pretrained(tmp_path / "half")
    load_tokenizer(world.base).save_pretrained(str(tmp_path / "half"))
    lora = adapter(world, tmp_path / "lora", std=0.01)
    common: Any = {
        "full": str(lora),
        "base": str(tmp_path / "half"),
        "output": tmp_path / "out",
        "save_dtype": "float32",
        "weighting": WeightingConfig(method="interpolate", scaling_coef=0.5),
    }
    if whole:
        unlearn(UnlearnConfig(**common, forget=str(world.forget), evaluate=False))
    else:
        edit_checkpoint(EditConfig(**common))
    name = "model.layers.0.mlp.up_proj"
    a, b = (
        read_tensor(open_index_of(lora)[f"base_model.model.{name}.lora_{side}.weight"])
        for side in "AB"
    )
    settings = json.loads((lora / "adapter_config.json").read_text())
    tau = settings["lora_alpha"] / 2 * b.double() @ a.double()
    merged = resolve_checkpoint(lora, base=tmp_path / "half")
    before, after = (
        read_tensor(open_index(folder).tensors[f"{name}.weight"]).double()
        for folder in (merged, tmp_path / "out")
    )
    error = (before - after - 0.5 * tau).norm() / (0.5 * tau).norm()
    assert float(error) < 1e-3


def test_small_steps_of_training_survive_a_narrow_type(world: World) -> None:
    model = load_model(world.base, CPU)
    weight: Any = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight.copy_(torch.full_like(weight, 1 + 2**-11))
    round_weights(model, torch.bfloat16, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # A sixteenth of the way to the next number above 1, which the nearest would never take.
    moved = (weight.detach().double() - 1) / 2**-7
    assert float(moved.mean()) == pytest.approx(1 / 16, abs=5 * (1 / 16 / moved.numel()) ** 0.5)


def test_an_adapter_in_a_pickle_is_not_loaded(world: World, tmp_path: Path) -> None:
    lora = adapter(world, tmp_path / "lora")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="never loaded"):
        resolve_checkpoint(lora)


def test_the_hub_is_asked_and_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def unreachable(name: str, **_more: Any) -> str:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        CheckpointNotFoundError, match="could not be fetched from the hub: no route"
    ):
        resolve_checkpoint("owner/name")
    assert asked == ["owner/name"]


@pytest.mark.parametrize("text", ["./none", "/none", "~/none", "a/b/c", "none", "none.gguf"])
def test_what_cannot_be_a_hub_id_is_not_asked_there(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointNotFoundError, match="There is no checkpoint at"):
        resolve_checkpoint(text)


def test_folders_that_hold_no_usable_model(world: World, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"never loaded|safetensors"):
        load_model(pickled, CPU)

    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("config.json", "model.safetensors"):
        (cut / name).write_bytes((world.base / name).read_bytes())
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CorruptCheckpointError):
        load_model(cut, CPU)

    (cut / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        load_tokenizer(cut)
    (cut / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json"):
        load_model(cut, CPU)


def test_a_model_with_nan_is_refused_by_name(world: World, tmp_path: Path) -> None:
    model: Any = load_model(world.base, CPU)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
        model.save_pretrained(tmp_path / str(bad))
        with pytest.raises(CorruptCheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN or Inf"):
            load_model(tmp_path / str(bad), CPU)


def test_loaded_models_compute_what_was_saved(world: World) -> None:
    tokenizer = load_tokenizer(world.full)
    encoded = encode_examples(load_examples(world.retain), tokenizer, DataConfig())
    losses = losses_of(load_model(world.full, CPU), encoded.encoded, batch_size=3, pad=0)
    alone = losses_of(load_model(world.full, CPU), encoded.encoded, batch_size=1, pad=2)
    assert losses == pytest.approx(alone, rel=1e-4)


def test_bars_of_libraries_do_not_leak(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    tqdm: Any = import_module("tqdm").tqdm
    monkeypatch.setattr(logging, "_tqdm_active", True)
    capsys.readouterr()
    load_model(world.base, ComputeConfig())
    assert capsys.readouterr().err == ""
    list(tqdm([1, 2], desc="a bar of the user's own"))
    assert "a bar of the user's own" in capsys.readouterr().err


def test_a_sentencepiece_file_alone_names_what_reads_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes((world.base / "config.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0c")
    monkeypatch.setattr("perta.models.load.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model .*`pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_saved_weights_are_as_open_as_other_files(
    world: World, tmp_path: Path, mask: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(mask)
    try:
        save_model(load_model(world.base, CPU), load_tokenizer(world.base), tmp_path, None)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == 0o666 & ~mask
    assert set(modes.values()) == {0o666 & ~mask}
    assert capsys.readouterr().err == ""  # no bar of the library's


def test_models_are_loaded_by_several_threads(world: World) -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_model(world.base, ComputeConfig()), range(16)))
    for model in [*models, load_model(world.base, ComputeConfig())]:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
