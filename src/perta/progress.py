"""Progress of long steps, with the time left, on standard error.

On a terminal a live bar; elsewhere (logs, CI) a line when a step begins, one every half minute and
one when it ends, so that a log says what runs and stays readable. A run of several steps numbers
them and says how much time is left for all of them. `quiet` turns everything off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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

from perta.temporary import during

_Advance = Callable[..., None]
"""`advance(n=1, note="")`: n units are done; the note is shown beside the bar."""

_CONTROLS = {
    **dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\ufffd"),
    **dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), ""),
}
"""C0 and C1 controls, which drive a terminal, and marks that reorder what is read."""


def visible(text: str, *, escaped: bool = False) -> str:
    """A text that a terminal shows and does not obey; `escaped` writes controls as JSON does."""
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
_said = 0.0  # when the last line was printed


def set_quiet(quiet: bool) -> None:
    """Turn progress and notes off or on."""
    global _quiet
    _quiet = quiet


def say(message: str) -> None:
    """Print one line for the user."""
    global _said
    _said = time.perf_counter()
    if not _quiet:
        console.print(message, markup=False, soft_wrap=True)


_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextmanager
def telling_once() -> Iterator[None]:
    """Print a warning once that several stages of one run come to."""
    told = _told.get()
    with during(_told, set() if told is None else told):
        yield


def warn(message: str) -> None:
    """Print a warning; it is shown even when quiet."""
    told = _told.get()
    if told is not None:
        if message in told:
            return
        told.add(message)
    console.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)


_EVERY = 30.0  # seconds between two lines of a step in a log


def span(seconds: float) -> str:
    """A duration that is about right."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Run:
    """How far a run of several steps is; what was reused does not count as done."""

    work: Mapping[str, float]
    done: float = 0.0
    seconds: float = 0.0
    _step: str = ""
    _began: float = 0.0
    _tracks: int = 0
    share: float = 0.0  # of the present track
    reused: bool = False

    def begin(self, step: str) -> None:
        self._step, self._began = step, time.perf_counter()
        self._tracks, self.share, self.reused = 0, 0.0, False

    def end(self) -> None:
        if self._tracks or not self.reused:
            # A tuning that ends early has done a part of its work.
            self.done += self.work[self._step] * (self.share if self._tracks == 1 else 1.0)
            self.seconds += time.perf_counter() - self._began

    def track(self) -> None:
        self._tracks, self.share = self._tracks + 1, 0.0

    def named(self, title: str) -> str:
        steps = list(self.work)
        return f"step {steps.index(self._step) + 1} of {len(steps)}: {title}"

    def left(self) -> str:
        """What the whole run still takes, as far as one can tell."""
        share = self.share if self._tracks == 1 else 0.0
        own, steps = self.work[self._step], list(self.work)
        done = self.done + share * own
        if not done:
            return ""
        ahead = sum(self.work[step] for step in steps[steps.index(self._step) + 1 :])
        passed = self.seconds + (time.perf_counter() - self._began if share else 0.0)
        return f", about {span(passed * (ahead + (1 - share) * own) / done)} left in all"


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


def running(work: Mapping[str, float]) -> AbstractContextManager[None]:
    """Number the steps of a run: step -> about how much there is to do, in any unit, in order."""
    return during(_run, _Run(work))


@contextmanager
def step(name: str, title: str) -> Iterator[None]:
    """One step of a run, if it has it: a line when it begins, and one every half minute."""
    run = _run.get()
    if run is None or name not in run.work:
        yield
        return
    run.begin(name)
    say(f"{run.named(title)}{run.left()}")
    over = threading.Event()
    lines = threading.Thread(target=_keep_saying, args=(run, title, over), daemon=True)
    lines.start()
    try:
        yield
    finally:
        over.set()
        lines.join()
    run.end()


def _keep_saying(run: _Run, title: str, over: threading.Event) -> None:
    """Say that a step goes on, where nothing else has been said for a while."""
    began = time.perf_counter()
    while not over.wait(max(_EVERY - (time.perf_counter() - max(_said, began)), _EVERY / 10)):
        now = time.perf_counter()
        if now - max(_said, began) >= _EVERY and not _bars:
            say(f"{run.named(title)}: {span(now - began)} so far{run.left()}")


def reused() -> None:
    """Say to the run that its present step had nothing to do."""
    if (run := _run.get()) is not None:
        run.reused = True


_bars: list[Progress] = []  # live bars, which say how far things are


@dataclass
class _Log:
    """Progress as lines."""

    description: str
    total: int
    started: float
    run: _Run | None = None
    _done: int = 0
    _note: str = ""
    _said: float = 0.0

    def count(self, n: int, note: str) -> None:
        self._done += n
        self._note = note or self._note
        if self.run and self.total:
            self.run.share = self._done / self.total

    def advance(self, n: int = 1, note: str = "") -> None:
        self.count(n, note)
        passed = time.perf_counter() - self.started
        if passed - self._said >= _EVERY:
            self._said = passed
            left = passed * (self.total - self._done) / self._done if self._done else None
            rest = "" if left is None else f", about {left:.0f} s left"
            say(
                f"{self.description}: {self._done} of {self.total} in {passed:.0f} s{rest}"
                f"{self.whole}{self.shown_note}"
            )

    @property
    def whole(self) -> str:
        """What the whole run still takes."""
        return self.run.left() if self.run else ""

    @property
    def shown_note(self) -> str:
        return f" {self._note}" if self._note else ""


@contextmanager
def track(description: str, total: int) -> Iterator[_Advance]:
    """Show the progress of one step; yields a function that reports finished units."""
    started, run = time.perf_counter(), _run.get()
    if run:
        run.track()
    log = _Log(description, total, started, run)
    if _quiet or not console.is_terminal:
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
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            log.count(n, note)
            bar.update(task, advance=n, note=f"{log.whole}{log.shown_note}".lstrip(", "))

        _bars.append(bar)
        try:
            yield advance
        finally:
            _bars.remove(bar)
