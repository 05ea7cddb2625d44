"""Retained rows that a run never uses: which, where they are kept, and what is judged on them."""

from __future__ import annotations

import json
import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import TUNE, World
from perta.cli import main
from perta.data.examples import ExampleSet, load_examples
from perta.errors import ConfigError, VerdictError
from perta.options import ScoringConfig, TrainSettings, WeightingConfig
from perta.recipes._request import Split, hold_back
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import Unlearned, unlearn
from perta.report.verdict.judge import require_verdict
from perta.stages.bench import write_people
from perta.stages.settings import PeopleConfig
from perta.store.record import read_manifest

Row = dict[str, Any]


def a_set(folder: Path, rows: list[Row]) -> ExampleSet:
    """Rows as a retain set."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_examples(file)


def numbered(n: int) -> list[Row]:
    """Different rows."""
    return [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(n)]


def sizes(split: Split) -> tuple[int, int]:
    """Rows that are protected, and held back."""
    return len(split.protected), 0 if split.held_back is None else len(split.held_back)


@pytest.mark.parametrize(
    ("n", "held"), [(1, 0), (31, 0), (32, 8), (79, 8), (120, 12), (2000, 200), (5000, 200)]
)
def test_a_tenth_at_least_8_and_at_most_200_where_there_are_enough(
    tmp_path: Path, n: int, held: int
) -> None:
    split = hold_back(a_set(tmp_path, numbered(n)), None, None)
    assert sizes(split) == (n - held, held)
    if not held:
        assert split.reason == f"{n} are too few to keep some out."


def test_the_parts_share_no_row_and_lose_none(tmp_path: Path) -> None:
    rows = a_set(tmp_path, numbered(100))
    split, again = hold_back(rows, None, None), hold_back(rows, None, None)
    assert split == again
    assert split.held_back is not None
    parts = [{e.row for e in part.examples} for part in (split.protected, split.held_back)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(1, 101))


def test_rows_of_a_subject_stay_together(tmp_path: Path) -> None:
    rows = [{**row, "person": f"P{i // 5}"} for i, row in enumerate(numbered(100))]
    split = hold_back(a_set(tmp_path, rows), None, None)
    assert split.by == "subject"
    assert sizes(split) == (90, 10)
    assert split.held_back is not None
    people = [{e.fields["person"] for e in p.examples} for p in (split.protected, split.held_back)]
    assert len(people[1]) == 2
    assert not people[0] & people[1]
    # Nine subjects are too few to give one away whole.
    few = [{**row, "person": f"P{i % 9}"} for i, row in enumerate(numbered(100))]
    assert hold_back(a_set(tmp_path, few), None, None).by == "row"
    named = [{**row, "who": i % 20} for i, row in enumerate(numbered(100))]
    assert hold_back(a_set(tmp_path, named), None, "who").by == "subject"


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    split = hold_back(a_set(tmp_path, numbered(50) * 2), None, None)
    assert split.held_back is not None
    parts = [{e.prompt for e in p.examples} for p in (split.protected, split.held_back)]
    assert not parts[0] & parts[1]
    assert hold_back(a_set(tmp_path, numbered(1) * 40), None, None).held_back is None


def test_as_many_as_the_user_says(tmp_path: Path) -> None:
    rows = a_set(tmp_path, numbered(20))
    assert sizes(hold_back(rows, "5", None)) == (15, 5)
    assert sizes(hold_back(rows, "0.5", None)) == (10, 10)
    assert sizes(hold_back(rows, "0", None)) == (20, 0)
    with pytest.raises(ConfigError, match="leaves none of the 20"):
        hold_back(rows, "20", None)
    with pytest.raises(ConfigError, match="--held-back"):
        hold_back(rows, "some", None)


def test_the_parts_on_disk_are_what_is_recorded_and_private(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    lines = "\n".join(f'"Who is {i}, ""x""?",É {i}' for i in range(40))
    table.write_text(f"question,answer\n{lines}\n", "utf-8")
    split = hold_back(load_examples(table), None, None)
    split.write(tmp_path / "work")
    assert split.held_back is not None
    for name, part in (("protected", split.protected), ("held_back", split.held_back)):
        file = tmp_path / "work" / f"retain_{name}.jsonl"
        assert load_examples(file).fingerprint == part.fingerprint
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retain set of 40 rows about 20 people."""
    folder = tmp_path_factory.mktemp("people") / "data"
    write_people(PeopleConfig(output=folder, people=21, questions=2, forget_people=1))
    return folder / "retain.jsonl"


def request(world: World, people: Path, output: Path, **more: Any) -> UnlearnConfig:
    settings: dict[str, Any] = {
        "weighting": WeightingConfig(method="perta-grad", scaling_coef=1.5),
        "tune": TUNE,
        "scoring": ScoringConfig(max_new_tokens=4),
        **more,
    }
    places = {"forget": str(world.forget), "retain": str(people), **settings}
    return UnlearnConfig(base=str(world.base), full=str(world.full), output=output, **places)


