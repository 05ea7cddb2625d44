"""Progress of long steps, with the time left, on standard error.

On a terminal a live bar; elsewhere (logs, CI) a line when a step begins, one every half minute and
one when it ends, so that a log says what runs and stays readable. `quiet` turns both off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

_Advance = Callable[..., None]
"""`advance(n=1, note="")`: n units are done; the note is shown beside the bar."""

_CONTROLS = {
    **dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\ufffd"),
    **dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), ""),
}
"""C0 and C1 controls, which drive a terminal, and marks that reorder what is read."""


def visible(text: str, *, escaped: bool = False) -> str:
    """A text that a terminal shows and does not obey: escape sequences have lost their start.

    Args:
        text: any text.
        escaped: write such characters as JSON does, in place of taking them out.
    """
    table = {code: f"\\u{code:04x}" for code in _CONTROLS} if escaped else _CONTROLS
    return text.translate(table)


class PlainConsole(Console):
    """A console whose texts, which may come from data, names or templates, cannot drive it."""

    def __init__(self, **given: Any) -> None:
        super().__init__(highlight=False, emoji=False, **given)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The parts to print; only the console's own have control sequences."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


console = PlainConsole(stderr=True)
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn progress and notes off or on."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line for the user."""
    if not _quiet:
        console.print(message, markup=False, soft_wrap=True)


_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextmanager
def telling_once() -> Iterator[None]:
    """Print a warning once that several stages of one run come to."""
    before = _told.set(set()) if _told.get() is None else None
    try:
        yield
    finally:
        if before is not None:
            _told.reset(before)


def warn(message: str) -> None:
    """Print a warning; it is shown even when quiet."""
    told = _told.get()
    if told is not None:
        if message in told:
            return
        told.add(message)
    console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)


_EVERY = 30.0
"""Seconds between two lines of a step in a log."""


@dataclass
class _Log:
    """Progress as lines.

    Attributes:
        description: what is being done.
        total: units of work.
        started: when it began, as `time.perf_counter` tells.
    """

    description: str
    total: int
    started: float
    _done: int = 0
    _note: str = ""
    _said: float = 0.0

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._note = note or self._note
        passed = time.perf_counter() - self.started
        if passed - self._said >= _EVERY:
            self._said = passed
            left = passed * (self.total - self._done) / self._done if self._done else None
            rest = "" if left is None else f", about {left:.0f} s left"
            say(
                f"{self.description}: {self._done} of {self.total} in {passed:.0f} s{rest}"
                f"{self.shown_note}"
            )

    @property
    def shown_note(self) -> str:
        return f" {self._note}" if self._note else ""


@contextmanager
def track(description: str, total: int) -> Iterator[_Advance]:
    """Show the progress of one step.

    Args:
        description: what is being done.
        total: units of work.

    Yields:
        A function that reports finished units.
    """
    started = time.perf_counter()
    if _quiet or not console.is_terminal:
        log = _Log(description, total, started)
        say(f"{description}: {total} to do")
        yield log.advance
        seconds = time.perf_counter() - started
        say(f"{description}: done in {seconds:.1f} s{log.shown_note}")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.advance(task, n)
            if note:
                bar.update(task, note=note)

        yield advance
