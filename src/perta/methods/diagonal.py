"""Methods that weigh: the share W of each weight that belongs to forgetting.

W comes from importance, float32 tensors of one shape, elementwise aligned, and is a new tensor of
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
from perta.methods.method import MOVED, Block, Needs, Side, Weighting, block_seed, mean, option

_PERTA = "Cai et al., arXiv 2601.22030"
_BOTH: tuple[Side, ...] = ("forget", "retain")
_IN_PROPORTION = (
    MOVED + "in proportion to how much it matters for them rather than for the examples to keep. "
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
    """Share of the gradient magnitude that belongs to forgetting."""

    name = "perta-grad"
    done = _IN_PROPORTION + "absolute gradient over examples."
    formula = "W = I_f / (I_f + rho I_r), order 1"
    source = _PERTA


class Fisher(_Share):
    """Share of the diagonal Fisher information that belongs to forgetting."""

    name = "perta-fisher"
    done = _IN_PROPORTION + "squared gradient over examples (diagonal Fisher information)."
    formula = "W = I_f / (I_f + rho I_r), order 2"
    source = _PERTA
    needs = Needs(importance=_BOTH, order=2.0)


class _AnyOrder(_Share):
    order: float = option(default=1.0, help="order of the importance", within="(0, 32]")


class Perta(_AnyOrder):
    """The general form: the share at any order; near 0 it is 1/2, far up a hard mask."""

    name = "perta"
    done = _IN_PROPORTION + "over examples of the absolute gradient to the power p."
    formula = "W = I_f / (I_f + rho I_r), order p"
    source = _PERTA


class Ratio(_AnyOrder):
    """Forget importance over retain importance, unbounded."""

    name = "ratio"
    done = (
        MOVED + "multiplied by how much it matters for them over how much it matters for the "
        "examples to keep, without a bound."
    )
    formula = "W = I_f / (rho I_r)"
    source = f"another reading of {_PERTA}"

    def weigh(self, block: Block) -> Tensor:
        """W = I_f / (ρ I_r), Inf where that exceeds float32.

        Where ρ I_r is 0 it is 1 if I_f > 0, the plain task vector on weights that the retain set
        does not use, and 0 if I_f is 0.
        """
        forget, retain, rho = block.forget, block.retain, self.rho
        weighting = torch.div(forget, retain).div_(rho) if rho else torch.zeros_like(forget)
        unused = retain == 0 if rho else torch.ones_like(retain, dtype=torch.bool)
        return torch.where(unused, (forget > 0).to(forget.dtype), weighting)


class ClippedRatio(Ratio):
    """Forget importance over retain importance, at most 1."""

    name = "clipped-ratio"
    done = (
        MOVED + "multiplied by how much it matters for them over how much it matters for the "
        "examples to keep, at most by 1."
    )
    formula = "W = min(1, I_f / (rho I_r))"

    def weigh(self, block: Block) -> Tensor:
        """W = min(1, I_f / (ρ I_r))."""
        return super().weigh(block).clamp_(max=1)


class Random(_AnyOrder):
    """The values of `perta`, shuffled within blocks of each tensor (ablation)."""

    name = "random"
    done = MOVED + "by shares that were shuffled at random within each tensor (an ablation)."
    formula = "W = shuffle(I_f / (I_f + rho I_r)), order p"
    source = f"ablation, {_PERTA}"
    draws = True

    def weigh(self, block: Block) -> Tensor:
        """Those values permuted: same distribution, no relation to the weights they fall on."""
        weighting = super().weigh(block)
        generator = torch.Generator().manual_seed(block_seed(*block.place))
        order = torch.randperm(weighting.numel(), generator=generator)
        return weighting.reshape(-1)[order].reshape(weighting.shape)


class Selective(Weighting):
    """Only the weights whose step changes the forget loss most."""

    name = "selective"
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
        """|g_f ⊙ τ|: first-order change of the forget loss that each weight's step makes."""
        return [(block.forget * mean(vectors)).abs_()]

    def weigh(self, block: Block) -> Tensor:
        """1 where the score is among the largest."""
        return (self.scores([block.task_vector], block)[0] >= block.cuts[0]).float()


class Ssd(Weighting):
    """Selective synaptic dampening: shrink weights that matter to the forget set."""

    name = "ssd"
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
        """W = 1 − min(λ I / I_f, 1) where I_f > selection · I, otherwise 0: equations 3 to 5.

        I = s I_f + (1 − s) I_r is the importance on all data, s the forget set's share of it.
        Quotients first, so that importance near the ends of the float32 range loses no digits.
        """
        part = block.forget_share
        quotient = torch.div(block.retain, block.forget).mul_(1 - part).add_(part)
        # 0/0 is NaN, compares as false, and is left alone like all that is not selected.
        selected = quotient * self.selection < 1
        return torch.where(selected, 1 - (quotient * self.dampening).clamp_(max=1), 0.0)

    def check_share(self, share: float) -> None:
        """I >= share · I_f, so no weight exceeds it more often than 1 / share."""
        if self.selection * share >= 1:
            raise ConfigError(
                f"`{self.name}` can select no weight: {share:.0%} of the rows are to be forgotten, "
                f"so its setting `selection` must be below {1 / share:g}, but it is "
                f"{self.selection:g}."
            )
