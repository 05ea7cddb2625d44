"""The files of an edited checkpoint: θ_full's layout, in its own types or in another.

Another type is for what θ_full stores most of its numbers in; what it stores in a type of its own,
such as float32 router biases, stays in that.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import torch

from perta.errors import CorruptCheckpointError
from perta.models.load import rename_type, save_type, stored_dtype
from perta.models.trust import read_config
from perta.options import SaveType
from perta.store.checkpoint import (
    INDEX,
    CheckpointIndex,
    TensorEntry,
    open_index,
    safetensors_header,
)
from perta.store.parse import read_json


def create_files(
    full: CheckpointIndex, folder: Path, save_dtype: SaveType, wide: Collection[str] = ()
) -> CheckpointIndex:
    """Make the output's files in an empty folder: headers, and room for the tensors.

    `full` is θ_full, or what takes its place; with the type `full` its header bytes and tensor
    places are kept. Tensors named in `wide` are stored in float32 all the same.
    """
    is_same = not wide and save_type(save_dtype, full.folder) == stored_dtype(full.folder)
    for shard, names in full.shards.items():
        entries = [full.tensors[name] for name in names]
        if is_same:
            header, size = _header_bytes(full.folder / shard), (full.folder / shard).stat().st_size
        else:
            types = {e.name: _output_type(e, full.folder, save_dtype) for e in entries}
            types |= {name: torch.float32 for name in names if name in wide}
            header, size = _new_header(entries, types, full.metadata)
        with (folder / shard).open("wb") as stream:
            stream.write(header)
            stream.flush()
            _reserve(stream, size)
    if (full.folder / INDEX).is_file():
        (folder / INDEX).write_bytes((full.folder / INDEX).read_bytes())
    created = open_index(folder)
    if not is_same and (folder / INDEX).is_file():
        _write_total(folder / INDEX, sum(entry.nbytes for entry in created.tensors.values()))
    return created


def _output_type(entry: TensorEntry, full: Path, save_dtype: SaveType) -> torch.dtype:
    """Type in which the output stores one tensor of θ_full."""
    is_main = entry.dtype == stored_dtype(full)
    return save_type(save_dtype, full) if is_main else entry.dtype


def write_config(full: Path, folder: Path, save_dtype: SaveType) -> None:
    """Write θ_full's config.json with the type of the output, where it names one."""
    file = full / "config.json"
    if save_dtype == "full" or not file.is_file():
        return
    config = read_config(full)
    rename_type(config, save_dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _header_bytes(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _new_header(
    entries: list[TensorEntry], types: dict[str, torch.dtype], metadata: dict[str, str]
) -> tuple[bytes, int]:
    """Header in other types, and the size of the file."""
    header = safetensors_header({e.name: (types[e.name], e.shape) for e in entries}, metadata)
    return header, len(header) + sum(e.numel * types[e.name].itemsize for e in entries)


def _write_total(file: Path, total: int) -> None:
    index = read_json(file, CorruptCheckpointError)
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _reserve(stream: BinaryIO, size: int) -> None:
    """Give an open file its size, with room on the disk where the system can reserve it.

    Writing is faster then, and a full disk is found before any work is done.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(error.errno, error.strerror, stream.name) from None
    stream.truncate(size)
