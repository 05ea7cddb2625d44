"""Fingerprints: what a file or folder holds, as one hash, wherever it lies.

Those of rows are under a key of the user's: whoever guesses a row could check a plain hash of it.

A file is hashed once and remembered by its number, size and time of change. A folder that this
package wrote is compared with its record whenever it is hashed to be used.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from perta.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from perta.store.checkpoint import (
    COMPANIONS,
    IMPORTANCE_SIDECAR,
    MOMENTS_SIDECAR,
    WEIGHTS,
    companions,
    matches,
    matching,
)
from perta.store.record import ADAPTER_CONFIG, MANIFEST, read_manifest

COUNTED = (*WEIGHTS, *COMPANIONS, ADAPTER_CONFIG, IMPORTANCE_SIDECAR, MOMENTS_SIDECAR)
"""Files of a folder that are hashed."""

_FileState = tuple[int, int, int, int, int]
_hashes: dict[_FileState, str] = {}
_HASHED_AT_ONCE, _HASHED_ALONE = 1 << 20, 1 << 22
_SETTLED = 2e9
"""Nanoseconds after which another change shows in a file's time, whatever its file system."""


def fingerprint(path: Path) -> str:
    """`content_of` a file or a folder; CorruptCheckpointError where it is not as it was written."""
    found = content_of(path)
    record = read_manifest(path) if path.is_dir() else None
    if record is None or record.get("content", found) == found:
        return found
    written, names = record.get("files", {}), matching(path, COUNTED)
    changed = [name for name in names if written.get(name) != _hash_file(path / name)]
    changed += [name for name in written if name not in names and matches(name, WEIGHTS)]
    if not changed:
        return found  # a part of the files beside the weights was left behind
    raise CorruptCheckpointError(
        f"{path} is not what `perta {record.get('stage')}` wrote: {', '.join(changed[:3])} changed "
        f"since. Make it again, or, if the change was meant, delete {path / MANIFEST}."
    )


def is_as_written(folder: Path) -> bool:
    """Whether a folder is there with a record, and holds what that says."""
    record = read_manifest(folder) if folder.is_dir() else None
    try:
        return record is not None and record.get("content") == content_of(folder)
    except CheckpointNotFoundError:
        return False  # nothing is left but its record


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder but its record, by name."""
    names = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    return {name: _hash_file(folder / name) for name in names if name != MANIFEST}


def content_of(path: Path) -> str:
    """Hash what a file, a checkpoint or an importance folder holds.

    Of a folder, the weights, the configuration, an adapter's settings, the tokenizer and the chat
    template count; model cards, logs and this package's own manifest do not. Names of files within
    the folder count, its own path does not. Files that have not changed since they were last hashed
    by this process are not read again. BLAKE3, because SHA-256 takes several times as long as
    editing where processors have no instructions for it. CheckpointNotFoundError where nothing
    counts.
    """
    if path.is_file():
        return _hash_file(path)
    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist.")
    companions(path)  # found here, before anything is made of them
    names = matching(path, COUNTED)
    if not names:
        raise CheckpointNotFoundError(f"{path} holds no checkpoint and no importance.")
    files = [path / name for name in names]
    is_large = sum(file.stat().st_size for file in files) > _HASHED_ALONE
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # its threads begin when asked
        digests = list((pool.map if is_large else map)(_hash_file, files))
    lines = (f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    return blake3("".join(lines).encode()).hexdigest()


def own_key() -> bytes:
    """The user's 32 bytes under which sets of rows are hashed, made where there are none.

    They lie in `$XDG_CONFIG_HOME/perta/key` or `~/.config/perta/key`. ConfigError where they cannot
    be kept there.
    """
    try:
        root = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        place = root / "perta" / "key"
        key = place.read_bytes() if place.exists() else b""
        key = key or _new_key(place)  # empty while another process writes it
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"The key of the fingerprints of sets cannot be kept ({error}). Let XDG_CONFIG_HOME "
            "name a folder that you can write to, the same one in every run."
        ) from error
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{place} does not hold the {_KEY_BYTES} bytes of a key: it was changed. Put it back, "
            "or delete it: what was made under it is then no longer recognised."
        )
    return key


_KEY_BYTES = 32


def _new_key(place: Path) -> bytes:
    """Make the key, or read the one that another process makes at the same time."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.touch(0o600)
    with place.open("r+b") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not (key := file.read()):
            key = secrets.token_bytes(_KEY_BYTES)
            file.write(key)
    return key


def states_of(files: Iterable[Path]) -> tuple[_FileState, ...] | None:
    """What differs once one of some files was changed; None where a change might not show yet."""
    found = tuple(map(_state, files))
    is_settled = time.time_ns() - max((state[4] for state in found), default=0) >= _SETTLED
    return found if is_settled else None


def _state(file: Path) -> _FileState:
    found = file.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _hash_file(file: Path) -> str:
    state = _state(file)
    if state not in _hashes:
        digest = blake3()
        with file.open("rb", buffering=0) as stream:
            while part := stream.read(_HASHED_AT_ONCE):
                digest.update(part)
        if state != _state(file) or time.time_ns() - state[4] < _SETTLED:
            return digest.hexdigest()  # a change might not show
        _hashes[state] = digest.hexdigest()
    return _hashes[state]
