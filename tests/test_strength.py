"""`--scaling-coef auto`: the search, trials in place, the pipeline."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import TUNE, World
from perta.config import ComputeConfig, DataConfig, WeightingConfig
from perta.config_stages import EditConfig, UnlearnConfig
from perta.data import encode_example, encode_examples, load_examples
from perta.edit import edit_checkpoint
from perta.errors import ConfigError
from perta.model import load_model, load_tokenizer
from perta.people import write_jsonl
from perta.pipeline import unlearn, work_folder
from perta.strength import LARGEST, Point, mean_loss, search_strength


def curve(tried: list[float], harm: float = 0.01, collapse: float = math.inf) -> Any:
    """Forget loss α², retain loss `harm`·α, all infinite from `collapse` on."""

    def measure(alpha: float) -> Point:
        tried.append(alpha)
        if alpha >= collapse:
            return Point(alpha, math.nan, math.nan, math.inf, math.inf)
        return Point(alpha, alpha**2, 7.0, 0.5 + harm * alpha, 0.4 + harm * alpha)

    return measure


def test_it_finds_the_smallest_strength_that_forgets() -> None:
    tried: list[float] = []
    chosen, reached, points = search_strength(curve(tried), 2.0, 0.1)
    assert reached
    assert 0 <= chosen.scaling_coef - math.sqrt(2) <= 0.02 * chosen.scaling_coef
    assert [p.scaling_coef for p in points] == sorted(tried)
    assert len(tried) < 14


def test_it_stops_at_the_budget() -> None:
    tried: list[float] = []
    chosen, reached, _ = search_strength(curve(tried, harm=0.1), 2.0, 0.1)
    assert not reached
    assert 0.97 < chosen.scaling_coef <= 1
    assert max(tried) == 2


def test_it_never_goes_behind_a_collapse() -> None:
    tried: list[float] = []
    chosen, reached, _ = search_strength(curve(tried, collapse=1.2), 2.0, 0.1)
    assert not reached
    assert 1.15 < chosen.scaling_coef < 1.2
    assert max(tried) == 2


def test_what_looks_unseen_already_needs_no_edit() -> None:
    tried: list[float] = []
    assert search_strength(curve(tried), 0.0, 0.1)[0].scaling_coef == 0
    assert tried == [0]


def test_a_direction_without_effect_ends_the_search() -> None:
    chosen, reached, _ = search_strength(lambda a: Point(a, 0.0, 7.0, 0.5, 0.5), 2.0, 0.1)
    assert not reached
    assert chosen.scaling_coef == LARGEST


def config(world: World, output: Path, method: str, **more: Any) -> UnlearnConfig:
    settings: dict[str, Any] = {
        "weighting": WeightingConfig(method=method, scaling_coef="auto"),
        "tune": TUNE,
        "evaluate": False,
        "retain_budget": 5.0,
        **more,
    }
    return UnlearnConfig(
        base=str(world.base),
        full=str(world.full),
        forget=str(world.forget),
        retain=str(world.retain),
        output=output,
        **settings,
    )


@pytest.mark.parametrize("method", ["perta-input", "perta-grad"])
def test_the_result_has_the_losses_of_the_trial(world: World, tmp_path: Path, method: str) -> None:
    forget_rows = tmp_path / "forget.jsonl"
    rows = [json.loads(line) for line in world.forget.read_text("utf-8").splitlines()]
    write_jsonl([{k: row[k] for k in ("question", "answer")} for row in rows], forget_rows)
    settings = replace(config(world, tmp_path / "out", method), forget=str(forget_rows))
    result = unlearn(settings)
    record = result.manifest["unlearn"]["strength"]
    saved = json.loads((work_folder(settings) / "strength.json").read_text("utf-8"))
    assert saved == record
    assert record["reached"] or method == "perta-grad"
    assert record["calibrated_on"] == "base model on the forget set"
    assert result.manifest["settings"]["scaling_coef"] == record["scaling_coef"] > 0
    assert result.manifest["unlearn"]["settings"]["scaling_coef"] == "auto"

    tokenizer = load_tokenizer(world.full)
    forget, retain = (
        encode_examples(load_examples(path), tokenizer, DataConfig()).encoded
        for path in (world.forget, world.retain)
    )
    chosen = next(p for p in record["frontier"] if p["scaling_coef"] == record["scaling_coef"])
    edited = load_model(result.folder, ComputeConfig())
    assert mean_loss(edited, forget, 0) == pytest.approx(chosen["forget_loss"], rel=1e-4)
    both = chosen["selecting_loss"] + chosen["reporting_loss"]
    assert mean_loss(edited, retain, 0) == pytest.approx(both / 2, rel=1e-4)
    base = load_model(world.base, ComputeConfig())
    assert mean_loss(base, forget, 0) == pytest.approx(record["unseen"])
    assert chosen["signal"] == chosen["forget_loss"]
    assert (chosen["signal"] >= record["unseen"]) == record["reached"]
    # A second run computes nothing; the record stays.
    assert unlearn(settings).manifest["unlearn"]["strength"] == record


def test_truth_ratios_calibrate_where_rows_have_them(world: World, tmp_path: Path) -> None:
    """Rows of the generator have a paraphrase and wrong answers; the ratio is worked by hand."""
    settings = config(world, tmp_path / "out", "perta-input")
    record = unlearn(settings).manifest["unlearn"]["strength"]
    assert record["calibrated_on"] == "truth ratios under the base model"
    start, chosen = (
        record["frontier"][0],
        next(p for p in record["frontier"] if p["scaling_coef"] == record["scaling_coef"]),
    )
    assert start["signal"] < record["unseen"]
    assert (chosen["signal"] >= record["unseen"]) == record["reached"]

    tokenizer = load_tokenizer(world.base)
    for folder, expected in ((world.base, record["unseen"]), (world.full, start["signal"])):
        model = load_model(folder, ComputeConfig())
        margins = []
        for example in load_examples(world.forget).examples:
            texts = [example.fields["paraphrased_answer"], *example.fields["perturbed_answer"]]
            losses = [
                mean_loss(
                    model, [encode_example(example.with_answer(t), tokenizer, DataConfig())], 0
                )
                for t in texts
            ]
            margins.append(losses[0] - sum(losses[1:]) / len(losses[1:]))
        assert sum(margins) / len(margins) == pytest.approx(expected, rel=1e-4)


def test_a_held_out_set_calibrates_and_counts(world: World, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.retain.read_text("utf-8").splitlines()]
    unseen = [{"question": row["question"], "answer": row["answer"][::-1]} for row in rows]
    holdout = str(write_jsonl(unseen, tmp_path / "holdout.jsonl"))
    settings = config(world, tmp_path / "out", "tv", holdout=holdout, retain_budget=0.0)
    record = unlearn(settings).manifest["unlearn"]
    assert record["strength"]["calibrated_on"] == "held-out set"
    model = load_model(world.full, ComputeConfig())
    tokenizer = load_tokenizer(world.full)
    expected = encode_examples(load_examples(holdout), tokenizer, DataConfig()).encoded
    assert record["strength"]["unseen"] == pytest.approx(mean_loss(model, expected, 0))
    assert "holdout" in record["inputs"]
    assert record["settings"]["retain_budget"] == 0


def test_what_looks_unseen_before_the_edit_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration that the full model passes would choose no edit at all."""
    monkeypatch.setattr("perta.pipeline.finetune_checkpoint", None)
    seen = tmp_path / "seen.jsonl"
    lines = world.retain.read_text("utf-8").splitlines()
    write_jsonl([json.loads(line) for line in (lines[0], lines[0])], seen)
    settings = config(world, tmp_path / "out", "perta-project", holdout=str(seen))
    with pytest.raises(ConfigError, match=r"looks unseen to .* already.*Is --holdout really"):
        unlearn(settings)
    with pytest.raises(ConfigError, match="hold the same rows"):
        unlearn(replace(settings, holdout=str(world.retain)))
    with pytest.raises(ConfigError, match=r"looks unseen .* Was .* tuned on the forget set"):
        unlearn(replace(settings, holdout=None, full=str(world.base)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [-1.0, math.nan, math.inf])
def test_the_budget_is_a_number(world: World, tmp_path: Path, budget: float) -> None:
    with pytest.raises(ConfigError, match="retain-budget"):
        config(world, tmp_path / "out", "perta-project", retain_budget=budget)


def test_answers_that_do_not_fit_do_not_calibrate(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in world.forget.read_text("utf-8").splitlines()]
    rows[0]["paraphrased_answer"] *= 40
    write_jsonl(rows, tmp_path / "long.jsonl")
    settings = config(world, tmp_path / "out", "perta-project")
    settings = replace(
        settings,
        forget=str(tmp_path / "long.jsonl"),
        data_config=replace(settings.data_config, max_length=100),
    )
    record = unlearn(settings).manifest["unlearn"]["strength"]
    assert record["calibrated_on"] == "base model on the forget set"
    assert capsys.readouterr().err.count("row 1: a paraphrased or wrong answer makes") == 1


def test_what_a_killed_search_left_is_cleared_away(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "out", "tv")
    left = work_folder(settings) / ".strength.partial-99999999"
    left.mkdir(parents=True)
    unlearn(settings)
    assert not [path.name for path in work_folder(settings).iterdir() if "partial" in path.name]


def test_mistakes(world: World, tmp_path: Path) -> None:
    edit = EditConfig(
        full=str(world.full),
        base=str(world.base),
        forget_checkpoint=str(world.full),
        output=tmp_path / "out",
        weighting=WeightingConfig(method="tv", scaling_coef="auto"),
    )
    with pytest.raises(ConfigError, match="perta unlearn"):
        edit_checkpoint(edit)
    one = tmp_path / "one.jsonl"
    one.write_text(world.retain.read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    with pytest.raises(ConfigError, match="too few"):
        unlearn(replace(config(world, tmp_path / "out", "tv"), retain=str(one)))
    assert not (tmp_path / "out").exists()
