"""Checkpoint folders: safetensors headers, tensors, fingerprints.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the
tensors' bytes. The header says where every tensor lies, so a checkpoint of any size is checked
here from a few kilobytes, before anything is read or written.

Importance files carry the checkpoint's tensor names, so the same reader serves them.

Source: https://github.com/huggingface/safetensors, README, section Format.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perta.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
)
from perta.store.parse import fits, parse_json, read_json

_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
IMPORTANCE_SIDECAR = "importance.json"
MOMENTS_SIDECAR = "moments.json"

_MAX_HEADER = 100_000_000  # longest header in bytes; the format's own limit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template.json",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "additional_chat_templates/*.jinja",
)
"""Files a model needs beside its weights. A list of what is known, not "everything else": a
folder may also hold training data and logs, which must not travel with the cleaned model."""

_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
GGUF = "model.gguf"
WEIGHTS = ("*.safetensors", INDEX, GGUF, "order-*/*.safetensors", f"order-*/{INDEX}")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of output heads, which may be the input embedding under another name."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: first byte, from the start of its file, and length in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint folder holds, read from the file headers alone."""

    folder: Path
    # Every tensor by name, in the order of the files and of the bytes in them.
    tensors: dict[str, TensorEntry]
    # File name -> names of its tensors, in the order of their bytes.
    shards: dict[str, tuple[str, ...]]
    metadata: dict[str, str]  # the header's free text of the first file, such as {"format": "pt"}

    @property
    def numel(self) -> int:
        """Number of values in all tensors."""
        return sum(entry.numel for entry in self.tensors.values())

    @cached_property
    def _without_first(self) -> dict[str, str]:
        """What follows the first part of a name -> the name, the first by the alphabet."""
        return {name.partition(".")[2]: name for name in sorted(self.tensors, reverse=True)}

    def find(self, name: str) -> TensorEntry | None:
        """A tensor by its name, with or without the base model's prefix, such as `transformer.`."""
        for same in (name, name.partition(".")[2]):
            if same in self.tensors:
                return self.tensors[same]
        longer = self._without_first.get(name)
        return self.tensors[longer] if longer else None


