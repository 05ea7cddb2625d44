"""The report: roles, verdict, intervals, redaction, and what it says when parts are missing."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest
from blake3 import blake3
from report_cases import (
    EVIL,
    FORGET_SET,
    MEANS,
    PRINTS,
    RETAIN_SET,
    SECRET,
    Json,
    answers,
    compared,
    edit_record,
    metric,
    named,
    results,
    tuned,
    write,
    write_demo,
)

from perta.data.batch import Encoded
from perta.data.examples import load_examples
from perta.data.rows import csv_text, write_jsonl
from perta.data.tokens import EncodedSet
from perta.errors import ConfigError, DataError, OutputExistsError
from perta.evidence.measures import read_measures
from perta.evidence.metrics import ks_test
from perta.evidence.scoring.items import Item
from perta.recipes.unlearn import Unlearned
from perta.report._page import Page
from perta.report._plots import edit_map, split_layers, truth_ratio_curves
from perta.report._sections import scale
from perta.report._svg import Axis, Curve, Ecdf, Point, Scatter, Style
from perta.report._tables import metric_tables, seed_table, styles, table_lines
from perta.report._texts import sample_sets
from perta.report.collect import Collection, Run, collect, costs
from perta.report.settings import ReportConfig
from perta.report.verdict.judge import Statement, Verdict, judge
from perta.report.verdict.words import Check
from perta.report.write import (
    _inline_style,
    _page_for,
    _write_figures,
    companion_folder,
    document,
    render,
    write_report,
)
from perta.stages.stage import At, run_file_stage

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu_reference_logs"


def page_of(*paths: Path | str, **options: object) -> str:
    """The page of some results."""
    config = ReportConfig(results=tuple(str(p) for p in paths))
    return render(_page_for(replace(config, **options)))  # type: ignore[arg-type]


def verdict_of(folder: Path, **models: tuple[float, float]) -> Verdict:
    """The verdict on the model `edited`, given (forget, retain) answer probabilities."""
    for name, (forget, retain) in models.items():
        write(folder / f"{name}.json", results(name, forget, retain))
    (verdict,) = judge(collect(named(folder)))
    return verdict


class Text(HTMLParser):
    """Text of a page, without style and script; counts what could run or load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self._silent = tag in ("script", "style")
        self.loads += [
            str(value)
            for name, value in attrs
            if name in ("src", "href", "srcset", "action") and not str(value).startswith("#")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        self._silent = self._silent and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text += f" {data}"


# --- readings ------------------------------------------------------------------------------


def test_no_interval_around_a_number_that_the_values_do_not_give() -> None:
    entry = metric([0.2, 0.4])
    assert read_measures({"forget_probability": entry})["forget_probability"].interval
    entry["agg_value"] = 0.9
    assert read_measures({"forget_probability": entry})["forget_probability"].interval is None


def test_aggregates_of_truth_ratios_are_recognised() -> None:
    rows = {"0": {"score": 2.0}, "1": {"score": 0.5}}
    symmetric = {"agg_value": 0.5, "value_by_index": rows}
    reading = read_measures({"forget_truth_ratio": symmetric})["forget_truth"]
    assert reading.interval is not None
    assert reading.examples == pytest.approx({"0": 0.5, "1": 0.5})
    margin = {"agg_value": 0.25, "value_by_index": rows}
    assert read_measures({"ra_Truth_Ratio": margin})["ra_truth"].examples == {"0": 0.0, "1": 0.5}


def test_values_that_are_missing_or_not_finite_stay_out() -> None:
    rows = {"0": {"score": 0.5}, "1": None, "2": {"score": None}}
    entry = {"agg_value": 0.5, "value_by_index": rows}
    assert read_measures({"forget_exact_memorization": entry})["forget_exact"].interval
    assert read_measures({"forget_quality": {"agg_value": None}}) == {}
    assert read_measures({"forget_quality": {"agg_value": float("nan")}}) == {}


def test_published_logs_are_read_in_full() -> None:
    if not LOGS.is_dir():
        pytest.skip(f"published logs are not at {LOGS}")
    logs = sorted(LOGS.glob("*.json"))
    names = ["full" if "full" in file.name else "retrained" for file in logs]
    runs = collect([f"{name}={file}" for name, file in zip(names, logs, strict=True)]).runs
    assert sorted(run.role for run in runs) == ["full", "full", "retrained", "retrained"]
    for run in runs:
        without = {key for key, r in run.measures.items() if r.interval is None}
        assert without <= {"forget_quality", "privleak"}
        for reading in run.measures.values():
            if reading.interval:
                assert reading.interval.low <= reading.value <= reading.interval.high


def test_forget_quality_of_published_logs_is_recomputed() -> None:
    if not LOGS.is_dir():
        pytest.skip(f"published logs are not at {LOGS}")
    full = LOGS / "llama-3.2-1b-instruct_full_forget01.json"
    retrained = LOGS / "llama-3.2-1b-instruct_retain99.json"
    collection = collect([f"method={full}", f"retrained={retrained}"])
    looks = styles(collection.runs)
    found = truth_ratio_curves(collection, collection.by_role("edited"), looks)
    assert found is not None
    row = next(row for row in found[1] if row[0] == "method")
    assert (row[1], row[3]) == (40, "0.007")


def test_ks_distance_of_two_small_samples() -> None:
    assert ks_test([1, 2, 3, 4], [3, 4, 5, 6])[0] == 0.5


# --- what the inputs are ---------------------------------------------------------------------


def test_roles_come_from_records(tmp_path: Path) -> None:
    folder = write_demo(tmp_path)
    for old, new in (("full", "one"), ("base", "two"), ("retrained", "three")):
        (folder / "results" / f"{old}.json").rename(folder / "results" / f"{new}.json")
    found = collect([str(folder)])
    assert [(run.label, run.role) for run in found.runs] == [
        ("base", "base"),
        ("full", "full"),
        ("retrained", "retrained"),
        ("perta-grad", "edited"),
        ("tv", "edited"),
    ]
    edited = found.by_role("edited")
    assert [(run.method, run.alpha, run.seed) for run in edited] == [
        ("perta-grad", 1.5, 0),
        ("tv", 0.8, 0),
    ]
    assert edited[0].edit["tensors"]


@pytest.mark.parametrize(
    "record", [None, [], {"settings": None}, {"inputs": {"base": []}}, {"unlearn": {"rounds": [3]}}]
)
def test_results_with_a_record_of_another_form_have_none(tmp_path: Path, record: object) -> None:
    content = {**results("x", 0.1, 0.9), "perta": record}
    [run] = collect([str(write(tmp_path / "x.json", content))]).runs
    assert run.label == "x"
    assert not run.record


def test_names_of_files_give_no_role(tmp_path: Path) -> None:
    names = ("llama_full_forget01", "npo-retain", "retain99", "reference", "base")
    for name in names:
        found = results(name, 0.5, 0.5)
        del found["perta"]
        found["forget_probability"]["agg_value"] += len(name) / 1e9  # they are not the same
        write(tmp_path / f"{name}.json", found)
    alone = collect([str(tmp_path)])
    assert {run.role for run in alone.runs} == {"edited"}
    assert any("each is judged as if it were the result" in notice for notice in alone.notices)
    ours = write(tmp_path / "ours" / "x.json", results("x", 0.1, 0.9))
    beside = collect([str(tmp_path), f"ours={ours}"])
    assert {run.label for run in beside.runs if run.role == "other"} == set(names)
    assert [verdict.run.label for verdict in judge(beside)] == ["ours"]
    assert any("shown and not judged" in notice for notice in beside.notices)


def models(folder: Path, records: Mapping[str, Json]) -> dict[str, Path]:
    """Folders of models with their records, and one edit of `full` by task vectors."""
    edit = edit_record("tv", 0.8)
    edit["unlearn"] = {"inputs": {"forget": FORGET_SET, "retain": RETAIN_SET}}
    for name, record in {**records, "tv": edit}.items():
        write(folder / name / "perta.json", record)
    return {
        name: write(folder / "results" / f"{i}.json", results(name, 0.1, 0.9))
        for i, name in enumerate(("base", "full", "forget_checkpoint", "tv", *records))
    }


def retuned(**changes: str) -> Json:
    """Record of a model that was tuned as the retrained one is, but for some changes."""
    record = tuned("retrained", RETAIN_SET, 20)
    record["inputs"] |= {name: v for name, v in changes.items() if name in ("base", "data")}
    record["settings"] |= {name: v for name, v in changes.items() if name == "samples"}
    return record


@pytest.mark.parametrize(
    ("changes", "role", "contradiction"),
    [
        ({}, "retrained", None),
        ({"base": PRINTS["full"]}, "other", "tuned from the full model"),
        ({"base": "9e" * 32}, "other", "tuned from another model than the base"),
        ({"data": "d0" * 32}, "other", "rows that were to be removed"),  # what full was tuned on
        ({"data": FORGET_SET}, "other", "rows that were to be removed"),
        ({"data": "77" * 32}, "other", None),
        ({"samples": "0.5"}, "other", None),
    ],
)
def test_retrained_is_what_was_tuned_from_the_base_on_the_retain_set(
    tmp_path: Path, changes: Mapping[str, str], role: str, contradiction: str | None
) -> None:
    records = {"full": tuned("full", "d0" * 32, 30), "retrained": retuned(**changes)}
    files = models(tmp_path, records)
    given = [str(tmp_path / name) for name in ("tv", "full", "retrained")]
    roles = {run.fingerprint: run.role for run in collect([*given, *map(str, files.values())]).runs}
    assert roles[PRINTS["retrained"]] == role
    assert roles[PRINTS["full"]] == "full"
    assert roles[PRINTS["base"]] == "base"
    assert roles[PRINTS["forget_checkpoint"]] == "forget checkpoint"
    named = [*given, str(files["tv"]), f"retrained={files['retrained']}"]
    if contradiction:
        with pytest.raises(DataError, match=contradiction):
            collect(named)
        return
    found = collect(named)
    assert {run.role for run in found.runs} == {"edited", "retrained"}
    is_stated = any("as stated by the user" in notice for notice in found.notices)
    assert is_stated == (role != "retrained")
    assert ("as stated by the user" in page_of(*named)) == is_stated


@pytest.mark.parametrize(
    ("name", "model", "contradiction"),
    [
        ("retrained", "full", "it is a model of another part there: full"),
        ("retrained", "tv", "it is a model of another part there: edited"),
        ("retrained", "forget_checkpoint", "it is a model of another part"),
        ("full", "base", "made from another full model"),
        ("base", "full", "made from another base model"),
    ],
)
def test_a_name_that_records_contradict_is_refused(
    tmp_path: Path, name: str, model: str, contradiction: str
) -> None:
    files = models(tmp_path, {})
    with pytest.raises(DataError, match=contradiction):
        collect([str(tmp_path / "tv"), f"{name}={files[model]}"])
    with pytest.raises(DataError, match="another part there: edited"):
        collect([f"retrained={tmp_path / 'tv'}"])


def test_comparisons_say_what_their_models_were(tmp_path: Path) -> None:
    runs = {
        "retrained_seed-0": compared("retrained", 0.06, 0.92),
        "full_seed-0": compared("full", 0.93, 0.92),
        "npo-retain_seed-0": compared("edited", 0.2, 0.9, method="npo-retain", scaling_coef=3.0),
    }
    for name, content in runs.items():
        write(tmp_path / f"{name}.json", content)
    found = collect([str(tmp_path)])
    assert [(run.label, run.role) for run in found.runs] == [
        ("full", "full"),
        ("retrained", "retrained"),
        ("npo-retain", "edited"),
    ]
    (verdict,) = judge(found)
    assert verdict.calibration == "retrained"
    assert verdict.forgetting.lead is not None
    assert verdict.forgetting.lead.reference == pytest.approx(0.06)


def unlearned(
    folder: Path, name: str, full: str, forget: tuple[str, str], work: Path
) -> tuple[Path, Json, Json]:
    """An output of `perta unlearn` and results before and after, of a full model of any name."""
    record = edit_record("tv", 0.8)
    record["content"], record["inputs"]["full"] = PRINTS.get(name, name), full
    record["settings"]["output"] = str(folder / name)
    sets = {"forget": forget[0], "retain": RETAIN_SET}
    evaluations = [
        results(place, probability, 0.9, inputs={"checkpoint": content, **sets})
        for place, content, probability in (
            ("before", full, 0.9),
            ("after", record["content"], 0.1),
        )
    ]
    for evaluation, place in zip(evaluations, (full, name), strict=True):
        evaluation["perta"]["settings"] |= {
            "checkpoint": str(folder / place),
            "forget": forget[1],
        }
    record["unlearn"] = {
        "settings": {"work_dir": str(work)},
        "inputs": {"base": PRINTS["base"], "full": full, **sets},
        "sources": {"forget": forget[1]},
        "seconds": {},
        "evaluation": {
            "before": {"forget_probability": 0.9},
            "after": {"forget_probability": 0.1},
        },
    }
    write(folder / name / "perta.json", record)
    before, after = evaluations
    return folder / name, before, after


def test_a_second_request_is_about_its_own_model_and_rows(tmp_path: Path) -> None:
    work = tmp_path / "second.work"
    unlearned(tmp_path, "first", PRINTS["full"], ("11" * 32, "/d/first.jsonl"), tmp_path / "w")
    output, before, after = unlearned(
        tmp_path, "second", "first", ("22" * 32, "/d/second.jsonl"), work
    )
    write(work / "evaluation_before.json", before)
    write(work / "evaluation_after.json", after)
    for given in ([output], [output, work], [work, output]):
        found = collect(list(map(str, given)))
        assert [(run.role, run.fingerprint) for run in found.runs] == [
            ("full", "first"),
            ("edited", "second"),
        ]
        page = page_of(*given)
        assert "<title>Unlearning report: second</title>" in page
        assert "second.jsonl" in page
        assert "first.jsonl" not in page
    # Both requests at once: the model between them has a part in each.
    both = collect([str(tmp_path / "first"), str(output)])
    parts = [(run.role, run.fingerprint) for run in both.runs]
    assert ("edited", "first") in parts
    assert ("full", "first") in parts


def test_a_shared_work_folder_shows_no_other_runs_numbers(tmp_path: Path) -> None:
    work, rows = tmp_path / "work", (FORGET_SET, "/d/forget.jsonl")
    mine, _, _ = unlearned(tmp_path, "mine", PRINTS["full"], rows, work)
    _, before, after = unlearned(tmp_path, "theirs", PRINTS["full"], rows, work)
    after["forget_probability"] = metric([0.3] * 40, "prob")
    write(work / "evaluation_before.json", before)
    write(work / "evaluation_after.json", after)
    found = collect([str(mine)])
    (edited,) = found.by_role("edited")
    assert edited.measures["forget_probability"].value == 0.1
    assert any("evaluation_after.json in work is of another model" in n for n in found.notices)
    assert "<title>Unlearning report: mine</title>" in page_of(mine, work)


def test_results_of_a_model_that_was_replaced_are_refused(tmp_path: Path) -> None:
    record = edit_record("tv", 0.8)
    write(tmp_path / "tv" / "perta.json", {**record, "content": "00" * 32})
    old = results("tv", 0.1, 0.9)
    old["perta"]["settings"]["checkpoint"] = str(tmp_path / "tv")
    file = write(tmp_path / "old.json", old)
    with pytest.raises(DataError, match="measured another model than the one in"):
        collect([str(tmp_path / "tv"), str(file)])


def test_labels_name_and_place_a_model(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", results("x", 0.1, 0.9))
    other = write(tmp_path / "y.json", results("y", 0.9, 0.9))
    runs = collect([f"our edit={file}", f"full={other}"]).runs
    assert [(run.label, run.role) for run in runs] == [("full", "full"), ("our edit", "edited")]


def test_strengths_and_seeds_tell_runs_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        for alpha in (0.5, 1.5):
            made = compared(
                "edited", 0.1 + seed / 50, 0.9, seed=seed, method="tv", scaling_coef=alpha
            )
            write(tmp_path / f"{alpha} {seed}.json", made)
    runs = collect([str(tmp_path)]).runs
    assert [run.label for run in runs] == [
        "tv α 0.5 seed 0",
        "tv α 0.5 seed 1",
        "tv α 1.5 seed 0",
        "tv α 1.5 seed 1",
    ]
    table = seed_table(runs)
    assert table is not None
    assert [row.entries[0].text for row in table.rows] == ["tv, α 0.5", "tv, α 1.5"]
    # Means 0.10 and 0.12 have mean 0.11 and standard deviation 0.02/sqrt(2).
    assert (table.rows[0].entries[1].text, table.rows[0].entries[1].small) == ("0.110", "± 0.014")


def test_output_of_unlearn_with_and_without_its_work_folder(tmp_path: Path) -> None:
    record = edit_record()
    record["unlearn"] = {
        "settings": {"work_dir": str(tmp_path / "gone")},
        "inputs": {"forget": "f0" * 32, "retain": "a0" * 32},
        "sources": {"forget": "/secret/place/erase.jsonl"},
        "seconds": {"finetune": 3.0, "edit": 0.5},
        "evaluation": {
            "before": {"forget_probability": 0.9, "retain_probability": 0.9},
            "after": {"forget_probability": 0.1, "retain_probability": 0.8},
        },
    }
    output = tmp_path / "cleaned"
    write(output / "perta.json", record)
    alone = collect([str(output)])
    assert [(run.label, run.role) for run in alone.runs] == [
        ("full", "full"),
        ("cleaned", "edited"),
    ]
    assert len(alone.notices) == 2
    page = page_of(output)
    assert "erase.jsonl" in page
    assert "/secret/place" not in page
    work = tmp_path / "cleaned.work"
    write(work / "evaluation_before.json", results("full", 0.9, 0.9))
    write(work / "evaluation_after.json", results("perta-grad", 0.1, 0.8))
    write(work / "forget_checkpoint" / "perta.json", tuned("forget_checkpoint", "f0" * 32, 7))
    whole = collect([str(output)])
    assert not whole.notices
    assert whole.runs[1].measures["forget_probability"].interval is not None
    assert costs(whole)[0][0].took.total == 3.5  # as this run noted, not as it was made again


@pytest.mark.parametrize(("back", "strength"), [(None, 1.0), (0.27, 1.0), (0.27, 0.8)])
def test_what_comes_back_is_said_where_the_rounds_told(
    tmp_path: Path, back: float | None, strength: float
) -> None:
    """Of a weaker edit than theirs they tell nothing."""
    folder, _, _ = unlearned(
        tmp_path, "cleaned", PRINTS["full"], (FORGET_SET, "f.jsonl"), tmp_path / "w"
    )
    record = json.loads((folder / "perta.json").read_text())
    record["unlearn"]["rounds"] = [{"comes_back": None}, {"comes_back": back}]
    record["unlearn"]["strength"] = {"scaling_coef": strength}
    write(folder / "perta.json", record)
    text = Text(page_of(folder)).text
    is_told = back is not None and strength == 1
    assert ("brings the removed answers back was not measured" in text) == (not is_told)
    assert ("in 64 samples with a chance of 27% in mean" in text) == is_told


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no"):
        collect([str(tmp_path / "nothing.json")])
    with pytest.raises(DataError, match="holds no evaluation results"):
        collect([str(write(tmp_path / "other.json", {"a": 1}))])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither results"):
        collect([str(tmp_path / "empty")])
    write(tmp_path / "tuned" / "perta.json", tuned("full", "d0", 1))
    with pytest.raises(DataError, match="Nothing to report"):
        collect([str(tmp_path / "tuned")])
    # Beside a folder that holds some, too: a yardstick that is stated is not left out in silence.
    folder = tmp_path / "results"
    write(folder / "one.json", results("edited", 0.1, 0.9))
    with pytest.raises(DataError, match="neither results"):
        collect([str(folder), f"retrained={tmp_path / 'empty'}"])
    with pytest.raises(DataError, match=r"^retrained=.*tuned: there are no results of one model"):
        collect([str(folder), f"retrained={tmp_path / 'tuned'}"])
    assert collect([f"retrained={folder}"]).by_role("retrained")
    write(folder / "two.json", results("full", 0.9, 0.9))
    with pytest.raises(DataError, match="no results of one model"):
        collect([f"retrained={folder}"])
    with pytest.raises(ConfigError, match="name at least one"):
        write_report(ReportConfig(output=tmp_path / "r.html"))


# --- the verdict -----------------------------------------------------------------------------


def test_verdict_when_all_is_well(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, full=(0.93, 0.92), retrained=(0.05, 0.92), edited=(0.06, 0.91))
    assert verdict.headline == "Forgotten as far as measured, and the rest is kept."
    assert (verdict.forgetting.status, verdict.retention.status) == ("met", "met")
    assert "as improbable as for a model that never saw them" in verdict.forgetting.text
    assert verdict.forgetting.numbers == (
        "Answer probability: 0.06 against 0.05 for the retrained model; before the edit it was "
        "0.93 (n\u00a0=\u00a040)."
    )
    # (0.06 - 0.05) / (0.93 - 0.05)
    lead = verdict.forgetting.lead
    assert lead is not None
    assert lead.share == pytest.approx(0.01 / 0.88)


def test_what_is_surely_above_the_reference_is_only_nearly_as_improbable(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, full=(0.93, 0.92), retrained=(0.05, 0.92), edited=(0.1, 0.91))
    assert verdict.forgetting.status == "met"
    assert "are now nearly as improbable as" in verdict.forgetting.text
    below = verdict_of(tmp_path, full=(0.93, 0.92), retrained=(0.05, 0.92), edited=(0.03, 0.91))
    assert "are now as improbable as" in below.forgetting.text


@pytest.mark.parametrize(
    ("forget", "retain", "headline"),
    [
        (0.06, 0.80, "Forgotten as far as measured, at some cost to the rest."),
        (0.06, 0.40, "Forgotten as far as measured, but much else is lost with it."),
        (0.30, 0.92, "Only partly forgotten; the rest is kept."),
        (0.80, 0.92, "Not forgotten; the rest is kept."),
        (0.80, 0.30, "Not forgotten, and much else is lost."),
    ],
)
def test_verdict_when_something_is_wrong(
    tmp_path: Path, forget: float, retain: float, headline: str
) -> None:
    verdict = verdict_of(
        tmp_path, full=(0.93, 0.92), retrained=(0.05, 0.92), edited=(forget, retain)
    )
    assert verdict.headline == headline
    broken = retain < 0.5 and forget < 0.1
    assert any("damaged model" in note for note in verdict.notes) == broken


def test_one_measure_that_still_finds_the_answers_decides(tmp_path: Path) -> None:
    write(tmp_path / "full.json", results("full", 0.93, 0.92))
    write(tmp_path / "retrained.json", results("retrained", 0.05, 0.92))
    edited = results("edited", 0.05, 0.92)
    edited["forget_extraction_strength"] = metric([0.9] * 40)
    write(tmp_path / "edited.json", edited)
    (verdict,) = judge(collect(named(tmp_path)))
    assert verdict.forgetting.status == "not"
    assert "by another measure, Extraction strength, what was learned is still there" in (
        verdict.forgetting.text
    )
    assert verdict.forgetting.numbers.startswith("Extraction strength: 0.90 against")


def test_few_and_scattered_examples_are_not_called_sure(tmp_path: Path) -> None:
    names = {"full": (0.9, 0.9), "retrained": (0.2, 0.9)}
    for name, (forget, retain) in names.items():
        write(tmp_path / f"{name}.json", results(name, forget, retain, n=4))
    edited = results("edited", 0.2, 0.9, n=4)
    edited["forget_probability"] = metric([0.0, 0.1, 0.3, 0.4], "prob")
    write(tmp_path / "edited.json", edited)
    (verdict,) = judge(collect(named(tmp_path)))
    assert verdict.forgetting.status == "unclear"
    assert verdict.headline.startswith("Probably forgotten")
    assert "too few examples to be sure" in verdict.forgetting.text


def test_one_exposed_example_is_named_though_the_mean_is_low(tmp_path: Path) -> None:
    for name in ("full", "retrained"):
        write(tmp_path / f"{name}.json", results(name, 0.9 if name == "full" else 0.05, 0.9))
    edited = results("edited", 0.05, 0.9)
    edited["forget_probability"] = metric([0.02] * 39 + [0.99], "prob")
    write(tmp_path / "edited.json", edited)
    (verdict,) = judge(collect(named(tmp_path)))
    assert any("most exposed removed example" in n and "0.99" in n for n in verdict.notes)


def test_without_a_retrained_model_holdout_then_base_calibrate(tmp_path: Path) -> None:
    edited = results("edited", 0.06, 0.9)
    write(tmp_path / "full.json", results("full", 0.93, 0.92))
    write(tmp_path / "base.json", results("base", 0.05, 0.1))
    write(tmp_path / "edited.json", edited)
    (verdict,) = judge(collect(named(tmp_path)))
    assert verdict.calibration == "base"
    assert "There is no retrained reference and no held-out set" in verdict.calibrated_on
    assert "for the base model, which never saw them" in verdict.forgetting.text
    edited["holdout_probability"] = metric([0.05] * 30, "prob")
    write(tmp_path / "edited.json", edited)
    (verdict,) = judge(collect(named(tmp_path)))
    assert verdict.calibration == "holdout"
    assert "against 0.05 on unseen examples" in verdict.forgetting.numbers


def test_without_any_reference_nothing_is_claimed(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, full=(0.93, 0.92), edited=(0.06, 0.9))
    assert verdict.calibration is None
    assert verdict.forgetting.status == "unknown"
    assert verdict.headline == "Forgetting cannot be judged; the rest is kept."
    assert "no model that never saw them" in verdict.forgetting.text


def test_a_reference_on_other_examples_is_not_used(tmp_path: Path) -> None:
    write(tmp_path / "full.json", results("full", 0.93, 0.92))
    other = results("retrained", 0.05, 0.92, inputs={"forget": "b1" * 32})
    write(tmp_path / "retrained.json", other)
    write(tmp_path / "edited.json", results("edited", 0.06, 0.9))
    (verdict,) = judge(collect(named(tmp_path)))
    assert verdict.calibration is None
    assert "Not measured on the same examples as edited" in page_of(*named(tmp_path))


def test_the_reference_of_the_same_seed_is_used(tmp_path: Path) -> None:
    for seed, forget in ((0, 0.05), (1, 0.15)):
        made = compared("retrained", forget, 0.92, seed=seed)
        write(tmp_path / f"retrained_{seed}.json", made)
    write(tmp_path / "full.json", compared("full", 0.93, 0.92, seed=1))
    write(tmp_path / "tv.json", compared("edited", 0.15, 0.9, seed=1, method="tv"))
    (verdict,) = judge(collect([str(tmp_path)]))
    assert verdict.forgetting.lead is not None
    assert verdict.forgetting.lead.reference == pytest.approx(0.15)


def test_forget_quality_speaks_only_beside_a_retrained_model(tmp_path: Path) -> None:
    edited = results("edited", 0.06, 0.9)
    edited["forget_quality"] = {"agg_value": 0.004}
    write(tmp_path / "edited.json", edited)
    write(tmp_path / "full.json", results("full", 0.93, 0.92))
    (verdict,) = judge(collect(named(tmp_path)))
    assert not any("truth ratios" in note for note in verdict.notes)
    write(tmp_path / "retrained.json", results("retrained", 0.05, 0.92))
    (verdict,) = judge(collect(named(tmp_path)))
    assert any("can be told apart" in n and "p = 0.004" in n for n in verdict.notes)


def test_the_best_model_comes_first_unless_another_is_asked_for(tmp_path: Path) -> None:
    folder = write_demo(tmp_path)
    assert [v.run.label for v in judge(collect([str(folder)]))] == ["perta-grad", "tv"]
    page = page_of(folder, subject="tv")
    assert "<title>Unlearning report: tv</title>" in page
    with pytest.raises(ConfigError, match="not an edited model of this report: perta-grad, tv"):
        page_of(folder, subject="nobody")


# --- texts -----------------------------------------------------------------------------------


def test_texts_of_all_sets_are_withheld(tmp_path: Path) -> None:
    page = page_of(write_demo(tmp_path))
    text = Text(page).text
    for secret in (SECRET, "Caldholm", "Where was person", "Nobody knows", "It is 0.", "What is 0"):
        assert secret not in page
    assert f"{len(SECRET) + 2} characters" in text
    assert "prints the texts" not in page


def test_a_withheld_text_leaves_no_hash_to_check_a_guess(tmp_path: Path) -> None:
    account = "Your account is DE79 1200 0000 0123 4567 89."
    made = results("x", 0.1, 0.9)
    made["forget_rougeL_recall"] = answers([("Which account?", account, account, 1.0)] * 40)
    page = page_of(write(tmp_path / "x.json", made))
    for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5, blake3):
        assert digest(account.encode()).hexdigest()[:6] not in page


def test_texts_appear_only_on_request_and_under_a_warning(tmp_path: Path) -> None:
    page = page_of(write_demo(tmp_path), show_texts=True)
    assert f"{SECRET} 0" in page
    assert "It is 0." in page
    assert 'role="alert"' in page
    assert "This page prints the texts that were to be forgotten, and those to keep." in page


WORDS = [f"{a}{b}{c}" for a in ("zor", "vil", "mep", "quad") for b in "aeiou" for c in "xbtk"]


@pytest.mark.parametrize("seed", range(4))
def test_no_part_of_a_text_is_in_the_page_or_its_files(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(12, 30)))

    made = {name: results(name, *values) for name, values in MEANS.items()}
    texts: list[str] = []
    for place in ("forget", "retain"):
        size = draw.randint(1, 40)
        rows = [(sentence(), sentence()) for _ in range(size)]
        texts += [text for row in rows for text in row]
        for found in made.values():
            # Answers quote parts of any text, and short secrets.
            said = [" ".join([sentence(), *draw.choice(texts).split()[3:16]]) for _ in rows]
            said[0] += f" PIN {seed}4711-XQ"
            found[f"{place}_rougeL_recall"] = answers(
                [(*row, text, 0.5) for row, text in zip(rows, said, strict=True)]
            )
            texts += said
    folder = write_demo(tmp_path / "demo")
    for name, found in made.items():
        write(folder / "results" / f"{name}.json", found)
    page = write_report(ReportConfig(results=(str(folder),), output=tmp_path / "r.html"))
    written = [page, *companion_folder(page).iterdir()]
    whole = "".join(file.read_bytes().decode("utf-8", "ignore") for file in written)
    assert "4711-XQ" not in whole
    assert not [word for word in WORDS if word in whole]  # let alone eight in a row


