"""What the edit computes of a chunk: stored values in, float32 between, stored values out.

The two operations that touch stored values make one pass each in `_stored.c`, conversions
included, where that was compiled and for the types it knows; PyTorch's operations, which make
several, give the same values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    from perta import _stored as _compiled
except ImportError:  # installed without a C compiler
    _compiled = None  # type: ignore[assignment]

_COMPILED_TYPES = (torch.float32, torch.bfloat16)


def difference(values: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """Values − base, both upcast before.

    Args:
        values: (count,), of any floating type.
        base: (count,), of any floating type.
        out: (count,), float32; may be `values`.

    Returns:
        `out`.
    """
    if _compiled and _suits_compiled(values, base):
        _compiled.difference(
            out.data_ptr(),
            values.data_ptr(),
            values.dtype == torch.bfloat16,
            base.data_ptr(),
            base.dtype == torch.bfloat16,
            len(out),
        )
        return out
    return out.copy_(values).sub_(base)


def subtract(stored: Tensor, delta: Tensor) -> float:
    """Subtract in place, in float32, and cast once.

    Args:
        stored: (count,), of any floating type; overwritten.
        delta: (count,), float32.

    Returns:
        Sum of squares of the results before the cast.
    """
    if _compiled and _suits_compiled(stored):
        squares = _compiled.subtract(
            stored.data_ptr(), stored.dtype == torch.bfloat16, delta.data_ptr(), len(delta)
        )
        if math.isfinite(squares):
            return squares
        return square_norm(stored.to(torch.float32))
    result = stored.to(torch.float32).sub_(delta)
    if result is not stored:
        stored.copy_(result)
    return square_norm(result)


def _suits_compiled(*tensors: Tensor) -> bool:
    return all(t.dtype in _COMPILED_TYPES and t.is_contiguous() for t in tensors)


def square_norm(values: Tensor) -> float:
    """Sum of squares of float32 values; finite exactly if all of them are."""
    total = float(torch.dot(values, values))
    if math.isfinite(total):
        return total
    wide = values.to(torch.float64)
    return float(torch.dot(wide, wide))


def scale(task_vector: Tensor, weighting: Tensor | float, scaling_coef: float) -> Tensor:
    """α · W ⊙ τ, in place.

    Args:
        task_vector: τ, float32; overwritten.
        weighting: W, same shape, or one number.
        scaling_coef: α.

    Returns:
        The same tensor.
    """
    for factor in (weighting, scaling_coef):
        if isinstance(factor, Tensor) or factor != 1:
            task_vector.mul_(factor)
    return task_vector
