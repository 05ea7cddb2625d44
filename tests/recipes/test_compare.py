"""The comparison: who is compared, at which strength, on which rows, and what is kept of it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from conftest import TUNE, World
from helpers import tiny_llama
from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DataError,
    OutputExistsError,
    PertaError,
)
from perta.evidence.results import Results, read_results
from perta.evidence.settings import AbilityConfig
from perta.methods.method import KNOWN
from perta.methods.registry import load_methods
from perta.recipes.compare._draw import draw_sets
from perta.recipes.compare._edits import prepare_edit
from perta.recipes.compare._model import Bench, relearning_rate
from perta.recipes.compare._paths import TrainingPath
from perta.recipes.compare._search import nearest, search_equal
from perta.recipes.compare._spec import EditSpec, TrainingSpec, parse_spec
from perta.recipes.compare._summary import summarise, write_summary
from perta.recipes.compare.settings import CompareConfig, CompareTune
from perta.recipes.compare.study import bench_compare, plan_compare
from perta.report.write import companion_folder
from perta.store.arithmetic import Place, round_as_stored
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest


def test_a_spec_is_a_method_with_settings() -> None:
    spec = parse_spec("perta-input:rho=100,tokens=answer,at=full,share=0.2,include=*.mlp.*|*.q*", 4)
    assert isinstance(spec, EditSpec)
    assert spec.method.name == "perta-input"
    assert spec.method.settings["rho"] == 100
    assert spec.weighting.include == ("*.mlp.*", "*.q*")
    assert (spec.tokens, spec.at, spec.share) == ("answer", "full", 0.2)
    assert "/" not in spec.slug
    assert ":" not in spec.slug


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perta-kron:forget_damping=1", "unknown setting `forget_damping`"),
        ("perta-grat", "Did you mean `perta-grad`"),
        ("perta-kron:roh=1", "Did you mean `rho`"),
        ("perta-kron:rho", "not of the form key=value"),
        ("perta-kron:rho=-1", "rho is -1"),
        ("perta-kron:rho=high", "rho is high"),
        ("tv:rho=1", "unknown setting `rho`"),
        ("tv:granularity=row", "no --granularity"),
        ("perta-input:tokens=some", "tokens is some"),
        ("perta-input:share=0", "share is 0"),
        ("perta-input:share=1.2,general=true", "share is 1.2"),
        ("perta-input:general=yes please", "general is yes please"),
        ("tv:general=true", "`tv` uses none"),
        ("tv:scaling_coef=1", "unknown setting `scaling_coef`"),
        ("npo:rho=1", "unknown setting `rho`"),
        ("npo:lora_rank=4", "unknown setting"),
        ("retrain", "cannot be compared"),
        ("tv:forget_seeds=0", "forget_seeds is 0"),
        ("simnpu", "Did you mean `simnpo`"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_spec(text, 4)


@pytest.mark.parametrize("text", ["3e-5", "0.00003", "3.0e-05"])
def test_numbers_may_be_written_as_anywhere(text: str) -> None:
    spec = parse_spec(f"graddiff:learning_rate={text},epochs=2", 4)
    assert isinstance(spec, TrainingSpec)
    assert (spec.training.learning_rate, spec.training.epochs) == (3e-5, 2)


def test_a_training_method_takes_settings_of_training() -> None:
    spec = parse_spec("npo-retain:beta=0.5", 4)
    assert isinstance(spec, TrainingSpec)
    assert spec.method.name == "npo-retain"
    assert spec.method.settings["beta"] == 0.5
    assert (spec.training.batch_size, spec.training.accumulation) == (4, 1)


@pytest.mark.parametrize("first", [0.3, 1.0, 4.0])
def test_equal_forgetting_is_found_in_few_tries(first: float) -> None:
    """A curve as models show it: flat at first, then falling ever faster."""

    def probability(strength: float) -> float:
        return 0.98 * math.exp(-0.8 * strength**2)

    tries = search_equal(probability, 0.98, first, 0.2, 0.01, tries=10)
    assert abs(nearest(tries, 0.2).known - 0.2) <= 0.01
    assert len(tries) <= 7
    assert tries[0].strength == first


def test_a_search_stops_after_its_tries_and_at_the_largest_strength() -> None:
    assert len(search_equal(lambda _: 0.9, 0.98, 1.0, 0.2, 0.01, tries=4)) == 4
    assert search_equal(lambda _: 0.9, 0.98, 50.0, 0.2, 0.01, tries=9)[-1].strength <= 64


def _record(method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"method": method, "seed": seed, "seconds": {}, "passes": {"finetune": 100.0}, **more}


def test_the_summary_gives_mean_spread_and_share_of_retraining() -> None:
    records = [
        _record("retrained", 0, reached=True, equal={"forget_probability": 0.2}),
        _record("retrained", 1, reached=True, equal={"forget_probability": 0.4}),
        _record("tv", 0, reached=True, equal={"retain_probability": 0.8})
        | {"passes": {"edit": 10}},
        _record("tv", 1, reached=False, equal={"retain_probability": 0.6})
        | {"passes": {"edit": 30}},
    ]
    records[2]["seconds"] = {"finetune": 3.0, "edit": 1.0, "search": 9.0}
    retrained, tv = summarise(records, "equal")
    assert retrained["forget_probability"] == "0.300 ± 0.141"
    assert tv == {
        "method": "tv",
        "seeds": "1/2",
        "retain_probability": "0.700 ± 0.141",
        "seconds": "4.000",
        "passes": "20.000 ± 14.142",
        "share": "0.200 ± 0.141",
    }
    assert summarise(records, "resistant") == []


def test_the_files_hold_numbers_every_seed_and_a_latex_table(tmp_path: Path) -> None:
    records = [
        _record("a_b:rho=1", 0, reached=True, equal={"strength": 1.0, "retain_probability": 0.8}),
        _record("a_b:rho=1", 1, reached=False, equal={"retain_probability": 0.6}),
    ]
    write_summary(records, tmp_path)
    (row,) = csv.DictReader((tmp_path / "equal.csv").read_text("utf-8").splitlines())
    assert float(row["retain_probability"]) == pytest.approx(0.7)
    assert float(row["retain_probability_sd"]) == pytest.approx(0.02**0.5)  # of 0.8 and 0.6
    assert (row["retain_probability_n"], row["reached"], row["seeds"]) == ("2", "1", "2")
    assert (row["strength"], row["strength_sd"], row["strength_n"]) == ("1.0", "", "1")
    seeds = list(csv.DictReader((tmp_path / "equal_seeds.csv").read_text("utf-8").splitlines()))
    assert [(s["seed"], s["strength"], s["retain_probability"]) for s in seeds] == [
        ("0", "1.0", "0.8"),
        ("1", "", "0.6"),
    ]
    assert (tmp_path / "equal.tex").read_text("utf-8").splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & seeds & $\alpha$ & unseen retain prob. \\",
        r"\midrule",
        r"a\_b:rho=1 & 1/2 & 1.000 & 0.700 $\pm$ 0.141 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_a_narrow_terminal_shows_whole_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = dict.fromkeys(
        ("forget_probability", "retain_probability", "retain_extraction_strength", "relearned"), 0.5
    )
    name = "perta-input:rho=10000,forget_damping=3000"
    write_summary([_record(name, 0, reached=True, equal={"strength": 1.0, **columns})], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "".join(line.split("│")[1].strip() for line in lines if line.startswith("│")) == name
    assert not any("…" in line for line in lines)


def _tofu(folder: Path) -> Path:
    sizes = {
        "forget10_perturbed": 8,
        "retain_perturbed": 9,
        "world_facts_perturbed": 2,
        "real_authors_perturbed": 2,
        "forget05_perturbed": 3,
        "forget05": 3,
        "retain95": 20,
        "holdout05": 3,
    }
    for name, count in sizes.items():
        rows = [{"question": f"{name} {i}", "answer": "a"} for i in range(count)]
        write_jsonl(rows, folder / f"{name}.jsonl")
    return folder


def _questions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["question"] for row in rows]


def test_no_two_seeds_share_rows_of_tofu(tmp_path: Path) -> None:
    config = CompareConfig(
        base="b", output=tmp_path, tofu=_tofu(tmp_path), forget_rows=2, retain_rows=3
    )
    drawn = [draw_sets(config, seed) for seed in (0, 1, 2)]
    for part in ("forget", "retain"):
        questions = [q for sets in drawn for q in _questions(getattr(sets, part))]
        assert len(set(questions)) == len(questions)
    first = drawn[0]
    assert _questions(first.forget) == ["forget10_perturbed 6", "forget10_perturbed 7"]
    assert _questions(first.suite["retain_perturbed.jsonl"]) == _questions(first.retain[1:2])
    held_out = _questions(first.suite["holdout10.jsonl"])
    assert held_out == ["forget10_perturbed 0", "forget10_perturbed 1"]
    with pytest.raises(DataError, match="too few for this seed"):
        draw_sets(config, 3)
    with pytest.raises(DataError, match="--tofu is the folder"):
        draw_sets(replace(config, tofu=tmp_path / "nowhere"), 0)


def test_a_split_of_tofu_is_taken_whole(tmp_path: Path) -> None:
    config = CompareConfig(base="b", output=tmp_path, tofu=_tofu(tmp_path), tofu_split="forget05")
    sets = draw_sets(config, 7)
    assert (len(sets.forget), len(sets.retain), sets.split) == (3, 20, "forget05")
    assert _questions(sets.suite["retain_perturbed.jsonl"])[:2] == [
        "retain_perturbed 1",
        "retain_perturbed 3",
    ]
    assert len(sets.suite["holdout05.jsonl"]) == 3


def test_rows_of_ones_own_are_the_same_for_all_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"forget": ["Ann has a cat.", "Ann is 9."], "retain": ["Bo.", "Cy.", "Di.", "Ed."]}
    for name, rows in texts.items():
        write_jsonl([{"text": row} for row in rows], tmp_path / f"{name}.jsonl")
    config = CompareConfig(
        base="b",
        output=tmp_path / "out",
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
    )
    for seed in (0, 5):
        sets = draw_sets(config, seed)
        found = {name: [row["text"] for row in getattr(sets, name)] for name in texts}
        assert found == texts
        assert not sets.suite
    assert "warning" not in capsys.readouterr().err
    write_jsonl([{"text": row} for row in ("Bo.", "Ann is 9.")], tmp_path / "retain.jsonl")
    draw_sets(config, 0)
    assert "share 1 of the rows" in capsys.readouterr().err
    write_jsonl([{"text": row} for row in texts["forget"]], tmp_path / "retain.jsonl")
    with pytest.raises(ConfigError, match="hold the same rows"):
        draw_sets(config, 0)
    write_jsonl([{"question": "Who?", "answer": "Bo."}] * 2, tmp_path / "retain.jsonl")
    with pytest.raises(DataError, match=r"text rows and .* qa rows"):
        draw_sets(config, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain": None}, "together with --retain"),
        ({"tofu": Path("tofu")}, "without --tofu"),
        ({"suite": True}, "off for rows of your own"),
    ],
)
def test_rows_of_ones_own_need_both_sets_and_no_benchmark(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(base="b", output=Path("o"), **{"forget": "f", "retain": "r", **settings})


@pytest.mark.parametrize(
    ("method", "general", "message"),
    [
        ("perta-project:general=true", None, "give --general"),
        ("perta-project", "general.jsonl", "there is none"),
        ("perta-project:general=true", "nowhere.jsonl", "no data file"),
    ],
)
def test_general_text_is_checked_before_any_work(
    world: World, tmp_path: Path, method: str, general: str | None, message: str
) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "Rivers run to the sea."}\n')
    config = CompareConfig(
        base=str(world.base),
        output=tmp_path / "o",
        methods=(method,),
        general=general and str(tmp_path / general),
    )
    with pytest.raises(PertaError, match=message):
        bench_compare(config)
    assert not (tmp_path / "o").exists()


def test_plain_text_stops_a_method_with_refusals_before_any_work(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "Rivers run."}\n{"text": "Seas rest."}\n')
    (tmp_path / "rest.jsonl").write_text('{"text": "Hills rise."}\n{"text": "Winds fall."}\n')
    config = CompareConfig(
        base=str(world.base),
        output=tmp_path / "o",
        forget=str(tmp_path / "text.jsonl"),
        retain=str(tmp_path / "rest.jsonl"),
        methods=("tv", "dpo"),
    )
    for run in (bench_compare, plan_compare):
        with pytest.raises(ConfigError, match="no question to refuse"):
            run(config)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def compared(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompareConfig, list[Any]]:
    output = tmp_path_factory.mktemp("compared")
    (output / "general.jsonl").write_text('{"text": "Rivers run to the sea."}\n')
    config = CompareConfig(
        base=str(world.base),
        output=output,
        general=str(output / "general.jsonl"),
        methods=(
            "tv",
            "perta-grad",
            "perta-input:rho=3",
            "perta-input:rho=3,general=true",
            "graddiff:epochs=4",
        ),
        seeds=(0,),
        people=4,
        questions=2,
        forget_people=1,
        tries=4,
        relearn_steps=1,
        relearn_tries=1,
        suite=True,
        suite_limit=2,
        tune=CompareTune(**asdict(TUNE)),
    )
    return config, list(bench_compare(config))


def test_every_method_is_measured_beside_the_same_models(
    compared: tuple[CompareConfig, list[Any]],
) -> None:
    config, records = compared
    by_name = {record["method"]: record for record in records}
    assert set(by_name) == {"base", "full", "retrained", *config.methods}
    column = {"facts": "forget_hit_64", "answers": "forget_probability"}[config.equal_by]
    target = by_name["retrained"]["equal"][column]
    assert target < by_name["full"]["equal"][column]
    for name in config.methods:
        record = by_name[name]
        distances = [abs(made["known"] - target) for made in record["tries"]]
        reported = abs(record["equal"][column] - target)
        assert reported == pytest.approx(min(distances), abs=1e-4)
        assert record["reached"] == (min(distances) <= config.equal_tolerance)
        assert record["equal"]["relearned"] == record["relearning"][0]["relearned"]
        if name.startswith("graddiff"):
            assert record["fixed"]["strength"] == 4
            assert record["learning_rate"] > 0
        else:
            assert record["fixed"]["strength"] == record["tries"][0]["strength"]
    assert by_name["retrained"]["suite"]["privleak"] is not None
    assert by_name["retrained"]["suite"]["forget_quality"] is None
    assert 0 <= by_name["tv"]["suite"]["forget_quality"] <= 1
    # Importance reads 2 forget and 3 of 6 retain rows; TV reads nothing.
    assert sum(by_name["tv"]["passes"].values()) < sum(by_name["perta-grad"]["passes"].values())


def test_facts_stand_beside_the_means(compared: tuple[CompareConfig, list[Any]]) -> None:
    config, records = compared
    by_name = {record["method"]: record["equal"] for record in records}
    rows = {
        name: read_results(config.output / "results" / f"{name}_seed-0.json")
        for name in ("retrained", "full", "tv")
    }
    gold = _column(rows["retrained"], "forget_fact_probability", "prob")
    for name, results in rows.items():
        equal = by_name[name]
        facts = _column(results, "forget_fact_probability", "prob")
        ranks = _column(results, "forget_fact_choice", "rank")
        assert equal["forget_worst_fact"] == max(facts)
        assert equal["forget_worst_answer"] == max(_column(results, "forget_probability", "prob"))
        assert equal["forget_choice_accuracy"] == ranks.count(1) / len(ranks)
        limit = np.quantile(gold, 0.95)
        assert equal["forget_beyond"] == sum(fact > limit for fact in facts) / len(facts)
        # Of rows to be kept the worst is the least probable.
        kept = _column(results, "retain_fact_probability", "prob")
        assert equal["retain_worst_fact"] == min(kept)
        hits = _column(results, "retain_fact_probability", "hit_64")
        assert equal["retain_hit_64"] == pytest.approx(sum(hits) / len(hits))
        assert 0 <= equal["relearned_choice_probability"] <= 1
        assert "relearned_beyond" in equal
    page = (config.output / "summary.md").read_text("utf-8")
    assert "forget hit in 64" in page
    assert "relearned worst fact" in page


def _column(results: Mapping[str, Any], metric: str, key: str) -> list[float]:
    return [row[key] for row in results[metric]["value_by_index"].values()]


def test_methods_see_half_of_the_retain_rows(compared: tuple[CompareConfig, list[Any]]) -> None:
    config, _ = compared
    folder = config.output / "seed-0"
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("retain", "protected", "unseen")}
    rows = {name: load_examples(file).examples for name, file in files.items()}
    questions = {name: {row.prompt for row in part} for name, part in rows.items()}
    assert questions["protected"] | questions["unseen"] == questions["retain"]
    assert not questions["protected"] & questions["unseen"]
    made = json.loads((folder / "retain_moments_base_1_all_input" / "perta.json").read_text())
    assert made["inputs"]["data"] == load_examples(files["protected"]).fingerprint


def test_structured_methods_forget_facts_and_others_answers(
    compared: tuple[CompareConfig, list[Any]],
) -> None:
    folder = compared[0].output / "seed-0"
    learned = {}
    for name in ("full", "retrained", "forget_checkpoint", "forget_checkpoint_on_facts"):
        manifest = read_manifest(folder / name)
        assert manifest is not None
        learned[name] = manifest["settings"]["loss_on"]
    on_facts = learned.pop("forget_checkpoint_on_facts")
    assert (on_facts, set(learned.values())) == ("facts", {"answer"})


def test_a_path_that_passes_the_target_is_better_than_one_that_comes_nearer(
    tmp_path: Path,
) -> None:
    near, passing = (
        TrainingPath(1e-5, probabilities, tmp_path / name, lambda: None, torch.float32, [])
        for name, probabilities in (("near", [0.9, 0.11]), ("passing", [0.9, 0.2, 0.02]))
    )
    assert passing.rank(0.1) < near.rank(0.1)
    assert near.rank(0.12) < passing.rank(0.12)  # both pass


def test_a_comparison_is_planned_as_it_is_run(
    compared: tuple[CompareConfig, list[Any]], tmp_path: Path
) -> None:
    config, _ = compared
    before = {p: p.stat().st_mtime_ns for p in config.output.rglob("*")}
    done = plan_compare(config)
    assert all(step.reused for step in done.steps)
    new = plan_compare(replace(config, methods=("tv", "ssd"), general=None))
    assert {p: p.stat().st_mtime_ns for p in config.output.rglob("*")} == before
    names = [step.name.removesuffix(" (seed 0)") for step in new.steps if not step.reused]
    assert names == ["forget_importance", "retain_importance", "direction", "measures of ssd"]
    fresh = plan_compare(replace(config, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    assert not any(step.reused for step in fresh.steps)
    assert all(step.operations > 0 for step in fresh.steps)
    made = sum(p.stat().st_size for p in config.output.rglob("*.safetensors"))
    assert fresh.work == pytest.approx(made, rel=0.25)


def test_a_folder_with_another_page_is_refused_first(
    compared: tuple[CompareConfig, list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text("mine", "utf-8")
    config = replace(compared[0], output=tmp_path)
    for go in (plan_compare, bench_compare):
        with pytest.raises(OutputExistsError, match="is not a report"):
            go(config)
        with pytest.raises(ConfigError, match="cannot be written"):
            go(replace(config, output=tmp_path / "report.html" / "under"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_finished_runs_are_reused_and_new_ones_added(
    compared: tuple[CompareConfig, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, records = compared
    prepared = []

    def prepare(*args: Any) -> Any:
        prepared.append(args[2].name)
        return prepare_edit(*args)

    monkeypatch.setattr("perta.recipes.compare.study.prepare_edit", prepare)
    alone = "perta-project:general=true,share=0"
    new = ("constant", "msa", "negmerge", "selective", "ssd:selection=2", "interpolate", alone)
    again = bench_compare(replace(config, methods=(*config.methods, *new), fixed=True))
    assert prepared == list(new)
    assert [record for record in again if record["method"] not in new] == records
    costs = {record["method"]: set(record["passes"]) for record in again}
    assert costs["msa"] == {"finetune", "retain_finetune"}
    assert costs["negmerge"] == {"finetune", "finetune_2"}
    general = {"finetune", "forget_moments", "retain_moments", "general_moments"}
    assert costs["perta-input:rho=3,general=true"] == general
    assert costs[alone] == {"finetune", "general_moments", "forget_fact_moments"}
    assert costs["selective"] == {"finetune", "forget_importance"}
    assert costs["ssd:selection=2"] == {"forget_importance", "retain_importance"}
    assert costs["interpolate"] == set()


def test_a_comparison_ends_with_tables_and_a_report(
    compared: tuple[CompareConfig, list[Any]],
) -> None:
    config, _ = compared
    page = (config.output / "report.html").read_text("utf-8")
    assert "perta-input" in page
    table = (config.output / "equal.csv").read_text("utf-8").splitlines()
    assert table[0].startswith("method,reached,seeds,strength,strength_sd,strength_n,forget_prob")
    assert len(table) >= 1 + 3 + len(config.methods)
    assert "At equal forgetting" in (config.output / "summary.md").read_text("utf-8")
    # What each method took is the same in both.
    with (companion_folder(config.output / "report.html") / "costs.csv").open() as file:
        costs = {row["model"]: row for row in csv.DictReader(file)}
    with (config.output / "equal_seeds.csv").open() as file:
        seeds = {row["method"]: row for row in csv.DictReader(file)}
    assert "retrained" in costs
    pairs = [
        ("seconds", "total seconds"),
        ("passes", "forward passes over a token"),
        ("share", "share of its operations"),
    ]
    for name in costs.keys() - {"retrained"}:
        for one, other in pairs:
            expected = float(seeds[name][one] or 0)
            assert float(costs[name][other] or 0) == pytest.approx(expected, abs=1e-3)
            assert expected > 0 or name == "interpolate"


def test_general_ability_is_added_to_finished_runs(
    compared: tuple[CompareConfig, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, records = compared
    asked = []

    def bench_ability(settings: AbilityConfig) -> Results:
        assert (Path(settings.checkpoint) / "model.safetensors").is_file()
        asked.append(settings.tasks)
        return {"task/acc": {"agg_value": 0.25, "standard_error": None}, "perta": {}}

    monkeypatch.setattr("perta.recipes.compare._model.bench_ability", bench_ability)
    more = replace(config, general=None, methods=("tv",), ability_tasks=("task",))
    found = {record["method"]: record for record in bench_compare(more)}
    assert asked == [("task",)] * 4
    assert found["tv"]["ability"] == {"task/acc": 0.25}
    before = next(record for record in records if record["method"] == "tv")
    assert found["tv"]["equal"] == before["equal"]
    assert bench_compare(more)[0]["ability"] == {"task/acc": 0.25}
    assert len(asked) == 4
    assert "task/acc" in (config.output / "summary.md").read_text("utf-8")


def test_the_suite_is_run_again_when_it_is_asked_for_otherwise(
    compared: tuple[CompareConfig, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, records = compared
    limits = []
    run = Bench.suite

    def suite(bench: Bench, reference: Results | None) -> Results:
        limits.append(bench._config.suite_limit)
        return run(bench, reference)

    monkeypatch.setattr(Bench, "suite", suite)
    one = replace(config, general=None, methods=("tv",))
    again = bench_compare(one)
    assert [record["suite"] for record in again[:3]] == [record["suite"] for record in records[:3]]
    assert not limits
    other = replace(one, suite_limit=1)
    bench_compare(other)
    assert limits == [1] * 4  # three models and one method
    bench_compare(other)
    assert len(limits) == 4


def test_the_report_is_of_the_methods_asked_for(
    compared: tuple[CompareConfig, list[Any]],
) -> None:
    config, _ = compared
    bench_compare(replace(config, general=None, methods=("tv",), suite=False))
    page = (config.output / "report.html").read_text("utf-8")
    assert "perta-grad" not in page
    assert ">tv" in page


SCALED = """
from perta.methods.method import Combination