def test_small_sets_show_no_fingerprint(tmp_path: Path) -> None:
    for n, shown in ((3, False), (12, True)):
        made = results("edited", 0.1, 0.9, n=n)
        made["retain_probability"] = metric([0.9] * 20, "prob")
        page = page_of(f"edited={write(tmp_path / f'{n}.json', made)}")
        assert (FORGET_SET[:16] in page) == shown
        assert RETAIN_SET[:16] in page


def test_no_repr_carries_texts(tmp_path: Path) -> None:
    file = write_jsonl(
        [{"question": "Where?", "answer": f"{SECRET} {i}"} for i in range(2)], tmp_path / "d.jsonl"
    )
    examples = load_examples(file)
    encoded = Encoded((5001, 5002), (-100, 5002), 1)
    result = results("full", 0.9, 0.9)
    found = collect([f"full={write(tmp_path / 'full.json', result)}"])
    subject = found.runs[0]
    shown = sample_sets(subject, [], 2, show=True)
    saved = run_file_stage("x", At(tmp_path / "x.json"), {}, {}, lambda: result)
    done = Unlearned(tmp_path, {}, result, result)
    values = (examples, examples.examples, encoded, EncodedSet((encoded,), (SECRET,)), found)
    for value in (*values, subject, shown, saved, done, Item((encoded,), (5001,))):
        assert "Mira" not in repr(value)
        assert "500" not in repr(value)
    assert "forget_probability" in repr(saved)


