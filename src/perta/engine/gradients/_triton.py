"""Means of powers of per-example gradients on a GPU, formed and raised in registers.

What `_powers.c` is on a CPU. A program owns a tile of the parameter and goes from example to
example: 2 m n operations a row of the factors, as many as the plain gradient takes, and 8 bytes an
element and order for all examples together. Gradients of single examples never reach memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TALL, _WIDE, _DEEP = 128, 128, 32
"""Rows and columns of a tile of the parameter, and rows of the factors that are read at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    left, right, bounds, first, second,
    weight, examples, height, width, left_stride, right_stride,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr,  # noqa: N803
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    column = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    is_row, is_column = row < height, column < width
    sum_first = tl.full((TALL, WIDE), 0, tl.float32)
    sum_second = tl.full((TALL, WIDE), 0, tl.float32)
    for example in range(examples):
        start = tl.load(bounds + 2 * example)
        stop = tl.load(bounds + 2 * example + 1)
        gradient = tl.full((TALL, WIDE), 0, tl.float32)
        for low in range(start, stop, DEEP):
            at = (low + tl.arange(0, DEEP)).to(tl.int64)
            inside = at < stop
            x = tl.load(
                left + at[None, :] * left_stride + row[:, None],
                mask=inside[None, :] & is_row[:, None],
                other=0.0,
            )
            y = tl.load(
                right + at[:, None] * right_stride + column[None, :],
                mask=inside[:, None] & is_column[None, :],
                other=0.0,
            )
            gradient = tl.dot(x, y, gradient, input_precision="ieee")
        if HAS_FIRST:
            sum_first += tl.abs(gradient)
        if HAS_SECOND:
            sum_second += gradient * gradient
    place = row[:, None] * width + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if HAS_FIRST:
        kept = tl.load(first + place, mask=mask)
        tl.store(first + place, kept + weight * sum_first, mask=mask)
    if HAS_SECOND:
        kept = tl.load(second + place, mask=mask)
        tl.store(second + place, kept + weight * sum_second, mask=mask)


def add_powers(
    left: Tensor, right: Tensor, bounds: Tensor, means: dict[float, Tensor], weight: float
) -> None:
    """Add weight · Σ_b |left_bᵀ right_b|^p to the mean (m, n) of each order p, 1 or 2.

    `left` (R, m) and `right` (R, n) are of one type, with rows in one piece each; `bounds` (B, 2)
    are int32, the half-open range of rows of each example; the means are float32 and contiguous.
    """
    height, width = left.shape[1], right.shape[1]
    one = next(iter(means.values()))
    grid = (triton.cdiv(height, _TALL), triton.cdiv(width, _WIDE))
    _add[grid](
        left, right, bounds, means.get(1.0, one), means.get(2.0, one),
        weight, len(bounds), height, width, left.stride(0), right.stride(0),
        1.0 in means, 2.0 in means, _TALL, _WIDE, _DEEP,
        num_warps=8, num_stages=3,
    )  # fmt: skip
