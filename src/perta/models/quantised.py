"""FP8 and MXFP4 checkpoints as plain ones, tensor by tensor.

    FP8     weight (out, in) in 8 bits, weight_scale_inv: one factor a block, such as 128 x 128
    MXFP4   NAME_blocks (E, out, in/32, 16): two 4-bit numbers a byte, the low one first;
            NAME_scales (E, out, in/32): exponent of 2 of 32 numbers, 127 more; NAME is (E, in, out)

Source: DeepSeek-V3, README_WEIGHTS.md; OCP Microscaling Formats 1.0, section 5.3.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perta.errors import CorruptCheckpointError
from perta.models.trust import read_config
from perta.store.checkpoint import (
    CheckpointIndex,
    TensorEntry,
    copy_companions,
    open_index,
    read_tensor,
    stream_tensors,
)

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_RECORD = "quantization_config"
_INPUT_SCALES = ("activation_scale", "input_scale")
"""What belongs to the products of quantised models, and to no weight."""


def can_dequantise(folder: Path) -> bool:
    """Whether a checkpoint is quantised in a format that is read here."""
    record = read_config(folder).get(_RECORD)
    return isinstance(record, dict) and record.get("quant_method") in ("fp8", "mxfp4")


def dequantise(folder: Path, target: Path) -> None:
    """Write a quantised checkpoint with plain numbers: float32 for FP8, bfloat16 for MXFP4.

    The names are those of the checkpoint that was quantised; at most one tensor is in memory.
    `target` is an existing empty folder.

    Raises:
        CorruptCheckpointError: a tensor without its scales, or scales of another shape.
    """
    index, config = open_index(folder), read_config(folder)
    record: Mapping[str, Any] = config.pop(_RECORD)
    makers = _makers(index, record.get("weight_block_size"))
    places = {
        shard: {name: makers[name][:2] for name in map(_plain_name, names) if name in makers}
        for shard, names in index.shards.items()
    }
    stream_tensors(
        target, {shard: types for shard, types in places.items() if types}, lambda n: makers[n][2]()
    )
    copy_companions(folder, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


_Maker = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def _plain_name(name: str) -> str:
    return name.removesuffix("_blocks")


def _makers(index: CheckpointIndex, block: Any) -> dict[str, _Maker]:
    """Plain name -> type, shape, and what makes the tensor."""
    entries, makers, used = index.tensors, dict[str, _Maker](), set[str]()
    for name, entry in entries.items():
        if entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = _partner(index, name, f"{name}_scale_inv", used)
            _check(entry, scale, _fp8_shapes(entry, block))
            makers[name] = torch.float32, entry.shape, _fp8_maker(entry, scale, block)
        elif name.endswith("_blocks"):
            scale = _partner(index, name, name.removesuffix("_blocks") + "_scales", used)
            _check(entry, scale, [entry.shape[:-1]])
            *experts, out, groups, size = entry.shape
            shape = (*experts, groups * size * 2, out)
            makers[_plain_name(name)] = torch.bfloat16, shape, _mxfp4_maker(entry, scale)
    for name, entry in entries.items():
        if name not in used | makers.keys() and not name.endswith(("_blocks", *_INPUT_SCALES)):
            makers[name] = entry.dtype, entry.shape, partial(read_tensor, entry)
    return makers


def _partner(index: CheckpointIndex, name: str, scales: str, used: set[str]) -> TensorEntry:
    if scales not in index.tensors:
        raise CorruptCheckpointError(
            f"{index.folder}: {name} is quantised, and no file holds {scales}. Copy or download "
            "the checkpoint again."
        )
    used.add(scales)
    return index.tensors[scales]


def _check(entry: TensorEntry, scale: TensorEntry, shapes: list[tuple[int, ...]]) -> None:
    if scale.shape not in shapes:
        raise CorruptCheckpointError(
            f"{scale.file}: {scale.name} is {scale.shape}, and {entry.name} of {entry.shape} "
            f"needs {shapes[0]}. Copy or download the checkpoint again."
        )


def _fp8_shapes(entry: TensorEntry, block: Any) -> list[tuple[int, ...]]:
    """Shapes that the scales of a weight may have."""
    if not block:
        return [(), (1,)]
    sizes = zip(entry.shape[-2:], block, strict=True)
    return [(*entry.shape[:-2], *(math.ceil(size / part) for size, part in sizes))]


def _fp8_maker(entry: TensorEntry, scale: TensorEntry, block: Any) -> Callable[[], Tensor]:
    return lambda: dequantise_fp8(read_tensor(entry), read_tensor(scale), block)


def _mxfp4_maker(entry: TensorEntry, scale: TensorEntry) -> Callable[[], Tensor]:
    return lambda: dequantise_mxfp4(read_tensor(entry), read_tensor(scale))


def dequantise_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Numbers of 8 bits, (..., out, in), times the factor of their block, in float32.

    `scale` is (..., out / block, in / block) rounded up; one number without blocks.
    """
    values, factors = weight.float(), scale.float()
    if not block:
        return values * factors
    for axis, size in zip((-2, -1), block, strict=True):
        factors = factors.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    return values.mul_(factors)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Numbers of 4 bits times the power of 2 of their group.

    From uint8 `blocks` (..., out, groups, size) and `scales` (..., out, groups) to (..., 2 · groups
    · size, out), bfloat16, in which all of them are exact.
    """
    table = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    pairs = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    values = torch.ldexp(table[pairs.int()], (scales.int() - 127).unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).to(torch.bfloat16)
