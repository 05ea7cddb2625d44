"""What bitsandbytes quantised, as plain numbers; the package itself is not needed.

    4 bits   two numbers a byte of the flat (out, in), the high one first:
             w = quant_map[number] · absmax[block]
    double   absmax = nested_quant_map[absmax] · nested_absmax[block] + nested_offset
    8 bits   weight (out, in), SCB (out,):   w = weight · SCB / 127

Source: Dettmers et al., arXiv 2305.14314, section 3, and 2208.07339, section 2; names and order as
bitsandbytes 0.50 stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perta.errors import CorruptCheckpointError
from perta.models.load import transposed_weights
from perta.store.checkpoint import CheckpointIndex, TensorEntry, read_tensor
from perta.store.parse import fits, parse_json

_STATE = "quant_state.bitsandbytes__"
_FORM = {
    "quant_type": str,
    "blocksize": int,
    "dtype": str,
    "shape": [int],
    "nested_blocksize?": int,
    "nested_offset?": (int, float),
}
_LARGEST_BLOCK = 4096
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Packed:
    """A weight that bitsandbytes quantised; a `turned` one is (in, out) in plain checkpoints."""

    name: str
    codes: TensorEntry
    parts: tuple[TensorEntry, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    turned: bool
    state: Mapping[str, Any]

    def read(self) -> Tensor:
        """The plain tensor."""
        found = {part.name.rpartition(".")[2]: read_tensor(part) for part in self.parts}
        if not self.state:
            values = found["weight"].float() * (found["SCB"].float() / 127).unsqueeze(1)
        else:
            values = self._four_bits(read_tensor(self.codes), found).view(self.state["shape"])
        return (values.t() if self.turned else values).to(self.dtype)

    def _four_bits(self, codes: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        """The flat numbers, float32."""
        scales = found["absmax"]
        if "nested_absmax" in found:
            nested = found["nested_quant_map"][scales.int()]
            spread = found["nested_absmax"].repeat_interleave(self.state["nested_blocksize"])
            scales = nested * spread[: len(nested)] + self.state["nested_offset"]
        packed = codes.view(torch.uint8).flatten()
        values = found["quant_map"][torch.stack((packed >> 4, packed & 0xF), dim=1).flatten().int()]
        count = math.prod(self.state["shape"])
        return values[:count] * scales.repeat_interleave(self.state["blocksize"])[:count]


def packed_tensors(index: CheckpointIndex) -> dict[str, Packed]:
    """Every weight that bitsandbytes quantised, by its name; their parts have to fit together."""
    turned, found = transposed_weights(index.folder), {}
    for name, entry in index.tensors.items():
        weight, _, kind = name.rpartition(f".{_STATE}")
        if weight:
            found[weight] = _of_four_bits(index, weight, entry, weight in turned)
        elif entry.dtype == torch.int8 and not kind.endswith("_format"):
            found[name] = _of_eight_bits(index, name, name in turned)
    return found


def _of_eight_bits(index: CheckpointIndex, name: str, turned: bool) -> Packed:
    place = name.rpartition(".")[0]
    codes, scales = index.tensors[name], part_of(index, name, f"{place}.SCB")
    layout = index.tensors.get(f"{place}.weight_format")
    is_by_rows = layout is None or not read_tensor(layout).any()
    is_known = len(codes.shape) == 2 and is_by_rows and scales.dtype.is_floating_point
    if not is_known or scales.shape != codes.shape[:1]:
        raise _unfit(codes)
    parts = (codes, scales, *([layout] if layout else []))
    shape = codes.shape[::-1] if turned else codes.shape
    return Packed(name, codes, parts, torch.float32, shape, turned, {})


def _of_four_bits(index: CheckpointIndex, name: str, entry: TensorEntry, turned: bool) -> Packed:
    where = f"{entry.file}: {entry.name}"
    if entry.dtype != torch.uint8:
        raise _unfit(entry)
    state = parse_json(bytes(read_tensor(entry).tolist()), where, CorruptCheckpointError)
    codes = part_of(index, name, name)
    is_known = fits(state, _FORM) and state["dtype"] in _TYPES and len(state["shape"]) == 2
    if not is_known or min(state["shape"]) < 1:
        raise _unfit(codes)
    blocks = _blocks(math.prod(state["shape"]), state["blocksize"])
    wanted = {"absmax": (blocks, torch.float32), "quant_map": (16, torch.float32)}
    if "nested_offset" in state:
        nested = _blocks(blocks, state.get("nested_blocksize", 0))
        wanted |= {"absmax": (blocks, torch.uint8), "nested_absmax": (nested, torch.float32)}
        wanted["nested_quant_map"] = (256, torch.float32)
    parts = {part: part_of(index, name, f"{name}.{part}") for part in wanted}
    is_whole = codes.nbytes == _blocks(math.prod(state["shape"]), 2)
    if not is_whole or {n: (part.numel, part.dtype) for n, part in parts.items()} != wanted:
        raise _unfit(codes)
    shape = tuple(state["shape"][::-1] if turned else state["shape"])
    every = (codes, entry, *parts.values())
    return Packed(name, codes, every, _TYPES[state["dtype"]], shape, turned, state)


def _blocks(count: int, size: int) -> int:
    return -(-count // size) if 0 < size <= _LARGEST_BLOCK else -1


def part_of(index: CheckpointIndex, name: str, part: str) -> TensorEntry:
    """A tensor that belongs to a quantised one; a CorruptCheckpointError where it is missing."""
    if part not in index.tensors:
        raise CorruptCheckpointError(
            f"{index.folder}: {name} is quantised, and no file holds {part}. Copy or download "
            "the checkpoint again."
        )
    return index.tensors[part]


def _unfit(codes: TensorEntry) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{codes.file}: what is stored beside {codes.name} does not fit it, or is of a form that "
        "is not read. Copy or download the checkpoint again."
    )
