"""`perta repair` against the formula in float64, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TUNE, World
from helpers import tiny_llama
from perta.errors import (
    CheckpointMismatchError,
    ConfigError,
    CorruptCheckpointError,
    OutputExistsError,
)
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, MomentOptions
from perta.recipes.repair import repair_checkpoint
from perta.recipes.settings import RepairConfig
from perta.stages.finetune import finetune_checkpoint
from perta.stages.moments import compute_moments
from perta.stages.settings import FinetuneConfig, MomentsConfig
from perta.store.checkpoint import copy_companions, open_index, read_tensor, write_tensors
from perta.store.measured.moments import open_moments
from perta.store.measured.second_moment import matrix
from perta.store.record import read_manifest, write_manifest

CPU = ComputeConfig(device="cpu", dtype="float32", threads=1)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}


@pytest.fixture
def config(world: World, tmp_path: Path) -> RepairConfig:
    """Of a run that moved every weight, at random."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.manual_seed(0)
    moved = {name: v + 0.01 * torch.randn_like(v) for name, v in tensors(world.full).items()}
    write_tensors(theirs, moved)
    copy_companions(world.full, theirs)
    return RepairConfig(
        full=str(world.full),
        unlearned=str(theirs),
        retain=str(world.retain),
        output=tmp_path / "out",
        compute=CPU,
    )


@pytest.mark.parametrize("rho", [0.0, 3.0, 50.0])
def test_the_step_lacks_what_retained_inputs_see(
    world: World, tmp_path: Path, config: RepairConfig, rho: float
) -> None:
    found = tensors(repair_checkpoint(replace(config, rho=rho)))
    moments = open_moments(tmp_path / "out.retain_moments")
    full, theirs = tensors(world.full), tensors(Path(config.unlearned))
    for name, value in full.items():
        if name not in moments.facts["inputs"]:
            assert torch.equal(found[name], value), name
            continue
        step = (value.double() - theirs[name].double()).numpy()
        c = matrix(moments.input_moment(name)).double()
        # Solved by eigenvectors, along each of which the share 1 / (1 + rho s / c) is taken.
        values, vectors = torch.linalg.eigh(c)
        shares = 1 / (1 + rho * values / c.diagonal().mean())
        wanted = torch.from_numpy(step) @ vectors @ shares.diag() @ vectors.T
        torch.testing.assert_close(
            value.double() - found[name].double(), wanted, rtol=1e-3, atol=2e-6
        )
    record: Any = read_manifest(config.output)
    assert record["settings"]["method"] == "sage"
    assert record["settings"]["solve_device"] == "cpu"  # as all else: a GPU solves otherwise
    assert record["settings"]["edit_threads"] == 1
    assert "unlearned by other means" in record["done"]


def test_ready_moments_give_the_same_and_no_other_folder(
    world: World, tmp_path: Path, config: RepairConfig
) -> None:
    moments = compute_moments(
        MomentsConfig(
            checkpoint=config.full, data=str(world.retain), output=tmp_path / "m", compute=CPU
        )
    )
    ready = replace(config, retain=None, retain_moments=moments)
    found = tensors(repair_checkpoint(ready))
    assert not (tmp_path / "out.retain_moments").exists()
    again = tensors(repair_checkpoint(replace(config, output=tmp_path / "again")))
    assert all(torch.equal(found[name], value) for name, value in again.items())


