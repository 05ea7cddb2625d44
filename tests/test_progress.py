"""Progress in a log: numbered steps, the time left for all of them, and lines in between."""

from __future__ import annotations

import re
import threading

import pytest

from perta import progress
from perta.progress import running, say, span, step, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr("perta.progress.time.perf_counter", lambda: now[0])
    return now


def test_steps_are_numbered_and_tell_what_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with running({"tune": 10.0, "measure": 20.0, "edit": 10.0}):
        with step("tune", "tuning"):
            clock[0] += 5
        with step("measure", "measuring"), track("Rows", 4) as advance:
            clock[0] += 40  # of the 10 s that the step takes at the speed so far
            advance(2)
        with step("edit", "the edit"):
            say("hello")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1 of 3: tuning"
    # 10 took 5 s, so the 30 that are left take 15 s.
    assert lines[1] == "step 2 of 3: measuring, about 15 s left in all"
    # 10 + 20/2 took 45 s, so 10 + 10 more take as long.
    assert lines[3] == "Rows: 2 of 4 in 40 s, about 40 s left, about 45 s left in all"
    # Half of the step was enough, as with a tuning that ends early: 10 + 10 took 45 s.
    assert lines[5] == "step 3 of 3: the edit, about 22 s left in all"


def test_what_is_reused_says_nothing_about_speed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with running({"tune": 100.0, "measure": 1.0, "edit": 1.0}):
        with step("tune", "tuning"):
            progress.reused()
            clock[0] += 1
        with step("measure", "measuring"):
            clock[0] += 60
        with step("edit", "the edit"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["step 2 of 3: measuring", "step 3 of 3: the edit, about 60 s left in all"]


def test_a_long_step_without_progress_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.02)
    told, tell = threading.Event(), progress.say

    def listen(message: str) -> None:
        tell(message)
        if "so far" in message:
            told.set()

    monkeypatch.setattr(progress, "say", listen)
    with running({"solve": 1.0}), step("solve", "solving"):
        assert told.wait(60)
    assert re.search(r"(?m)^step 1 of 1: solving: \d+ s so far$", capsys.readouterr().err)


def test_other_runs_are_not_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    with step("tune", "tuning"):
        pass
    with running({"edit": 1.0}), step("tune", "tuning"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (91, "2 min"), (5401, "1.5 h")]
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text
