"""Costs and sentences of every method: terminal, page and CSV say the same, as the records do."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import perta.terminal
from conftest import TUNE, World
from helpers import weighting as chosen
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.methods.method import Edit, Method
from perta.methods.objectives import Training
from perta.methods.registry import known, parse
from perta.models.load import load_tokenizer
from perta.options import ScoringConfig, TrainSettings, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.report.collect import collect, costs
from perta.report.settings import ReportConfig
from perta.report.write import companion_folder, write_report
from perta.store.costs import STAGES, costs_of, duration
from perta.store.record import read_manifest
from perta.terminal import print_costs

EDITS = list(known(Edit))
TRAINED = list(known(Training))
_BY_EPOCHS = [name for name in TRAINED if name != "influence"]


@pytest.fixture(scope="module")
def outputs(
    world: World, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """One output of every method; the work folder is shared, so stages are reused."""
    folder = tmp_path_factory.mktemp("every")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERTA_CACHE", str(folder / "cache"))
        yield _outputs(world, adapter, folder)


def _outputs(world: World, adapter: Path, folder: Path) -> dict[str, Path]:
    found = {}
    for name in (*EDITS, *TRAINED, "auto"):
        method = "perta-project" if name == "auto" else name
        alpha: Any = "auto" if name == "auto" else 1.0 if name in EDITS else None
        # Another order than that of `perta-grad`, which would give the same weights.
        theirs: dict[str, Any] = {
            "ssd": {"selection": 1.2},
            "perta": {"order": 1.5},
        }
        weighting = chosen(method=method, scaling_coef=alpha, **theirs.get(name, {}))
        if name == "influence":
            weighting = WeightingConfig(method="influence:damping=1.0,tolerance=0.01")
        found[name] = unlearn(
            UnlearnConfig(
                base=str(world.base),
                full=str(adapter if name == "influence" else world.full),
                forget=str(world.forget),
                retain=str(world.retain),
                output=folder / name,
                work_dir=folder / "work",
                evaluate=name in ("tv", "retrain"),
                scoring=ScoringConfig(max_new_tokens=4),
                tune=TUNE,
                training=TrainSettings(epochs=1 if name in _BY_EPOCHS else None),
                weighting=weighting,
            )
        ).folder
    contents = [(read_manifest(folder) or {})["content"] for folder in found.values()]
    assert len(set(contents)) == len(found)
    return found


def test_terminal_page_and_csv_agree_for_every_method(
    outputs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tuple(map(str, outputs.values()))
    page = write_report(ReportConfig(results=given, output=tmp_path / "r.html", figures=False))
    with (companion_folder(page) / "costs.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    found, retraining = costs(collect(given))
    monkeypatch.setattr(perta.terminal, "console", lambda: Console(width=500))
    print_costs(found, retraining)
    terminal = capsys.readouterr().out.splitlines()
    html = " ".join(page.read_text("utf-8").split())
    retrained = read_manifest(outputs["retrain"])
    assert retrained is not None
    assert retraining == sum(retrained["seconds"].values())
    for name in outputs.keys() - {"retrain"}:
        record = read_manifest(outputs[name])
        assert record is not None
        noted = record["unlearn"]["seconds"]
        apart = sum(seconds for stage, seconds in noted.items() if stage.startswith("evaluate"))
        total = sum(noted.values()) - noted["total"] - apart
        assert float(rows[name]["evaluation"]) == pytest.approx(apart)
        assert (apart > 0) == (name == "tv")
        assert float(rows[name]["total seconds"]) == pytest.approx(total, abs=0.02)
        assert float(rows[name]["share of retraining"]) == pytest.approx(
            total / retraining, abs=0.02
        )
        stages = [float(rows[name][title] or 0) for title in STAGES.values() if title in rows[name]]
        assert sum(stages) == pytest.approx(total, abs=0.02)
        line = next(line for line in terminal if line.startswith(f"│ {name} "))
        shown = duration(float(rows[name]["total seconds"]))
        assert f" {shown} " in line
        percent = f"{100 * float(rows[name]['share of retraining']):.0f}%"
        assert percent in line
        assert f"{name}</span><span>{shown}, {percent} of retraining" in html


def test_every_stage_that_a_method_needs_is_counted(outputs: dict[str, Path]) -> None:
    def stages(name: str) -> set[str]:
        record = read_manifest(outputs[name])
        assert record is not None
        return {stage for stage, title in STAGES.items() if title in costs_of(record, {}).stages}

    tuned = {"finetune", "edit"}
    both = {"forget_importance", "retain_importance"}
    assert stages("tv") == tuned
    assert stages("perta-grad") == tuned | both
    structured = {*tuned, "retain_moments", "direction"}
    assert stages("perta-project") == structured | {"forget_fact_moments", "merge_moments"}
    assert stages("auto") == stages("perta-project") | {"calibrate", "rounds", "strength"}
    assert stages("perta-kron") == structured | {"forget_moments"}
    assert stages("msa") == {*tuned, "retain_finetune"}
    assert stages("ssd") == {"edit", *both}
    assert stages("interpolate") == {"edit"}
    assert stages("npo") == stages("influence") == {"train"}


def test_a_reused_stage_costs_what_it_took_when_it_was_made(outputs: dict[str, Path]) -> None:
    # Both reuse the forget checkpoint of `tv`; what their own runs waited would differ.
    taken = set()
    for name in ("perta-grad", "perta-fisher"):
        record = read_manifest(outputs[name])
        assert record is not None
        taken.add(record["unlearn"]["seconds"]["finetune"])
    assert len(taken) == 1


def test_what_was_done_is_said_of_every_method(outputs: dict[str, Path]) -> None:
    said = {}
    for name, output in outputs.items():
        record = read_manifest(output)
        assert record is not None
        method = "perta-project" if name == "auto" else name
        row = parse(method, Method)
        assert (record["done"], record["equation"]) == (row.done, row.equation)
        said[method] = record["done"]
        assert row.done in (output / "README.md").read_text("utf-8") or name in TRAINED
    assert len(set(said.values())) == len(said)
    for name in _BY_EPOCHS:
        assert "trained" in said[name]
        assert "moved back" not in said[name]
    for name in ("ssd", "interpolate"):
        assert "learning the removed examples" not in said[name]
    assert "examples to keep" in said["msa"]


def test_operations_are_the_tokens_that_pass(outputs: dict[str, Path], world: World) -> None:
    """Counted by hand: one forward pass over a token is 1, there and back 3."""
    tokenizer = load_tokenizer(world.base)
    sets = {"forget": world.forget, "retain": world.retain}
    tokens = {
        name: sum(len(e.input_ids) for e in encode_examples(load_examples(file), tokenizer).encoded)
        for name, file in sets.items()
    }

    def passes(name: str) -> dict[str, float]:
        record = read_manifest(outputs[name])
        assert record is not None
        found = costs_of(record, {})
        assert found.operations == sum(found.passes.values())
        return {stage: found.passes[t] for stage, t in STAGES.items() if t in found.passes}

    tuned = read_manifest(outputs["tv"].parent / "work" / "forget_checkpoint")
    assert tuned is not None
    epochs = len(tuned["epoch_losses"])
    assert passes("tv") == {"finetune": 3 * epochs * tokens["forget"]}
    fisher = passes("perta-fisher")
    assert fisher["forget_importance"] == 3 * tokens["forget"]
    assert fisher["retain_importance"] == 3 * tokens["retain"]
    kron = passes("perta-kron")
    assert kron["forget_moments"] == 3 * tokens["forget"]
    assert passes("perta-project")["retain_moments"] == tokens["retain"]
    assert passes("retrain") == {"train": 3 * tokens["retain"]}
    assert passes("auto").keys() >= {"finetune", "retain_moments", "calibrate", "strength"}
