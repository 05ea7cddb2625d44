"""Outputs that appear complete or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perta.errors import ConfigError, OutputExistsError


@contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder that appears only when it is complete.

    The block writes to a hidden folder beside the final name. It is renamed when the block
    ends, and removed when anything, including an interrupt, ends the block early. With
    `overwrite`, what was there before goes only once the new folder is in place.

    Args:
        output: the final name; missing parent folders are made.
        overwrite: replace an output that is there already.

    Yields:
        The folder to write to.

    Raises:
        OutputExistsError: the output is there and `overwrite` is off, or replacing it would
            remove the working or home folder.
    """
    output = output.absolute()
    partial = _reserve(output, overwrite)
    try:
        partial.mkdir()
        yield partial
        _check_output(output, overwrite)
        _put_in_place(partial, output)
    finally:
        _release(partial)


@contextmanager
def atomic_file(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a file that appears only when it is complete, as `atomic_folder` does for folders.

    Args:
        output: the final name; missing parent folders are made.
        overwrite: replace an output that is there already.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        OutputExistsError: the output is there and `overwrite` is off, or is a folder.
    """
    output = output.absolute()
    if output.is_dir():
        raise OutputExistsError(f"{output} is a folder; give the name of a file.")
    partial = _reserve(output, overwrite)
    try:
        yield partial
        _check_output(output, overwrite)
        partial.replace(output)
    finally:
        _release(partial)


def write_text(file: Path, text: str) -> None:
    """Write a text whole or not at all, in UTF-8, in place of the one before."""
    with atomic_file(file, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def check_writable(output: Path) -> None:
    """Stop before any work where an output could not be written.

    Args:
        output: place of a file or folder; its parents may not be there yet.

    Raises:
        ConfigError: a parent is no folder, or nothing may be written there.
    """
    parent = next(p for p in output.absolute().parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise ConfigError(f"{output} cannot be written: {parent} is no folder. Choose another.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{output} cannot be written: nothing may be written to {parent}. Choose another place."
        )


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place` that is gone when the block ends.

    What a killed run left of it is cleared away by the next.

    Args:
        place: path that names it; nothing appears there.

    Yields:
        The folder.
    """
    partial = _reserve(place.absolute(), overwrite=True)
    try:
        partial.mkdir()
        yield partial
    finally:
        _release(partial)


_active: set[Path] = set()
"""Unfinished outputs of this process."""


def _check_output(output: Path, overwrite: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if not overwrite:
        raise OutputExistsError(
            f"{output} is there already. Give another output, or replace it with --overwrite."
        )
    for kept in (Path.cwd(), Path.home()):
        if kept.is_relative_to(output):
            raise OutputExistsError(f"{output} contains {kept}; it is not replaced.")


def _reserve(output: Path, overwrite: bool) -> Path:
    """Name for the unfinished output; what dead runs left beside it is cleared away first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    if partial in _active:
        raise OutputExistsError(f"{output} is being written by another part of this program.")
    for path in output.parent.glob(f".{glob.escape(output.name)}.*-*"):
        kind, _, pid = path.name.removeprefix(f".{output.name}.").partition("-")
        if kind not in {"partial", "replaced"} or _is_alive(pid):
            continue
        if kind == "replaced" and not output.exists():
            path.rename(output)
        else:
            _remove(path)
    _check_output(output, overwrite)
    _active.add(partial)
    return partial


def _release(partial: Path) -> None:
    _remove(partial)
    _active.discard(partial)


def _is_alive(pid: str) -> bool:
    # A file of our own process id that `_active` does not know is of an earlier process with
    # the same id, which is common in containers.
    if not pid.isdigit():
        return True
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _put_in_place(partial: Path, output: Path) -> None:
    if not (output.exists() or output.is_symlink()):
        partial.rename(output)
        return
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        replaced.rename(output)
        raise
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
