"""The strength at which a method forgets as much as retraining does, in few tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_LARGEST = 64.0  # strength beyond which no search goes


@dataclass(frozen=True)
class Try:
    """One strength, and what is known of the forget set there, in [0, 1]: see `Bench.known`."""

    strength: float
    known: float


def search_equal(
    measure: Callable[[float], float],
    start: float,
    first: float,
    target: float,
    tolerance: float,
    tries: int,
) -> list[Try]:
    """Look for the strength at which as much is known of the forget set as by the retrained model.

    Between two strengths the logarithm of what is known is taken to be linear; outside, the
    strength grows by half.
    """
    below, made = Try(0.0, start), list[Try]()
    strength = first
    while len(made) < tries and strength <= _LARGEST:
        made.append(Try(strength, measure(strength)))
        if abs(made[-1].known - target) <= tolerance:
            break
        if made[-1].known < target:
            rest = tries - len(made)
            return made + search_between(measure, below, made[-1], target, tolerance, rest)
        below = made[-1]
        strength *= 1.5
    return made


def search_between(
    measure: Callable[[float], float],
    below: Try,
    above: Try,
    target: float,
    tolerance: float,
    tries: int,
) -> list[Try]:
    """`search_equal` between two strengths, where the measure is above and below the target."""
    made: list[Try] = []
    while len(made) < tries:
        strength = _between(below, above, target)
        made.append(Try(strength, measure(strength)))
        if abs(made[-1].known - target) <= tolerance:
            break
        if made[-1].known > target:
            below = made[-1]
        else:
            above = made[-1]
    return made


def nearest(tries: list[Try], target: float) -> Try:
    """The try that is nearest to the target."""
    return min(tries, key=lambda made: abs(made.known - target))


def _between(below: Try, above: Try, target: float) -> float:
    low, high = _log(below.known), _log(above.known)
    share = (low - _log(target)) / (low - high) if low > high else 0.5
    # Well inside, so that a bracket with one far end shrinks as well.
    share = min(0.9, max(0.1, share))
    return below.strength + share * (above.strength - below.strength)


def _log(known: float) -> float:
    return math.log(max(known, 1e-6))
