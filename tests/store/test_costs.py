"""Costs and sentences of every method: terminal, page and CSV say the same, as the records do."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import perta.terminal
from conftest import TUNE, World
from helpers import weighting as chosen
from perta.methods.method import Edit, Method
from perta.methods.objectives import Training
from perta.methods.registry import known, parse
from perta.options import ScoringConfig, TrainSettings
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.tables import costs
from perta.report.write import companion_folder, write_report
from perta.store.costs import STAGES, costs_of, duration
from perta.store.record import read_manifest
from perta.terminal import print_costs

EDITS = list(known(Edit))
TRAINED = [name for name in known(Training) if name != "influence"]  # it wants an adapter


@pytest.fixture(scope="module")
def outputs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of every method; the work folder is shared, so stages are reused."""
    folder = tmp_path_factory.mktemp("every")
    found = {}
    for name in (*EDITS, *TRAINED, "auto"):
        method = "perta-project" if name == "auto" else name
        alpha: Any = "auto" if name == "auto" else 1.0 if name in EDITS else None
        # Another order than that of `perta-grad`, which would give the same weights.
        more: dict[str, Any] = {"ssd": {"selection": 1.2}, "perta": {"order": 1.5}}.get(name, {})
        found[name] = unlearn(
            UnlearnConfig(
                base=str(world.base),
                full=str(world.full),
                forget=str(world.forget),
                retain=str(world.retain),
                output=folder / name,
                work_dir=folder / "work",
                evaluate=name in ("tv", "retrain"),
                scoring=ScoringConfig(max_new_tokens=4),
                tune=TUNE,
                training=TrainSettings(epochs=1 if name in TRAINED else None),
                weighting=chosen(method=method, scaling_coef=alpha, **more),
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
    assert stages("perta-project") == {*tuned, "retain_moments", "direction"}
    assert stages("auto") == stages("perta-project") | {"calibrate", "rounds", "strength"}
    assert stages("perta-kron") == stages("perta-project") | {"forget_moments"}
    assert stages("msa") == {*tuned, "retain_finetune"}
    assert stages("ssd") == {"edit", *both}
    assert stages("interpolate") == {"edit"}
    assert stages("npo") == {"train"}


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
    for name in TRAINED:
        assert "trained" in said[name]
        assert "moved back" not in said[name]
    for name in ("ssd", "interpolate"):
        assert "learning the removed examples" not in said[name]
    assert "examples to keep" in said["msa"]