def test_samples_are_the_first_and_the_most_exposed() -> None:
    found = results("edited", 0.1, 0.9)
    rows = found["forget_probability"]["value_by_index"]
    rows["7"]["prob"] += 0.5
    found["forget_probability"]["agg_value"] += 0.5 / 40
    # Row 2 of the file was left out.
    left = {str(i): {"row": i + 1 + (i > 0)} for i in range(40)}
    found["forget_row"] = {"agg_value": 40, "value_by_index": left}
    run = Run("edited", "edited", read_measures(found), found)
    forget, retain = sample_sets(run, [], 2, show=True)
    assert [(s.number, s.exposed) for s in forget.samples] == [
        ("1", False),
        ("3", False),
        ("9", True),
    ]
    assert (forget.first, forget.total, forget.withheld) == (2, 40, False)
    assert [s.number for s in retain.samples] == ["1", "2"]
    # What all prompts begin with is left out.
    assert retain.samples[0].question.text == "What is 0 + 0?"
    assert sample_sets(run, [], 0, show=True) == []


@pytest.mark.parametrize("show_texts", [False, True])
def test_markup_in_answers_stays_text(tmp_path: Path, show_texts: bool) -> None:
    page = page_of(write_demo(tmp_path, evil=True), show_texts=show_texts)
    parsed = Text(page)
    assert parsed.tags["script"] == 1
    assert "img" not in parsed.tags
    assert (EVIL in parsed.text) == show_texts


