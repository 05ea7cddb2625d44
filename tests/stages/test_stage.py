"""What holds for every stage: inputs survive, whatever the output is called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from conftest import TUNE, World
from perta.data.rows import read_rows
from perta.errors import ConfigError, OutputExistsError
from perta.evidence.settings import PeopleBenchConfig
from perta.options import TrainSettings, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.report.settings import ReportConfig
from perta.report.write import write_report
from perta.stages.bench import bench_people
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import (
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MergeMomentsConfig,
    MomentsConfig,
    TrainConfig,
)
from perta.stages.train import train_checkpoint
from perta.store.fingerprint import fingerprint
from perta.store.record import write_manifest

Stage = Callable[[str, str, Path], object]
"""Runs a stage on a checkpoint, a data file and an output, and may overwrite."""


def _finetune(checkpoint: str, data: str, output: Path) -> object:
    return finetune_checkpoint(
        FinetuneConfig(base=checkpoint, data=data, output=output, tune=TUNE, overwrite=True)
    )


def _importance(checkpoint: str, data: str, output: Path) -> object:
    return compute_importance(
        ImportanceConfig(checkpoint=checkpoint, data=data, output=output, overwrite=True)
    )


def _moments(checkpoint: str, data: str, output: Path) -> object:
    return compute_moments(
        MomentsConfig(checkpoint=checkpoint, data=data, output=output, overwrite=True)
    )


def _train(checkpoint: str, data: str, output: Path) -> object:
    settings = TrainSettings(epochs=1)
    return train_checkpoint(
        TrainConfig(
            method="ga",
            full=checkpoint,
            forget=data,
            output=output,
            training=settings,
            overwrite=True,
        )
    )


def _unlearn(checkpoint: str, data: str, output: Path) -> object:
    return unlearn(
        UnlearnConfig(
            base=checkpoint,
            full=checkpoint,
            forget=data,
            retain=data,
            output=output,
            overwrite=True,
        )
    )


def test_a_request_takes_keywords_text_and_paths(world: World, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": world.base, "full": world.full, "forget": world.forget}
    weighting = WeightingConfig(method="interpolate")
    more: dict[str, Any] = {"evaluate": False, "weighting": weighting}
    result = unlearn(**given, output=str(tmp_path / "out"), **more)
    texts: dict[str, Any] = {name: str(place) for name, place in given.items()}
    config = UnlearnConfig(**texts, output=tmp_path / "out", **more)
    assert result.folder == tmp_path / "out"
    assert unlearn(config).manifest == result.manifest
    assert unlearn(config, output=tmp_path / "other").folder == tmp_path / "other"


@pytest.mark.parametrize("stage", [_finetune, _importance, _moments, _train, _unlearn])
def test_an_output_never_replaces_an_input(stage: Stage, world: World, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(world.base, checkpoint)
    data = tmp_path / "sets" / "rows.jsonl"
    data.parent.mkdir()
    shutil.copyfile(world.forget, data)
    before = fingerprint(checkpoint), data.read_bytes()
    for output in (checkpoint, checkpoint / "inside", data.parent, tmp_path):
        with pytest.raises(ConfigError, match="overlaps the input"):
            stage(str(checkpoint), str(data), output)
    assert (fingerprint(checkpoint), data.read_bytes()) == before


def _evaluate(checkpoint: str, data: str, output: Path) -> object:
    return evaluate_checkpoint(
        EvaluateConfig(checkpoint=checkpoint, forget=data, output=output, overwrite=True)
    )


def _bench(checkpoint: str, data: str, output: Path) -> object:
    folder = str(Path(data).parent)
    return bench_people(
        PeopleBenchConfig(checkpoint=checkpoint, data=folder, output=output, overwrite=True)
    )


def _report(checkpoint: str, data: str, output: Path) -> object:
    return write_report(ReportConfig(results=(checkpoint,), output=output, overwrite=True))


@pytest.mark.parametrize("stage", [_evaluate, _bench, _report])
def test_results_never_replace_what_is_read(stage: Stage, world: World, tmp_path: Path) -> None:
    checkpoint, data = tmp_path / "model", tmp_path / "sets" / "forget.jsonl"
    shutil.copytree(world.full, checkpoint)
    shutil.copytree(world.forget.parent, data.parent)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    places = [file for file in before if stage is not _report or file.parent == checkpoint]
    parts = [checkpoint / "generation_config.json", checkpoint / "new.safetensors"]
    for output in (*places, *(() if stage is _report else parts), checkpoint, data.parent):
        with pytest.raises((ConfigError, OutputExistsError)):
            stage(str(checkpoint), str(data), output)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_results_of_another_kind_are_replaced_beside_the_weights(
    world: World, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(world.full, checkpoint)
    output = checkpoint / "results.json"
    _evaluate(str(checkpoint), str(world.forget), output)
    first = output.read_bytes()
    _evaluate(str(checkpoint), str(world.retain), output)
    assert output.read_bytes() != first


def test_a_work_folder_is_no_input_and_lies_in_none(world: World, tmp_path: Path) -> None:
    full = tmp_path / "full"
    shutil.copytree(world.full, full)
    before = {file: file.read_bytes() for file in full.rglob("*") if file.is_file()}
    mine = tmp_path / "work" / "retain_protected.jsonl"
    mine.parent.mkdir()
    shutil.copyfile(world.retain, mine)
    given: dict[str, Any] = {"base": world.base, "full": full, "forget": world.forget}
    for work, retain in ((full, world.retain), (full / "work", world.retain), (mine.parent, mine)):
        with pytest.raises(ConfigError, match="overlaps the input"):
            unlearn(**given, retain=retain, output=tmp_path / "out", work_dir=work)
    assert {file: file.read_bytes() for file in full.rglob("*") if file.is_file()} == before
    assert mine.read_bytes() == world.retain.read_bytes()


@pytest.mark.parametrize("output", ["adapter", "adapter/inside", "base", "base/inside"])
def test_an_adapter_and_its_base_are_no_outputs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(world.base, base)
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        str(adapter)
    )
    for folder in (adapter, base):
        write_manifest(folder, {"stage": "finetune"})  # so nothing else keeps it
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    with pytest.raises(ConfigError, match="overlaps the input"):
        _finetune(str(adapter), str(world.forget), tmp_path / output)
    assert {file: file.read_bytes() for file in before} == before
    assert not (tmp_path / output / "inside").exists()


def test_merged_moments_never_replace_their_parts(world: World, tmp_path: Path) -> None:
    part = tmp_path / "part"
    compute_moments(MomentsConfig(checkpoint=str(world.base), data=str(world.forget), output=part))
    before = fingerprint(part)
    with pytest.raises(ConfigError, match="overlaps the input"):
        merge_moments(MergeMomentsConfig(folders=(part,), output=part, overwrite=True))
    assert fingerprint(part) == before


def test_results_that_cannot_be_written_stop_before_the_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.stages.stage.load_model", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(world.base),
                forget=str(world.forget),
                output=tmp_path / "file" / "results.json",
            )
        )


def test_a_program_may_give_a_stage_rows_and_places_as_text(world: World, tmp_path: Path) -> None:
    rows = read_rows(str(world.forget), "")
    given: dict[str, Any] = {"base": world.base, "data": rows, "output": str(tmp_path / "out")}
    tuned = finetune_checkpoint(FinetuneConfig(**given, tune=TUNE))
    assert rows[0]["answer"] not in (tuned / "perta.json").read_text()
    same = FinetuneConfig(base=str(world.base), data=str(world.forget), output=tuned, tune=TUNE)
    assert finetune_checkpoint(same) == tuned  # up to date
    for name, value, wanted in (
        ("base", None, "--base is None; it must be given"),
        ("output", None, "--output is None; it must be given"),
        ("output", b"out", "it must be a path"),
        ("overwrite", "yes", "it must be True or False"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            FinetuneConfig(**{**given, name: value})
