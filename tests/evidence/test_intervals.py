"""Intervals: exact limits, groups, and coverage at any number of values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from perta.evidence.intervals import (
    difference_interval,
    mean_interval,
    share_interval,
    student_interval,
    upper_end,
)

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

SHAPES: dict[str, tuple[Draw, float]] = {
    "even": (lambda g, n: g.random(n), 0.5),
    "skewed": (lambda g, n: g.beta(0.3, 3, n), 0.3 / 3.3),
    "one row in ten intact": (
        lambda g, n: np.where(g.random(n) < 0.1, 0.99, 0.05),
        0.1 * 0.99 + 0.9 * 0.05,
    ),
    "zeros and ones": (lambda g, n: (g.random(n) < 0.2).astype(float), 0.2),
}


@pytest.mark.parametrize("n", [1, 3, 8, 20, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_mean_is_inside_as_often_as_promised(n: int, shape: str) -> None:
    draw, truth = SHAPES[shape]
    generator = np.random.default_rng(n)
    found = [mean_interval(draw(generator, n).tolist()) for _ in range(400)]
    inside = sum(interval.low <= truth <= interval.high for interval in found) / 400
    # Three standard errors of 400 draws below 95%.
    assert inside >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


@pytest.mark.parametrize("subjects", [3, 8, 20])
def test_subjects_are_what_is_drawn_and_not_their_rows(subjects: int) -> None:
    generator = np.random.default_rng(subjects)
    groups = np.repeat(np.arange(subjects), 5).tolist()
    inside, by_row = 0, 0
    for _ in range(400):
        # Five rows of a subject are nearly the same; over subjects the mean is 0.2.
        own = np.repeat(generator.beta(1, 4, subjects), 5)
        values = np.clip(own + generator.normal(0, 0.01, len(own)), 0, 1).tolist()
        interval = mean_interval(values, groups=groups)
        inside += interval.low <= 0.2 <= interval.high
        interval = mean_interval(values)
        by_row += interval.low <= 0.2 <= interval.high
    assert inside / 400 >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5
    assert by_row / 400 < 0.9


def test_the_difference_of_two_samples_is_covered() -> None:
    generator = np.random.default_rng(0)
    draw, truth = SHAPES["one row in ten intact"]
    inside = 0
    for _ in range(300):
        values, others = draw(generator, 8).tolist(), generator.beta(1, 4, 5).tolist()
        interval = difference_interval(values, others)
        inside += interval.low <= truth - 0.2 <= interval.high
    assert inside / 300 >= 0.93


def test_no_hit_among_n_is_the_exact_binomial_limit() -> None:
    # (1 - p)^n = 0.025 has the solution p = 1 - 0.025^(1/n).
    for n in (1, 3, 13, 20, 100):
        exact = share_interval(0, n)
        assert exact.low == 0
        assert exact.high == pytest.approx(1 - 0.025 ** (1 / n))
        assert share_interval(n, n).low == pytest.approx(0.025 ** (1 / n))
        assert mean_interval([0.0] * n).high == pytest.approx(exact.high, rel=0.06)
    # Textbook value: 5 of 10.
    assert share_interval(5, 10).low == pytest.approx(0.18709, abs=1e-5)
    assert share_interval(5, 10).high == pytest.approx(0.81291, abs=1e-5)


def test_zeros_and_ones_have_the_binomial_interval() -> None:
    found, exact = mean_interval([1.0] * 5 + [0.0] * 15), share_interval(5, 20)
    assert found.low == pytest.approx(exact.low, abs=0.01)
    assert found.high == pytest.approx(exact.high, abs=0.01)


def test_one_value_says_next_to_nothing() -> None:
    interval = mean_interval([0.05])
    assert interval.high > 0.95
    assert student_interval([0.05]) is None


def test_many_values_have_the_normal_interval() -> None:
    n = 5000  # more than fit in one table of draws
    interval = mean_interval([i % 2 for i in range(n)])
    half = 1.96 * 0.5 / n**0.5
    assert interval.low == pytest.approx(0.5 - half, abs=0.1 * half)
    assert interval.high == pytest.approx(0.5 + half, abs=0.1 * half)


def test_intervals_are_the_same_every_time() -> None:
    values = [0.1, 0.5, 0.9, 0.3]
    assert mean_interval(values) == mean_interval(values)


def test_students_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, t(2) = 4.3027: half width 4.3027 / sqrt(3).
    interval = student_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.high - 2 == pytest.approx(4.302653 / 3**0.5)
    # Each value thrice, as one group each: nothing more is known.
    groups = student_interval([1.0] * 3 + [2.0] * 3 + [3.0] * 3, list("aaabbbccc"))
    assert groups is not None
    assert groups.high == pytest.approx(interval.high)


def test_the_end_of_a_spread_is_the_largest_of_few_values() -> None:
    assert upper_end([3.0, 1.0, 2.0]) == 3.0
    # 0.95 * 40 = 38: the 38th of 39.
    assert upper_end([float(i) for i in range(1, 40)]) == 38.0


def test_a_mean_of_values_within_bounds_lies_within_them() -> None:
    # Two people of means 0 and 0.2: 0.1 ± t(1) · 0.1 would be -1.17 to 1.37.
    found = mean_interval([0.0, 0.0, 0.2, 0.2], groups=[0, 0, 1, 1])
    assert (found.low, found.high) == (0.0, 1.0)
