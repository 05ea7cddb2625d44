"""One task vector out of several: mean, trim and sign election, random drop, agreement.

Functions take float32 tensors of one shape, which they may overwrite, and give the tensor that
the edit weights and subtracts. What is not finite stays so, for the edit to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perta.methods.method import (
    Block,
    Combination,
    Edit,
    Needs,
    Weighting,
    block_seed,
    mean,
    option,
)


def ties(vectors: Sequence[Tensor], cuts: Sequence[float]) -> Tensor:
    """Trim each task vector, elect a sign for every weight, average those that have it.

    The elected sign is that of the sum of the trimmed vectors, so the larger total magnitude
    wins; where the sum is 0, so is the result. Of one vector it is the trim. `cuts` are the
    smallest magnitudes kept.

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

    Source: Kim et al., NegMerge, arXiv 2410.05583.
    """
    low, high = vectors[0].clone(), vectors[0].clone()
    for vector in vectors[1:]:
        torch.minimum(low, vector, out=low)
        torch.maximum(high, vector, out=high)
    return mean(vectors).mul_((low > 0) | (high < 0))


def dare(vectors: Sequence[Tensor], drop: float, seeds: Sequence[int], begin: int) -> Tensor:
    """Drop weights of each task vector, (count,), at random and rescale the rest; then the mean.

    Each is dropped with probability `drop`, the rest divided by 1 - `drop`: the expectation stays.
    `begin` is the place of the first element in the tensor.

    Source: Yu et al., arXiv 2311.03099, section 3.
    """
    for vector, seed in zip(vectors, seeds, strict=True):
        kept = uniform(seed, begin, len(vector)) >= drop
        vector.mul_(torch.from_numpy(kept)).div_(1 - drop)
    return mean(vectors)


def uniform(seed: int, begin: int, count: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of neighbouring places, (count,), by seed and place alone.

    So they do not depend on how a tensor is cut into blocks. The generator is SplitMix64, whose
    n-th number is a hash of seed + n times a constant.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    place = np.arange(begin + 1, begin + count + 1, dtype=np.uint64)
    bits = place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53)


# --- the methods ----------------------------------------------------------------------------------

_MOVED = (
    "Every edited weight was moved back along what learning the removed examples alone does to it, "
)


class Tv(Combination):
    """Task arithmetic."""

    name = "tv"
    summary = "plain task arithmetic: subtract the whole task vector"
    done = _MOVED + "all by the same factor α (task vector negation)."
    formula = "W = 1"
    source = "Ilharco et al., arXiv 2212.04089"


class Constant(Weighting):
    """One share everywhere."""

    name = "constant"
    summary = "the same share everywhere (ablation)"
    done = _MOVED + "all by the same share (an ablation)."
    formula = "W = constant"
    source = "ablation, Cai et al., arXiv 2601.22030"
    constant: float = option(default=0.5, help="constant W", within="[0, 1]")

    def weigh(self, block: Block) -> float:
        """The constant."""
        del block
        return self.constant


class Msa(Combination):
    """Model state arithmetic."""

    name = "msa"
    summary = "model state arithmetic: plain task arithmetic, and a retain vector added"
    done = (
        "Every edited weight was moved back along what learning the removed examples alone does "
        "to it, and forward along what learning some of the examples to keep alone does to it."
    )
    formula = "W = 1; + beta (theta_r - theta_0), beta = retain_coef"
    source = "Rezaei et al., arXiv 2506.20941"
    needs = Needs(retain_checkpoint=True)
    retain_coef: float = option(
        default=1.0, help="strength β of the retain vector", within="(-1e6, 1e6)"
    )

    def scaled(self, factor: float) -> Msa:
        """β keeps its proportion to α."""
        return replace(self, retain_coef=self.retain_coef * factor)


class Ties(Combination):
    """The largest values of each task vector, signs elected."""

    name = "ties"
    summary = "the largest values of each task vector, signs elected, averaged"
    done = _MOVED + (
        "where only the largest changes count and only those with the sign that prevails among the "
        "models tuned on them."
    )
    formula = "direction ties(tau_1, ...), W = 1"
    source = "Yadav et al., arXiv 2306.01708"
    ranks = True
    keep: float = option(default=0.2, help="kept share", within="(0, 1]")

    def scores(self, vectors: Sequence[Tensor], block: Block) -> Sequence[Tensor]:
        """Magnitudes of every task vector."""
        del block
        return [vector.abs_() for vector in vectors]

    def combine(self, vectors: Sequence[Tensor], block: Block) -> Tensor:
        """`ties`."""
        return ties(vectors, block.cuts)


class Dare(Combination):
    """Drop and rescale."""

    name = "dare"
    summary = "a random part of the task vector, rescaled to the same mean"
    done = (
        "A random part of the weights was moved back along what learning the removed examples "
        "alone does to them, further by as much as the part is smaller; all others stayed as they "
        "were."
    )
    formula = "direction tau * (kept with 1 - p) / (1 - p), W = 1"
    source = "Yu et al., arXiv 2311.03099"
    draws = True
    drop: float = option(default=0.9, help="dropped share", within="[0, 1)")

    def combine(self, vectors: Sequence[Tensor], block: Block) -> Tensor:
        """`dare` on one block, its draws seeded by place."""
        seed, name, begin = block.place
        # Every vector draws for itself, and every element for its place in the tensor.
        seeds = [block_seed(seed, name, index) for index in range(len(vectors))]
        return dare(vectors, self.drop, seeds, begin)


class Negmerge(Combination):
    """The mean where all signs agree."""

    name = "negmerge"
    summary = "mean of several task vectors where the signs of all agree"
    done = (
        "The weights that all models tuned on the removed examples alone move the same way were "
        "moved back by the mean of those moves; all others stayed as they were."
    )
    formula = "direction mean(tau_1, ...) where signs agree, W = 1"
    source = "Kim et al., arXiv 2410.05583"
    needs = Needs(tuned=2)

    def combine(self, vectors: Sequence[Tensor], block: Block) -> Tensor:
        """`agreement`."""
        del block
        return agreement(vectors)


class Interpolate(Edit):
    """Back to the base."""

    name = "interpolate"
    summary = "back towards the base model everywhere (control)"
    done = (
        "Every edited weight was moved back towards the base model by the same factor α (a "
        "control): what was learned of all examples is weakened alike. No model was tuned."
    )
    formula = "direction theta_full - theta_0, W = 1"
    source = "control"
    needs = Needs(tuned=0)
    direction = "full - base"
