"""Which strengths to try, and which to take: two questions asked of a number, no model.

The strength has to make the forget set look unseen (`forgets`) within the retain budget
(`fits`). Neither is taken to be monotone: a larger step may bring a fact back, and harm may fall
again. So strengths a factor `RATIO` apart are looked at in ascending order, and the first that
passes is refined downwards from the largest below it that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

FIRST: Final = 0.5
"""Smallest strength of the scan."""

LARGEST: Final = 16.0
"""Strength beyond which no search goes."""

RATIO: Final = 2 ** (1 / 3)
"""Factor between two strengths of the scan: its resolution."""

_GRID: Final = tuple(round(FIRST * RATIO**step, 12) for step in range(16))  # what is scanned

TOLERANCE: Final = 0.04
"""Relative width of the interval of strengths at which refining stops."""

_COARSE = 0.1

_FINEST = 0.01  # width at which refining stops next to 0

_OCTAVE = 3  # strengths of the scan within a factor of 2

_CHECKS = (3, 9, 15)
"""Places of the scan at which the budget is looked at even where the forget set is not there."""

Question = Callable[[float], bool]


@dataclass(frozen=True)
class Found:
    """The smallest strength that passes; without one, those within the budget, ascending."""

    scaling_coef: float | None
    within: tuple[float, ...] = ()


def search_strength(forgets: Question, fits: Question, largest: float = LARGEST) -> Found:
    """Look for the smallest strength up to the largest that forgets and fits, to `TOLERANCE`.

    Every range of passing strengths that spans a factor of `RATIO`, from `FIRST` on, is found,
    however the rest of the curve runs, unless the budget was exceeded at every strength of an
    octave before it: what lies behind is a model that collapses. Narrower ranges are found where
    they lie between a strength that falls short and one that goes too far. `fits` is asked where
    the set is forgotten, and at a few strengths besides, to know when to stop.
    """
    known: dict[float, bool] = {0.0: True}

    def is_within(strength: float) -> bool:
        if strength not in known:
            known[strength] = fits(strength)
        return known[strength]

    if forgets(0.0):
        return Found(0.0)
    low, was_forgotten, exceeded = 0.0, False, 0
    for place, high in enumerate(strength for strength in _GRID if strength <= largest):
        is_forgotten = forgets(high)
        if is_forgotten and not was_forgotten:
            # What is just enough may be within the budget where a little more is not.
            edge = _smallest(forgets, low, high)
            if is_within(edge):
                return Found(edge)
        if is_forgotten or exceeded or place in _CHECKS:
            exceeded = 0 if is_within(high) else exceeded + 1
            if is_forgotten and not exceeded:
                return Found(_smallest(lambda a: forgets(a) and is_within(a), low, high))
        if exceeded == _OCTAVE:
            break
        low, was_forgotten = high, is_forgotten
    _find_limit(is_within, known)
    return Found(None, tuple(sorted(strength for strength, fit in known.items() if fit)))


def search_coarsely(forgets: Question, largest: float = LARGEST) -> float | None:
    """Look for a strength that forgets, octave by octave and to a tenth: others follow it."""
    low, high = 0.0, FIRST
    while high <= largest:
        if forgets(high):
            return _smallest(forgets, low, high, _COARSE)
        low, high = high, 2 * high
    return None


def _smallest(holds: Question, low: float, high: float, tolerance: float = TOLERANCE) -> float:
    """Halve the interval until it is narrow: `holds` is false at `low` and true at `high`."""
    while high - low > max(tolerance * high, _FINEST):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _find_limit(is_within: Question, known: dict[float, bool]) -> None:
    """Look for the largest strength below the first that is known to exceed the budget."""
    beyond = min((strength for strength, fit in known.items() if not fit), default=None)
    if beyond is not None:
        low = max(strength for strength, fit in known.items() if fit and strength < beyond)
        _smallest(lambda strength: not is_within(strength), low, beyond)


def is_monotone(answers: Sequence[tuple[float, bool | None, bool | None]]) -> bool:
    """Whether, as far as was looked, a larger strength forgets more and costs more.

    Of each strength tried: whether it forgets and whether it fits; None where nobody looked.
    """
    tried = sorted(answers)
    forgot = [a for _, a, _ in tried if a is not None]
    broke = [not a for _, _, a in tried if a is not None]
    return forgot == sorted(forgot) and broke == sorted(broke)
