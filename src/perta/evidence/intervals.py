"""95% intervals that hold their coverage at any number of values. Pure numbers, no files.

Resampling values by themselves cannot show what they lack: one value has no spread, and eight
low ones say little about a set in which one in ten is high. So means of values with known
bounds are taken under random weights with one more value at the bound:

    upper end = 97.5% quantile of  D_1 x_1 + … + D_n x_n + D_{n+1} · highest,

D drawn evenly from all weights that add up to 1 (Dirichlet), and the lower end the same way with
the lowest. For zeros and ones these are the exact binomial limits (Clopper–Pearson), for one value
nearly the whole range. Source: N. Gaffke, "Three test statistics for a nonparametric one-sided
hypothesis on the mean of a nonnegative variable", Math. Methods of Statistics 14 (2005); Phan,
Thomas, Learned-Miller, arXiv 2106.03163.

Values of one group (questions about one person) are not independent. Where there are several
groups, the interval is widened to Student's, from the sums of the groups:

    mean ± t(m − 1) · sqrt(m / (m − 1) · Σ_g (S_g − n_g · mean)²) / n
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Groups = Sequence[object] | None
"""Of each value the group it belongs to; values of one group count together."""

_CONFIDENCE = 0.95
_DRAWS = 2000

_CACHED = 1 << 21
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval over n examples."""

    value: float
    low: float
    high: float
    n: int


def share_interval(hits: int, n: int) -> Interval:
    """Share of n independent cases, with the exact binomial limits (Clopper–Pearson)."""
    from scipy.stats import beta

    tail = (1 - _CONFIDENCE) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return Interval(hits / n, low, high, n)


def mean_interval(
    values: Sequence[float],
    lowest: float = 0.0,
    highest: float = 1.0,
    groups: Groups = None,
    confidence: float = _CONFIDENCE,
) -> Interval:
    """Mean of bounded values with its interval; without groups they are independent."""
    array = np.asarray(values, dtype=np.float64)
    low, high = bounded_means(array, lowest, highest)
    found = quantile_interval(float(array.mean()), low, high, len(array), confidence)
    wide = _widened(found, None if groups is None else student_interval(values, groups, confidence))
    # Values within bounds have a mean within them; Student's ends know of none.
    return Interval(wide.value, max(lowest, wide.low), min(highest, wide.high), wide.n)


def difference_interval(
    values: Sequence[float],
    others: Sequence[float],
    lowest: float = 0.0,
    highest: float = 1.0,
    groups: tuple[Groups, Groups] = (None, None),
    confidence: float = _CONFIDENCE,
) -> Interval:
    """Difference of the means of two separate sets of values with one pair of bounds."""
    low, high = bounded_means(np.asarray(values, dtype=np.float64), lowest, highest)
    other_low, other_high = bounded_means(np.asarray(others, dtype=np.float64), lowest, highest, 1)
    value = float(np.mean(values)) - float(np.mean(others))
    n = min(len(values), len(others))
    found = quantile_interval(value, low - other_high, high - other_low, n, confidence)
    half = _half_width((values, others), groups, confidence)
    return _widened(found, Interval(value, value - half, value + half, n))


def pairs_interval(
    pairs: Array, lowest: float, highest: float, groups: tuple[Groups, Groups] = (None, None)
) -> Interval:
    """Mean over all pairs of two sets drawn separately, such as an AUC or a difference of two.

    `pairs` are (n, m) values within the bounds, n of the one set and m of the other. Pairs with the
    example of a side that was not seen could all have either bound. `groups`, of each of the n and
    of each of the m, widen it to Student's from the means of each side (DeLong's variance, by
    group).
    """
    n, m = pairs.shape
    left, right = _random_weights(n, 0)[:, :-1], _random_weights(m, 1)[:, :-1]
    draws = np.einsum("bi,ij,bj->b", left, pairs, right, optimize=True)
    rest = 1 - left.sum(axis=1) * right.sum(axis=1)
    value = float(pairs.mean())
    found = quantile_interval(value, draws + rest * lowest, draws + rest * highest, min(n, m))
    half = _half_width((pairs.mean(axis=1).tolist(), pairs.mean(axis=0).tolist()), groups)
    low, high = max(lowest, value - half), min(highest, value + half)
    return _widened(found, Interval(value, low, high, min(n, m)))


def student_interval(
    values: Sequence[float], groups: Groups = None, confidence: float = _CONFIDENCE
) -> Interval | None:
    """Mean with Student's interval over groups, or single values; None with fewer than two."""
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64)
    names = list(range(len(array)) if groups is None else groups)
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    m = len(places)
    if m < 2:
        return None
    mean = float(array.mean())
    excess = np.zeros(m)
    np.add.at(excess, [places[name] for name in names], array - mean)
    error = math.sqrt(m / (m - 1) * float(excess @ excess)) / len(array)
    half = float(t.ppf((1 + confidence) / 2, m - 1)) * error
    return Interval(mean, mean - half, mean + half, len(array))


def _half_width(
    columns: tuple[Sequence[float], Sequence[float]],
    groups: tuple[Groups, Groups],
    confidence: float = _CONFIDENCE,
) -> float:
    """Half of Student's interval of a sum of two separate means, of those that have groups."""
    sides = [
        student_interval(column, group, confidence)
        for column, group in zip(columns, groups, strict=True)
        if group is not None
    ]
    return math.hypot(*((side.high - side.low) / 2 for side in sides if side), 0.0)


def quantile_interval(
    value: float, low: Array, high: Array, n: int, confidence: float = _CONFIDENCE
) -> Interval:
    """The interval between the lower quantile of some draws and the upper one of others."""
    tail = 100 * (1 - confidence) / 2
    return Interval(
        value,
        min(value, float(np.percentile(low, tail))),
        max(value, float(np.percentile(high, 100 - tail))),
        n,
    )


def bounded_means(
    values: Array, lowest: float, highest: float, seed: int = 0
) -> tuple[Array, Array]:
    """Means of (n,) values under random weights, with one more at either bound: two (DRAWS,)."""
    n = len(values)
    if _DRAWS * (n + 1) <= _CACHED:
        weights = _random_weights(n, seed)
        means, rest = weights[:, :n] @ values, weights[:, n]
    else:
        generator = np.random.default_rng(seed)
        rows = max(1, _CHUNK // n)
        parts = []
        for done in range(0, _DRAWS, rows):
            some = generator.standard_exponential((min(rows, _DRAWS - done), n + 1))
            some /= some.sum(axis=1, keepdims=True)
            parts.append((some[:, :n] @ values, some[:, n]))
        means, rest = (np.concatenate(column) for column in zip(*parts, strict=True))
    return means + rest * lowest, means + rest * highest


@lru_cache(maxsize=8)
def _random_weights(n: int, seed: int) -> Array:
    """Weights of n values and of the one at the bound, (DRAWS, n + 1); rows add up to 1."""
    weights = np.random.default_rng(seed).standard_exponential((_DRAWS, n + 1))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def upper_end(values: Sequence[float]) -> float:
    """Value above which at most one in twenty of n such values lies.

    It is the k-th smallest, k = ⌈0.95 (n + 1)⌉, the largest where that exceeds n (fewer than 19).
    """
    ordered = sorted(values)
    return ordered[min(len(ordered), math.ceil(_CONFIDENCE * (len(ordered) + 1))) - 1]


def _widened(found: Interval, other: Interval | None) -> Interval:
    if other is None:
        return found
    return Interval(found.value, min(found.low, other.low), max(found.high, other.high), found.n)
