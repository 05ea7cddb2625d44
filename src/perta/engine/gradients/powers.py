"""Per-example gradients in pieces -> means over examples of their powers.

A piece says what a layer contributes to the gradient of its parameter without forming it. The
gradient of each example is formed here, a piece at a time, raised to every order and forgotten.

What bounds the cost on a CPU, for P weights in linear layers, B examples and T tokens in all:

    products    2 P T operations, as many as the weight gradients of the plain backward pass, which
                autograd does not form here
    powers      B P elements to raise and add for every order
    means       8 P bytes of main memory per order and batch: larger batches share them
    once a run  4 P bytes per order to allocate and clear

`_powers.c` raises a product while it is in registers, so that the powers cost little beside the
products: a (1536, 576) weight with 8 examples of 64 tokens takes 1.2 times its plain gradient for
order 2 and 1.35 times for orders 1 and 2, on one thread or two. Where it was not compiled, and for
other orders and types, a block of all gradients at a time goes through the second-level cache:
two to three times. `_triton.py` does the same on a GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perta.models.precision import wide_product
from perta.parallel import summed
from perta.progress import warn

try:
    from perta.engine.gradients import _powers as _compiled
except ImportError:  # installed without a C compiler, or a processor it was not written for
    _compiled = None  # type: ignore[assignment]

Segments = tuple[tuple[int, int], ...]
"""For each example the half-open range of rows of a flattened activation that belongs to it."""


@dataclass(frozen=True)
class Means:
    """Running means over examples of the powers of one parameter's gradients, by order."""

    by_order: dict[float, Tensor]
    weight: float  # one over the number of all examples, so that nothing is left to divide

    @property
    def any(self) -> Tensor:
        """One of them, for what they share: shape, type and device."""
        return next(iter(self.by_order.values()))

    @contextmanager
    def adding(self, counts: bool = True) -> Iterator[Means]:  # noqa: ARG002 - to those in parts
        """Where to add the powers of some examples, of the parameter's shape."""
        yield self

    def total(self, order: float) -> Tensor:
        """What all processes have added up."""
        return summed(self.by_order[order])


# --- what one parameter's gradient is made of -------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Per-example gradients left_b^T right_b (m, n) from all examples' rows, (R, m) and (R, n)."""

    left: Tensor
    right: Tensor
    segments: Segments


@dataclass(frozen=True)
class Rows:
    """Per-example gradients that are zero but for a few rows of the parameter."""

    ids: Tensor  # (R,) int64, rows; one may come more than once
    values: Tensor  # (R, n), added to them
    example: Tensor  # (R,) int64


@dataclass(frozen=True)
class Direct:
    """Per-example gradients as they are: (B, *shape)."""

    values: Tensor


Piece = Product | Rows | Direct


# --- means of powers ---------------------------------------------------------------------------

_CACHE_BYTES, _DEVICE_BYTES = 1 << 20, 256 << 20
"""Size of the block that a whole batch's gradients are formed in: on a CPU it is to stay in the
cache, an accelerator wants few large operations."""


def add_pieces(means: Means, pieces: Sequence[Piece]) -> bool:
    """Add the powers of the gradients that the pieces add up to, if there is a rule for these."""
    products = [piece for piece in pieces if isinstance(piece, Product)]
    rows = [piece for piece in pieces if isinstance(piece, Rows)]
    direct = [piece.values for piece in pieces if isinstance(piece, Direct)]
    if not pieces or (direct and (products or rows)):
        return False
    if direct:
        add_powers(means, functools.reduce(torch.add, direct))
    if rows:
        _add_rows(means, rows, products)
    if products:
        _add_products(means, products)
    return True


def add_powers(means: Means, gradients: Tensor) -> None:
    """Add the powers of per-example gradients (B, *shape)."""
    for order, mean in means.by_order.items():
        powers = power(gradients.to(mean.dtype), order).sum(0)
        mean.add_(powers.to(mean.device), alpha=means.weight)


def _add_rows(means: Means, rows: Sequence[Rows], products: Sequence[Product]) -> None:
    """Add the powers of the parameter's rows that an embedding touched.

    What products add to these rows (a tied output head) is added before the power is taken, and
    taken out of the products.
    """
    height, width = means.any.shape
    dtype = means.any.dtype
    ids = torch.cat([piece.ids for piece in rows])
    example = torch.cat([piece.example for piece in rows])
    keys, place = (example * height + ids).unique(return_inverse=True)
    gradients = torch.zeros(len(keys), width, dtype=dtype, device=ids.device)
    _add_at(gradients, place, torch.cat([piece.values for piece in rows]).to(dtype))
    touched = keys % height
    for product in products:
        bounds = torch.arange(len(product.segments) + 1, device=keys.device) * height
        starts = torch.searchsorted(keys, bounds).tolist()
        for (low, high), (start, stop) in zip(
            itertools.pairwise(starts), product.segments, strict=True
        ):
            left, columns = product.left[start:stop], touched[low:high]
            share = left[:, columns].to(dtype).t() @ product.right[start:stop].to(dtype)
            gradients[low:high] += share
            left.index_fill_(1, columns, 0)
    for order, mean in means.by_order.items():
        powers = power(gradients, order).mul_(means.weight).to(mean.device)
        _add_at(mean, touched.to(mean.device), powers)


