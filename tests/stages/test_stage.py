"""What holds for every stage: inputs survive, whatever the output is called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import TUNE, World
from perta.errors import ConfigError
from perta.options import TrainSettings, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
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
    monkeypatch.setattr("perta.stages.evaluate.load_model", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(world.base),
                forget=str(world.forget),
                output=tmp_path / "file" / "results.json",
            )
        )
