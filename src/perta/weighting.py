"""The share W of each weight that belongs to forgetting: one function and one table row a method.

The edit is θ_full − α · W ⊙ τ, with τ = θ_f − θ₀. A method says what W is. Functions take
float32 tensors of any shape, elementwise aligned, and return a new tensor of that shape.

Source: Cai et al., "Per-parameter Task Arithmetic for Unlearning in Large Language Models",
arXiv 2601.22030, for `perta*`, from its public texts; the formulas are our reading of them.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perta.errors import ConfigError

_PERTA = "Cai et al., arXiv 2601.22030"
_STRUCTURED = "this project; curvature as in RegMean, arXiv 2212.09849, and K-FAC, arXiv 1503.05671"
_TASK_ARITHMETIC = "Ilharco et al., arXiv 2212.04089"


@dataclass(frozen=True)
class Block:
    """What a method may look at to weight one block of one tensor.

    Attributes:
        forget: importance on the forget set, float32, non-negative and finite; empty where the
            method needs none.
        retain: importance on the retain set, same shape.
        rho: weight of the retain importance against the forget importance.
        constant: W of the method `constant`.
        place: seed, tensor name and first element, for methods that draw: see `block_seed`.
    """

    forget: Tensor
    retain: Tensor
    rho: float = 1.0
    constant: float = 0.5
    place: tuple[int, str, int] = (0, "", 0)


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: what users type.
        summary: one line on what it does.
        formula: W, with I_f and I_r the importance on the forget and the retain set.
        source: where it comes from.
        needs_importance: whether I_f and I_r are used.
        default_order: order p of the importance where the user gives none.
        any_order: whether the user may choose the order.
        weighting: block -> W of its shape, or one number for all of it.
        default_rho: weight of the retain side where the user gives none.
        default_scaling_coef: strength where the user gives none.
        moments: whether the direction is weighted by second moments of layers instead of W;
            `input`: by those of inputs, `kron`: of output gradients as well.
    """

    name: str
    summary: str
    formula: str
    source: str
    needs_importance: bool
    default_order: float
    any_order: bool
    weighting: Callable[[Block], Tensor | float]
    default_rho: float = 1.0
    default_scaling_coef: float = 1.0
    moments: Literal["input", "kron"] | None = None


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
    # 0/0 is NaN up to the last step; x/0 is Inf and becomes 0 by itself.
    return weighting.add_(1).reciprocal_().nan_to_num_(nan=0.0)


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


def get_method(name: str) -> Method:
    """Find a method by name; `_` may stand for `-`.

    Args:
        name: the method.

    Returns:
        Its row.

    Raises:
        ConfigError: there is no such method.
    """
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), METHODS, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(f"Unknown method `{name}`; {hint}There are: {', '.join(METHODS)}.")
    return method


def importance_order(method: Method, order: float | None) -> float:
    """Order of the importance a method is to be run with.

    Args:
        method: row of the table.
        order: the user's choice, if any.

    Returns:
        The order p.

    Raises:
        ConfigError: the method has one order of its own, and another was chosen.
    """
    if order is None or order == method.default_order or not method.needs_importance:
        return method.default_order
    if not method.any_order:
        raise ConfigError(
            f"`{method.name}` is defined by order {method.default_order:g}, but --order is "
            f"{order:g}. Use `--method perta --order {order:g}`."
        )
    return order


def _table(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _table(
    Method(
        name="tv",
        summary="plain task arithmetic: subtract the whole task vector",
        formula="W = 1",
        source=_TASK_ARITHMETIC,
        needs_importance=False,
        default_order=1.0,
        any_order=False,
        weighting=lambda _block: 1.0,
    ),
    Method(
        name="perta-grad",
        summary="share of the gradient magnitude that belongs to forgetting",
        formula="W = I_f / (I_f + rho I_r), order 1",
        source=_PERTA,
        needs_importance=True,
        default_order=1.0,
        any_order=False,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta-fisher",
        summary="share of the diagonal Fisher information that belongs to forgetting",
        formula="W = I_f / (I_f + rho I_r), order 2",
        source=_PERTA,
        needs_importance=True,
        default_order=2.0,
        any_order=False,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta",
        summary="the general form: the share at any order; near 0 it is 1/2, far up a hard mask",
        formula="W = I_f / (I_f + rho I_r), order p",
        source=_PERTA,
        needs_importance=True,
        default_order=1.0,
        any_order=True,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta-input",
        summary="the share in directions of layer inputs; edits linear layers only",
        formula="direction tau C_f (C_f + rho C_r + lambda I)^-1",
        source=_STRUCTURED,
        needs_importance=False,
        default_order=1.0,
        any_order=False,
        weighting=lambda _block: 1.0,
        default_rho=10.0,
        default_scaling_coef=1.5,
        moments="input",
    ),
    Method(
        name="perta-kron",
        summary="the share in the basis where input and gradient moments are diagonal",
        formula="W = b_f c_f / (b_f c_f + rho b_r c_r), rotated",
        source=_STRUCTURED,
        needs_importance=False,
        default_order=1.0,
        any_order=False,
        weighting=lambda _block: 1.0,
        default_rho=10.0,
        default_scaling_coef=1.5,
        moments="kron",
    ),
    Method(
        name="ratio",
        summary="forget importance over retain importance, unbounded",
        formula="W = I_f / (rho I_r)",
        source=f"another reading of {_PERTA}",
        needs_importance=True,
        default_order=1.0,
        any_order=True,
        weighting=lambda block: ratio(block.forget, block.retain, block.rho),
    ),
    Method(
        name="clipped-ratio",
        summary="forget importance over retain importance, at most 1",
        formula="W = min(1, I_f / (rho I_r))",
        source=f"another reading of {_PERTA}",
        needs_importance=True,
        default_order=1.0,
        any_order=True,
        weighting=lambda block: clipped_ratio(block.forget, block.retain, block.rho),
    ),
    Method(
        name="constant",
        summary="the same share everywhere (ablation)",
        formula="W = --constant",
        source=f"ablation, {_PERTA}",
        needs_importance=False,
        default_order=1.0,
        any_order=False,
        weighting=lambda block: block.constant,
    ),
    Method(
        name="random",
        summary="the values of `perta`, shuffled within blocks of each tensor (ablation)",
        formula="W = shuffle(I_f / (I_f + rho I_r)), order p",
        source=f"ablation, {_PERTA}",
        needs_importance=True,
        default_order=1.0,
        any_order=True,
        weighting=lambda block: shuffle(
            share(block.forget, block.retain, block.rho), block_seed(*block.place)
        ),
    ),
)
