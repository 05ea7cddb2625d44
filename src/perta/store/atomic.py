"""Outputs that appear complete or not at all, and what may be replaced by them.

While an output is made, a hidden folder of that run lies beside it:

    .OUTPUT.partial-PLACE-XXXXXX/lock   locked as long as the run lives, wherever it runs
    .OUTPUT.partial-PLACE-XXXXXX/new    what is being written
    .OUTPUT.partial-PLACE-XXXXXX/old    what it replaces, while the two change places

`new` is on the disk itself before it is renamed, so a loss of power takes no part of it. What a
dead run left is finished, where it was about to replace something, and else cleared away by the
next run that looks for the output. PLACE says on which host and since which start of it the run
was made: what came from elsewhere cannot be known to be dead, and stays.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path

from perta.errors import ConfigError, OutputExistsError
from perta.options import at_home
from perta.progress import say

_LOCK, _NEW, _OLD = "lock", "new", "old"


@contextmanager
def atomic_folder(
    output: Path, overwrite: bool = False, *, private: bool = False
) -> Iterator[Path]:
    """Fill a folder that appears only when it is complete, and is removed where anything ends it.

    With `overwrite`, what was there before goes only once the new folder is in place; else that is
    an OutputExistsError. One that is `private` is for its owner alone, whatever the user's mask
    allows.
    """
    with _making(output.absolute(), overwrite) as new:
        new.mkdir(0o700 if private else 0o777)
        yield new


@contextmanager
def atomic_file(output: Path, overwrite: bool = False, *, private: bool = False) -> Iterator[Path]:
    """Write a file that appears only when it is complete, as `atomic_folder` does for folders."""
    output = output.absolute()
    if output.is_dir():
        raise OutputExistsError(f"{output} is a folder; give the name of a file.")
    with _making(output, overwrite) as new:
        if private:
            new.touch(0o600)
        yield new


def write_text(file: Path, text: str, *, private: bool = False) -> None:
    """Write a text whole or not at all, in UTF-8, in place of the one before."""
    with atomic_file(file, overwrite=True, private=private) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def beside(output: Path, ending: str) -> Path:
    """Where something that belongs to an output lies: beside it, under its name and an ending."""
    if not output.name:
        raise ConfigError(f"{output} is no name. Name the output itself, as in ./result.")
    return output.with_name(f"{output.name}{ending}")


def check_writable(output: Path) -> None:
    """Stop with a ConfigError before any work where an output could not be written."""
    parent = next(p for p in output.absolute().parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise ConfigError(f"{output} cannot be written: {parent} is no folder. Choose another.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{output} cannot be written: nothing may be written to {parent}. Choose another place."
        )


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place` that is gone when the block ends, or before the next one."""
    with _hidden(place.absolute()) as run:
        (run / _NEW).mkdir()
        yield run / _NEW


def recover(output: Path) -> None:
    """Finish or clear away what dead runs left beside an output."""
    output = output.absolute()
    for run in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*")):
        place = _PARTIAL.search(run.name)
        if place is None:
            continue
        with _claimed(run) as claimed:
            if claimed and _host() != place[1] and _boot() != place[2]:
                say(f"{run} is of a run on another machine. Delete it if that runs no more.")
            elif claimed:
                if _is_there(run / _OLD) and _is_there(run / _NEW) and not _is_there(output):
                    (run / _NEW).rename(output)
                _clear(run)


def check_place(output: Path) -> None:
    """Stop before a place at which no output may be put, whatever the user wants.

    A link, a device or a pipe; a folder that is or holds the working folder, the home folder or the
    root of a file system.
    """
    if not _is_there(output):
        return
    mode, place = output.lstat().st_mode, output.parent.resolve() / output.name
    if stat.S_ISLNK(mode):
        why = f"is a link to {output.readlink()}"
    elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        why = "is no file and no folder but a device, a pipe or a socket"
    else:
        kept = (Path.cwd(), at_home("~"), *_mounts())
        inside = [str(path) for path in kept if path.resolve().is_relative_to(place.resolve())]
        if not inside:
            return
        why = f"contains {inside[0]}"
    raise OutputExistsError(f"{output} {why}; it is not replaced. Choose another output.")


