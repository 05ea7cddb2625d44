"""Verdicts on scores whose outcome is worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from perta.evidence.audit.judge import Found, Judgement, judge_remains

N = 20


def found(
    cleaned: Sequence[float | None],
    full: Sequence[float | None] = (1.0,) * N,
    subjects: Sequence[int] | None = None,
    holdout: Sequence[float | None] = (),
    **others: Sequence[float | None],
) -> Found:
    scores = {"cleaned": {"forget": list(cleaned)}, "full": {"forget": list(full)}}
    scores |= {role: {"forget": list(values)} for role, values in others.items()}
    if holdout:
        scores["cleaned"]["holdout"] = list(holdout)
    rows = {"forget": range(1, len(cleaned) + 1), "holdout": range(1, len(holdout) + 1)}
    return Found(scores, rows, {"forget": subjects})


def judged(*cleaned: float | None, **more: object) -> Judgement:
    return judge_remains(found(cleaned, **more))  # type: ignore[arg-type]


def test_like_the_retrained_model_it_passes() -> None:
    judgement = judged(*(0.02,) * N, retrained=(0.02,) * N)
    assert (judgement.verdict, judgement.reason) == ("passed", "no more than the retrained model")
    assert judgement.yardstick is not None
    assert judgement.yardstick[0] == "retrained"
    assert judgement.full == 1.0


def test_one_row_that_is_still_there_leaks_and_is_named() -> None:
    judgement = judged(*(0.02,) * 7, 0.9, *(0.02,) * 12, retrained=(0.02,) * N)
    assert (judgement.verdict, judgement.leaking_rows) == ("leaks", (8,))
    assert judgement.worst_row == (8, 0.9)
    assert judgement.reason == "still there: 1 row"


def test_a_small_excess_everywhere_leaks_in_the_mean() -> None:
    # (0.2 - 0) / (1 - 0) = 20% of it is left, in every row alike.
    judgement = judged(*(0.2,) * N, retrained=(0.0,) * N)
    assert judgement.verdict == "leaks"
    assert judgement.reason == "20% of what the full model knew beyond the retrained model is left"
    assert judgement.leaking_rows == ()


def test_few_rows_are_no_proof() -> None:
    # 1 - 0.025^(1/12) = 26.5%, 1 - 0.025^(1/13) = 24.7%
    twelve = judged(*(0.0,) * 12, full=(1.0,) * 12, retrained=(0.0,) * 12)
    assert (twelve.verdict, twelve.reason) == ("not sure", "12 rows are too few to tell")
    assert judged(*(0.0,) * 13, full=(1.0,) * 13, retrained=(0.0,) * 13).verdict == "passed"


def test_pieces_of_one_row_are_no_more_than_one_row() -> None:
    def cut(pieces: int, values: Sequence[float] = (0.0,) * 26) -> Judgement:
        whole = found(values, (1.0,) * 26, retrained=(0.0,) * 26)
        numbers = {"forget": [1 + i // pieces for i in range(26)], "holdout": []}
        return judge_remains(replace(whole, rows=numbers))

    assert (cut(26).verdict, cut(26).reason) == ("not sure", "1 rows are too few to tell")
    assert cut(3).verdict == "not sure"  # 9 rows
    assert cut(2).verdict == "passed"  # 13 rows
    # Two rows of 13 pieces, means 0 and 0.2: 0.1 ± t(1) * 0.1 = 0.1 ± 1.27
    high = cut(13, (*(0.0,) * 13, *(0.2,) * 13)).value
    assert high is not None
    assert high.high == pytest.approx(0.1 + 12.706 * 0.1, rel=1e-4)


def test_without_a_yardstick_nothing_passes() -> None:
    judgement = judged(*(0.0,) * N)
    assert (judgement.verdict, judgement.reason) == ("not sure", "there is no yardstick")
    assert judged(*(None,) * N, retrained=(0.0,) * N).reason == (
        "no row of the forget set has a score"
    )


def test_a_probe_that_the_full_model_fails_says_nothing() -> None:
    judgement = judged(*(0.0,) * N, full=(0.04,) * N, retrained=(0.0,) * N)
    assert judgement.verdict == "not sure"
    assert "knew no more than the retrained model" in judgement.reason


def test_unseen_rows_come_before_the_base_model_and_behind_the_retrained_one() -> None:
    names = [
        judgement.yardstick[0]
        for more in (
            {"base": (0.0,) * N},
            {"base": (0.0,) * N, "holdout": (0.0,) * 30},
            {"base": (0.0,) * N, "holdout": (0.0,) * 30, "retrained": (0.0,) * N},
        )
        if (judgement := judged(*(0.0,) * N, **more)).yardstick
    ]
    assert names == ["base", "holdout", "retrained"]


def test_words_around_the_facts_are_not_judged_by_the_base_model() -> None:
    for value in (0.0, 0.9):
        made = found((value,) * N, base=(0.0,) * N)
        assert judge_remains(made, wording=True).verdict == "not sure"
        assert judge_remains(made).verdict == ("leaks" if value else "passed")


def test_a_subject_of_whom_a_third_is_left_leaks_though_no_row_does() -> None:
    cleaned = [0.3 if i < 4 else 0.0 for i in range(N)]
    judgement = judged(*cleaned, retrained=(0.0,) * N, subjects=[i // 4 for i in range(N)])
    assert judgement.leaking_rows == ()
    assert judgement.leaking_subjects == (0,)
    assert judgement.worst_subject == pytest.approx((0, 0.3))
    assert judgement.verdict == "leaks"


def test_steps_say_nothing_of_a_single_row() -> None:
    # 1 of 20 first by chance where the retrained model has another one first.
    cleaned, retrained = [1.0, *(0.0,) * 39], [0.0, 1.0, *(0.0,) * 38]
    made = found(cleaned, full=(1.0,) * 40, retrained=retrained)
    assert judge_remains(made).verdict == "leaks"
    assert judge_remains(made, by_row=False).verdict == "passed"


def test_a_model_that_never_saw_the_rows_seldom_leaks_in_the_mean() -> None:
    # Facts that nobody knows: both models guess, each row by itself.
    draw = random.Random(0)
    verdicts = [
        judge_remains(
            found(
                [draw.betavariate(0.3, 1.2) for _ in range(40)],
                full=(1.0,) * 40,
                retrained=[draw.betavariate(0.3, 1.2) for _ in range(40)],
            ),
            by_row=False,
        ).verdict
        for _ in range(200)
    ]
    assert verdicts.count("leaks") <= 0.05 * 200
