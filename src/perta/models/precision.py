"""Which type a model's matrix products are computed in.

bfloat16 where the processor has units for it. Sums, trained weights, their gradients and all that
an optimizer keeps are float32 whatever the products are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perta.errors import shortage
from perta.temporary import temporarily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT = 256
"""Tokens below which the backward pass of attention is slower in bfloat16 on CPUs, up to three
times; see docs/benchmarks.md."""


_WIDE = 256
"""Width of a model from which products in bfloat16 are worth their rounding on CPUs; below it they
are hardly faster than in float32."""


def product_type(dtype: str, device: torch.device, width: int | None) -> torch.dtype:
    """The type that `--dtype`, a `DType`, stands for on a device, for a model of a hidden size.

    bfloat16 products are some sixty times slower on CPUs without units for them. A model whose
    `width` is not known counts as a large one.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    is_wide = width is None or width >= _WIDE
    has_units = device.type == "cpu" and is_wide and torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_units else torch.float32


def product_type_of(
    model: PreTrainedModel, dtype: str, device: torch.device | None = None
) -> torch.dtype:
    """`product_type` for a loaded model on a device, by default where it lies."""
    embedding: Any = model.get_input_embeddings()
    return product_type(dtype, device or model.device, int(embedding.weight.shape[1]))


@contextmanager
def products_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute the products of float32 weights in another type; nothing for float32."""
    if dtype == torch.float32:
        yield
        return
    spared = _OnCpu(dtype) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype), spared:
        yield


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, m, T) @ (B, T, n) summed and returned in `dtype`, whatever the inputs'.

    Products of bfloat16 numbers are exact in float32, so units for bfloat16 give the same sums.
    """
    if left.dtype == torch.bfloat16 and dtype == torch.float32:
        if left.is_cuda:
            try:
                return torch.bmm(left, right, out_dtype=dtype)
            except (TypeError, RuntimeError) as error:
                if shortage(error):
                    raise
                # Before torch 2.8, or on a GPU without such a product.
        elif left.device.type == "cpu":
            put, before = torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
            with temporarily(put, "medium", before):  # the type within a product
                if len(left) == 1:  # a third of the time of a batch of one
                    return torch.mm(left[0].float(), right[0].float()).unsqueeze(0)
                return torch.bmm(left.float(), right.float())
    return torch.bmm(left.to(dtype), right.to(dtype))


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that nothing lies in, or a process's share of them; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (free + kept) // math.ceil(processes / torch.cuda.device_count())


class _OnCpu(TorchFunctionMode):
    """What autocast does not know of CPUs, where there is a backward pass.

    Attention over few tokens is in float32, and layers that read one input share a narrow copy.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._read: tuple[Tensor, int] | None = None
        self._narrow = torch.empty(0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is F.linear and torch.is_grad_enabled() and args[0].dtype == torch.float32:
            return func(self._shared(args[0]), *args[1:], **given)
        is_attention = func is F.scaled_dot_product_attention and torch.is_grad_enabled()
        if not is_attention or args[0].shape[-2] >= _SHORT:
            return func(*args, **given)
        with torch.autocast("cpu", enabled=False):
            wide = {name: _float(value) for name, value in given.items()}
            return func(*map(_float, args), **wide)

    def _shared(self, x: Tensor) -> Tensor:
        """`x` in the type of the products: the copy that was made for the layer before, if any."""
        before = self._read
        if before is None or before[0] is not x or before[1] != x._version:
            self._read, self._narrow = (x, x._version), x.to(self._dtype)
        return self._narrow


def _float(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_narrow else value