def _add_at(target: Tensor, place: Tensor, values: Tensor) -> None:
    """Add rows to those of the target that `place` names, in an order without chance."""
    if target.is_cuda:
        target.index_put_((place,), values, accumulate=True)
    else:
        target.index_add_(0, place, values)


def _add_products(means: Means, products: Sequence[Product]) -> None:
    """Add the powers of sum_k left_kb^T right_kb of each example b."""
    product = products[0] if len(products) == 1 else _joined(products)
    device, dtype = product.left.device, _shared_type(product)
    in_registers = means.by_order.keys() <= {1.0, 2.0} and all(
        mean.device == device and mean.dtype == torch.float32 and mean.is_contiguous()
        for mean in means.by_order.values()
    )
    if in_registers and _compiled and device.type == "cpu":
        _add_product_compiled(means, product)
    elif in_registers and _has_kernel(device, dtype):
        _add_product_on_gpu(means, product)
    else:
        _add_product_together(means, product)


def _joined(products: Sequence[Product]) -> Product:
    """One product with the rows of all: a sum of products is a product of longer factors."""
    parts = [
        (product.left[start:stop], product.right[start:stop])
        for segments in zip(*(product.segments for product in products), strict=True)
        for product, (start, stop) in zip(products, segments, strict=True)
    ]
    ends = [0, *itertools.accumulate(len(left) for left, _ in parts)][:: len(products)]
    left, right = (torch.cat(factors) for factors in zip(*parts, strict=True))
    return Product(left, right, tuple(itertools.pairwise(ends)))


def _add_product_compiled(means: Means, product: Product) -> None:
    """Form and raise the gradients in registers; see `_powers.c`."""
    left, right = (
        factor.to(torch.float32).contiguous() for factor in (product.left, product.right)
    )
    first, second = (means.by_order[p].data_ptr() if p in means.by_order else 0 for p in (1, 2))
    height, width = means.any.shape
    _compiled.add_powers(
        left.data_ptr(),
        right.data_ptr(),
        len(left),
        product.segments,
        height,
        width,
        first,
        second,
        means.weight,
        torch.get_num_threads(),
    )


def _shared_type(product: Product) -> torch.dtype:
    """The type that holds the numbers of both factors."""
    return torch.promote_types(product.left.dtype, product.right.dtype)


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of `_triton.py` can be compiled and run there for factors of a type."""
    if device.type != "cuda":
        return False
    try:
        # Whole tiles, as most layers have: what is compiled for one row needs less of a GPU.
        factor = torch.ones(64, 256, dtype=dtype, device=device)
        means = {order: torch.zeros(256, 256, device=device) for order in (1.0, 2.0)}
        _add_product_on_gpu(Means(means, 1.0), Product(factor, factor, ((0, 64),)))
    except ImportError:  # installed without Triton
        return False
    except Exception as error:  # no compiler, or a GPU that it was not written for
        why = f"{type(error).__name__}: {error}"
        warn(f"the kernel for gradients in {dtype} cannot run on {device}: {why}")
        return False
    return True


def _add_product_on_gpu(means: Means, product: Product) -> None:
    """Form and raise the gradients in registers; see `_triton.py`."""
    from perta.engine.gradients import _triton  # takes a second to import

    dtype = _shared_type(product)
    left, right = (factor.to(dtype).contiguous() for factor in (product.left, product.right))
    bounds = _bounds(product.segments, left.device)
    _triton.add_powers(left, right, bounds, means.by_order, means.weight)


@functools.lru_cache(maxsize=2)
def _bounds(segments: Segments, device: torch.device) -> Tensor:
    """Segments as a tensor (B, 2), copied once for all layers of a batch."""
    return torch.tensor(segments, dtype=torch.int32, device=device)


def _add_product_together(means: Means, product: Product) -> None:
    """Form the gradients of all examples at once, a block of rows after the other."""
    mean = means.any
    height, width = mean.shape
    left = _stacked(product.left, product.segments).transpose(1, 2)
    right = _stacked(product.right, product.segments)
    bytes_at_once = _CACHE_BYTES if left.is_cpu else _DEVICE_BYTES
    block = max(1, bytes_at_once // (left.shape[0] * width * mean.element_size()))
    for low in range(0, height, block):
        high = min(low + block, height)
        gradients = wide_product(left[:, low:high], right, means.any.dtype)
        for order, mean in means.by_order.items():
            if gradients.is_cpu:
                powers = power(gradients, order).sum(0)
            else:
                # The norm over examples raises and adds in one pass over memory.
                powers = torch.linalg.vector_norm(gradients, order, dim=0).pow_(order)
            mean[low:high].add_(powers.to(mean.device), alpha=means.weight)


def _stacked(rows: Tensor, segments: Segments) -> Tensor:
    """Rows of each example, padded with zeros: (R, n) -> (B, longest, n)."""
    return nn.utils.rnn.pad_sequence([rows[start:stop] for start, stop in segments], True)


def power(gradient: Tensor, order: float) -> Tensor:
    """|gradient|^order, a new tensor."""
    if order == 2:
        return gradient.square()
    magnitude = gradient.abs()
    return magnitude if order == 1 else magnitude.pow_(order)


def segment_sums(rows: Tensor, segments: Segments) -> Tensor:
    """Sum of the rows of each example: (R, n) -> (B, n)."""
    return torch.stack([rows[start:stop].sum(0) for start, stop in segments])
