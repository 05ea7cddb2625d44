"""The share W of each weight that belongs to forgetting: one function and one table row a method.

The edit is θ_full − α · W ⊙ τ, with τ = θ_f − θ₀ or another direction, for one method plus
β · (θ_r − θ₀). A method says what W is, what the direction is and how several task vectors become
one. Functions take float32 tensors of any shape, elementwise aligned, and return a new tensor of
that shape.

Source: Cai et al., "Per-parameter Task Arithmetic for Unlearning in Large Language Models",
arXiv 2601.22030, for `perta*`, from its public texts; the formulas are our reading of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from perta.errors import ConfigError
from perta.methods.method import Block, Needs, Side, Weighting, block_seed, mean, option

_PERTA = "Cai et al., arXiv 2601.22030"
_BOTH: tuple[Side, ...] = ("forget", "retain")
_MOVED = (
    "Every edited weight was moved back along what learning the removed examples alone does to it, "
)
_IN_PROPORTION = (
    _MOVED + "in proportion to how much it matters for them rather than for the examples to keep. "
    "How much a weight matters is the mean "
)


def share(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Share of the importance that belongs to forgetting: W in [0, 1], 0 where there is none of it.

    W = I_f / (I_f + ρ I_r), computed as 1 / (1 + ρ · (I_r / I_f)). Nothing is added before the
    division, so importance near the ends of the float32 range (1e-40 or 1e38; high orders get
    there) loses no digits. Shares too small to move a weight may come out as 0. Importance is
    float32, non-negative and finite, and ρ >= 0.
    """
    if rho == 0:
        return (forget > 0).to(forget.dtype)
    weighting = torch.div(retain, forget)
    if rho != 1:
        weighting.mul_(rho)
    weighting.add_(1).reciprocal_()
    # 0/0 is NaN up to here; x/0 was Inf and has become 0 by itself. A sum finds out whether there
    # is any for a third of what replacing costs.
    return weighting.nan_to_num_(nan=0.0) if math.isnan(weighting.sum()) else weighting