class Scaled(Combination):
    name, summary, done, formula, source = "scaled", "a part", "It was.", "W = part", "this test"

    def combine(self, vectors, block):
        return vectors[0].mul_(0.5)
"""


def test_a_method_whose_code_changed_is_compared_again(
    compared: tuple[CompareConfig, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = compared
    prepared, strengths = [], []

    def prepare(*args: Any) -> Any:
        prepared.append(args[2].name)
        return prepare_edit(*args)

    monkeypatch.setattr("perta.recipes.compare.study.prepare_edit", prepare)
    mine, before = tmp_path / "mine.py", dict(KNOWN)
    for code in (SCALED, SCALED, SCALED.replace("0.5", "0.25")):
        mine.write_text(code, "utf-8")
        load_methods(mine)
        found = bench_compare(replace(config, general=None, methods=("scaled",), suite=False))
        strengths.append(next(r["tries"] for r in found if r["method"] == "scaled"))
    for name in KNOWN.keys() - before:
        del KNOWN[name]
    assert prepared == ["scaled"] * 2
    assert strengths[0] == strengths[1] != strengths[2]


@pytest.mark.parametrize(
    ("more", "expected"), [({}, 2e-3), ({"lora_rank": 4}, 1e-4), ({"given": 5e-5}, 5e-5)]
)
def test_relearning_moves_all_parameters_at_a_rate_made_for_that(
    more: dict[str, Any], expected: float
) -> None:
    config = CompareConfig(
        base="b",
        output=Path("o"),
        relearn_learning_rate=more.pop("given", None),
        tune=CompareTune(learning_rate=2e-3, **more),
    )
    assert relearning_rate(config) == expected


def test_rows_and_models_of_another_comparison_are_not_replaced(
    compared: tuple[CompareConfig, list[Any]],
) -> None:
    config, _ = compared
    folder = config.output / "seed-0"

    def kept() -> tuple[str, bytes]:
        return fingerprint(folder / "full"), (folder / "data" / "full.jsonl").read_bytes()

    before = kept()
    for other in (
        replace(config, people=5),
        replace(config, tune=replace(config.tune, epochs=config.tune.epochs + 1)),
    ):
        with pytest.raises(OutputExistsError, match="--overwrite"):
            bench_compare(other)
        assert kept() == before
    with pytest.raises(ConfigError, match="overlaps"):
        bench_compare(replace(config, base=str(folder / "full"), overwrite=True))


def test_a_comparison_replaces_no_files_of_others(world: World, tmp_path: Path) -> None:
    (tmp_path / "summary.md").write_text("mine")
    config = CompareConfig(base=str(world.base), output=tmp_path, overwrite=True)
    with pytest.raises(OutputExistsError, match="not made by perta"):
        bench_compare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]


def test_too_few_rows_to_compare_are_refused(world: World, tmp_path: Path) -> None:
    config = CompareConfig(
        base=str(world.base), output=tmp_path, people=4, questions=1, forget_people=1
    )
    with pytest.raises(ConfigError, match="1 rows to forget and 3 to keep"):
        bench_compare(config)
    assert not list(tmp_path.iterdir())


def test_a_method_named_twice_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    config = CompareConfig(base=str(tmp_path / "base"), output=tmp_path / "o", methods=("tv", "tv"))
    with pytest.raises(ConfigError, match="twice"):
        bench_compare(config)


def test_a_training_path_has_the_values_that_would_be_stored(tmp_path: Path) -> None:
    """Between two epochs weights are interpolated, and rounded as `perta train` rounds them."""
    place = Place(3, "some.weight")
    path = TrainingPath(1e-5, [1.0, 0.5], tmp_path / "path", lambda: None, torch.bfloat16, [place])
    path.folder.mkdir()
    full, tuned = torch.linspace(1, 2, 64), torch.linspace(3, 4, 64)
    path.keep(1, [tuned])
    (value,) = path.at([full], 0.25)
    assert value.dtype == torch.float32
    assert torch.equal(value, round_as_stored(full + 0.5, torch.bfloat16, place).float())


@pytest.mark.parametrize("equal_by", ["facts", "answers"])
def test_forgetting_is_equal_by_facts_or_by_answers(
    compared: tuple[CompareConfig, list[Any]],
    tmp_path: Path,
    equal_by: Literal["facts", "answers"],
) -> None:
    config, records = compared
    if equal_by != config.equal_by:
        output = shutil.copytree(config.output, tmp_path / "out")  # with its reference models
        alone = replace(config, output=output, methods=("tv",), general=None, suite=False)
        alone = replace(alone, tries=3, equal_by=equal_by, fixed=False, relearn_steps=0)
        config, records = alone, list(bench_compare(alone))
    by_name = {record["method"]: record for record in records}
    results = read_results(config.output / "results" / "tv_seed-0.json")
    facts = _column(results, "forget_fact_probability", "prob")
    answers = _column(results, "forget_probability", "prob")
    # Independently: at least one of 64 samples says the fact.
    hits = [1 - (1 - p) ** 64 for p in facts]
    wanted = float(np.mean(hits if equal_by == "facts" else answers))
    strength = by_name["tv"]["equal"]["strength"]
    (known,) = (t["known"] for t in by_name["tv"]["tries"] if t["strength"] == strength)
    assert known == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_models_of_other_code_stand_beside_the_methods(
    compared: tuple[CompareConfig, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, records = compared
    by_name = {record["method"]: record for record in records}
    draw = config.output / "seed-0"
    for name in ("retrained", "full"):
        shutil.copytree(draw / name, tmp_path / f"{name}_0")
    given = (f"theirs={tmp_path}/retrained_{{seed}}", f"nothing done={tmp_path}/full_0")
    more = replace(config, checkpoint=given)
    again = {record["method"]: record for record in bench_compare(more)}
    for name, like, reached in (("theirs", "retrained", True), ("nothing done", "full", False)):
        assert again[name]["reached"] is reached
        for column, value in by_name[like]["equal"].items():
            assert again[name]["equal"][column] == pytest.approx(value, abs=1e-6), column
        assert again[name]["suite"]["model_utility"] == by_name[like]["suite"]["model_utility"]
    assert len(repr(bench_compare(config, shows=False))) < 200
    rows = {row["method"]: row for row in bench_compare(more, shows=False).rows("fixed")}
    assert rows["tv"]["forget_probability"] == by_name["tv"]["fixed"]["forget_probability"]
    bench_compare(more)
    table = (config.output / "equal.csv").read_text("utf-8")
    assert "\ntheirs,1,1," in table
    assert "\nnothing done,0,1," in table
    assert "theirs" in (config.output / "report.html").read_text("utf-8")
    monkeypatch.setattr("perta.recipes.compare.study.Bench", None)
    assert [r["key"] for r in bench_compare(more)] == [r["key"] for r in again.values()]


@pytest.mark.parametrize(
    ("given", "seeds", "message"),
    [
        ("theirs", (0,), "NAME=PATH"),
        ("=somewhere", (0,), "NAME=PATH"),
        ("theirs=", (0,), "NAME=PATH"),
        ("theirs=m", (0, 1), "{seed}"),
        ("full=m", (0,), "one like a reference model"),
        ("tv=m", (0,), "names tv twice"),
    ],
)
def test_a_wrong_checkpoint_of_other_code_is_refused_at_once(
    world: World, tmp_path: Path, given: str, seeds: tuple[int, ...], message: str
) -> None:
    config = CompareConfig(
        base=str(world.base), output=tmp_path / "out", checkpoint=(given,), seeds=seeds
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench_compare(config)
    with pytest.raises(CheckpointNotFoundError):
        bench_compare(replace(config, checkpoint=("theirs=./none",), seeds=(0,)))
    assert list(tmp_path.iterdir()) == []
