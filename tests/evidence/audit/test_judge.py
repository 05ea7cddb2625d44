"""Verdicts on scores whose outcome is worked out by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scipy.stats import t

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
    # Two rows of 13 pieces, means 0.5 and 0.53: 0.515 ± t(1) * 0.015
    high = cut(13, (*(0.5,) * 13, *(0.53,) * 13)).value
    assert high is not None
    assert high.high == pytest.approx(0.515 + 12.706 * 0.015, rel=1e-4)


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
    assert judge_remains(made, guessable=True).verdict == "leaks"
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


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_a_row_stands_out_from_the_retrained_model_by_a_limit_worked_out_by_hand() -> None:
    # Fourteen rows are as there, one is e times less likely: d^2 = 1. With 15 that are not above,
    # s = sqrt((4 + 1) / 19), and of 16 rows the limit is t(1 - 0.025 / 16, 19) * s.
    limit = float(t.ppf(1 - 0.025 / 16, 19)) * math.sqrt(5 / 19)
    logits = [-2.0, -6.0] * 8  # far apart, so that this tells nothing
    usual = [sigmoid(z) for z in logits]
    cleaned, full = list(usual), [1.0] * 16
    cleaned[5] = sigmoid(logits[5] - 1)
    for far, wanted in ((0.99, ()), (1.01, (3,))):
        cleaned[2] = sigmoid(logits[2] + far * limit)
        full[2] = 1.5 * cleaned[2]  # more than half of it is left
        made = found(cleaned, full, retrained=usual)
        assert judge_remains(made).leaking_rows == wanted, far
    # Of ten ways each gets a tenth.
    assert judge_remains(made, ways=10).leaking_rows == ()


@pytest.mark.parametrize("yardstick", ["retrained", "base"])
def test_rows_that_were_forgotten_too_well_pay_for_none(yardstick: str) -> None:
    # The other 15 lie 12 below; those of the yardstick lie 1 from their mean, 16 of them: twice
    # that and four, over 15 + 4.
    limit = float(t.ppf(1 - 0.025 / 16, 19)) * math.sqrt(36 / 19)
    logits = [-5.0, -3.0] * 8
    cleaned, full = [sigmoid(z - 12) for z in logits], [1.0] * 16
    for far, wanted in ((0.99, ()), (1.01, (3,))):
        cleaned[2] = sigmoid(logits[2] + far * limit)
        full[2] = 1.5 * cleaned[2]
        made = found(cleaned, full, **{yardstick: [sigmoid(z) for z in logits]})  # type: ignore[arg-type]
        assert judge_remains(made).leaking_rows == wanted, far


def test_what_the_yardsticks_differ_by_limits_a_row_whatever_became_of_the_others() -> None:
    # The base model lies 1 above and 1 below the retrained one by turns: s = sqrt((4 + 16) / 20).
    # By the other rows, forgotten e^12 times too well, and by how rows differ it would be far more.
    limit = float(t.ppf(1 - 0.025 / 16, 20))
    logits = [-2.0, -8.0] * 8
    retrained = [sigmoid(z) for z in logits]
    base = [sigmoid(z + 1 - i // 2 % 2 * 2) for i, z in enumerate(logits)]
    cleaned, full = [sigmoid(z - 12) for z in logits], [1.0] * 16
    for far, wanted in ((0.99, ()), (1.01, (3,))):
        cleaned[2] = sigmoid(logits[2] + far * limit)
        full[2] = 1.2 * cleaned[2]
        made = found(cleaned, full, retrained=retrained, base=base)
        assert judge_remains(made).leaking_rows == wanted, far
    assert judge_remains(found(cleaned, full, retrained=retrained)).leaking_rows == ()


def test_a_row_stands_out_from_unseen_rows_by_a_limit_worked_out_by_hand() -> None:
    # Their odds are e^-5 and e^-3, eight each: s = sqrt((4 + 16) / 19), 15 degrees and four more.
    unseen = [sigmoid(-5.0), sigmoid(-3.0)] * 8
    mean = sum(unseen) / 16
    limit = float(t.ppf(1 - 0.025 / N, 19)) * math.sqrt(20 / 19)
    for far, wanted in ((0.99, ()), (1.01, (3,))):
        own = mean / (1 - mean) * math.exp(far * limit)
        cleaned, full = [0.0] * N, [1.0] * N
        cleaned[2] = own / (1 + own)
        full[2] = 1.5 * cleaned[2]  # more than half of it is left
        assert judged(*cleaned, full=full, holdout=unseen).leaking_rows == wanted, far


def test_what_another_yardstick_has_too_is_no_leak() -> None:
    cleaned, retrained, base = [0.0] * N, [0.0] * N, [0.0] * N
    cleaned[4] = base[4] = 0.8
    assert judged(*cleaned, retrained=retrained).leaking_rows == (5,)
    both = judged(*cleaned, retrained=retrained, base=base)
    assert (both.verdict, both.leaking_rows) == ("not sure", ())
    assert both.reason == "1 row has much left, which may be chance"
    # In the mean: unseen rows are as likely as the removed ones.
    third = (0.3,) * N
    assert judged(*third, retrained=retrained).verdict == "leaks"
    told = judged(*third, retrained=retrained, holdout=third)
    assert told.verdict == "not sure"
    assert told.reason.endswith("is left, but no more than unseen rows have")


def test_one_right_guess_is_no_leak_without_the_retrained_model() -> None:
    cleaned = [0.9, *(0.0,) * (N - 1)]
    for yardstick in ({"base": (0.0,) * N}, {"holdout": (0.0,) * N}):
        made = found(cleaned, **yardstick)  # type: ignore[arg-type]
        assert judge_remains(made).verdict == "leaks"
        assert judge_remains(made, guessable=True).verdict == "not sure"
    assert judge_remains(found(cleaned, retrained=(0.0,) * N), guessable=True).verdict == "leaks"


@pytest.mark.parametrize("ways", [1, 10])
def test_models_that_never_saw_the_rows_seldom_leak_in_any_row_or_way(ways: int) -> None:
    draw = random.Random(ways)

    def guesses(right: Sequence[float]) -> list[list[float]]:
        """By way the scores of a model that is right by chance, much alike in every way."""
        own = [draw.gauss(mean, 1.5) for mean in right]
        return [[sigmoid(draw.gauss(one, 0.5)) for one in own] for _ in range(ways)]

    leaks = 0
    for _ in range(200):
        right = [draw.gauss(-3.0, 1.0) for _ in range(16)]
        pairs = zip(guesses(right), guesses(right), strict=True)
        made = [found(cleaned, (1.0,) * 16, retrained=usual) for cleaned, usual in pairs]
        leaks += any(judge_remains(one, ways=ways).verdict == "leaks" for one in made)
    assert leaks <= 18  # with a share of 0.05 there are more once in a hundred times
