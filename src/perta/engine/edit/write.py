"""The edit: θ_u = θ_full − α · W ⊙ direction [+ β · (θ_r − θ₀)], streamed from files to a file.

The direction is θ_f − θ₀ for most methods; `perta methods` says which takes what.

    plan    headers of every input: what belongs together; stops if anything is wrong
    passes  what no single chunk can know: averages over rows, the smallest value kept
    stream  chunk by chunk: read, edited, given to a sink
    write   the sink of files: all of it, into a folder, with the model card

The output has θ_full's files, header bytes and tensor places, in its own types or in another.
Another type is for what θ_full stores most of its numbers in; what it stores in a type of its own,
such as float32 router biases, stays in that.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from perta.engine.edit._chunks import CHUNK
from perta.engine.edit._stream import Step, check_effect, edit_all, open_edit
from perta.engine.edit.plan import FULL, EditInputs, Target, short_name
from perta.engine.edit.stored import Stored, TensorSummary, check_stored, stored_of
from perta.errors import CorruptCheckpointError, DivergenceError
from perta.methods.card import model_card
from perta.models.load import rename_type, save_type, stored_dtype
from perta.models.trust import read_config, write_config
from perta.options import SaveType, WeightingConfig
from perta.progress import track
from perta.store.arithmetic import Place, square_norm, subtract
from perta.store.arithmetic import Step as Rounded
from perta.store.checkpoint import (
    INDEX,
    CheckpointIndex,
    TensorEntry,
    copy_companions,
    open_index,
    opened,
    safetensors_header,
    write_from,
)
from perta.store.parse import read_json


@dataclass(frozen=True)
class EditSummary:
    """What the edit did."""

    stored: Stored  # what rounding left of the step, over all edited tensors
    # Every edited tensor, in the order of θ_full's files; a tied output head is part of its
    # embedding.
    tensors: tuple[TensorSummary, ...]
    edited: int  # number of weights edited
    copied: int  # number of values copied from θ_full as they are
    seconds: float  # duration of the edit


def write_edit(
    folder: Path,
    inputs: EditInputs,
    weighting: WeightingConfig,
    *,
    save_dtype: SaveType = "full",
    wide: Collection[str] = (),
    threads: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    chunk: int = CHUNK,
) -> EditSummary:
    """Write weights, companion files and model card into an existing empty folder.

    θ_full is cast to `save_dtype`, to the nearest, and then edited; `wide` tensors are stored in
    float32 all the same. `fingerprints`, name of each input -> hash, are for the model card.
    `chunk` elements are worked on at once; it also bounds the reach of the method `random`.
    ConfigError where the method is none or lacks its importance, or a pattern matches nothing;
    CheckpointMismatchError where inputs differ in tensors or shapes; CheckpointError where one is
    quantised, damaged or not finite, the forget checkpoint equals the base, W is 0 everywhere, or
    rounding loses nearly all of the step; DivergenceError where the result does not fit the type of
    the output.
    """
    started = time.perf_counter()
    editor = open_edit(inputs, weighting, threads, chunk)
    targets, weighting = editor.targets, editor.blocks.weighting
    outputs = create_files(open_index(inputs.full), folder, save_dtype, wide).tensors
    with track("edit", len(targets)) as advance:
        summaries = edit_all(editor, _Files(outputs, weighting.weighting_seed), advance)
    check_effect(summaries, editor, inputs)
    stored = stored_of(summaries)
    check_stored(stored)
    copy_companions(inputs.full, folder)
    _write_config(inputs.full, folder, save_dtype)
    (folder / "README.md").write_text(model_card(weighting, fingerprints or {}), "utf-8")
    open_index(folder)
    edited = sum(target.full.numel for target in targets if target.sources)
    copied = sum(target.full.numel for target in targets if not target.sources)
    return EditSummary(stored, summaries, edited, copied, time.perf_counter() - started)


@dataclass(frozen=True)
class _Files:
    """The sink that subtracts the steps from θ_full's values and writes what is left."""

    outputs: Mapping[str, TensorEntry]  # the output's tensors by name
    seed: int  # of the rounding

    def __call__(self, target: Target, steps: Iterator[Step]) -> None:
        """Write chunks of one tensor; where they go is known before anything is computed."""
        place, name = self.outputs[target.full.name], target.alias_of or target.full.name
        with opened(place.file, os.O_WRONLY) as output:
            for step in steps:
                if step.delta is None:
                    stored = _copied(step, place.dtype)
                else:
                    where = Place(self.seed, name, step.begin)
                    stored = _edited(step, step.delta, place.dtype, where)
                offset = place.offset + step.begin * place.dtype.itemsize
                write_from(output, offset, stored.view(torch.uint8).numpy().data)