@pytest.fixture(scope="module")
def run(
    world: World, people: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[UnlearnConfig, Unlearned]:
    settings = request(world, people, tmp_path_factory.mktemp("run") / "out")
    return settings, unlearn(settings)


def inputs_of(place: Path) -> dict[str, str]:
    """Fingerprints of what an output was made from."""
    found: dict[str, str] = (read_manifest(place) or {})["inputs"]
    return found


def test_what_makes_the_result_never_sees_the_rows_that_judge_it(
    run: tuple[UnlearnConfig, Unlearned], people: Path
) -> None:
    settings, result = run
    work = settings.work_folder
    held = result.manifest["unlearn"]["held_back"]
    assert (held["rows"], held["of"], held["by"]) == (8, 40, "subject")
    assert inputs_of(work / "retain_importance")["data"] == held["protected"]
    for name in ("before", "after"):
        assert inputs_of(work / f"evaluation_{name}.json")["retain"] == held["fingerprint"]
    whole = load_examples(people)
    assert result.manifest["unlearn"]["inputs"]["retain"] == whole.fingerprint
    assert held["fingerprint"] != held["protected"] != whole.fingerprint
    assert result.verdict is not None
    assert any("8 of 40 examples to keep" in note for note in result.verdict.notes)


def test_every_run_is_judged_though_nothing_unseen_was_given(
    run: tuple[UnlearnConfig, Unlearned],
) -> None:
    settings, result = run
    base = json.loads((settings.work_folder / "evaluation_base.json").read_text("utf-8"))
    assert "forget_probability" in base
    assert "retain_probability" not in base
    verdict = result.verdict
    assert verdict is not None
    assert verdict.calibration == "base"
    assert verdict.forgetting.status != "unknown"
    # Two rows are no proof, whatever they say.
    assert verdict.status != "met"
    assert result.report is not None
    files = result.report.with_name(f"{result.report.stem}_files")
    record = json.loads((files / "verdict.json").read_text("utf-8"))
    assert record["headline"] == verdict.headline
    assert record["model"]["fingerprint"] == result.manifest["content"]


@pytest.mark.parametrize("method", ["graddiff", "retrain", "tv"])
def test_which_methods_have_rows_to_hold_back(
    world: World, people: Path, tmp_path: Path, method: str
) -> None:
    trains = method != "tv"
    settings = request(
        world,
        people,
        tmp_path / "out",
        weighting=WeightingConfig(method=method, scaling_coef=None if trains else 1.0),
        training=TrainSettings(epochs=1 if trains else None),
        evaluate=False,
    )
    manifest = unlearn(settings).manifest
    held = manifest["unlearn"]["held_back"]
    whole = load_examples(people).fingerprint
    if method == "graddiff":
        assert held["rows"] == 8
        assert manifest["inputs"]["retain"] == held["protected"]
    else:
        assert held["rows"] == 0
        assert held["used"] is trains
        assert manifest["inputs"].get("retain", whole) == whole


def test_facts_are_what_is_judged_and_the_base_finds_them(world: World, tmp_path: Path) -> None:
    bare = tmp_path / "forget.jsonl"
    rows = [json.loads(line) for line in world.forget.read_text("utf-8").splitlines()]
    plain = [{name: row[name] for name in ("question", "answer")} for row in rows]
    bare.write_text("".join(json.dumps(row) + "\n" for row in plain), "utf-8")
    settings = request(
        world,
        world.retain,
        tmp_path / "out",
        forget=str(bare),
        weighting=WeightingConfig(method="tv", scaling_coef=1.0),
    )
    result = unlearn(settings)
    assert result.verdict is not None
    assert "what the base model does not expect" in result.verdict.facts
    assert result.verdict.forgetting.numbers.startswith("Fact probability")
    lead = result.verdict.forgetting.lead
    assert lead is not None
    assert lead.core
    assert lead.reference is not None


def test_too_few_rows_are_judged_as_what_they_are(world: World, tmp_path: Path) -> None:
    result = unlearn(request(world, world.retain, tmp_path / "out"))
    assert result.verdict is not None
    assert result.verdict.retention.status != "met"
    notes = " ".join(result.verdict.notes)
    assert "took part in what made this model" in notes
    assert "6 are too few to keep some out" in notes


def test_a_script_can_ask_for_a_verdict(
    run: tuple[UnlearnConfig, Unlearned],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, result = run
    with pytest.raises(VerdictError, match="--fail-unless met"):
        require_verdict("met", result.verdict, result.folder)
    require_verdict(None, result.verdict, result.folder)
    words = ["perta", "unlearn", "--fail-unless", "met", "--method", "perta-grad"]
    for name in ("base", "full", "forget", "retain", "output"):
        words += [f"--{name}", str(getattr(settings, name))]
    words += ["--scaling-coef", "1.5", "--max-new-tokens", "4", "--epochs", str(TUNE.epochs)]
    words += ["--learning-rate", str(TUNE.learning_rate), "--batch-size", str(TUNE.batch_size)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert re.search(r"^Verdict: \S.*$", printed.out, re.MULTILINE)
    assert re.search(r"^error: --fail-unless met: .* stays\.$", printed.err, re.MULTILINE)
    assert settings.output.is_dir()
    page = settings.output.with_name("again.html")
    words = ["perta", "report", str(settings.output), "--output", str(page)]
    monkeypatch.setattr(sys, "argv", [*words, "--no-figures", "--fail-unless", "met"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert page.is_file()


def test_a_verdict_needs_an_evaluation(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fail-unless needs the evaluation"):
        request(world, world.retain, tmp_path / "out", evaluate=False, fail_unless="met")
