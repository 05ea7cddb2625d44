"""Second moments of a few or of many rows: the matrix, or the factor that says the same in less.

    C = sum over rows of x xᵀ      (d, d)
    C = Rᵀ R                       R (n, d) with n < d, upper triangular

A moment is a tensor of either shape: square it is C, with fewer rows than columns it is R. A set
of far fewer tokens than a layer is wide is kept as R, from the QR decomposition of its rows: n d
numbers in place of d², and every product and solve in the span of the rows. R holds what C holds
and no more: the order of the tokens and each one's own vector are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING, _LEAST = 1e-6, 1e-3
"""Shares of a trace: below the first nothing is left, from the second on enough."""


def is_factor(moment: Tensor) -> bool:
    """Whether a moment is kept as R."""
    return moment.shape[0] < moment.shape[1]


def few(rows: int, columns: int) -> bool:
    """Whether rows are worth keeping as R: beyond half as many as columns that saves little."""
    return 2 * rows <= columns


def few_together(moments: Sequence[Tensor]) -> bool:
    """Whether the sum of moments is worth keeping as one R."""
    return few(sum(len(moment) for moment in moments), moments[0].shape[1])


def factor(rows: Tensor) -> Tensor:
    """R (n, d) float64 with Rᵀ R = Xᵀ X, for n < d rows; of no rows it is one row of zeros."""
    if rows.shape[0] >= rows.shape[1]:
        raise ValueError(f"{rows.shape[0]} rows of {rows.shape[1]} numbers have no factor")
    if not len(rows):
        return torch.zeros(1, rows.shape[1], dtype=torch.float64, device=rows.device)
    found: Tensor = torch.linalg.qr(rows.double(), mode="r").R
    return found


def matrix(moment: Tensor) -> Tensor:
    """C (d, d) float64; a moment that is C in float64 already is returned itself."""
    moment = moment.double()
    return moment.t() @ moment if is_factor(moment) else moment


def divided(moment: Tensor, count: float) -> Tensor:
    """The moment of C / count, in the type and shape it has."""
    return moment / (math.sqrt(count) if is_factor(moment) else count)


def added(moments: Sequence[Tensor]) -> Tensor:
    """The moment of the sum, float64: R as long as that is worth it."""
    if few_together(moments):
        return factor(torch.cat([moment.double() for moment in moments]))
    total = matrix(moments[0]).clone()
    for moment in moments[1:]:
        total += matrix(moment)
    return total


def without(moment: Tensor, part: Tensor) -> Tensor | None:
    """C (d, d) float64 of the rows that are left without some; zero where nothing is.

    None where so little is left, or of what is no part so much was taken, that rounding of a
    float32 moment would show: its error is 2⁻²⁴ of the whole.
    """
    left = matrix(moment) - matrix(part)
    share = float(left.trace() / matrix(moment).trace()) if moment.any() else 0.0
    if abs(share) < _ROUNDING:
        return torch.zeros_like(left)
    return left if share >= _LEAST else None


def mean_diagonal(moment: Tensor) -> float:
    """Mean of C's diagonal."""
    moment = moment.double()
    total = moment.square().sum() if is_factor(moment) else moment.diagonal().sum()
    return float(total) / moment.shape[1]


def times(left: Tensor, moment: Tensor) -> Tensor:
    """The product with C, (…, d) float64."""
    moment = moment.double()
    return left @ moment.t() @ moment if is_factor(moment) else left @ moment