def test_markup_in_labels_and_titles_stays_text(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", results("x", 0.1, 0.9))
    parsed = Text(page_of(f"{EVIL.replace('=', '')}={file}", title=EVIL))
    assert parsed.tags["script"] == 1
    assert "img" not in parsed.tags


# --- the page and the files beside it --------------------------------------------------------


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of(write_demo(tmp_path))
    assert Text(page).loads == ["data:,"]
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)


def test_paths_are_cut_to_their_last_part(tmp_path: Path) -> None:
    assert "/home/someone" not in page_of(write_demo(tmp_path))


def test_every_missing_part_is_said(tmp_path: Path) -> None:
    found = results("x", 0.1, 0.9)
    del found["perta"]
    text = Text(page_of(write(tmp_path / "x.json", found))).text
    for sentence in (
        "There is no record of the edit beside these results",
        "The results hold no truth ratios",
        "The results carry no record of how long the edit took",
        "The results carry no record of what made them",
        "The model before the edit was not evaluated",
    ):
        assert sentence in text
    bare = {"forget_probability": {"agg_value": 0.1}}
    text = Text(page_of(write(tmp_path / "bare.json", bare))).text
    for sentence in (
        "so there is no trade-off to plot",
        "The results hold no answer probability of single examples",
        "The results hold no generated answers",
        "How much of everything else was kept was not measured",
    ):
        assert sentence in text