def _copied(step: Step, dtype: torch.dtype) -> Tensor:
    """Values of θ_full as they are, in the type of the output."""
    full = step.readers[FULL]
    full.read(step.begin, step.count)
    full.check_copy(step.begin, step.count)
    stored = full.raw.to(dtype)
    if stored.dtype != full.raw.dtype and not bool(torch.isfinite(stored).all()):
        raise DivergenceError(
            f"{full.entry.name} holds numbers outside the range of {short_name(dtype)}. Use a "
            "wider type (--save-dtype)."
        )
    return stored


def _edited(step: Step, delta: Tensor, dtype: torch.dtype, place: Place) -> Tensor:
    """Values of θ_full less δ, rounded once; adds what rounding did to the step's sums."""
    stored = step.readers[FULL].load(step.begin, step.count).to(dtype)
    # Without a step the stored bytes stay: 0 - (-0) would turn a stored -0 into 0.
    if step.is_still:
        done = Rounded(square_norm(stored.to(torch.float32)))
    else:
        done = subtract(stored, delta, place)
    # The norm of a chunk bounds its largest value, so a finite norm of the task vector and a norm
    # of the result below the largest number of the output's type clear every input and the cast.
    # Only when that fails are the values themselves looked at.
    limit = torch.finfo(stored.dtype).max / 2
    is_finite = math.isfinite(step.sums.task_vector) and (
        done.squares < limit * limit or bool(torch.isfinite(stored.to(torch.float32)).all())
    )
    if not is_finite:
        step.refuse_infinite(stored.dtype)
    step.sums.along, step.sums.error, step.sums.changed = done.along, done.error, done.changed
    return stored


# --- the files ------------------------------------------------------------------------------------


def create_files(
    full: CheckpointIndex, folder: Path, save_dtype: SaveType, wide: Collection[str] = ()
) -> CheckpointIndex:
    """Make the output's files in an empty folder: θ_full's headers, or new ones, and room."""
    own, wanted = stored_dtype(full.folder), save_type(save_dtype, full.folder)
    is_same = not wide and wanted == own
    for shard, names in full.shards.items():
        entries = [full.tensors[name] for name in names]
        if is_same:
            header, size = _header_bytes(full.folder / shard), (full.folder / shard).stat().st_size
        else:
            types = {e.name: wanted if e.dtype == own else e.dtype for e in entries}
            types |= {name: torch.float32 for name in names if name in wide}
            stored = {e.name: (types[e.name], e.shape) for e in entries}
            header = safetensors_header(stored, full.metadata)
            size = len(header) + sum(e.numel * types[e.name].itemsize for e in entries)
        with (folder / shard).open("wb") as stream:
            stream.write(header)
            stream.flush()
            _reserve(stream, size)
    if (full.folder / INDEX).is_file():
        (folder / INDEX).write_bytes((full.folder / INDEX).read_bytes())
    created = open_index(folder)
    if not is_same and (folder / INDEX).is_file():
        index = read_json(folder / INDEX, CorruptCheckpointError)
        total = sum(entry.nbytes for entry in created.tensors.values())
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return created


def _write_config(full: Path, folder: Path, save_dtype: SaveType) -> None:
    """Write θ_full's config.json with the type of the output, where it names one."""
    if save_dtype == "full" or not (full / "config.json").is_file():
        return
    config = read_config(full)
    rename_type(config, save_dtype)
    write_config(folder, config)


def _header_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _reserve(stream: BinaryIO, size: int) -> None:
    """Give an open file its size and room on the disk, so that a full one is found at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(error.errno, error.strerror, stream.name) from None
    stream.truncate(size)