def _mounts() -> list[Path]:
    """Where file systems begin, as far as the system tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    escaped = re.compile(r"\\([0-7]{3})")
    return [Path(escaped.sub(lambda m: chr(int(m[1], 8)), line.split()[4])) for line in lines]


_active: set[Path] = set()  # outputs that this process is making


@contextmanager
def _making(output: Path, overwrite: bool) -> Iterator[Path]:
    """The place to write an output to, which is renamed when the block has ended."""
    output.parent.mkdir(parents=True, exist_ok=True)
    recover(output)
    _check_output(output, overwrite)
    if output in _active:
        raise OutputExistsError(f"{output} is being written by another part of this program.")
    _active.add(output)
    try:
        with _hidden(output) as run:
            yield run / _NEW
            for place in (*(run / _NEW).rglob("*"), run / _NEW):
                if not place.is_symlink():
                    _sync(place)
            _check_output(output, overwrite)
            _put_in_place(run, output)
    finally:
        _active.discard(output)


def _check_output(output: Path, overwrite: bool) -> None:
    check_place(output)
    if _is_there(output) and not overwrite:
        raise OutputExistsError(
            f"{output} is there already. Give another output, or replace it with --overwrite."
        )


def _put_in_place(run: Path, output: Path) -> None:
    if (run / _NEW).is_dir() and _is_there(output):
        output.rename(run / _OLD)
        try:
            (run / _NEW).rename(output)
        except BaseException:
            (run / _OLD).rename(output)
            raise
    else:
        (run / _NEW).replace(output)
    _sync(output.parent)


@contextmanager
def _hidden(output: Path) -> Iterator[Path]:
    """A hidden folder beside an output that is gone when the block ends."""
    output.parent.mkdir(parents=True, exist_ok=True)
    recover(output)
    # Noted before they are made: an interrupt may come in between.
    begun, locks = list[Path](), list[int]()
    try:
        yield _begin(output, begun, locks)
    finally:
        for run in begun:
            _clear(run)
        for lock in locks:
            os.close(lock)


_PARTIAL = re.compile(r"\.partial-([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]{6}$")


def _begin(output: Path, begun: list[Path], locks: list[int]) -> Path:
    """A new hidden folder, and in `locks` the descriptor that shows that its run lives."""
    while True:
        token = f"{_host()}-{_boot()}-{secrets.token_hex(3)}"
        run = output.with_name(f".{output.name}.partial-{token}")
        begun.append(run)
        try:
            run.mkdir(mode=0o700)
        except FileExistsError:
            begun.pop()  # another run's
            continue
        try:
            locks.append(os.open(run / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileNotFoundError:
            continue  # cleared away as one without a lock
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (run / _LOCK).exists():
                return run
        except BlockingIOError:
            pass  # taken for dead before it was locked
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return run
            raise
        os.close(locks.pop())


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer; leftovers on them are never known to be dead."""


@contextmanager
def _claimed(run: Path) -> Iterator[bool]:
    """Whether nobody holds a hidden folder; the lock is held until the block ends."""
    try:
        lock = os.open(run / _LOCK, os.O_RDWR)
    except FileNotFoundError:  # it was never begun, or half cleared away
        yield True
        return
    except OSError:  # of another user
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(lock)


@cache
def _host() -> str:
    """This machine; containers have names of their own, and a few share a machine's id."""
    try:
        number = Path("/etc/machine-id").read_text("utf-8")
    except OSError:
        number = ""
    return blake2b(f"{socket.gethostname()} {number}".encode(), digest_size=4).hexdigest()


@cache
def _boot() -> str:
    """This start of the kernel, under which locks are to be relied upon."""
    try:
        number = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8")
    except OSError:
        number = _host()
    return blake2b(number.encode(), digest_size=4).hexdigest()


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _clear(run: Path) -> None:
    """Remove a hidden folder, its lock last."""
    for part in (_NEW, _OLD, _LOCK):
        if (run / part).is_dir() and not (run / part).is_symlink():
            shutil.rmtree(run / part, ignore_errors=True)
        else:
            with suppress(OSError):
                (run / part).unlink()
    with suppress(OSError):
        run.rmdir()


def _sync(place: Path) -> None:
    """Have a file or a folder on the disk itself."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot do it for folders
            raise
    finally:
        os.close(descriptor)