def test_reasons_for_what_was_left_out_are_passed_on(tmp_path: Path) -> None:
    found = results("edited", 0.1, 0.9)
    found["forget_quality"] = {"agg_value": None, "missing": "There is no reference."}
    page = page_of(write(tmp_path / "edited.json", found))
    assert "Forget quality (forget_quality)" in page
    assert "There is no reference." in page


def test_results_without_an_edited_model_are_shown_without_a_verdict(tmp_path: Path) -> None:
    file = write(tmp_path / "full.json", results("full", 0.9, 0.9))
    page = page_of(f"full={file}")
    assert "No edited model was evaluated" in page
    assert "Measurements without an edited model." in page


def test_an_edit_without_results_is_mapped(tmp_path: Path) -> None:
    write(tmp_path / "out" / "perta.json", edit_record())
    page = page_of(tmp_path / "out")
    assert "An edit without an evaluation." in page
    assert "Mean weighting of perta-grad" in page


def test_fingerprints_settings_and_versions_are_there(tmp_path: Path) -> None:
    page = page_of(write_demo(tmp_path))
    assert PRINTS["full"][:16] in page
    assert PRINTS["forget_checkpoint"] in page
    assert "torch 2.0" in page
    assert "1.5" in page


def test_maps_cover_layers_and_modules() -> None:
    run = Run("perta-grad", "edited", record=edit_record())
    maps = edit_map(run)
    weighting, change = maps.figures
    assert weighting.columns == ("q", "up", "down")
    assert weighting.rows == ("0", "1", "2")
    cell = next(c for c in weighting.cells if (c.row, c.column) == (2, 1))
    assert cell.value == pytest.approx(0.3 + 0.05 * 2 + 0.02)
    cell = next(c for c in change.cells if (c.row, c.column) == (2, 1))
    assert cell.value == pytest.approx(3.0 / 100**0.5)  # a norm of 3 over 100 weights
    assert [row[0] for row in maps.outside] == ["model.embed_tokens.weight"]


