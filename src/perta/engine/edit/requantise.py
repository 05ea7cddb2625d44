"""An edited checkpoint in the quantised format of the one that it came from.

    θ_full as stored ── codes and scales ─┐
    θ_u, float32 ──────────────────────────┴─ slab by slab: what changed is rounded, the rest stays

Files, header bytes and tensor places are θ_full's; see `models.quantised` for the formats.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from perta.engine.edit._output import create_files
from perta.engine.edit.stream import Stored, Sums
from perta.models.quantised import Quantised, is_of_inputs, quantised_tensors
from perta.progress import track
from perta.store.arithmetic import Place, square_norm
from perta.store.checkpoint import (
    TensorEntry,
    copy_companions,
    open_index,
    opened,
    read_tensor,
    rows_of,
    write_from,
)


def write_quantised(folder: Path, original: Path, edited: Path, seed: int) -> dict[str, Stored]:
    """Write edited weights as the checkpoint that they came from stores them.

    Args:
        folder: an existing empty folder.
        original: quantised checkpoint, θ_full.
        edited: θ_u, the tensors that are quantised in float32, the others as they are to be.
        seed: of the rounding.

    Returns:
        Plain name of every quantised tensor -> what the format left of its step.

    Raises:
        CorruptCheckpointError: a file is damaged.
    """
    index, new = open_index(original), open_index(edited)
    quantised = quantised_tensors(index)
    parts = {entry.name for one in quantised.values() for entry in (one.codes, one.scales)}
    files = create_files(index, folder, "full").tensors
    for name in index.tensors.keys() - parts:
        held = index if is_of_inputs(name) else new
        _write(files[name], read_tensor(held.tensors[name]))
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
        before, after = part.read().float(), part.plain(codes, scales).float()
        delta, error = (before - wanted).flatten(), (wanted - after).flatten()
        along, changed = float(error @ delta), float((after != before).sum())
        done = Sums(0.0, 0.0, square_norm(delta), along, square_norm(error), changed)
        sums.add(done)
    return sums.stored(start)


def _write(entry: TensorEntry, values: Tensor) -> None:
    with opened(entry.file, os.O_WRONLY) as output:
        write_from(output, entry.offset, values.flatten().view(torch.uint8).numpy().data)