def ratio(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Forget importance in units of retain importance, unbounded.

    W = I_f / (ρ I_r), Inf where that exceeds float32. Where ρ I_r is 0 there is no such unit: W is
    1 there if I_f > 0, the plain task vector on weights that the retain set does not use, and 0 if
    I_f is 0.
    """
    weighting = torch.div(forget, retain).div_(rho) if rho else torch.zeros_like(forget)
    unused = retain == 0 if rho else torch.ones_like(retain, dtype=torch.bool)
    return torch.where(unused, (forget > 0).to(forget.dtype), weighting)


def saliency(gradient: Tensor, task_vector: Tensor) -> Tensor:
    """First-order change of the forget loss that each weight's step makes: |g_f ⊙ τ|."""
    return (gradient * task_vector).abs_()


def dampened(
    forget: Tensor, retain: Tensor, forget_share: float, selection: float, dampening: float
) -> Tensor:
    """Share to take off weights that matter far more to the forget set than to all data.

    With the importance on all data I = s I_f + (1 − s) I_r, s being the forget set's share of all
    examples, α = `selection` > 0 and λ = `dampening` >= 0,

        W = 1 − min(λ I / I_f, 1)  where I_f > α I,  otherwise 0.

    Quotients first, so that importance near the ends of the float32 range loses no digits.

    Source: Foster et al., arXiv 2308.07707, equations 3 to 5.
    """
    quotient = torch.div(retain, forget).mul_(1 - forget_share).add_(forget_share)
    # 0/0 is NaN, compares as false, and is left alone like all that is not selected.
    selected = quotient * selection < 1
    return torch.where(selected, 1 - (quotient * dampening).clamp_(max=1), 0.0)


def shuffle(weighting: Tensor, seed: int) -> Tensor:
    """Permute values at random: same distribution, no relation to the weights they fall on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weighting.numel(), generator=generator)
    return weighting.reshape(-1)[order].reshape(weighting.shape)


# --- the methods ----------------------------------------------------------------------------------


class _Share(Weighting):
    """Weightings by importance on both sets, with ρ."""

    needs = Needs(importance=_BOTH)
    rho: float = option(default=1.0, help="weight ρ of the retain importance", within="[0, inf)")

    @property
    def weighs_retain(self) -> bool:
        """Whether importance on the retain set protects a weight."""
        return self.rho > 0

    def weigh(self, block: Block) -> Tensor:
        """W = I_f / (I_f + ρ I_r)."""
        return share(block.forget, block.retain, self.rho)


class Grad(_Share):
    """The share of the gradient magnitude."""

    name = "perta-grad"
    summary = "share of the gradient magnitude that belongs to forgetting"
    done = _IN_PROPORTION + "absolute gradient over examples."
    formula = "W = I_f / (I_f + rho I_r), order 1"
    source = _PERTA


class Fisher(_Share):
    """The share of the diagonal Fisher information."""

    name = "perta-fisher"
    summary = "share of the diagonal Fisher information that belongs to forgetting"
    done = _IN_PROPORTION + "squared gradient over examples (diagonal Fisher information)."
    formula = "W = I_f / (I_f + rho I_r), order 2"
    source = _PERTA
    needs = Needs(importance=_BOTH, order=2.0)


class _AnyOrder(_Share):
    order: float = option(default=1.0, help="order of the importance", within="(0, 32]")


class Perta(_AnyOrder):
    """The share at any order."""

    name = "perta"
    summary = "the general form: the share at any order; near 0 it is 1/2, far up a hard mask"
    done = _IN_PROPORTION + "over examples of the absolute gradient to the power p."
    formula = "W = I_f / (I_f + rho I_r), order p"
    source = _PERTA


class Ratio(_AnyOrder):
    """The quotient of both importances."""

    name = "ratio"
    summary = "forget importance over retain importance, unbounded"
    done = (
        _MOVED + "multiplied by how much it matters for them over how much it matters for the "
        "examples to keep, without a bound."
    )
    formula = "W = I_f / (rho I_r)"
    source = f"another reading of {_PERTA}"

    def weigh(self, block: Block) -> Tensor:
        """W = I_f / (ρ I_r)."""
        return ratio(block.forget, block.retain, self.rho)


class ClippedRatio(Ratio):
    """The quotient of both importances, at most 1."""

    name = "clipped-ratio"
    summary = "forget importance over retain importance, at most 1"
    done = (
        _MOVED + "multiplied by how much it matters for them over how much it matters for the "
        "examples to keep, at most by 1."
    )
    formula = "W = min(1, I_f / (rho I_r))"

    def weigh(self, block: Block) -> Tensor:
        """W = min(1, I_f / (ρ I_r))."""
        return super().weigh(block).clamp_(max=1)


class Random(_AnyOrder):
    """The share, shuffled."""

    name = "random"
    summary = "the values of `perta`, shuffled within blocks of each tensor (ablation)"
    done = _MOVED + "by shares that were shuffled at random within each tensor (an ablation)."
    formula = "W = shuffle(I_f / (I_f + rho I_r)), order p"
    source = f"ablation, {_PERTA}"
    draws = True

    def weigh(self, block: Block) -> Tensor:
        """W = shuffle(I_f / (I_f + ρ I_r))."""
        return shuffle(super().weigh(block), block_seed(*block.place))


class Selective(Weighting):
    """A mask of the largest saliencies."""

    name = "selective"
    summary = "only the weights whose step changes the forget loss most"
    done = (
        "The weights whose step changes the loss on the removed examples most were moved back "
        "along what learning those examples alone does to them; all others stayed as they were."
    )
    formula = "W = top-k mask of |g_f tau|, k = keep"
    source = "our reading of selective task arithmetic, arXiv 2411.16139"
    needs = Needs(importance=("forget",), reduction="abs_of_mean")
    ranks = True
    keep: float = option(default=0.1, help="kept share", within="(0, 1]")

    def scores(self, vectors: Sequence[Tensor], block: Block) -> Sequence[Tensor]:
        """|g_f ⊙ τ|."""
        return [saliency(block.forget, mean(vectors))]

    def weigh(self, block: Block) -> Tensor:
        """1 where the saliency is among the largest."""
        return (saliency(block.forget, block.task_vector) >= block.cuts[0]).float()


class Ssd(Weighting):
    """Selective synaptic dampening."""

    name = "ssd"
    summary = "selective synaptic dampening: shrink weights that matter to the forget set"
    done = (
        "The weights that matter much more for the removed examples than for all examples were "
        "shrunk towards zero; all others stayed as they were. No model was tuned."
    )
    formula = "direction theta_full, W = 1 - min(dampening I / I_f, 1) where I_f > selection I"
    source = "Foster et al., arXiv 2308.07707"
    needs = Needs(tuned=0, importance=_BOTH, order=2.0, at="full", set_sizes=True)
    direction = "full"
    selection: float = option(
        default=10.0,
        help="selection: quotient of the importance on the forget set and on both, above which a "
        "weight is dampened",
        within="(0, inf)",
    )
    dampening: float = option(default=1.0, help="dampening λ", within="[0, inf)")

    def weigh(self, block: Block) -> Tensor:
        """W = 1 − min(λ I / I_f, 1) where I_f > selection · I."""
        return dampened(
            block.forget, block.retain, block.forget_share, self.selection, self.dampening
        )

    def check_share(self, share: float) -> None:
        """I >= share · I_f, so no weight exceeds it more often than 1 / share."""
        if self.selection * share >= 1:
            raise ConfigError(
                f"`{self.name}` can select no weight: {share:.0%} of the rows are to be forgotten, "
                f"so its setting `selection` must be below {1 / share:g}, but it is "
                f"{self.selection:g}."
            )
