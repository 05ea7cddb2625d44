"""Methods that make one direction of task vectors: all of it, or what a rule leaves.

Vectors are float32 tensors of one shape, which may be overwritten. What is not finite stays so, for
the edit to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perta.methods.method import (
    MOVED,
    Block,
    Combination,
    Edit,
    Needs,
    Weighting,
    block_seed,
    mean,
    option,
)


class Tv(Combination):
    """Plain task arithmetic: subtract the whole task vector."""

    name = "tv"
    done = MOVED + "all by the same factor α (task vector negation)."
    formula = "W = 1"
    source = "Ilharco et al., arXiv 2212.04089"


class Constant(Weighting):
    """The same share everywhere (ablation)."""

    name = "constant"
    done = MOVED + "all by the same share (an ablation)."
    formula = "W = constant"
    source = "ablation, Cai et al., arXiv 2601.22030"
    constant: float = option(default=0.5, help="constant W", within="[0, 1]")

    def weigh(self, block: Block) -> float:
        """The constant."""
        del block
        return self.constant


class Msa(Combination):
    """Model state arithmetic: plain task arithmetic, and a retain vector added."""

    name = "msa"
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
    """The largest values of each task vector, signs elected, averaged."""

    name = "ties"
    done = MOVED + (
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
        """Trim each task vector, elect a sign for every weight, average those that have it.

        The elected sign is that of the sum of the trimmed vectors, so the larger total magnitude
        wins; where the sum is 0, so is the result. Of one vector it is the trim. Source: algorithm
        1.
        """
        trimmed = [v.mul_(v.abs() >= cut) for v, cut in zip(vectors, block.cuts, strict=True)]
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


class Dare(Combination):
    """A random part of the task vector, rescaled to the same mean."""

    name = "dare"
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
        """Drop each weight with a probability, divide by 1 less that: the expectation stays.

        Source: section 3.
        """
        seed, name, begin = block.place
        # Every vector draws for itself, and every element for its place in the tensor.
        for index, vector in enumerate(vectors):
            kept = _uniform(block_seed(seed, name, index), begin, len(vector)) >= self.drop
            vector.mul_(torch.from_numpy(kept)).div_(1 - self.drop)
        return mean(vectors)


class Negmerge(Combination):
    """Mean of several task vectors where the signs of all agree."""

    name = "negmerge"
    done = (
        "The weights that all models tuned on the removed examples alone move the same way were "
        "moved back by the mean of those moves; all others stayed as they were."
    )
    formula = "direction mean(tau_1, ...) where signs agree, W = 1"
    source = "Kim et al., arXiv 2410.05583"
    needs = Needs(tuned=2)

    def combine(self, vectors: Sequence[Tensor], block: Block) -> Tensor:
        """The mean where all have the same sign, otherwise 0."""
        del block
        low, high = vectors[0].clone(), vectors[0].clone()
        for vector in vectors[1:]:
            torch.minimum(low, vector, out=low)
            torch.maximum(high, vector, out=high)
        return mean(vectors).mul_((low > 0) | (high < 0))


class Interpolate(Edit):
    """Back towards the base model everywhere (control)."""

    name = "interpolate"
    done = (
        "Every edited weight was moved back towards the base model by the same factor α (a "
        "control): what was learned of all examples is weakened alike. No model was tuned."
    )
    formula = "direction theta_full - theta_0, W = 1"
    source = "control"
    needs = Needs(tuned=0)
    direction = "full - base"


def _uniform(seed: int, begin: int, count: int) -> NDArray[np.float64]:
    """Random numbers in [0, 1) of neighbouring places, (count,), by seed and place alone.

    SplitMix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014.
    """
    place = np.arange(begin + 1, begin + count + 1, dtype=np.uint64)
    bits = place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return np.ldexp((bits >> np.uint64(11)).astype(np.float64), -53)