def name_ends_with(name: str, endings: Iterable[str]) -> bool:
    """Whether a tensor's name is one of these, whatever modules it lies in."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


# --- reading -------------------------------------------------------------------------------


def open_index(folder: Path) -> CheckpointIndex:
    """Read and check the headers of a checkpoint or importance folder; no tensor is read.

    Files count as transformers counts them: `model.safetensors` if it is there, otherwise the
    shards named in `model.safetensors.index.json`. A folder with both, where the index names other
    shards, is refused, because half of it is left over from another run. CheckpointNotFoundError
    without folder or checkpoint; CorruptCheckpointError where a file is truncated, its header
    contradicts it, or shards are missing or hold a tensor twice; CheckpointError at unknown types.
    """
    names, weight_map = _find_shards(folder)
    headers = {name: read_header(folder / name) for name in names}
    tensors: dict[str, TensorEntry] = {}
    for entry in (entry for entries, _ in headers.values() for entry in entries):
        if (first := tensors.setdefault(entry.name, entry)) is not entry:
            raise CorruptCheckpointError(
                f"{folder}: {entry.name} is in both {first.file.name} and {entry.file.name}. "
                "Save the checkpoint again into an empty folder."
            )
    if weight_map is not None:
        _check_weight_map(folder, weight_map, tensors)
    shards = {name: tuple(e.name for e in entries) for name, (entries, _) in headers.items()}
    metadata = next((said for _, said in headers.values() if said), {})
    return CheckpointIndex(folder, tensors, shards, metadata)


def read_header(file: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """Read and check a safetensors file's header: tensors in order of their bytes, free text."""
    header, data_start = _read_raw_header(file)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not fits(metadata, {str: str}):
        raise CorruptCheckpointError(f"{file}: __metadata__ in the header is no object of texts.")
    entries = [_entry(file, name, info, data_start) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            raise CorruptCheckpointError(
                f"{file}: {entry.name} begins at byte {entry.offset} but the tensor before it "
                f"ends at {end}. The file is damaged; copy or download it again."
            )
        end += entry.nbytes
    size = file.stat().st_size
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise CorruptCheckpointError(
            f"{file} is {state}: {size} bytes instead of {end}. Copy or download it again."
        )
    return entries, metadata or {}


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own, on the CPU, as it is stored."""
    flat = torch.empty(entry.nbytes, dtype=torch.uint8)
    with opened(entry.file) as descriptor:
        read_into(descriptor, entry.offset, flat.numpy().data, entry)
    return flat.view(entry.dtype).reshape(entry.shape)


def rows_of(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """A slice of a tensor along its first axis, as a tensor of its own."""
    row = entry.nbytes // entry.shape[0]
    shape = (stop - start, *entry.shape[1:])
    place = entry.offset + start * row
    return replace(entry, shape=shape, offset=place, nbytes=(stop - start) * row)


@contextmanager
def opened(file: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file for reading or writing at any place; yields its descriptor."""
    descriptor = os.open(file, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, offset: int, buffer: memoryview, entry: TensorEntry) -> None:
    """Fill a writable buffer from an open file, from the byte `offset` on."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise CorruptCheckpointError(
                f"{entry.file} ended while {entry.name} was read: something shortened it "
                "meanwhile. Make sure that nothing writes to the inputs, and run again."
            )
        buffer, offset = buffer[count:], offset + count


def write_from(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Write a whole buffer at a place in an open file."""
    while buffer:
        count = os.pwrite(descriptor, buffer, offset)
        buffer, offset = buffer[count:], offset + count


def _find_shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    if not folder.is_dir():
        what = "is a file, not a checkpoint folder" if folder.is_file() else "does not exist"
        raise CheckpointNotFoundError(f"{folder} {what}. Give a folder with {_SINGLE}.")
    has_single, has_index = (folder / _SINGLE).is_file(), (folder / INDEX).is_file()
    weight_map = _read_weight_map(folder / INDEX) if has_index else None
    if has_single:
        if weight_map and set(weight_map.values()) != {_SINGLE}:
            raise CorruptCheckpointError(
                f"{folder} holds both {_SINGLE} and an {INDEX} that names other shards: the "
                "checkpoints of two runs. Delete the one that is out of date."
            )
        return [_SINGLE], weight_map
    if weight_map is None:
        raise _no_checkpoint(folder)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CorruptCheckpointError(
            f"{folder}: {INDEX} names {', '.join(missing[:3])}, which "
            f"{'is' if len(missing) == 1 else 'are'} not there ({len(missing)} of {len(names)} "
            "shards missing). Copy or download the checkpoint again."
        )
    return names, weight_map


def _read_weight_map(file: Path) -> dict[str, str]:
    pairs = read_json(file, CorruptCheckpointError).get("weight_map")
    if not isinstance(pairs, dict) or not all(isinstance(shard, str) for shard in pairs.values()):
        raise CorruptCheckpointError(
            f"{file} is not a shard index: it lacks a weight_map. Copy or download it again."
        )
    for shard in set(pairs.values()):  # a file beside the index, none outside the folder
        if Path(shard).name != shard or "\0" in shard or len(os.fsencode(shard)) > 255:
            raise CorruptCheckpointError(f"{file} names a shard outside its folder: {shard[:300]}.")
    return pairs


def _no_checkpoint(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return CheckpointNotFoundError(
            f"{folder} has {others[0]} but neither {_SINGLE} nor {INDEX}. Save the model with "
            "`model.save_pretrained(folder)`."
        )
    if pickles:
        return CorruptCheckpointError(
            f"{folder} has only pickle files ({pickles[0]}), which are never loaded because "
            "they can run code. Convert them on a machine you trust: "
            "`AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`."
        )
    return CheckpointNotFoundError(f"{folder} has no {_SINGLE} and no {INDEX}.")


def _check_weight_map(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors and name_ends_with(name, HEADS):
            continue  # some writers name a tied head too; one that is needed is missed later
        if name not in tensors or tensors[name].file.name != shard:
            raise CorruptCheckpointError(
                f"{folder}: {INDEX} says that {shard} holds {name}, but it does not. The shards "
                "are of another run than the index; copy or download the checkpoint again."
            )
    for name in tensors:
        if name not in weight_map:
            raise CorruptCheckpointError(
                f"{folder}: {tensors[name].file.name} holds {name}, which {INDEX} does not "
                "name. Copy or download the checkpoint again."
            )


def _read_raw_header(file: Path) -> tuple[dict[str, Any], int]:
    if not file.is_file():
        raise CheckpointNotFoundError(f"{file} does not exist.")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptCheckpointError(
                f"{file} is truncated or not a safetensors file: {size} bytes, and its header "
                f"alone would be {length}. Copy or download it again."
            )
        text = stream.read(length)
    header = parse_json(text, f"{file}: the header", CorruptCheckpointError)
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{file}: the header is not a JSON object.")
    return header, 8 + length


def _entry(file: Path, name: str, info: Any, data_start: int) -> TensorEntry:
    try:
        dtype_name = str(info["dtype"])
        shape = tuple(int(size) for size in info["shape"])
        begin, end = (int(offset) for offset in info["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{file}: the header of {name} cannot be read.") from error
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(
            f"{file}: {name} has type {dtype_name}, which cannot be read. Save the model in "
            "bfloat16, float16 or float32."
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
        raise CorruptCheckpointError(
            f"{file}: {name} is {dtype_name} {shape}, {nbytes} bytes, but its place in the file "
            f"has {end - begin}. The file is damaged; copy or download it again."
        )
    return TensorEntry(name, dtype, shape, file, data_start + begin, nbytes)


def matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Files under `folder` that match, as sorted relative names."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def is_float(entry: TensorEntry) -> bool:
    """Whether a tensor is stored in a type that models compute in."""
    return entry.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_constant(entry: TensorEntry) -> bool:
    """Whether a tensor is no weight but a constant, as older transformers versions stored."""
    name, shape = entry.name, entry.shape
    if not is_float(entry) or name.endswith(("rotary_emb.inv_freq", ".masked_bias")):
        return True
    causal_mask = len(shape) == 4 and shape[:2] == (1, 1)
    return name.endswith((".attn.bias", ".attention.bias")) and causal_mask


# --- writing -------------------------------------------------------------------------------


def companions(folder: Path) -> list[str]:
    """What goes into every model that is made from one, as sorted relative names; no links out."""
    names, inside = matching(folder, (*COMPANIONS, *_LEGAL)), folder.resolve()
    allowed = [inside]
    blobs = inside.parent.parent / "blobs"
    if inside.parent.name == "snapshots" and not blobs.is_symlink():
        allowed.append(blobs)  # where the hub's cache keeps the files that its folders link to
    for name in names:
        place = (folder / name).resolve()
        if not any(place.is_relative_to(other) for other in allowed):
            raise CheckpointError(
                f"{folder / name} is a link to {place}, outside its folder, and would be copied "
                "into the result. Put the file itself in its place, or remove the link."
            )
    return names


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model needs beside its weights, and its licence; see `companions`."""
    for name in companions(source):
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, copy)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], shards: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write tensors as a safetensors checkpoint, each in its own type, by `stream_tensors`.

    `shards` are files and the names of their tensors, of which some may be missing; without it all
    go into one file. ConfigError where a tensor is in no shard, or its type cannot be stored.
    """
    layout = {_SINGLE: list(tensors)} if shards is None else shards
    places = {
        file: {n: (tensors[n].dtype, tensors[n].shape) for n in sorted(names) if n in tensors}
        for file, names in layout.items()
    }
    if homeless := set(tensors).difference(*places.values()):
        raise ConfigError(f"{min(homeless)} is in no shard of the checkpoint.")
    stream_tensors(folder, {f: p for f, p in places.items() if p}, tensors.__getitem__)


def stream_tensors(
    folder: Path,
    places: Mapping[str, Mapping[str, tuple[torch.dtype, Sequence[int]]]],
    value: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors checkpoint, each tensor made when its turn comes.

    `places` are file -> name -> type and shape, `value` gives a tensor in them, on any device.
    """
    for file_name, types in places.items():
        header = safetensors_header(types, metadata or {"format": "pt"})
        with (folder / file_name).open("wb") as stream:
            stream.write(header)
            for name in sorted(types, key=lambda name: -types[name][0].itemsize):
                flat = value(name).detach().contiguous().cpu().reshape(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
    if set(places) != {_SINGLE}:
        every = {name: place for types in places.values() for name, place in types.items()}
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in every.values())
        write_weight_map(folder, {name: file for file in places for name in places[file]}, total)


def write_weight_map(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write the index of a checkpoint of several files; `total` are the bytes of its tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a safetensors file, up to its tensors, a multiple of 8.

    Wide types come first, so that every tensor starts at a multiple of its own item size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
        dtype, shape = tensors[name]
        if dtype not in _DTYPE_NAMES:
            raise ConfigError(f"{name} has type {dtype}, which cannot be stored.")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor name matches one of the shell-style patterns, case included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