def test_change_is_relative_where_norms_are_recorded() -> None:
    run = Run("perta-grad", "edited", record=edit_record(norms=True))
    change = edit_map(run).figures[1]
    assert change.legend.startswith("‖ΔW‖ / ‖W‖")
    assert max(cell.value for cell in change.cells) == pytest.approx(0.3)


def test_a_weighting_of_one_needs_no_map() -> None:
    maps = edit_map(Run("tv", "edited", record=edit_record("tv", 0.8)))
    assert len(maps.figures) == 1
    assert maps.sentences[0] == "The weighting is the same for every weight: W = 1.00."


def test_methods_without_a_weight_for_each_weight_map_the_change_alone() -> None:
    record = edit_record()
    for row in record["edit"]["tensors"]:
        row["mean_weighting"] = None
    maps = edit_map(Run("perta-input", "edited", record=record))
    assert [figure.css for figure in maps.figures] == ["hue-d"]
    assert "no map of W" in maps.sentences[0]
    assert maps.outside[0][1] == "–"


def test_experts_of_a_layer_are_one_cell() -> None:
    rows = [
        {"elements": n, "mean_weighting": w, "delta_norm": d, "task_vector_norm": 1.0, "name": name}
        for name, n, w, d in (
            ("model.layers.0.mlp.experts.0.up_proj.weight", 10, 0.2, 3.0),
            ("model.layers.0.mlp.experts.1.up_proj.weight", 30, 0.6, 4.0),
        )
    ]
    layers, outside = split_layers(rows)
    (place,) = layers.values()
    assert not outside
    assert (place.elements, place.change) == (40, 5.0)
    assert place.weighting == pytest.approx((10 * 0.2 + 30 * 0.6) / 40)


