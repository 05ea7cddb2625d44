"""What the edit computes of a chunk: stored values in, float32 between, stored values out.

Types narrower than float32 are rounded up or down at random, up with the share of the way that
the value lies above its lower neighbour. So a step far below the distance of two neighbours is
stored on average, where rounding to the nearest would drop it, and what is exact stays exact. The
random numbers depend on a seed and on the place of the element alone: neither chunks nor threads
nor the device change a byte.

The operations that touch stored values make one pass each in `_stored.c`, conversions included,
where that was compiled and for the types it knows; PyTorch's operations, which make several, give
the same values.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from perta.store import _stored as _compiled

    if not hasattr(_compiled, "round"):  # built from an older source
        _compiled = None  # type: ignore[assignment]
except ImportError:  # installed without a C compiler
    _compiled = None  # type: ignore[assignment]

_COMPILED_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Place:
    """Where elements lie, which decides how they are rounded."""

    seed: int
    name: str  # the tensor's in the checkpoint, the first of a tied one stored twice
    start: int = 0  # first element, counted in the flat tensor

    def keys(self) -> tuple[int, int]:
        """Two numbers in [0, 2^32) that stand for the tensor."""
        digest = hashlib.sha256(f"{self.seed}\0{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def round_as_stored(values: Tensor, dtype: torch.dtype, place: Place) -> Tensor:
    """Float32 values of any shape, rounded as the edit does when it writes them from `place` on."""
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    flat = values.reshape(-1)
    if _compiled and dtype == torch.bfloat16 and flat.is_cpu and flat.is_contiguous():
        out = torch.empty(len(flat), dtype=dtype)
        keys, start = place.keys(), place.start & _LOW_BITS
        _compiled.round(out.data_ptr(), flat.data_ptr(), len(flat), *keys, start)
    else:
        out = round_by(flat, dtype, thresholds(place, len(flat), flat.device))
    return out.view(values.shape)


_LOW_BITS = 0xFFFFFFFF


def thresholds(place: Place, count: int, device: torch.device | None = None) -> Tensor:
    """The random numbers that decide how elements are rounded, (count,) int32 in [0, 2^16)."""
    first_key, second_key = place.keys()
    x = torch.arange(count, dtype=torch.int64, device=device)
    x = x.add_((place.start + first_key) & _LOW_BITS).bitwise_and_(_LOW_BITS)
    # Products are wanted modulo 2^32, which the low bits of an overflow still are.
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_LOW_BITS) ^ second_key
    x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_LOW_BITS)
    return ((x ^ (x >> 16)) >> 16).to(torch.int32)


def round_by(values: Tensor, dtype: torch.dtype, above: Tensor) -> Tensor:
    """Round float32 values to bfloat16, float16 or 8 bits by given random numbers.

    2^16 - `above`, int32 in [0, 2^16) of the same shape, is the share of the way to the upper
    neighbour, in parts of 2^16, from which a value is rounded up, away from zero.
    """
    info = torch.finfo(dtype)
    return rounded_by(values, info.eps, info.smallest_normal, above).to(dtype)


def rounded_by(values: Tensor, eps: float, smallest_normal: float, above: Tensor) -> Tensor:
    """The same for any format, as float32: `eps` between 1 and the next, less below the normal."""
    # Adding to the bits of a float moves it away from zero, into the next binade where need be.
    dropped = 23 + round(math.log2(eps))
    extra = dropped - 16
    moved = values.view(torch.int32) + (above << extra if extra > 0 else above >> -extra)
    rounded = (moved & (-1 << dropped)).view(torch.float32)
    if smallest_normal > torch.finfo(torch.float32).smallest_normal:
        steps = values.abs() / (smallest_normal * eps)
        part = (steps - steps.floor()) * 2.0**16
        low = (steps.floor() + (part >= 2**16 - above)) * (smallest_normal * eps)
        rounded = torch.where(values.abs() < smallest_normal, low.copysign(values), rounded)
    return torch.where(values.isfinite(), rounded, values)


@dataclass
class Step:
    """What became of a step δ that was subtracted, as sums over elements."""

    squares: float  # of the results before they were rounded
    along: float = 0.0  # of e · δ, where δ + e is the step that was stored
    error: float = 0.0  # of e²
    changed: float = 0.0  # elements whose stored value is another than before


def difference(values: Tensor, base: Tensor, out: Tensor) -> Tensor:
    """Values − base, (count,) of any floating type, in float32 in `out`, which may be `values`."""
    if _compiled and _suits_compiled(values, base):
        left, right = ((t.data_ptr(), t.dtype == torch.bfloat16) for t in (values, base))
        _compiled.difference(out.data_ptr(), *left, *right, len(out))
        return out
    return out.copy_(values).sub_(base)


def subtract(stored: Tensor, delta: Tensor, place: Place) -> Step:
    """Subtract a float32 δ from (count,) stored values of any type, in place, and round once."""
    if _compiled and _suits_compiled(stored):
        target = stored.data_ptr(), stored.dtype == torch.bfloat16
        where = *place.keys(), place.start & _LOW_BITS
        step = Step(*_compiled.subtract(*target, delta.data_ptr(), len(delta), *where))
        if not math.isfinite(step.squares):
            step.squares = square_norm(stored.to(torch.float32))
        return step
    before = stored.to(torch.float32, copy=True)
    result = before - delta
    stored.copy_(round_as_stored(result, stored.dtype, place))
    after = stored.to(torch.float32)
    error = before.sub(after).sub_(delta)
    along = float(torch.dot(error, delta))
    changed = float((after != before).sum())
    return Step(square_norm(result), along, square_norm(error), changed)


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
    """α · W ⊙ τ, in place; W has τ's shape or is one number."""
    for factor in (weighting, scaling_coef):
        if isinstance(factor, Tensor) or factor != 1:
            task_vector.mul_(factor)
    return task_vector
