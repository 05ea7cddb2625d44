"""An edited checkpoint in the quantised format of the one that it came from, or as a GGUF file.

    θ_full as stored ── codes and scales ─┐
    θ_u, float32 ──────────────────────────┴─ slab by slab: what changed is rounded, the rest stays

Files, header bytes and tensor places are θ_full's; see `models.formats.quantised` for the formats.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from perta.engine.edit.stored import Stored, Sums
from perta.engine.edit.write import create_files
from perta.errors import CheckpointMismatchError, DivergenceError
from perta.models.formats.gguf_write import GgufPlan, round_for
from perta.models.formats.quantised import Quantised, is_of_inputs, quantised_tensors
from perta.progress import track
from perta.store.arithmetic import Place, round_as_stored, square_norm
from perta.store.checkpoint import (
    GGUF,
    TensorEntry,
    copy_companions,
    is_constant,
    open_index,
    opened,
    read_tensor,
    rows_of,
    write_from,
)


def write_quantised(folder: Path, original: Path, edited: Path, seed: int) -> dict[str, Stored]:
    """Write edited or trained weights, in float32 or as stored, as `original` stores them.

    Returns by plain name what the format left of each step; CheckpointMismatchError where a weight
    is missing.
    """
    index, new = open_index(original), open_index(edited)
    quantised = quantised_tensors(index)
    parts = {entry.name for one in quantised.values() for entry in (one.codes, one.scales)}
    files = create_files(index, folder, "full").tensors
    for name in index.tensors.keys() - parts:
        old = index.tensors[name]
        source = old if is_of_inputs(name) or is_constant(old) else new.find(name)
        if source is None:
            raise CheckpointMismatchError(
                f"{original} stores {name}, which the model keeps under another name. Store plain "
                "numbers: --save-dtype bfloat16, or float32."
            )
        values = read_tensor(source)
        if values.dtype != old.dtype:
            values = round_as_stored(values.float(), old.dtype, Place(seed, name))
        _write(files[name], values)
    found = {}
    with track("requantise", len(quantised)) as advance:
        for name, one in quantised.items():
            found[name] = _write_one(folder, one, new.tensors[name], seed)
            advance()
    copy_companions(original, folder)
    return found


def _write_one(folder: Path, one: Quantised, values: TensorEntry, seed: int) -> Stored:
    """Write one tensor, part by part."""
    sums, start = Sums(), 0
    for part, first, last in one.slabs():
        wanted = read_tensor(rows_of(values, first, last)).float()
        codes, scales = part.requantised(wanted, Place(seed, one.name, start))
        start += wanted.numel()
        for entry, made in ((part.codes, codes), (part.scales, scales)):
            _write(replace(entry, file=folder / entry.file.name), made)
        sums.add(_measured(part.read().float(), wanted, part.plain(codes, scales).float()))
    return sums.stored(start)


def _measured(before: Tensor, wanted: Tensor, after: Tensor) -> Sums:
    """What became of the step from `before` to `wanted`, float32, of which `after` is stored."""
    delta, error = (before - wanted).flatten(), (wanted - after).flatten()
    along, changed = float(error @ delta), float((after != before).sum())
    return Sums(0.0, 0.0, square_norm(delta), along, square_norm(error), changed)


def write_gguf(folder: Path, plan: GgufPlan, edited: Path, seed: int) -> dict[str, Stored]:
    """Write edited float32 weights as a GGUF file; name -> what its type left of the step."""
    old, new, found = open_index(plan.folder), open_index(edited), dict[str, Stored]()

    def value(name: str, kind: GGMLQuantizationType) -> Tensor:
        wanted = read_tensor(new.tensors[name]).float()
        after = round_for(kind, wanted, Place(seed, name))
        if not bool(torch.isfinite(after).all()):
            raise DivergenceError(
                f"{name} leaves the range of {kind.name}. Use a smaller --scaling-coef or a wider "
                "type (--save-dtype)."
            )
        before = read_tensor(old.tensors[name]).float()
        found[name] = _measured(before, wanted, after).stored(wanted.numel())
        return after

    plan.write(folder / GGUF, value)
    return found


def _write(entry: TensorEntry, values: Tensor) -> None:
    with opened(entry.file, os.O_WRONLY) as output:
        write_from(output, entry.offset, values.flatten().view(torch.uint8).numpy().data)
