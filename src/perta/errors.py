"""Every error a user can cause, in one tree below `PertaError`.

Messages say what is wrong, where, and how to fix it. The command line prints the message
alone and exits with status 1; a traceback means a defect in this package.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class PertaError(Exception):
    """Base of all errors with a message written for the user."""


class ConfigError(PertaError):
    """An option is unknown, out of range, or contradicts another."""


class DataError(PertaError):
    """A data file cannot be read, or holds rows that cannot be used."""


class EmptyDatasetError(DataError):
    """A data set has no examples."""


class CheckpointError(PertaError):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint at the given place."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is damaged, not finite, or stored in a format that is not loaded."""


class CheckpointMismatchError(CheckpointError):
    """Two checkpoints that must agree in tensors and shapes do not."""


class OutputExistsError(PertaError):
    """The output is there already and does not match what would be written."""


class DivergenceError(PertaError):
    """A training run or a solve produced NaN, Inf or an exploding loss."""


class NotLearnedError(PertaError):
    """A model was to learn a set, and did not."""


class VerdictError(PertaError):
    """The output is there, and the verdict on it is worse than was asked for."""


class LedgerError(PertaError):
    """A ledger of requests is not whole, or is in use."""


class EngineMismatchError(PertaError):
    """The batched importance engine and the example-by-example loop disagree."""


def nearest(name: str, names: Iterable[str], *, listed: bool = True, where: str = "") -> str:
    """Sentences to end a message with: which name was meant and, if `listed`, all there are."""
    there = list(names)
    near = difflib.get_close_matches(name, there, n=1)
    hint = f" Did you mean `{where}{near[0]}`?" if near else ""
    return f"{hint} There are: {', '.join(there)}." if listed else hint


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "alloc_failed")
_NO_SPACE = ("no space left on device", "disk quota exceeded", "failed writing file")


def shortage(error: BaseException) -> str | None:
    """What the computer ran out of, memory or disk, by an error and its causes; None if neither."""
    cause: BaseException | None = error
    while cause is not None:
        if _is_of(cause, (errno.ENOMEM,), _NO_MEMORY) or isinstance(cause, MemoryError):
            return (
                "Out of memory. Lower --batch-size, --pass-batch-size or "
                "--unlearn-batch-size, or take a smaller model."
            )
        if _is_of(cause, (errno.ENOSPC, errno.EDQUOT), _NO_SPACE):
            file = getattr(cause, "filename", None)
            return (
                f"The disk is full{f': {file}' if file else ''}. Make room, or write to another "
                "disk, and run again; finished stages are reused."
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _is_of(error: BaseException, numbers: tuple[int, ...], words: tuple[str, ...]) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    if isinstance(error, (PertaError, ValueError, LookupError)):
        return False  # they may quote what a user wrote
    return any(part in str(error).lower() for part in words)


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
