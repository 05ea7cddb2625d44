"""Progress of long steps, with the time left, on standard error.

On a terminal a live bar; elsewhere (logs, CI) one line when a step ends, so that a log stays
readable. `quiet` turns both off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]
"""`advance(n=1, note="")`: n units are done; the note is shown beside the bar."""

console = Console(stderr=True, highlight=False)
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn progress and notes off or on."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line for the user."""
    if not _quiet:
        console.print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning; it is shown even when quiet."""
    console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)


@contextmanager
def track(description: str, total: int) -> Iterator[Advance]:
    """Show the progress of one step.

    Args:
        description: what is being done.
        total: units of work.

    Yields:
        A function that reports finished units.
    """
    started = time.perf_counter()
    if _quiet or not console.is_terminal:
        last_note = [""]

        def remember(_n: int = 1, note: str = "") -> None:
            last_note[0] = note or last_note[0]

        yield remember
        seconds = time.perf_counter() - started
        say(f"{description}: done in {seconds:.1f} s{' ' + last_note[0] if last_note[0] else ''}")
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
