"""Plans: what a run would do is what it does, and asking for it writes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import TUNE, World
from perta.errors import OutputExistsError
from perta.options import ScoringConfig, TrainSettings, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import plan_unlearn, unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig
from perta.store.record import read_manifest

LORA = replace(TUNE, lora_rank=4, learning_rate=2e-2)


def config(world: World, output: Path, method: str = "perta-project", **more: Any) -> UnlearnConfig:
    weighting = WeightingConfig(method=method, **more.pop("weighting", {}))
    settings = {"scoring": ScoringConfig(generate=False), **more}
    return world.request(output, weighting=weighting, **settings)


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def announced(err: str) -> list[str]:
    """Titles of the steps that a run announced, in order."""
    found = re.findall(r"(?m)^step (\d+) of (\d+): (.*?)(?:, about .* left in all)?$", err)
    assert [int(place) for place, _, _ in found] == list(range(1, len(found) + 1))
    assert {int(count) for _, count, _ in found} == {len(found)}
    return [title for _, _, title in found]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("perta-project", {}),
        ("perta-project", {"held_back": "2", "weighting": {"scaling_coef": 1.0}}),
        ("perta-kron", {"weighting": {"scaling_coef": 1.0}, "general": True}),
        ("perta-fisher", {}),
        ("negmerge", {}),
        ("msa", {}),
        ("ssd:selection=2", {"evaluate": False}),
        ("npo-retain", {"training": TrainSettings(epochs=1)}),
        ("retrain", {"training": TrainSettings(epochs=1)}),
        ("perta-project", {"tune": LORA, "rounds": 1}),
        ("perta-input", {"tune": LORA, "forget_seeds": 3, "weighting": {"scaling_coef": 1.0}}),
        # Few rows of a tiny model: what reaches them takes much of the rest.
        (
            "perta-project",
            {"tune": LORA, "forget_checkpoint": True, "rounds": 3, "retain_budget": 5.0},
        ),
    ],
)
def test_a_run_takes_the_steps_of_its_plan(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    more: dict[str, Any],
) -> None:
    if "general" in more:
        text = tmp_path / "general.jsonl"
        text.write_text(json.dumps({"text": "Bread is baked in an oven, at high heat."}) + "\n")
        more = {**more, "general": str(text)}
    settings = config(world, tmp_path / "out", method, **more)
    if "forget_checkpoint" in more:  # a whole one, to which rounds add adapters
        tuned = FinetuneConfig(
            base=str(world.base), data=str(world.forget), output=tmp_path / "tuned", tune=TUNE
        )
        settings = replace(settings, forget_checkpoint=str(finetune_checkpoint(tuned)))
    before = tree(tmp_path)
    plan = plan_unlearn(settings)
    assert tree(tmp_path) == before
    assert not any(step.reused for step in plan.steps)
    assert all(step.operations > 0 for step in plan.steps)
    capsys.readouterr()
    made = unlearn(settings)
    assert announced(capsys.readouterr().err) == [step.title for step in plan.steps]
    assert set(made.manifest["unlearn"]["seconds"]) == {s.name for s in plan.steps} | {"total"}
    work = sum(p.stat().st_size for p in plan.work_folder.rglob("*.safetensors"))
    assert plan.work == pytest.approx(work, rel=0.25)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert plan.output == pytest.approx(weights, rel=0.05)
    again = plan_unlearn(settings)
    assert all(step.reused and not step.operations for step in again.steps)


def test_what_would_be_reused_is_what_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = config(
        world, tmp_path / "one", held_back="2", weighting={"scaling_coef": 1.0}, evaluate=False
    )
    unlearn(first)
    other = replace(
        first,
        output=tmp_path / "two",
        weighting=WeightingConfig(scaling_coef=2.0),
        evaluate=True,
    )
    before = tree(tmp_path)
    plan = plan_unlearn(other)
    assert tree(tmp_path) == before
    reused = [step.name for step in plan.steps if step.reused]
    facts = ["forget_fact_moments", "merge_moments"]
    assert reused == ["finetune", "retain_moments", *facts, "direction"]
    capsys.readouterr()
    unlearn(other)
    told = re.findall(r"(?m)^\S+: \S*/one.work/(\S+) is what is needed", capsys.readouterr().err)
    facts = ["forget_fact_moments", "protected_moments"]
    assert told == ["forget_checkpoint", "retain_moments", *facts, "direction"]


@pytest.mark.parametrize("work", ["elsewhere/first", None])
def test_what_an_earlier_run_made_is_found_wherever_it_lies(
    world: World, tmp_path: Path, work: str | None
) -> None:
    place = tmp_path / work if work else None
    first = config(
        world, tmp_path / "one", "tv", work_dir=place, weighting={"scaling_coef": 1.0},
        evaluate=False,
    )  # fmt: skip
    unlearn(first)
    other = replace(first, weighting=WeightingConfig(method="tv", scaling_coef=2.0))
    for output, theirs in (
        (tmp_path / "two", None),
        (tmp_path / "two", tmp_path / "another" / "work"),
        (tmp_path / "far" / "two", place or tmp_path / "one.work"),
    ):
        plan = plan_unlearn(replace(other, output=output, work_dir=theirs))
        assert [step.name for step in plan.steps if step.reused] == ["finetune"]


def test_operations_are_those_of_the_passes(world: World, tmp_path: Path) -> None:
    """A forward pass over a token is two operations a parameter, a backward pass four."""
    settings = config(world, tmp_path / "out", "perta-fisher", evaluate=False)
    plan = {step.name: step.operations for step in plan_unlearn(settings).steps}
    unlearn(settings)
    record = read_manifest(tmp_path / "out.work" / "forget_checkpoint") or {}
    parameters = plan_unlearn(replace(settings, overwrite=True)).output / 4
    epochs = len(record["epoch_losses"])
    seen = 6 * parameters * record["tokens"] / epochs
    assert plan["finetune"] == pytest.approx(TUNE.epochs * seen, rel=0.1)
    assert plan["forget_importance"] == pytest.approx(seen, rel=0.1)


def test_a_plan_is_refused_as_the_run_is(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("somebody's")
    with pytest.raises(OutputExistsError, match="was not made by perta"):
        plan_unlearn(config(world, tmp_path / "out"))