def test_costs_and_their_share_of_retraining(tmp_path: Path) -> None:
    found, retraining = costs(collect([str(write_demo(tmp_path))]))
    assert retraining == 20
    assert [(c.run.label, c.took.total) for c in found] == [("perta-grad", 4.5), ("tv", 4.5)]
    assert found[0].share == pytest.approx(4.5 / 20)


def test_tables_as_csv_hold_values_and_intervals(tmp_path: Path) -> None:
    runs = collect([str(write_demo(tmp_path))]).runs
    table = next(t for t in metric_tables(runs) if t.name == "measures_forget")
    rows = list(csv.DictReader(csv_text(table_lines(table)).splitlines()))
    grad = next(row for row in rows if row["model"] == "perta-grad")
    assert float(grad["Answer prob."]) == pytest.approx(0.07)
    assert float(grad["Answer prob. low"]) < 0.07 < float(grad["Answer prob. high"])
    assert grad["Answer prob. n"] == "40"


def test_formulas_in_labels_do_not_run_in_spreadsheets(tmp_path: Path) -> None:
    runs = [Run("=1+1", "edited", read_measures(results("x", 0.1, 0.9)))]
    assert "'=1+1," in csv_text(table_lines(metric_tables(runs)[0]))
    for start in "=+-@\t\r\n＝":
        cells = next(csv.reader(io.StringIO(csv_text([[f"{start}1+1", -1.5, "plain"]]), "")))
        assert cells == [f"'{start}1+1".replace("\r", "\n"), "-1.5", "plain"]


def test_page_and_files_are_written_and_replaced(tmp_path: Path) -> None:
    config = ReportConfig(
        results=(str(write_demo(tmp_path / "demo")),), output=tmp_path / "out" / "report.html"
    )
    page = write_report(config)
    folder = tmp_path / "out" / "report_files"
    names = {file.name for file in folder.iterdir()}
    for stem in ("trade_off_forget_probability_retain_probability", "answer_probability"):
        assert f"{stem}.svg" in names
    assert {"measures_forget.csv", "costs.csv", "edit_tv.csv", "change_tv.svg"} <= names
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    before = page.read_bytes()
    assert write_report(config) == page
    assert page.read_bytes() == before
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report_files"]