def test_an_output_that_must_stay_is_refused_before_anything_is_measured(
    world: World, tmp_path: Path, config: RepairConfig
) -> None:
    other, rows = tmp_path / "other", tmp_path / "rows" / "retain.jsonl"
    other.mkdir()
    rows.parent.mkdir()
    shutil.copy(config.retain or "", rows)
    write_manifest(rows.parent, {"stage": "edit"})
    for output, more, error, message in (
        (other, {}, OutputExistsError, "was not made by perta"),
        (Path(config.unlearned), {"overwrite": True}, ConfigError, "overlaps the input"),
        (rows.parent, {"overwrite": True, "retain": str(rows)}, ConfigError, "overlaps the input"),
        (rows / "out", {}, ConfigError, "cannot be written"),
    ):
        with pytest.raises(error, match=message):
            repair_checkpoint(replace(config, output=output, **more))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "rows", "theirs"]
    repair_checkpoint(config)
    moments = tmp_path / "out.retain_moments"
    before = moments.stat().st_ino
    with pytest.raises(OutputExistsError, match="made with other method_settings"):
        repair_checkpoint(replace(config, rho=5.0, moments=MomentOptions(tokens="answer")))
    assert moments.stat().st_ino == before
    # Moments of its own are used again; those that somebody made for something else stay.
    shutil.rmtree(config.output)
    repair_checkpoint(config)
    assert moments.stat().st_ino == before
    shutil.rmtree(config.output)
    with pytest.raises(OutputExistsError, match=r"out\.retain_moments exists .* --overwrite"):
        repair_checkpoint(replace(config, retain=str(world.forget)))
    assert moments.stat().st_ino == before
    assert not config.output.exists()
    repair_checkpoint(replace(config, retain=str(world.forget), overwrite=True))
    assert moments.stat().st_ino != before


def test_moments_of_another_model_are_to_be_made_at_the_full_one(
    world: World, tmp_path: Path, config: RepairConfig
) -> None:
    moments = compute_moments(
        MomentsConfig(
            checkpoint=str(world.base), data=str(world.retain), output=tmp_path / "m", compute=CPU
        )
    )
    with pytest.raises(CheckpointMismatchError, match=f"--checkpoint {config.full} "):
        repair_checkpoint(replace(config, retain=None, retain_moments=moments))


def test_what_cannot_be_repaired_is_refused_before_anything_is_measured(
    world: World, tmp_path: Path, config: RepairConfig
) -> None:
    with pytest.raises(ConfigError, match="no step was taken"):
        repair_checkpoint(replace(config, unlearned=config.full))
    other = tmp_path / "other"
    tiny_llama(intermediate_size=64).save_pretrained(other)
    with pytest.raises(CheckpointMismatchError, match=r"embed_tokens.weight is .* but "):
        repair_checkpoint(replace(config, unlearned=str(other)))
    with pytest.raises(ConfigError, match=r"rho is -1.* in \[0, inf\)"):
        repair_checkpoint(replace(config, rho=-1.0))
    for more in ({"retain": None}, {"retain_moments": tmp_path}):
        with pytest.raises(ConfigError, match="--retain-moments"):
            replace(config, **more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "theirs"]


def test_models_that_are_given_for_each_other_are_refused(
    tmp_path: Path, config: RepairConfig
) -> None:
    repaired = repair_checkpoint(config)
    swapped = replace(config, full=str(repaired), unlearned=config.full, output=tmp_path / "2")
    with pytest.raises(ConfigError, match=f"{repaired} was unlearned from {config.full}"):
        repair_checkpoint(swapped)
    assert not (tmp_path / "2.retain_moments").exists()


def test_a_damaged_model_is_named_and_not_what_was_made_of_it(
    world: World, tmp_path: Path, config: RepairConfig
) -> None:
    theirs = Path(config.unlearned)
    damaged = tensors(theirs)
    damaged["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    write_tensors(theirs, damaged)
    with pytest.raises(CorruptCheckpointError, match=rf"{theirs}.*up_proj.weight holds NaN"):
        repair_checkpoint(config)
    assert not (tmp_path / "out").exists()


def test_adapters_are_repaired_as_the_models_they_make(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    adapters = [
        finetune_checkpoint(
            FinetuneConfig(
                base=str(world.base),
                data=str(data),
                output=tmp_path / name,
                tune=replace(TUNE, epochs=2, lora_rank=2),
                compute=CPU,
            )
        )
        for name, data in (("full", world.retain), ("theirs", world.forget))
    ]
    merged = [resolve_checkpoint(adapter) for adapter in adapters]
    found = []
    for name, (full, theirs) in {"adapters": adapters, "merged": merged}.items():
        config = RepairConfig(
            full=str(full),
            unlearned=str(theirs),
            retain=str(world.retain),
            output=tmp_path / name,
            compute=CPU,
        )
        found.append(tensors(repair_checkpoint(config)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert not all(torch.equal(v, found[0][name]) for name, v in tensors(merged[0]).items())
