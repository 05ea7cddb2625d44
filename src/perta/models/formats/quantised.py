"""FP8 and MXFP4 checkpoints as plain ones, and plain numbers in their formats again.

    FP8     weight (out, in) in 8 bits, weight_scale_inv: one factor a block, such as 128 x 128
    MXFP4   NAME_blocks (E, out, in/32, 16): two 4-bit numbers a byte, the low one first;
            NAME_scales (E, out, in/32): exponent of 2 of 32 numbers, 127 more; NAME is (E, in, out)

A block in which nothing changed keeps its bytes. One that changed keeps its scale where the new
numbers fit it, and each number is rounded up or down at random, as `store.arithmetic` does it:
steps are small beside the distance of two such numbers, and rounding to the nearest loses them.

Source: DeepSeek-V3, README_WEIGHTS.md; OCP Microscaling Formats 1.0, section 5.3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from perta.errors import CorruptCheckpointError
from perta.models.formats._bitsandbytes import packed_tensors, part_of
from perta.models.trust import read_config, write_config
from perta.store.arithmetic import Place, round_by, rounded_by, thresholds
from perta.store.checkpoint import (
    CheckpointIndex,
    TensorEntry,
    copy_companions,
    open_index,
    read_tensor,
    rows_of,
    stream_tensors,
)

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_LARGEST = 6.0
_RECORD, _BITSANDBYTES = "quantization_config", "bitsandbytes"


WRITTEN = ("fp8", "mxfp4")
"""Formats that an edit is written in again."""


def stored_format(folder: Path) -> str | None:
    """Format that a checkpoint is quantised in, of those that are read here."""
    record = read_config(folder).get(_RECORD)
    if not isinstance(record, dict):
        return None
    is_old = record.get("load_in_4bit") or record.get("load_in_8bit")
    method = record.get("quant_method") or (_BITSANDBYTES if is_old else None)
    return method if method in (*WRITTEN, _BITSANDBYTES) else None


def dequantise(folder: Path, target: Path) -> None:
    """Write a quantised checkpoint with plain numbers, under its own names, tensor by tensor.

    float32 for FP8 and 8 bits of bitsandbytes, bfloat16 for MXFP4, and for 4 bits of bitsandbytes
    the type that it computes from. CorruptCheckpointError where scales are missing or do not fit.
    """
    index, config = open_index(folder), read_config(folder)
    is_packed = stored_format(folder) == _BITSANDBYTES
    del config[_RECORD]
    made: dict[str, Any] = packed_tensors(index) if is_packed else {**quantised_tensors(index)}
    plain_names = {one.codes.name: name for name, one in made.items()}
    parts = {part.name for one in made.values() for part in one.parts}
    sources: dict[str, Any] = {**index.tensors, **made}
    places = {}
    for shard, names in index.shards.items():
        kept = (n for n in names if n in plain_names or not (n in parts or is_of_inputs(n)))
        found = [plain_names.get(name, name) for name in kept]
        places[shard] = {name: (sources[name].dtype, sources[name].shape) for name in found}

    def value(name: str) -> Tensor:
        return made[name].read() if name in made else read_tensor(index.tensors[name])

    stream_tensors(target, {shard: types for shard, types in places.items() if types}, value)
    copy_companions(folder, target)
    write_config(target, config)


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor of a checkpoint."""

    name: str  # of the tensor that it is made of
    codes: TensorEntry  # the numbers of few bits
    scales: TensorEntry  # what they are multiplied with
    # rows and columns that share a factor; None for one factor, and for MXFP4
    block: tuple[int, int] | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether the numbers have 8 bits, not 4."""
        return self.codes.dtype != torch.uint8

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The tensors that hold it."""
        return self.codes, self.scales

    @property
    def dtype(self) -> torch.dtype:
        """Type of the plain tensor."""
        return torch.float32 if self.is_fp8 else torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the plain tensor."""
        if self.is_fp8:
            return self.codes.shape
        *experts, out, groups, size = self.codes.shape
        return (*experts, groups * size * 2, out)

    def read(self) -> Tensor:
        """The plain tensor."""
        return self.plain(read_tensor(self.codes), read_tensor(self.scales))

    def plain(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The same of given bytes."""
        if self.is_fp8:
            return _dequantise_fp8(codes, scales, self.block)
        return _dequantise_mxfp4(codes, scales)

    def requantised(self, values: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Codes and scales of new float32 values; what is as it was keeps its bytes."""
        codes, scales = read_tensor(self.codes), read_tensor(self.scales)
        if self.is_fp8:
            return _requantise_fp8(codes, scales, values, self.block, place)
        return _requantise_mxfp4(codes, scales, values, place)

    def rounded(self, values: Tensor, seed: int) -> Tensor:
        """What would be read again after values are stored, float32 of the plain shape."""
        start, found = 0, []
        for part, first, last in self.slabs():
            wanted = values[first:last].cpu()
            stored = part.requantised(wanted, Place(seed, self.name, start))
            found.append(part.plain(*stored).float())
            start += wanted.numel()
        return torch.cat(found).to(values.device)

    def slabs(self) -> Iterator[tuple[Quantised, int, int]]:
        """Parts that no scale reaches across, and which rows of the plain tensor they are."""
        size = self.codes.shape[0]
        has_experts = len(self.codes.shape) == (3 if self.is_fp8 else 4)
        step = 1 if has_experts and self.scales.shape[:1] == (size,) else size
        if self.is_fp8 and self.block and not has_experts:
            step = self.block[0]
        if step == size:
            yield self, 0, self.shape[0]
            return
        for part, start in enumerate(range(0, size, step)):
            stop = min(start + step, size)
            codes, scales = rows_of(self.codes, start, stop), rows_of(self.scales, part, part + 1)
            yield replace(self, codes=codes, scales=scales), start, stop


def is_of_inputs(name: str) -> bool:
    """Whether a tensor belongs to the products of quantised models, and to no weight."""
    return name.endswith(("activation_scale", "input_scale"))


_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_POWERS = torch.float8_e8m0fnu
_FACTORS = (torch.float32, torch.bfloat16, torch.float16, _POWERS)


def quantised_tensors(index: CheckpointIndex) -> dict[str, Quantised]:
    """Every quantised tensor, by its plain name; CorruptCheckpointError where scales do not fit."""
    block = _block(index.folder)
    found = {}
    for name, entry in index.tensors.items():
        plain = name.removesuffix("_blocks")
        if entry.dtype in _FP8:
            scale = part_of(index, name, f"{name}_scale_inv")
            _check(entry, scale, _fp8_shapes(entry, block), _FACTORS)
        elif plain != name:
            scale = part_of(index, name, f"{plain}_scales")
            packed = entry.dtype == torch.uint8 and len(entry.shape) > 2 and entry.shape[-1] == 16
            _check(entry, scale, [entry.shape[:-1]] if packed else [], (torch.uint8,))
        else:
            continue
        if plain in found or (plain != name and plain in index.tensors):
            raise CorruptCheckpointError(
                f"{index.folder} holds {plain} twice, plain and quantised. Copy or download the "
                "checkpoint again."
            )
        found[plain] = Quantised(plain, entry, scale, block if entry.dtype in _FP8 else None)
    return found


def _block(folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a factor, as config.json says."""
    block = read_config(folder)[_RECORD].get("weight_block_size")
    if block is None:
        return None
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise CorruptCheckpointError(
            f"{folder}: config.json says weight_block_size {block!r}, and two numbers of rows and "
            "columns are wanted. Take config.json from where the checkpoint came from."
        )
    return block[0], block[1]


def _check(
    entry: TensorEntry,
    scale: TensorEntry,
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if scale.shape not in shapes or scale.dtype not in dtypes:
        wanted = f"needs {shapes[0]} of {dtypes[0]}" if shapes else "is of no such format"
        raise CorruptCheckpointError(
            f"{scale.file}: {scale.name} is {scale.shape} of {scale.dtype}, and {entry.name}, "
            f"{entry.shape} of {entry.dtype}, {wanted}. Copy or download the checkpoint again."
        )


def _fp8_shapes(entry: TensorEntry, block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Shapes that the scales of a weight may have."""
    if not block:
        return [(), (1,)]
    if len(entry.shape) < 2:
        return []
    sizes = zip(entry.shape[-2:], block, strict=True)
    return [(*entry.shape[:-2], *(math.ceil(size / part) for size, part in sizes))]


def _dequantise_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Numbers of 8 bits, (..., out, in), times the factor of their block, in float32.

    `scale` is (..., out / block, in / block) rounded up; one number without blocks.
    """
    values = weight.float()
    return values.mul_(_spread(scale.float(), values, block))


def _spread(factors: Tensor, values: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Factors of blocks, one for each of their values."""
    for axis, size in zip((-2, -1), block or (), strict=False):
        factors = factors.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    return factors


def _largest(values: Tensor, factors: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Largest magnitude of every block, in the shape of its factors."""
    if not block:
        return values.abs().amax().expand(factors.shape)
    rows, columns = factors.shape[-2:]
    missing = (0, columns * block[1] - values.shape[-1], 0, rows * block[0] - values.shape[-2])
    shape = (*values.shape[:-2], rows, block[0], columns, block[1])
    return pad(values.abs(), missing).reshape(shape).amax((-3, -1))


def _requantise_fp8(
    weight: Tensor, scale: Tensor, values: Tensor, block: tuple[int, int] | None, place: Place
) -> tuple[Tensor, Tensor]:
    """New numbers and factors, in the types of the old ones, for new float32 values.

    Factors change where the largest number of a block no longer fits, or is less than half of what
    it was. `weight`, `scale` and `block` are as for `_dequantise_fp8`.
    """
    limit, old = torch.finfo(weight.dtype).max, scale.float()
    before = _dequantise_fp8(weight, scale, block)
    factors = _new_factors(before, values, old, limit, block, scale.dtype)
    spread = _spread(factors, values, block)
    scaled = (values / spread).nan_to_num_(0.0).clamp_(-limit, limit)
    above = thresholds(place, values.numel()).view(values.shape)
    codes = round_by(scaled, weight.dtype, above).view(torch.uint8)
    kept = (values == before) & (spread == _spread(old, values, block))
    codes = torch.where(kept, weight.view(torch.uint8), codes).view(weight.dtype)
    return codes, torch.where(factors == old, old, factors).to(scale.dtype)


def _new_factors(
    before: Tensor,
    values: Tensor,
    factors: Tensor,
    limit: float,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Factors of a type for new values, float32, the old ones where they still suit a block."""
    largest = _largest(values, factors, block)
    wanted = largest / limit
    wanted = (_power(_exponents(wanted)) if dtype == _POWERS else wanted.to(dtype)).float()
    stays = (largest <= factors * limit) & (2 * largest >= _largest(before, factors, block))
    return torch.where(stays | (largest == 0) | (wanted == 0), factors, wanted)


def _power(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents)


def _exponents(factors: Tensor) -> Tensor:
    """Exponents of the smallest powers of 2 that are no smaller, int32, at least -127."""
    mantissa, exponent = torch.frexp(factors)
    return torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)


def _dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Numbers of 4 bits times the power of 2 of their group.

    From uint8 `blocks` (..., out, groups, size) and `scales` (..., out, groups) to (..., 2 · groups
    · size, out), bfloat16, in which all of them are exact.
    """
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    pairs = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(table[pairs.int()], (scales.int() - 127).unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).to(torch.bfloat16)


def _requantise_mxfp4(
    blocks: Tensor, scales: Tensor, values: Tensor, place: Place
) -> tuple[Tensor, Tensor]:
    """New numbers and exponents for values (..., 2 · groups · size, out); see `_requantise_fp8`."""
    block = (1, 2 * blocks.shape[-1])
    new = values.transpose(-1, -2)
    old = _dequantise_mxfp4(blocks, scales).float().transpose(-1, -2)
    before = _power(scales.int() - 127)
    factors = _new_factors(old, new, before, _FP4_LARGEST, block, _POWERS)
    scaled = (new / _spread(factors, new, block)).clamp_(-_FP4_LARGEST, _FP4_LARGEST).contiguous()
    rounded = rounded_by(scaled, 0.5, 1.0, thresholds(place, new.numel()).view(new.shape))
    codes = torch.bucketize(rounded.abs(), torch.tensor(_FP4)).to(torch.uint8)
    codes += 8 * torch.signbit(rounded).to(torch.uint8)
    stored = torch.stack((blocks & 0xF, blocks >> 4), dim=-1)
    is_same = (new == old) & _spread(factors == before, new, block)
    codes = torch.where(is_same.view(stored.shape), stored, codes.view(stored.shape))
    exponents = (_exponents(factors) + 127).to(torch.uint8)
    return codes[..., 0] | codes[..., 1] << 4, torch.where(factors == before, scales, exponents)
