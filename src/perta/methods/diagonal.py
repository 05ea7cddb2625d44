"""The share W of each weight that belongs to forgetting: one function and one table row a method.

The edit is θ_full − α · W ⊙ τ, with τ = θ_f − θ₀ or another direction, for one method plus
β · (θ_r − θ₀). A method says what W is, what the direction is and how several task vectors become
one. Functions take float32 tensors of any shape, elementwise aligned, and return a new tensor of
that shape.

Source: Cai et al., "Per-parameter Task Arithmetic for Unlearning in Large Language Models",
arXiv 2601.22030, for `perta*`, from its public texts; the formulas are our reading of them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def share(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Share of the importance that belongs to forgetting.

    W = I_f / (I_f + ρ I_r), computed as 1 / (1 + ρ · (I_r / I_f)). Nothing is added before the
    division, so importance near the ends of the float32 range (1e-40 or 1e38; high orders get
    there) loses no digits. Shares too small to move a weight may come out as 0.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W in [0, 1]; 0 where both are 0: such a weight is left alone.
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

    W = I_f / (ρ I_r). Where ρ I_r is 0 there is no such unit: W is 1 there if I_f > 0, the
    plain task vector on weights that the retain set does not use, and 0 if I_f is 0.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W >= 0; Inf where the quotient exceeds float32.
    """
    weighting = torch.div(forget, retain).div_(rho) if rho else torch.zeros_like(forget)
    unused = retain == 0 if rho else torch.ones_like(retain, dtype=torch.bool)
    return torch.where(unused, (forget > 0).to(forget.dtype), weighting)


def clipped_ratio(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Forget importance in units of retain importance, at most 1.

    W = min(1, I_f / (ρ I_r)); where ρ I_r is 0, W is 1 if I_f > 0 and 0 otherwise.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W in [0, 1].
    """
    return ratio(forget, retain, rho).clamp_(max=1)


def saliency(gradient: Tensor, task_vector: Tensor) -> Tensor:
    """First-order change of the forget loss that each weight's step makes: |g_f ⊙ τ|.

    Args:
        gradient: |g_f|, magnitude of the mean gradient on the forget set.
        task_vector: τ, same shape.

    Returns:
        Non-negative, same shape.
    """
    return (gradient * task_vector).abs_()


def dampened(
    forget: Tensor, retain: Tensor, forget_share: float, selection: float, dampening: float
) -> Tensor:
    """Share to take off weights that matter far more to the forget set than to all data.

    With the importance on all data I = s I_f + (1 − s) I_r,

        W = 1 − min(λ I / I_f, 1)  where I_f > selection · I,  otherwise 0.

    Quotients first, so that importance near the ends of the float32 range loses no digits.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        forget_share: s, share of all examples that belongs to the forget set.
        selection: α of the paper, > 0.
        dampening: λ of the paper, >= 0.

    Returns:
        W in [0, 1]; 0 where I_f is 0.
    Source: Foster et al., arXiv 2308.07707, equations 3 to 5.
    """
    quotient = torch.div(retain, forget).mul_(1 - forget_share).add_(forget_share)
    # 0/0 is NaN, compares as false, and is left alone like all that is not selected.
    selected = quotient * selection < 1
    return torch.where(selected, 1 - (quotient * dampening).clamp_(max=1), 0.0)


def shuffle(weighting: Tensor, seed: int) -> Tensor:
    """Permute values at random: same distribution, no relation to the weights they fall on.

    Args:
        weighting: any shape.
        seed: seed of the permutation.

    Returns:
        The same values in another order, same shape.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weighting.numel(), generator=generator)
    return weighting.reshape(-1)[order].reshape(weighting.shape)


def block_seed(seed: int, name: str, start: int) -> int:
    """Seed of one block of one tensor.

    It depends on the place of the block alone, so results do not depend on which thread or
    machine works on it.

    Args:
        seed: the user's seed.
        name: the tensor.
        start: the block's first element, counted in the flat tensor.

    Returns:
        An integer in [0, 2^63).
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{start}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
