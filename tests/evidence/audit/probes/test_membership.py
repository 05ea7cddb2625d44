"""Membership attacks: AUCs by hand, both sides of them, and the coverage of their interval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from audit_cases import log_probabilities, material, view

from helpers import tiny_llama
from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probes import membership
from perta.evidence.intervals import pairs_interval
from perta.evidence.metrics import membership_auc, wins

Side = Sequence[float]


def found(**models: tuple[Side, Side]) -> Found:
    scores = {
        role: {"forget": list(forget), "holdout": list(holdout)}
        for role, (forget, holdout) in models.items()
    }
    sizes = {name: len(side) for name, side in scores["cleaned"].items()}
    rows = {name: range(1, size + 1) for name, size in sizes.items()}
    subjects = {name: list(range(size)) for name, size in sizes.items()}
    return Found(scores, rows, subjects)


def judged(**models: tuple[Side, Side]) -> Judgement:
    return membership.Loss().judge(found(**models))


def drawn(n: int, mean: float = 0.0, seed: int = 0) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(mean, 1, n)]


def test_the_auc_is_the_share_of_pairs() -> None:
    forget, holdout = [1.0, 3.0], [2.0, 3.0, 0.0]
    # 2>1, 3>1, 0<1; 2<3, 3=3, 0<3
    value = judged(cleaned=(forget, holdout), base=(forget, holdout)).value
    assert value is not None
    assert value.value == pytest.approx((2 + 0.5) / 6) == membership_auc(forget, holdout)
    assert 0 <= value.low < value.value < value.high <= 1


def test_rows_like_unseen_ones_pass_where_there_are_many() -> None:
    same = (drawn(800, seed=1), drawn(800, seed=2))
    full = (drawn(800, -3, seed=3), drawn(800, seed=4))
    judgement = judged(cleaned=same, retrained=same, full=full)
    assert judgement.verdict == "passed"
    few = judged(
        cleaned=(same[0][:10], same[1][:10]),
        retrained=(drawn(10, seed=5), drawn(10, seed=6)),
        full=(full[0][:10], full[1][:10]),
    )
    assert few.verdict == "not sure"


@pytest.mark.parametrize(("mean", "word"), [(-2, "known"), (2, "removed")])
def test_both_sides_leak(mean: float, word: str) -> None:
    unseen = (drawn(60, seed=1), drawn(60, seed=2))
    judgement = judged(
        cleaned=(drawn(60, mean, seed=3), unseen[1]),
        retrained=unseen,
        full=(drawn(60, -4, seed=4), unseen[1]),
    )
    assert judgement.verdict == "leaks"
    assert word in judgement.reason or "conspicuously" in judgement.reason


@pytest.mark.parametrize(("sign", "word"), [(1, "removed"), (-1, "known")])
def test_rows_a_little_off_leak_though_none_lies_at_an_end(sign: int, word: str) -> None:
    unseen = (drawn(100, seed=1), drawn(100, seed=2))
    near = [sign * (0.9 + 0.2 * value) for value in drawn(100, seed=3)]
    judgement = judged(
        cleaned=(near, unseen[1]), retrained=unseen, full=(drawn(100, -4, seed=4), unseen[1])
    )
    assert judgement.notes["known_tpr"] == judgement.notes["conspicuous_tpr"] == 0
    assert (judgement.verdict, word in judgement.reason) == ("leaks", True)


def test_a_difference_that_the_retrained_model_has_too_is_none() -> None:
    # Forgotten rows are easier texts: their AUC is far from 1/2 under every model.
    easier = (drawn(800, -1, seed=1), drawn(800, seed=2))
    judgement = judged(
        cleaned=easier, retrained=easier, full=(drawn(800, -5, seed=3), drawn(800, seed=4))
    )
    assert judgement.value is not None
    assert judgement.value.value > 0.7
    assert judgement.verdict == "passed"


@pytest.mark.parametrize(("sign", "word"), [(1, "known"), (-1, "conspicuously unlikely")])
def test_a_few_rows_at_an_end_leak_though_the_mean_does_not(sign: int, word: str) -> None:
    unseen = (drawn(200, seed=1), drawn(200, seed=2))
    some = [-9.0 * sign] * 20 + unseen[0][20:]
    judgement = judged(
        cleaned=(some, unseen[1]), retrained=unseen, full=(drawn(200, -5, seed=3), unseen[1])
    )
    assert judgement.verdict == "leaks"
    assert word in judgement.reason
    name = "known_tpr" if sign > 0 else "conspicuous_tpr"
    # floor(0.01 * 200) + 1 = 3: those beyond the third most extreme of 200 unseen rows.
    third = sorted(v * sign for v in unseen[1])[2]
    assert judgement.notes[name] == sum(v * sign < third for v in some) / 200 >= 0.1
    assert judgement.notes["fpr"] == pytest.approx(3 / 201)


def test_without_a_model_that_never_saw_the_rows_nobody_can_tell() -> None:
    same = (drawn(100, seed=1), drawn(100, seed=2))
    assert "no retrained or base model" in judged(cleaned=same, full=same).reason


def test_the_reference_attack_subtracts_the_base_model() -> None:
    cleaned, base = ([1.0, 2.0], [3.0, 4.0]), ([1.0, 3.0], [1.0, 5.0])
    judgement = membership.Reference().judge(found(cleaned=cleaned, base=base))
    # 0 and -1 against 2 and -1: 2>0, 2>-1, -1<0, -1=-1
    assert judgement.value is not None
    assert judgement.value.value == pytest.approx(2.5 / 4)
    assert judgement.yardstick is not None
    assert judgement.yardstick[1].value == 0.5


def test_scores_are_those_of_the_answer(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    seen = view(made, model)
    rows = [item.answers[0] for item in seen.items("holdout")]
    logs = [log_probabilities(model, row) for row in rows]
    losses = [-sum(log) / len(log) for log in logs]
    assert membership.Loss().run(seen, "holdout").scores == pytest.approx(losses, rel=1e-5)
    lowest = [sorted(log[:-1])[: max(1, int(0.4 * (len(log) - 1)))] for log in logs]
    assert membership.MinK().run(seen, "holdout").scores == pytest.approx(
        [-sum(part) / len(part) for part in lowest], rel=1e-5
    )
    assert None not in membership.MinKPlusPlus().run(seen, "holdout").scores
    zlib = membership.Zlib().run(seen, "holdout").scores
    assert all(z is not None and 0 < z < loss for z, loss in zip(zlib, losses, strict=True))


@pytest.mark.parametrize("rows", [1, 5])
def test_the_interval_of_a_difference_of_aucs_holds_its_coverage(rows: int) -> None:
    # The models' scores are independent and equally good, so the true difference is 0.
    held, trials, people = 0, 100, 12
    for seed in range(trials):
        draw = np.random.default_rng(seed)
        pairs = []
        for _ in range(2):
            forget, holdout = (
                (draw.normal(shift, 1, people)[:, None] + draw.normal(0, 0.3, (people, rows)))
                for shift in (-1, 0)
            )
            pairs.append(wins(forget.ravel(), holdout.ravel()))
        groups = [person for person, _ in product(range(people), range(rows))]
        interval = pairs_interval(pairs[0] - pairs[1], -1, 1, (groups, groups))
        held += interval.low <= 0 <= interval.high
    assert held >= 0.95 * trials
