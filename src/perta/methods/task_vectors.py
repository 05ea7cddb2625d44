"""One task vector out of several: mean, trim and sign election, random drop, agreement.

Functions take float32 tensors of one shape, which they may overwrite, and give the tensor that
the edit weights and subtracts. What is not finite stays so, for the edit to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Mean of the task vectors, in place of the first.

    Args:
        vectors: τ_1 ... τ_n.

    Returns:
        (τ_1 + ... + τ_n) / n; of one, that one untouched.
    """
    total = vectors[0]
    for vector in vectors[1:]:
        total.add_(vector)
    return total.div_(len(vectors)) if len(vectors) > 1 else total


def ties(vectors: Sequence[Tensor], cuts: Sequence[float]) -> Tensor:
    """Trim each task vector, elect a sign for every weight, average those that have it.

    The elected sign is that of the sum of the trimmed vectors, so the larger total magnitude
    wins; where the sum is 0, so is the result. Of one vector it is the trim.

    Args:
        vectors: τ_1 ... τ_n.
        cuts: smallest magnitude kept of each.

    Returns:
        Mean over the vectors with the elected sign, 0 where there is none.
    Source: Yadav et al., arXiv 2306.01708, algorithm 1.
    """
    trimmed = [v.mul_(v.abs() >= cut) for v, cut in zip(vectors, cuts, strict=True)]
    if len(trimmed) == 1:
        return trimmed[0]
    elected = torch.stack(trimmed).sum(0).sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in trimmed:
        agrees = vector * elected > 0
        # A product with 0, not a selection: NaN must stay NaN.
        total.add_(vector.mul_(agrees))
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def agreement(vectors: Sequence[Tensor]) -> Tensor:
    """Mean of the task vectors where all have the same sign, otherwise 0.

    Args:
        vectors: τ_1 ... τ_n.

    Returns:
        The mean, or 0 where one is positive and another is not.
    Source: Kim et al., NegMerge, arXiv 2410.05583.
    """
    low, high = vectors[0].clone(), vectors[0].clone()
    for vector in vectors[1:]:
        torch.minimum(low, vector, out=low)
        torch.maximum(high, vector, out=high)
    return mean(vectors).mul_((low > 0) | (high < 0))


def dare(vectors: Sequence[Tensor], drop: float, seeds: Sequence[int], begin: int) -> Tensor:
    """Drop weights of each task vector at random and rescale the rest; then the mean.

    Args:
        vectors: τ_1 ... τ_n, (count,).
        drop: probability p that a weight is dropped; the rest is divided by 1 - p.
        seeds: seed of each vector's draws in this tensor.
        begin: place of the first element in the tensor.

    Returns:
        The mean of the sparse vectors; each has the expectation of its vector.
    Source: Yu et al., arXiv 2311.03099, section 3.
    """
    for vector, seed in zip(vectors, seeds, strict=True):
        kept = uniform(seed, begin, len(vector)) >= drop
        vector.mul_(torch.from_numpy(kept)).div_(1 - drop)
    return mean(vectors)


def uniform(seed: int, begin: int, count: int) -> NDArray[np.float64]:
    """Random numbers of neighbouring places; each depends on seed and place alone.

    So they do not depend on how a tensor is cut into blocks. The generator is SplitMix64, whose
    n-th number is a hash of seed + n times a constant.

    Args:
        seed: any integer.
        begin: place of the first number.
        count: how many.

    Returns:
        (count,) in [0, 1).
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    place = np.arange(begin + 1, begin + count + 1, dtype=np.uint64)
    bits = place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53)
