"""Settings of the program and of libraries that are other ones for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")


@contextmanager
def temporarily(put: Callable[[_T], object], value: _T, before: _T) -> Iterator[None]:
    """Put a value in a place, and when the block ends, however it does, what was there `before`."""
    put(value)
    try:
        yield
    finally:
        put(before)


def during(variable: ContextVar[_T], value: _T) -> AbstractContextManager[None]:
    """Give a context variable another value."""
    return temporarily(variable.set, value, variable.get())
