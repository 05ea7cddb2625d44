"""The likelihood-ratio attack: distances by hand, both ends, and how often it is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from audit_cases import log_probabilities, material, view
from numpy.typing import NDArray

from helpers import tiny_llama
from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probes.shadows import LikelihoodRatio

Side = Sequence[float] | NDArray[np.float64]
# Student's t with 3 + 4 - 1 = 6 degrees of freedom: 0.025 / 2 ends / 2 rows lie above this.
LIMIT = 3.5213


def sigmoid(phi: float) -> float:
    return 1 / (1 + math.exp(-phi))


def judged(
    cleaned: Side,
    *others: Side,
    full: float = 8.0,
    people: Sequence[int] | None = None,
) -> Judgement:
    """What is said of values on the scale log(p / (1 - p)); the first other is retrained."""
    n = len(cleaned)
    names = ["retrained", *(f"shadow-{i}" for i in range(1, len(others)))]
    by_role = {"cleaned": cleaned, "full": [full] * n, **dict(zip(names, others, strict=True))}
    scores = {role: {"forget": [sigmoid(v) for v in values]} for role, values in by_role.items()}
    return LikelihoodRatio().judge(Found(scores, {"forget": range(1, n + 1)}, {"forget": people}))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("factor", "leaking"), [(1.02, (1,)), (0.98, ())])
def test_a_row_stands_out_beyond_the_limit_on_either_side(
    sign: int, factor: float, leaking: tuple[int, ...]
) -> None:
    # S_i = 1 + 0 + 1, s^2 = (4 + 2 * 2) / (4 + 2 * 2) = 1, s_i^2 = (4 + 2) / 6 = 1.
    edge = LIMIT * math.sqrt(1 + 1 / 3)
    judgement = judged([sign * edge * factor, 0], [-1, 1], [0, 0], [1, -1])
    assert judgement.leaking_rows == leaking
    assert (judgement.verdict == "leaks") == bool(leaking)
    assert judgement.notes["known" if sign > 0 else "conspicuously unlikely"] == len(leaking)
    if leaking:
        assert ("unlikely" in judgement.reason) == (sign < 0)


def test_pieces_of_one_text_are_one_row() -> None:
    by_role = {"cleaned": 6.0, "full": 8.0} | {f"shadow-{i}": -4.0 for i in range(1, 4)}
    scores = {role: {"forget": [sigmoid(value)] * 3} for role, value in by_role.items()}
    judgement = LikelihoodRatio().judge(Found(scores, {"forget": [7, 7, 9]}, {"forget": None}))
    assert judgement.leaking_rows == (7, 9)
    assert judgement.reason == "standing out as known: 2 rows"


def test_a_row_of_which_models_differ_much_takes_more() -> None:
    # S = 50, 50, 2, 2 and s^2 = (4 + 104) / (4 + 4 * 2) = 9, so s_1^2 = (36 + 50) / 6 and
    # s_3^2 = (36 + 2) / 6; of 4 rows 0.025 / 8 lie above 4.1152.
    edge = 4.1152 * math.sqrt(38 / 6 * 4 / 3)
    others = [-5, 5, -1, 1], [0, 0, 0, 0], [5, -5, 1, -1]
    told = judged([edge * 1.02, 0, edge * 1.02, 0], *others, full=18)
    assert told.leaking_rows == (3,)
    assert judged([edge * 1.02, 0, edge * 0.98, 0], *others, full=18).leaking_rows == ()


def test_the_same_of_a_subject_and_of_all_rows_together() -> None:
    rng = np.random.default_rng(0)
    people = [i // 4 for i in range(16)]
    others = [rng.normal(-4, 0.5, 16) for _ in range(4)]
    one = np.where(np.array(people) == 2, -0.5, -4.0)
    assert judged(one, *others, people=people).leaking_subjects == (2,)
    together = judged(rng.normal(-6, 0.2, 16), *others)
    assert (together.verdict, together.leaking_rows) == ("leaks", ())
    assert together.reason == "standing out as conspicuously unlikely: all rows taken together"


def test_rows_as_usual_pass_and_a_few_do_not() -> None:
    rng = np.random.default_rng(1)
    same, *others = rng.normal(-4, 0.5, (5, 20))
    assert judged(same, *others).verdict == "passed"
    few = judged(same[:8], *[other[:8] for other in others])
    assert (few.verdict, few.reason) == ("not sure", "8 rows are too few to tell")


def test_two_models_are_too_few() -> None:
    judgement = judged([7.0] * 20, [-4.0] * 20, [-4.1] * 20)
    assert (judgement.verdict, "give 3 or more" in judgement.reason) == ("not sure", True)
    (one,) = judged([7.0] * 20, [-4.0] * 20).reason.split(";")[:1]
    assert one == "too few models that never saw the rows (1)"


def test_a_shadow_that_saw_the_rows_hides_nothing() -> None:
    rng = np.random.default_rng(2)
    unseeing = rng.normal(-4, 0.5, (3, 20))
    judgement = judged(unseeing[0], unseeing[1], rng.normal(7, 0.5, 20), unseeing[2])
    assert judgement.verdict == "not sure"
    assert "shadow-1 knows the rows better" in judgement.reason


def test_rows_that_the_full_model_does_not_know_say_nothing() -> None:
    judgement = judged([-4.0] * 20, [-4.1] * 20, [-4.0] * 20, [-3.9] * 20, full=-4)
    assert (judgement.verdict, "knew no more" in judgement.reason) == ("not sure", True)


@pytest.mark.parametrize("models", [3, 8])
def test_of_models_that_never_saw_the_rows_one_in_twenty_is_called_a_leak(models: int) -> None:
    # Rows differ in how much models differ of them, and whole models differ a little.
    alarms, trials = 0, 200
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        spread = rng.uniform(0.3, 2, 16)
        found = rng.normal(-4, 1, 16) + spread * rng.normal(size=(models + 1, 16))
        found += rng.normal(0, 0.3, (models + 1, 1))
        alarms += judged(*found).verdict == "leaks"
    assert alarms <= 0.05 * trials


def test_scores_are_those_of_the_facts(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    logs = [log_probabilities(model, fact.encoded) for fact in made.facts["forget"]]
    means = [math.exp(sum(log) / len(log)) for log in logs]
    rows = LikelihoodRatio().run(view(made, model), "forget")
    assert rows.scores == pytest.approx(means, rel=1e-5)
