"""Verdicts that the person who asked can rely on: worst case, few rows, facts, rows unseen."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_cases import PRINTS, Json, edit_record, metric, tuned, write

from perta.report.collect import collect
from perta.report.verdict._sentences import (
    forget_numbers,
    forget_text,
    headline,
    retain_text,
    trace_text,
)
from perta.report.verdict.judge import Verdict, as_record, judge
from perta.report.verdict.words import RANK, Calibration, Check, Status

KEPT = [0.9] * 40


def results(forget: Sequence[float], retain: Sequence[float] = KEPT, /, **more: Any) -> Json:
    """Results of a model by the answer probability of every row."""
    return {
        "forget_probability": metric(forget, "prob"),
        "retain_probability": metric(retain, "prob"),
        **more,
    }


def facts(values: Sequence[float], source: str = "wrong answers") -> Json:
    """Fact probabilities as the quick evaluation writes them."""
    rows = {
        str(i): {"prob": p, "loss": -math.log(p), "hit_64": 1 - (1 - p) ** 64, "source": source}
        for i, p in enumerate(values)
    }
    return {"agg_value": sum(values) / len(values), "value_by_index": rows}


def subjects(numbers: Sequence[int]) -> Json:
    """Subjects of rows as the quick evaluation writes them."""
    rows = {str(i): {"subject": number} for i, number in enumerate(numbers)}
    return {"agg_value": None, "value_by_index": rows}


def verdict_on(folder: Path, **runs: Json) -> Verdict:
    """The verdict on the model `edited`."""
    paths = [f"{name}={write(folder / f'{name}.json', found)}" for name, found in runs.items()]
    (verdict,) = judge(collect(paths))
    return verdict


# --- few rows, and rows that a mean hides ----------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
def test_few_rows_are_never_proof(tmp_path: Path, n: int) -> None:
    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * n),
        retrained=results([0.05] * n),
        edited=results([0.05] * n),
    )
    assert verdict.forgetting.status == "unclear"
    assert "too few examples" in verdict.forgetting.text


def test_over_forgotten_rows_make_few_rows_no_proof_either(tmp_path: Path) -> None:
    # So far below the yardstick that the mean's interval stays below a quarter left.
    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * 8),
        retrained=results([0.4] * 8),
        edited=results([0.01] * 8),
    )
    lead = verdict.forgetting.lead
    assert lead is not None
    assert lead.share_high is not None
    assert lead.share_high < 0.25
    assert verdict.forgetting.status == "unclear"


@pytest.mark.parametrize("n", [13, 20, 400])
def test_enough_rows_without_one_left_are(tmp_path: Path, n: int) -> None:
    # 1 - 0.025^(1/13) = 0.247: of 13 rows none is left, so at most a quarter may be.
    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * n),
        retrained=results([0.05] * n),
        edited=results([0.05] * n),
    )
    assert verdict.status == "met"


@pytest.mark.parametrize("yardstick", ["retrained", "base", "holdout"])
@pytest.mark.parametrize("intact", [1, 12])
def test_over_forgotten_rows_pay_for_none(tmp_path: Path, intact: int, yardstick: str) -> None:
    usual = [0.3 + 0.001 * i for i in range(40)]
    low = (sum(usual) - intact * 0.995) / (40 - intact)
    after = results([0.995] * intact + [low] * (40 - intact))
    runs = {"full": results([0.995] * 40), "edited": after}
    if yardstick == "holdout":
        after["holdout_probability"] = metric(usual, "prob")
    else:
        runs[yardstick] = results(usual)
    verdict = verdict_on(tmp_path, **runs)
    lead = verdict.forgetting.lead
    assert lead is not None
    assert lead.share == pytest.approx(0, abs=1e-9)
    assert verdict.forgetting.status == "partly"
    assert lead.rows == tuple(str(i + 1) for i in range(intact))
    assert verdict.headline.startswith("Only partly forgotten")
    assert f"{intact} of the 40 removed answers" in verdict.forgetting.text


def test_one_intact_row_among_many_is_found_beside_a_guessable_one(tmp_path: Path) -> None:
    usual = [0.05] * 9 + [0.995] + [0.05] * 10
    after = [*usual[:19], 0.99]
    verdict = verdict_on(
        tmp_path, full=results([0.99] * 20), retrained=results(usual), edited=results(after)
    )
    assert verdict.forgetting.status == "partly"
    assert "row 20" in verdict.forgetting.text


def test_rows_are_named_by_their_number_in_the_file(tmp_path: Path) -> None:
    usual, numbers = [0.05] * 20, [*range(1, 19), 25, 25]  # rows 19 to 24 left out, 25 cut in two
    after = results([*usual[:18], 0.99, 0.98])
    rows = {str(i): {"row": number} for i, number in enumerate(numbers)}
    after["forget_row"] = {"agg_value": 19, "value_by_index": rows}
    verdict = verdict_on(
        tmp_path, full=results([0.99] * 20), retrained=results(usual), edited=after
    )
    assert "2 of the 20 removed answers are still there (row 25)" in verdict.forgetting.text
    assert as_record(verdict)["forgetting"]["checks"][0]["rows"] == [25]


def test_a_row_within_the_spread_of_retraining_is_no_leak(tmp_path: Path) -> None:
    usual = [0.1 + 0.03 * i for i in range(20)]  # up to 0.67
    after = [usual[(i + 9) % 20] for i in range(20)]
    verdict = verdict_on(
        tmp_path, full=results([0.99] * 20), retrained=results(usual), edited=results(after)
    )
    assert verdict.forgetting.lead is not None
    assert verdict.forgetting.lead.rows == ()


def test_rows_that_were_forgotten_too_well_do_not_hide_one_that_is_left(tmp_path: Path) -> None:
    usual = [1 / (1 + math.exp(8 - 0.2 * i)) for i in range(20)]
    after = [1e-9] * 19 + [0.97]
    for yardstick in ("retrained", "base"):
        runs = {
            "full": results([0.99] * 20, forget_fact_probability=facts([0.99] * 20)),
            yardstick: results(usual, forget_fact_probability=facts(usual)),
            "edited": results(after, forget_fact_probability=facts(after)),
        }
        verdict = verdict_on(tmp_path / yardstick, **runs)
        assert verdict.forgetting.status == "partly"
        assert "row 20" in verdict.forgetting.text


def perhaps_left() -> tuple[list[float], list[float]]:
    """Rows of an unseeing model and of one of which much may be left of the first, by chance."""
    # Half of the rows lie e^2 below and above: s is near 2, and of 20 rows the limit near 7.
    logits = [-4.0 + 4 * (i % 2) for i in range(20)]
    usual = [1 / (1 + math.exp(-z)) for z in logits]
    after = [1 / (1 + math.exp(-z + (2 if i % 4 > 1 else -2))) for i, z in enumerate(logits)]
    return usual, [0.9, *after[1:]]


def test_a_row_that_may_be_chance_is_named_and_proves_nothing(tmp_path: Path) -> None:
    usual, after = perhaps_left()
    verdict = verdict_on(
        tmp_path, full=results([0.99] * 20), retrained=results(usual), edited=results(after)
    )
    lead = verdict.forgetting.lead
    assert lead is not None
    assert (verdict.forgetting.status, lead.rows) == ("unclear", ())
    assert "1" in lead.doubtful_rows
    assert verdict.headline.startswith("Perhaps not all forgotten")
    assert "that may be chance. Much may be left of rows" in verdict.forgetting.text
    assert not verdict.fulfils("met")
    (check,) = [c for c in as_record(verdict)["forgetting"]["checks"] if c["decisive"]]
    assert 1 in check["doubtful_rows"]


def test_a_mean_above_the_yardstick_that_may_be_chance_proves_nothing(tmp_path: Path) -> None:
    # Eight rows 0.5 above and six 0.3 below: 0.157 ± 0.23, of a gap of 0.55.
    strength = {"full": [0.95] * 14, "retrained": [0.4] * 14, "edited": [0.9] * 8 + [0.1] * 6}
    low = [0.05] * 14
    runs = {
        name: results(
            [0.95] * 14 if name == "full" else low, forget_extraction_strength=metric(values)
        )
        for name, values in strength.items()
    }
    verdict = verdict_on(tmp_path, **runs)
    check = next(c for c in verdict.forgetting.checks if c.key == "forget_strength")
    assert check.share == pytest.approx((11 / 14 * 0.2) / 0.55)
    assert (check.status, check.doubt) == ("unclear", True)
    assert "By one measure, Extraction strength" in verdict.forgetting.text


@pytest.mark.parametrize("yardstick", ["retrained", "holdout"])
def test_models_that_never_saw_the_rows_are_seldom_said_to_have_any(
    tmp_path: Path, yardstick: str
) -> None:
    """Facts that nobody knows: both models guess, each row and measure by itself."""
    draw = random.Random(3)

    def guesses() -> list[float]:
        return [1 / (1 + math.exp(-draw.gauss(-3.0, 1.5))) for _ in range(16)]

    def guessing(name: str) -> Json:
        own = guesses()
        facts_of = {f"{name}_fact_probability": facts(own)}
        choice = {f"{name}_fact_choice": metric(guesses(), "prob")}
        answers = {f"{name}_probability": metric(own, "prob")}
        return {**answers, **facts_of, **choice}

    known = facts([0.99] * 16)
    full = results([0.99] * 16, forget_fact_probability=known)
    full["forget_fact_choice"] = metric([1.0] * 16, "prob")
    left = 0
    for world in range(100):
        edited = {**results([0.5]), **guessing("forget")}
        runs = {"full": full, "edited": edited}
        if yardstick == "holdout":
            edited |= guessing("holdout")
        else:
            runs[yardstick] = {**results([0.5]), **guessing("forget")}
        verdict = verdict_on(tmp_path / str(world), **runs)
        left += verdict.forgetting.status in ("partly", "not")
    assert left <= 11  # with a share of 0.05 there are more once in two hundred times


def test_rows_that_stand_out_are_counted_though_none_is_whole(tmp_path: Path) -> None:
    # A third of the rows keeps 0.4 of what was learned, the others are below the yardstick.
    usual = [0.2 + 0.002 * i for i in range(30)]
    after = [0.2 + 0.4 * 0.75] * 10 + [0.1] * 20
    verdict = verdict_on(
        tmp_path, full=results([0.95] * 30), retrained=results(usual), edited=results(after)
    )
    assert verdict.forgetting.status == "partly"


def test_a_subject_that_is_left_decides(tmp_path: Path) -> None:
    # Every row of subject 2 keeps 0.4: no row by half, and one row in five hides in the mean.
    people = subjects([i // 4 for i in range(40)])
    after = [0.4 if i // 4 == 2 else 0.02 for i in range(40)]
    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * 40, forget_subject=people),
        retrained=results([0.05] * 40, forget_subject=people),
        edited=results(after, forget_subject=people),
    )
    lead = verdict.forgetting.lead
    assert lead is not None
    assert lead.subjects == (2,)
    assert verdict.forgetting.status == "partly"
    assert "one subject" in verdict.forgetting.text


def test_intervals_are_over_subjects(tmp_path: Path) -> None:
    after = [0.02 + 0.03 * (i // 10) for i in range(40)]
    usual = [0.05] * 40
    alone = verdict_on(
        tmp_path, full=results([0.95] * 40), retrained=results(usual), edited=results(after)
    ).forgetting.lead
    people = {"forget_subject": subjects([i // 10 for i in range(40)])}
    grouped = verdict_on(
        tmp_path,
        full=results([0.95] * 40, **people),
        retrained=results(usual, **people),
        edited=results(after, **people),
    ).forgetting.lead
    assert alone is not None
    assert grouped is not None
    assert alone.share_low is not None
    assert grouped.share_low is not None
    # Four means 0.02, 0.05, 0.08, 0.11 less 0.05: 0.015 ± t(3) · 0.0387 / 2, over a gap of 0.9.
    assert grouped.share_low == pytest.approx((0.015 - 3.18245 * 0.0387298 / 2) / 0.9, abs=1e-4)
    assert grouped.share_low < alone.share_low


# --- facts -----------------------------------------------------------------------------------


def test_a_sentence_template_makes_no_forgotten_model_remembered(tmp_path: Path) -> None:
    rouge = {"forget_rougeL_recall": metric([0.81] * 20, "rougeL_recall")}
    known = {"forget_rougeL_recall": metric([1.0] * 20, "rougeL_recall")}
    nothing = {"forget_rougeL_recall": metric([0.2] * 20, "rougeL_recall")}
    verdict = verdict_on(
        tmp_path,
        full=results([0.99] * 20, forget_fact_probability=facts([0.99] * 20), **known),
        base=results([0.05] * 20, forget_fact_probability=facts([0.01] * 20), **nothing),
        edited=results([0.6] * 20, forget_fact_probability=facts([0.02] * 20), **rouge),
    )
    assert verdict.calibration == "base"
    assert verdict.forgetting.status == "met"
    assert verdict.forgetting.numbers.startswith("Fact probability: 0.02 against 0.01")
    assert "differs from the wrong ones (20 rows)." in verdict.facts
    shares = {check.key: check for check in verdict.forgetting.checks}
    assert not shares["forget_rouge"].core
    assert not shares["forget_probability"].core


def test_a_fact_that_is_left_counts_though_the_answer_looks_gone(tmp_path: Path) -> None:
    verdict = verdict_on(
        tmp_path,
        full=results([0.99] * 20, forget_fact_probability=facts([0.99] * 20)),
        retrained=results([0.3] * 20, forget_fact_probability=facts([0.03] * 20)),
        edited=results([0.3] * 20, forget_fact_probability=facts([0.9] + [0.02] * 19)),
    )
    assert verdict.forgetting.status == "partly"
    assert "row 1" in verdict.forgetting.text


def test_results_without_facts_say_so(tmp_path: Path) -> None:
    verdict = verdict_on(
        tmp_path, full=results([0.9] * 20), base=results([0.1] * 20), edited=results([0.1] * 20)
    )
    assert verdict.forgetting.status == "met"
    assert "whole answers are judged" in verdict.facts


# --- what stands out by its absence ----------------------------------------------------------


def test_over_forgetting_is_a_finding_of_its_own(tmp_path: Path) -> None:
    usual = [0.2 + 0.01 * i for i in range(20)]
    verdict = verdict_on(
        tmp_path,
        full=results([0.99] * 20),
        retrained=results(usual),
        edited=results([0.001] * 20),
    )
    assert verdict.forgetting.status == "met"
    assert verdict.trace.status == "not"
    assert verdict.headline.endswith("; what was removed stands out by its absence.")
    alike = verdict_on(
        tmp_path,
        full=results([0.99] * 20),
        retrained=results(usual),
        edited=results(usual[::-1]),
    )
    assert alike.trace.status == "met"
    few = verdict_on(
        tmp_path, full=results([0.99] * 3), retrained=results([0.2] * 3), edited=results([0.2] * 3)
    )
    assert few.trace.status == "unclear"


# --- tests of few rows -----------------------------------------------------------------------


def test_a_test_that_could_find_nothing_is_no_proof(tmp_path: Path) -> None:
    def with_ratios(found: Json, ratios: Sequence[float]) -> Json:
        return {**found, "forget_truth_ratio": metric(ratios)}

    def quality(n: int, p: float) -> Any:
        edited = with_ratios(results([0.05] * n), [60.0 + i for i in range(n)])
        edited["forget_quality"] = {"agg_value": p}
        verdict = verdict_on(
            tmp_path,
            full=with_ratios(results([0.99] * n), [0.01] * n),
            retrained=with_ratios(results([0.05] * n), [1.0] * n),
            edited=edited,
        )
        return next(c for c in verdict.forgetting.checks if c.key == "forget_quality"), verdict

    check, verdict = quality(3, 0.1)
    assert check.status == "unclear"
    assert any("too few" in note for note in verdict.notes)
    assert quality(40, 0.3)[0].status == "met"
    assert quality(40, 0.01)[0].status == "not"


# --- what is kept ----------------------------------------------------------------------------


def test_retention_needs_the_same_rows_before(tmp_path: Path) -> None:
    def on(found: Json, retain: str, checkpoint: str) -> Json:
        inputs = {"forget": "F", "retain": retain, "checkpoint": checkpoint}
        return {**found, "perta": {"stage": "evaluate", "settings": {}, "inputs": inputs}}

    verdict = verdict_on(
        tmp_path,
        full=on(results([0.99] * 20, [0.35] * 20), "R1", "a"),
        retrained=on(results([0.05] * 20, [0.35] * 20), "R1", "b"),
        edited=on(results([0.05] * 20, [0.40] * 20), "R2", "c"),
    )
    assert verdict.retention.status == "unknown"
    assert "not evaluated on the same examples to keep" in verdict.retention.text
    assert verdict.status == "unknown"


def test_a_retained_subject_that_is_lost_decides(tmp_path: Path) -> None:
    people = {"retain_subject": subjects([i // 2 for i in range(100)])}
    kept = [0.9] * 98 + [0.1] * 2
    verdict = verdict_on(
        tmp_path,
        full=results([0.9] * 20, [0.9] * 100, **people),
        retrained=results([0.05] * 20, [0.9] * 100, **people),
        edited=results([0.05] * 20, kept, **people),
    )
    assert verdict.retention.status == "partly"
    assert "one subject" in verdict.retention.text


@pytest.mark.parametrize("utility", [0.59, 0.6])
def test_a_mean_alone_is_not_sure(tmp_path: Path, utility: float) -> None:
    def bare(value: float) -> Json:
        return {"forget_probability": {"agg_value": 0.1}, "model_utility": {"agg_value": value}}

    verdict = verdict_on(tmp_path, full=bare(0.6), retrained=bare(0.6), edited=bare(utility))
    assert verdict.retention.status == "unclear"


def retained(
    folder: Path, held_back: Json | None, evaluated: str, measured: str = "importance"
) -> Verdict:
    """A verdict with records of an edit that used the retain set `a0…`."""
    record = edit_record()
    record["inputs"]["retain_importance"] = measured
    record["unlearn"] = {"inputs": {"retain": "a0" * 32}, "settings": {}}
    if held_back is not None:
        record["unlearn"]["held_back"] = held_back
    write(folder / "edited" / "perta.json", record)
    importance = {"inputs": {"data": "a0" * 32}, "content": "importance", "seconds": {}}
    write(folder / "importance" / "perta.json", importance)

    def made(found: Json, name: str) -> Json:
        inputs = {"checkpoint": PRINTS[name], "forget": "F", "retain": evaluated}
        return {**found, "perta": {"stage": "evaluate", "settings": {}, "inputs": inputs}}

    results_of = folder / "results"
    write(results_of / "full.json", made(results([0.9] * 20), "full"))
    write(results_of / "base.json", made(results([0.05] * 20), "base"))
    write(results_of / "edited.json", made(results([0.05] * 20), "perta-grad"))
    (verdict,) = judge(collect([str(folder)]))
    return verdict


@pytest.mark.parametrize("merged", [False, True])
def test_retention_on_rows_that_took_part_is_not_sure(tmp_path: Path, merged: bool) -> None:
    if merged:
        both = {"inputs": {"moments_1": "importance", "moments_2": "gone"}, "content": "both"}
        write(tmp_path / "merged" / "perta.json", {**both, "seconds": {}})
    part = "both" if merged else "importance"
    verdict = retained(tmp_path, None, "a0" * 32, measured=part)
    assert verdict.retention.status == "unclear"
    assert any("flattering" in note for note in verdict.notes)


def test_retention_on_rows_kept_out_is_what_counts(tmp_path: Path) -> None:
    held = {"rows": 40, "of": 400, "fingerprint": "b0" * 32, "by": "row"}
    verdict = retained(tmp_path, held, "b0" * 32)
    assert verdict.retention.status == "met"
    assert any("40 of 400 examples to keep" in note for note in verdict.notes)


# --- causes ----------------------------------------------------------------------------------


def remembered(
    folder: Path,
    *,
    loss: float = 0.01,
    usual: Sequence[float] = (0.05,) * 20,
    after: Sequence[float] = (0.983,) * 20,
    status: str = "not",
    tuning: Json | None = None,
    **record: Any,
) -> Verdict:
    """A verdict on an edit that changed nothing, or what these probabilities say."""
    edit = edit_record()
    edit["edit"].update(record.pop("edit", {}))
    edit.update(record)
    tune = tuned("forget_checkpoint", "F", 1)
    tune.update({"final_loss": loss, "learned": loss <= 0.2, **(tuning or {})})
    write(folder / "edited" / "perta.json", edit)
    write(folder / "forget" / "perta.json", tune)

    def made(found: Json, name: str) -> Json:
        inputs = {"checkpoint": PRINTS[name], "forget": "F", "retain": "R"}
        return {**found, "perta": {"stage": "evaluate", "settings": {}, "inputs": inputs}}

    write(folder / "results" / "full.json", made(results([0.991] * 20), "full"))
    write(folder / "results" / "base.json", made(results(usual), "base"))
    write(folder / "results" / "edited.json", made(results(after), "perta-grad"))
    (verdict,) = judge(collect([str(folder)]))
    assert verdict.forgetting.status == status
    return verdict


def test_the_likely_cause_is_named(tmp_path: Path) -> None:
    (cause,) = remembered(tmp_path / "a", loss=2.5).causes
    assert "did not learn the removed examples (final loss 2.50" in cause
    # Whoever tuned it: with a given forget checkpoint this run may have no such option.
    assert "Tune it again with more --epochs" in cause
    (cause,) = remembered(tmp_path / "b").causes
    assert "strength 1.5 is too small" in cause
    # Not every fact is as deep as was asked for, but all are known.
    nearly = {"learned": False, "final_losses": [0.04, 0.1]}
    (cause,) = remembered(tmp_path / "n", loss=0.07, tuning=nearly).causes
    assert "strength 1.5 is too small" in cause
    one = {"learned": False, "final_losses": [0.04, 3.0] + [0.04] * 98}
    (cause,) = remembered(tmp_path / "o", loss=0.07, tuning=one).causes
    assert "did not learn the removed examples (final loss 3.00" in cause
    (cause,) = remembered(tmp_path / "c", edit={"stored": {"stored_share": 0.4}}).causes
    assert "rounding" in cause
    assert "40%" in cause
    found = {"reached": True, "calibrated_on": "held-out set"}
    (cause,) = remembered(tmp_path / "s", unlearn={"settings": {}, "strength": found}).causes
    assert "(held-out set) every fact looks unseen already" in cause
    strength = {"strength": {"reached": False, "retain_budget": 0.1}}
    (cause,) = remembered(tmp_path / "d", unlearn={"settings": {}, **strength}).causes
    assert "--retain-budget" in cause
    rounds = {"reached": False, "scaling_coef": 1.0, "in_rounds": True, "standing_out": [3]}
    (cause,) = remembered(tmp_path / "e", unlearn={"settings": {}, "strength": rounds}).causes
    assert "left facts that stand out, 1 of them. Give --scaling-coef a number above 1.5" in cause
    (cause,) = remembered(tmp_path / "t", stage="train").causes
    assert "training stopped too early" in cause


def test_what_may_be_chance_has_no_cause(tmp_path: Path) -> None:
    usual, after = perhaps_left()
    for stage in ("edit", "train"):
        verdict = remembered(
            tmp_path / stage, usual=usual, after=after, status="unclear", stage=stage
        )
        assert (verdict.forgetting.doubt, verdict.causes) == (True, ())


def test_the_verdict_as_a_record_is_strict_json(tmp_path: Path) -> None:
    verdict = remembered(tmp_path, loss=2.5)
    record = json.loads(json.dumps(as_record(verdict), allow_nan=False))
    assert (record["schema"], record["status"]) == (1, "not")
    assert record["yardstick"] == "base"
    assert record["forgetting"]["status"] == "not"
    assert record["over_forgetting"]["status"] in ("met", "unclear")
    check = record["forgetting"]["checks"][0]
    assert check["rows"] == list(range(1, 21))
    assert record["causes"]
    assert not verdict.fulfils("partly")
    assert verdict.headline in verdict.line
    assert "\n" not in verdict.line


def test_long_facts_are_judged_by_their_tokens(tmp_path: Path) -> None:
    # Forty tokens at 0.95 each: the whole has a probability of 0.13, and yet it is known.
    def long_facts(per_token: float) -> Json:
        rows = {
            str(i): {"prob": per_token**40, "loss": -math.log(per_token), "source": "surprise"}
            for i in range(20)
        }
        return {"agg_value": per_token**40, "value_by_index": rows}

    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * 20, forget_fact_probability=long_facts(0.95)),
        base=results([0.05] * 20, forget_fact_probability=long_facts(0.2)),
        edited=results([0.9] * 20, forget_fact_probability=long_facts(0.9)),
    )
    assert verdict.forgetting.status == "not"
    assert verdict.forgetting.numbers.startswith("Fact probability per token: 0.90 against 0.20")


def test_a_yardstick_without_rows_stands_for_each_of_them_with_its_mean(tmp_path: Path) -> None:
    """Rows at the yardstick's mean are gone; those at the full model's are left, with subjects."""
    more: Json = {
        "forget_subject": subjects([0] * 10 + [1] * 10),
        "perta": {"stage": "evaluate", "inputs": {"forget": "f0" * 32, "retain": "a0" * 32}},
    }
    after = [0.5] * 10 + [0.95] * 10
    retrained = results([0.5] * 20, **more)
    del retrained["forget_probability"]["value_by_index"]
    verdict = verdict_on(
        tmp_path,
        full=results([0.95] * 20, **more),
        retrained=retrained,
        edited=results(after, **more),
    )
    check = next(c for c in verdict.forgetting.checks if c.key == "forget_probability")
    # A mean tells nothing of how far rows lie apart, so which rows it are may be chance.
    assert (check.rows, check.subjects) == ((), ())
    assert sorted(map(int, check.doubtful_rows)) == list(range(11, 21))
    assert check.doubtful_subjects == (1,)


@pytest.mark.parametrize("kind", ["said again", "in pieces", "distinct"])
def test_rows_said_again_or_in_pieces_are_one(tmp_path: Path, kind: str) -> None:
    """Forty rows are proof, forty copies or pieces of three are not."""
    source = range(40) if kind == "distinct" else [i % 3 for i in range(40)]

    def found(values: Sequence[float]) -> Json:
        texts = {
            str(i): {"rougeL_recall": 0.1, "input": f"Who is {n}?", "ground_truth": f"It is {n}."}
            for i, n in enumerate(source)
        }
        pieces = {str(i): {"row": n + 1} for i, n in enumerate(source)}
        more: Json = {"forget_row": {"agg_value": 40, "value_by_index": pieces}}
        if kind != "in pieces":
            more = {"forget_rougeL_recall": {"agg_value": 0.1, "value_by_index": texts}}
        return results(values, **more)

    verdict = verdict_on(
        tmp_path,
        full=found([0.95] * 40),
        retrained=found([0.05] * 40),
        edited=found([0.05] * 40),
    )
    check = next(c for c in verdict.forgetting.checks if c.key == "forget_probability")
    assert check.status == ("met" if kind == "distinct" else "unclear")


@pytest.mark.parametrize("status", RANK)
@pytest.mark.parametrize("other", RANK)
def test_every_pair_of_outcomes_is_told(status: Status, other: Status) -> None:
    """No sentence is missing, and none keeps a gap."""
    lead = Check("a", "Lead", 0.9, 0.1, 0.1, 20, core=True, status=status)
    doubt = other == "unclear"
    worse = Check("b", "Other", 0.9, 0.5, 0.1, 20, core=True, status=other, doubt=doubt)
    calibrations: tuple[Calibration | None, ...] = ("retrained", "holdout", "base", None)
    for calibration in calibrations:
        texts = [
            forget_text(lead, worse, calibration),
            forget_numbers(worse, calibration),
            retain_text(status, lead),
            headline(status, other, "not"),
            headline(status, other, doubt=True),
        ]
        if status in ("met", "unclear", "not"):
            texts.append(trace_text(lead, calibration))
        for text in texts:
            assert text.endswith(".")
            assert "{" not in text
