"""Runs are killed at file events and at random times; the same command then finishes them.

Every stage runs on tiny models in processes forked from this one, which has imported everything.
A killed run is followed by an undisturbed one of the same command. What lies there then must be
what a run that was never killed leaves, its inputs as they were, and nothing hidden beside it.

`make faults` kills as often as PERTA_KILLS says, the tests a few times at each stage.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World
from perta.evidence.settings import PeopleBenchConfig
from perta.options import ScoringConfig, TrainSettings, TuneConfig, WeightingConfig
from perta.progress import set_quiet
from perta.recipes.requests.apply import apply_requests
from perta.recipes.requests.clean import clean_requests
from perta.recipes.requests.look import verify_requests
from perta.recipes.requests.settings import (
    LedgerConfig,
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
)
from perta.recipes.requests.state import read_state
from perta.recipes.requests.take import add_request, start_ledger
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.report.settings import ReportConfig
from perta.report.write import write_report
from perta.stages.bench import bench_people, write_people
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import (
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MomentsConfig,
    PeopleConfig,
    TrainConfig,
)
from perta.stages.train import train_checkpoint
from perta.store.ledger import HEAD, LEDGER

KILLS = int(os.environ.get("PERTA_KILLS", "0"))
SEED = int(os.environ.get("PERTA_KILLS_SEED", "0"))

_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
    "shutil.rmtree",
    "shutil.copyfile",
}
_UNSTEADY = ("seconds", "created", "passes", "sources", "output", "work_dir", "total")
"""Keys of records that hold durations and places."""

Command = Callable[[World, Path], object]


def _tune(**more: Any) -> TuneConfig:
    return TuneConfig(epochs=3, learning_rate=5e-3, stop_loss=0.0, **more)


def _finetune(world: World, place: Path) -> object:
    return finetune_checkpoint(
        FinetuneConfig(
            base=str(world.base),
            data=str(world.forget),
            output=place / "out",
            tune=_tune(save_every=1),
            overwrite=True,
        )
    )


def _train(world: World, place: Path) -> object:
    return train_checkpoint(
        TrainConfig(
            method="npo-retain",
            full=str(world.full),
            base=str(world.base),
            forget=str(world.forget),
            retain=str(world.retain),
            output=place / "out",
            training=TrainSettings(epochs=2, learning_rate=1e-3),
            save_every=1,
            overwrite=True,
        )
    )


def _importance(world: World, place: Path) -> object:
    return compute_importance(
        ImportanceConfig(
            checkpoint=str(world.base), data=str(world.forget), output=place / "out", overwrite=True
        )
    )


def _moments(world: World, place: Path) -> object:
    return compute_moments(
        MomentsConfig(
            checkpoint=str(world.base), data=str(world.forget), output=place / "out", overwrite=True
        )
    )


def _evaluate(world: World, place: Path) -> object:
    return evaluate_checkpoint(
        EvaluateConfig(
            checkpoint=str(world.full),
            forget=str(world.forget),
            output=place / "out.json",
            scoring=ScoringConfig(max_new_tokens=4),
            overwrite=True,
        )
    )


def _people(_world: World, place: Path) -> object:
    return write_people(PeopleConfig(output=place / "out", people=3, questions=2, overwrite=True))


def _bench(world: World, place: Path) -> object:
    return bench_people(
        PeopleBenchConfig(
            checkpoint=str(world.full),
            data=str(world.forget.parent),
            output=place / "out.json",
            limit=2,
            overwrite=True,
        )
    )


def _request(world: World, place: Path, method: str) -> UnlearnConfig:
    return UnlearnConfig(
        base=str(world.base),
        full=str(world.full),
        forget=str(world.forget),
        retain=str(world.retain),
        output=place / "out",
        weighting=WeightingConfig(method=method, scaling_coef=1.0),
        tune=_tune(),
        scoring=ScoringConfig(generate=False),
        overwrite=True,
    )


def _unlearn(world: World, place: Path) -> object:
    return unlearn(_request(world, place, "perta-grad"))


def _structured(world: World, place: Path) -> object:
    return unlearn(_request(world, place, "perta-input"))


def _trained(world: World, place: Path) -> object:
    config = _request(world, place, "npo-retain")
    return unlearn(
        replace(
            config,
            weighting=WeightingConfig(method="npo-retain"),
            tune=TuneConfig(),
            training=TrainSettings(epochs=2, learning_rate=1e-3),
        )
    )


def _report(world: World, place: Path) -> object:
    if not (place / "results.json").exists():
        _evaluate(world, place)
        (place / "out.json").rename(place / "results.json")
    return write_report(
        ReportConfig(results=(str(place / "results.json"),), output=place / "r.html")
    )


def _requests(world: World, place: Path) -> object:
    """A ledger, each step of which is taken if it is not done."""
    folder = place / "ledger"
    if not folder.exists():
        given: dict[str, Any] = {n: str(getattr(world, n)) for n in ("base", "full", "retain")}
        with pytest.MonkeyPatch.context() as patch:
            # Hashes of rows depend on the ledger's key, which is drawn.
            drawn = SimpleNamespace(
                token_hex=lambda size: "5e" * size, token_bytes=lambda size: b"\x5e" * size
            )
            patch.setattr("perta.recipes.requests.take.secrets", drawn)
            start_ledger(RequestsInitConfig(folder=folder, **given))
    if not read_state(folder).requests:
        add_request(RequestsAddConfig(folder=folder, forget=str(world.forget), name="r1"))
    if read_state(folder).requests[0].applied is None:
        method = WeightingConfig(method="perta-project", scaling_coef=1.0)
        tune = _tune(save_every=None)
        apply_requests(RequestsApplyConfig(folder=folder, weighting=method, tune=tune))
    if read_state(folder).entries[-1].kind != "clean":
        clean_requests(LedgerConfig(folder=folder))
    return verify_requests(folder)


COMMANDS: Mapping[str, Command] = {
    "finetune": _finetune,
    "train": _train,
    "importance": _importance,
    "moments": _moments,
    "evaluate": _evaluate,
    "people": _people,
    "bench": _bench,
    "unlearn": _unlearn,
    "structured": _structured,
    "trained": _trained,
    "report": _report,
    "requests": _requests,
}


@dataclass
class Kill:
    """When a run dies: at a file event, counted from 1, or after so many seconds."""

    event: int | None = None
    seconds: float | None = None


def _in_child(work: Callable[[], object], kill: Kill | None, place: Path) -> tuple[int, int]:
    """Run in a forked process; its exit status, and how many file events it came to."""
    counter = place.parent / "events"
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            sys.stdout = sys.stderr = io.StringIO()
            set_quiet(True)
            events = 0

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal events
                if event not in _EVENTS or str(place) not in str(arguments[:2]):
                    return
                events += 1
                if kill is not None and events == kill.event:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            try:
                work()
                status = 0
            except BaseException as error:
                counter.with_name("error").write_text(f"{type(error).__name__}: {error}")
            counter.write_text(str(events))
        os._exit(status)
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), int(counter.read_text()) if counter.exists() else 0


def _steady(value: Any) -> Any:
    """A record without durations, times and places."""
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in _UNSTEADY}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def _content(file: Path) -> Any:
    if file.name == LEDGER:
        return [json.loads(line)["kind"] for line in file.read_text("utf-8").splitlines()]
    if file.parent.name == "ledger" and file.name in (HEAD, "key"):
        return "a key drawn at random is in it"
    if file.suffix in (".html", ".csv"):
        return "durations are in it"
    if file.suffix == ".json":
        return _steady(json.loads(file.read_text("utf-8")))
    return file.read_bytes()


def _found(place: Path, *, rounded: bool = False) -> dict[str, Any]:
    """Name -> content of every file, hidden ones included."""
    files = [path for path in place.rglob("*") if path.is_file()]
    found = {str(file.relative_to(place)): _content(file) for file in files}
    if rounded:  # rows that were left are batched anew: see docs/evidence.md
        found = {n: None if n == "out.json" else content for n, content in found.items()}
    return found


def _inputs(world: World) -> dict[str, bytes]:
    folders = (world.base, world.full, world.forget.parent)
    return {str(f): f.read_bytes() for d in folders for f in sorted(d.rglob("*")) if f.is_file()}


class Killer:
    """One command, what it leaves undisturbed, and what came of killing it."""

    def __init__(self, name: str, world: World, root: Path) -> None:
        self.name, self.world, self.place = name, world, root / "place"
        self.command = COMMANDS[name]
        self.outcomes: Counter[str] = Counter()
        self.bad: list[str] = []
        self.place.mkdir()
        self.before = _inputs(world)
        started = time.perf_counter()
        status, self.events = self._run(None)
        self.seconds = time.perf_counter() - started
        assert status == 0, (root / "error").read_text()
        self.whole = _found(self.place, rounded=name == "bench")

    def _run(self, kill: Kill | None) -> tuple[int, int]:
        return _in_child(lambda: self.command(self.world, self.place), kill, self.place)

    def kill(self, kills: list[Kill], *, over: bool) -> None:
        """Kill a run, perhaps over an older output and several times, and run it to its end."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        if over:
            self._make_older()
        statuses = [self._run(kill)[0] for kill in kills]
        status, _ = self._run(None)
        outcome = self._outcome(status)
        self.outcomes[outcome if -9 in statuses else f"not reached, {outcome}"] += 1
        if outcome != "same":
            self.bad.append(f"{self.name} {kills} over={over}: {outcome}")

    def _make_older(self) -> None:
        """An output of this package at the same place, made otherwise."""
        for name in {Path(name).parts[0] for name in self.whole}:
            if name == "out":
                (self.place / name).mkdir()
                (self.place / name / "perta.json").write_text('{"stage": "other"}')
                (self.place / name / "left over").write_text("old")
            elif name == "out.json":
                (self.place / name).write_text('{"perta": {"stage": "other"}}')

    def _outcome(self, status: int) -> str:
        if status != 0:
            return f"not finished: {self.place.with_name('error').read_text()[:200]}"
        if _inputs(self.world) != self.before:
            return "inputs changed"
        found = _found(self.place, rounded=self.name == "bench")
        hidden = [path.name for path in self.place.rglob(".*") if path.name != ".lock"]
        if hidden:
            return f"left {hidden[0].partition('.partial')[0]}"
        if found.keys() != self.whole.keys():
            return f"other files: {sorted(found.keys() ^ self.whole.keys())[:3]}"
        other = [name for name, content in found.items() if content != self.whole[name]]
        return f"other content: {other[:3]}" if other else "same"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_is_finished_by_the_same_command(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killer, chance = Killer(name, world, tmp_path), random.Random(f"{SEED} {name}")
    count = KILLS // len(COMMANDS) or 2
    for number in range(count):
        by_time = number % 4 == 3
        kill = (
            Kill(seconds=chance.uniform(0, killer.seconds))
            if by_time
            else Kill(event=chance.randint(1, killer.events))
        )
        more = [Kill(event=chance.randint(1, killer.events))] if number % 5 == 4 else []
        killer.kill([kill, *more], over=number % 2 == 1)
    if KILLS:
        with capsys.disabled():
            sys.stdout.write(f"\n{name}: {dict(killer.outcomes)} at {killer.events} events\n")
    assert not killer.bad, "\n".join(killer.bad)
