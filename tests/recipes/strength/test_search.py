"""The search for a strength on curves whose answer is known."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable
from itertools import pairwise

import pytest

from perta.recipes.strength._search import (
    FIRST,
    LARGEST,
    RATIO,
    TOLERANCE,
    Found,
    is_monotone,
    search_coarsely,
    search_strength,
)

Curve = Callable[[float], bool]


def always(_strength: float) -> bool:
    return True


def never(_strength: float) -> bool:
    return False


def run(forgets: Curve, fits: Curve) -> tuple[Found, list[float], list[float]]:
    """The outcome, and the strengths at which the forget and the retain set were looked at."""
    forgotten: list[float] = []
    retained: list[float] = []

    def look(alpha: float) -> bool:
        forgotten.append(alpha)
        return forgets(alpha)

    def check(alpha: float) -> bool:
        retained.append(alpha)
        return fits(alpha)

    return search_strength(look, check), forgotten, retained


@pytest.mark.parametrize("edge", [0.03, 0.4, 0.5, 0.9, math.sqrt(2), 2.7, 11.0])
def test_a_monotone_curve_gives_the_smallest_strength(edge: float) -> None:
    found, looks, checks = run(lambda a: a >= edge, lambda a: a <= 2 * edge)
    assert found.scaling_coef is not None
    assert 0 <= found.scaling_coef - edge <= max(TOLERANCE * found.scaling_coef, 0.01)
    assert len(looks) <= 21
    # The retained rows, which are the many, are read where the forget set passes, and seldom else.
    assert len([a for a in checks if a < edge / 1.1]) <= 2


@pytest.mark.parametrize(
    ("edge", "largest"), [(0.02, 16), (0.5, 16), (9.3, 16), (0.4, 32), (16.1, 32), (32.0, 32)]
)
def test_a_coarse_search_is_right_to_a_tenth(edge: float, largest: float) -> None:
    found = search_coarsely(lambda a: a >= edge, largest)
    assert found is not None
    assert edge <= found <= edge + max(0.1 * found, 0.01)


@pytest.mark.parametrize("largest", [16, 32])
def test_a_coarse_search_ends_at_its_largest_strength(largest: float) -> None:
    assert search_coarsely(lambda a: a >= 1.01 * largest, largest) is None


@pytest.mark.parametrize("by_retain", [False, True])
def test_passing_strengths_in_the_middle_are_found(by_retain: bool) -> None:
    """They are 1.29 to 1.75; outside the forget set stands out again, or the budget is exceeded."""

    def window(alpha: float) -> bool:
        return 1.29 <= alpha <= 1.75

    found, looks, _ = run(
        (lambda a: a >= 1.29) if by_retain else window, window if by_retain else always
    )
    assert found.scaling_coef == pytest.approx(1.29, rel=TOLERANCE)
    assert max(looks) < 1.75


def test_a_narrow_range_between_too_little_and_too_much_is_found() -> None:
    found, _, _ = run(lambda a: a >= 2.70, lambda a: a <= 2.85)
    assert found.scaling_coef is not None
    assert 2.70 <= found.scaling_coef <= 2.85


def test_windows_as_wide_as_the_resolution_are_found_anywhere() -> None:
    chance = random.Random(0)
    for _ in range(500):
        start = FIRST * (LARGEST / FIRST / RATIO) ** chance.random()
        stop = start * RATIO * 1.0001
        found, _, _ = run(lambda a, b=start, c=stop: b <= a <= c, always)  # type: ignore[misc]
        assert found.scaling_coef is not None
        assert start <= found.scaling_coef <= start * (1 + 2 * TOLERANCE)


def test_random_curves() -> None:
    """Whatever the curve: what is taken passes, and no wide range below it was passed over."""
    chance = random.Random(1)
    found_any = 0
    for _ in range(1000):
        edges = [sorted(chance.uniform(0.2, 16) for _ in range(chance.randrange(9))) for _ in "ab"]
        inverted = chance.random() < 0.3

        def forgets(alpha: float, edges: list[float] = edges[0]) -> bool:
            return bisect(edges, alpha) % 2 == 1

        def fits(alpha: float, edges: list[float] = edges[1], flip: bool = inverted) -> bool:
            return (bisect(edges, alpha) % 2 == 0) != flip or alpha == 0

        found, looks, checks = run(forgets, fits)
        ranges = _passing(forgets, fits, sorted({0.2, 16.0, *edges[0], *edges[1]}))
        wide = [low for low, high in ranges if low >= FIRST and high >= low * RATIO]
        if found.scaling_coef is None:
            assert all(fits(a) for a in found.within)
            assert not wide or max(looks) < wide[0] * RATIO
            continue
        found_any += 1
        assert forgets(found.scaling_coef)
        assert fits(found.scaling_coef)
        assert found.scaling_coef in checks
        if wide:
            assert found.scaling_coef <= wide[0] * (1 + 2 * TOLERANCE)
    assert found_any > 300


def _passing(forgets: Curve, fits: Curve, edges: list[float]) -> list[tuple[float, float]]:
    """Ranges of passing strengths between neighbouring edges."""
    middles = ((low + high) / 2 for low, high in pairwise(edges))
    pairs = zip(pairwise(edges), middles, strict=True)
    return [(low, high) for (low, high), middle in pairs if forgets(middle) and fits(middle)]


def test_it_stops_at_the_budget() -> None:
    found, looks, checks = run(never, lambda a: a <= 1.3)
    assert found.scaling_coef is None
    assert found.within[-1] == pytest.approx(1.3, rel=TOLERANCE)
    assert found.within[-1] <= 1.3
    assert max(looks) == max(checks) < 7  # an octave behind the first look at the budget above it


def test_a_collapse_that_looks_unseen_is_not_taken() -> None:
    found, looks, _ = run(lambda a: a >= 1.2, lambda a: a < 1.19)
    assert found.scaling_coef is None
    assert 1.1 < found.within[-1] < 1.19
    assert max(looks) < 2.1


def test_what_looks_unseen_already_needs_no_edit() -> None:
    found, looks, checks = run(always, always)
    assert found == Found(0.0)
    assert (looks, checks) == ([0.0], [])


def test_a_direction_without_effect_ends_the_search() -> None:
    found, _, checks = run(never, always)
    assert found.scaling_coef is None
    assert found.within[-1] == pytest.approx(LARGEST)
    assert len(checks) == 3


def test_monotone_or_not() -> None:
    assert is_monotone(
        [(0.0, False, True), (2.0, True, None), (1.0, False, None), (4, True, False)]
    )
    assert not is_monotone([(0.0, False, None), (2.0, False, None), (1.0, True, None)])
    assert not is_monotone([(0.0, None, True), (1.0, None, False), (2.0, None, True)])