def test_what_is_not_a_report_is_not_replaced(tmp_path: Path) -> None:
    demo = str(write_demo(tmp_path / "demo"))
    page = tmp_path / "page.html"
    page.write_text("mine", "utf-8")
    config = ReportConfig(results=(demo,), output=page, figures=False)
    with pytest.raises(OutputExistsError, match="is not a report"):
        write_report(config)
    assert page.read_text("utf-8") == "mine"
    with pytest.raises(OutputExistsError, match="not made by perta"):
        write_report(replace(config, overwrite=True))
    assert page.read_text("utf-8") == "mine"
    page.write_text("", "utf-8")
    assert write_report(replace(config, overwrite=True)).read_text("utf-8").startswith("<!doctype")
    foreign = tmp_path / "other_files"
    foreign.mkdir()
    (foreign / "mine.csv").write_text("1", "utf-8")
    with pytest.raises(OutputExistsError, match="Move it away"):
        write_report(replace(config, output=tmp_path / "other.html", overwrite=True))
    assert (foreign / "mine.csv").exists()


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo")
    code = (
        "import sys; from pathlib import Path; from perta.report.settings import ReportConfig; "
        "from perta.report.write import write_report; "
        f"write_report(ReportConfig(results=({str(demo)!r},), "
        f"output=Path({str(tmp_path / 'r.html')!r}))); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_marks_differ_in_shape_and_not_only_in_colour() -> None:
    runs = [Run(name, "edited", method=name) for name in "abcdefgh"]
    looks = styles([*runs, Run("base", "base"), Run("retrained", "retrained"), Run("full", "full")])
    edited = [looks[run.label] for run in runs]
    assert len({look.shape for look in edited}) == len(edited)
    assert len({look.css for look in edited}) == len(edited)


def test_a_collection_without_anything_still_makes_a_page() -> None:
    page = render(Page(ReportConfig(results=("none",)), Collection((), {}), []))
    assert "No results of an evaluation were given." in page


@pytest.mark.parametrize(("before", "reference"), [(0.98, 0.45), (0.96, 0.99), (0.1, 0.9)])
def test_labels_of_the_verdicts_scale_do_not_touch(before: float, reference: float) -> None:
    check = Check("k", "l", before, 0.5, reference, 8, True, "met")
    pins = scale(Statement("met", "", "", (check,)), "retrained")[1:]
    width = 40  # percent of the line that a label takes on a phone
    start = {"left": 0.0, "middle": width / 2, "right": float(width)}
    places = [(pin.level, pin.percent - start[pin.side]) for pin in pins]
    (level, first), (other_level, second) = places
    assert level != other_level or abs(first - second) >= width


def test_a_file_names_every_curve_and_needs_no_page(tmp_path: Path) -> None:
    axis = Axis("share", 0.0, 1.0, ((0.0, "0"), (1.0, "1")))
    settings = "learning_rate=1e-4,epochs=10,steering_coef=240,retain_weight=1"
    name = f"rmu:{settings} at equal forgetting & resistance, seed 0, of all that were drawn"
    style, css = Style("s0", "circle"), files("perta").joinpath("report/assets/report.css")
    scatter = Scatter("a", "", "", "", (Point(0.9, 0.5, name, "", style),), axis, axis)
    curves = (Curve((0.1, 0.2), name, "", style), Curve((0.3,), "short", "", style))
    for figure in (scatter, Ecdf("b", "", curves, axis)):
        text = document(figure, _inline_style(css.read_text("utf-8")))
        assert "var(" not in text
        assert ".s0 { color: #0065a8; }" in text
        root = ElementTree.fromstring(text)
        written = list(root.iter("{http://www.w3.org/2000/svg}text"))
        # Nothing lies outside the drawing, at 6.5 units to a character.
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        mine = [n for n in written if n.text and n.attrib["text-anchor"] == "start"]
        assert all(float(n.attrib["x"]) + 6.5 * len(n.text or "") <= width for n in mine)
        assert all(float(n.attrib["y"]) < height for n in written)
        assert "steering_coef=240" in "".join(n.text or "" for n in mine)


def test_png_files_are_written_where_they_can_be_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = Axis("share", 0.0, 1.0, ((0.0, "0"), (1.0, "1")))
    figure = Ecdf("b", "", (Curve((0.1,), "x", "", Style("s0", "circle")),), axis)
    css = files("perta").joinpath("report/assets/report.css").read_text("utf-8")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "resvg_py", None)
        _write_figures([figure], css, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["b.svg"]
    pytest.importorskip("resvg_py")
    _write_figures([figure], css, tmp_path)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_printed_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perta.cli import main

    page = tmp_path / "r.html"
    words = ["report", str(write_demo(tmp_path / "demo")), "--output", str(page), "--json"]
    monkeypatch.setattr(sys, "argv", ["perta", *words, "--no-figures"])
    main()
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "r_files" / "verdict.json").read_text("utf-8"))
    assert printed == {"page": str(page), "verdict": written}


def test_no_control_of_a_record_reaches_page_or_tables(tmp_path: Path) -> None:
    """Wherever a text comes from: here a setting, a method and a place."""
    folder = write_demo(tmp_path / "demo")
    for file in folder.rglob("perta.json"):
        record = json.loads(file.read_text())
        escape, turned = "\x1b[31m", "\u202e"
        record["settings"] = {**record.get("settings", {}), "seed": escape, "base": turned}
        file.write_text(json.dumps(record))
    page = write_report(ReportConfig(results=(str(folder),), output=tmp_path / "r.html"))
    texts = [page.read_text("utf-8")]
    written = [file for file in (tmp_path / "r_files").iterdir() if file.suffix != ".png"]
    texts += [file.read_text("utf-8") for file in written]
    assert not any(mark in text for text in texts for mark in ("\x1b", "\u202e"))
