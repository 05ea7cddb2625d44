"""What an output replaces, and what is left when a run dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perta.data.examples import load_examples
from perta.errors import CheckpointNotFoundError, ConfigError, DataError, OutputExistsError
from perta.models.resolve import cache_folder, resolve_checkpoint
from perta.recipes.settings import UnlearnConfig
from perta.report.write import companion_folder
from perta.store import atomic
from perta.store.atomic import (
    atomic_file,
    atomic_folder,
    beside,
    recover,
    scratch_folder,
    write_text,
)
from perta.store.record import check_output, check_separate, write_manifest

DIES = """
import os, signal, sys
from pathlib import Path
from perta.store import atomic

output, place = Path(sys.argv[1]), sys.argv[2]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if place != "writing":
    real = getattr(Path, place)
    def patched(self, target):
        if self.name == sys.argv[3]:
            die()
        return real(self, target)
    setattr(Path, place, patched)
with atomic.atomic_folder(output, overwrite=True) as new:
    (new / "file").write_text("new")
    if place == "writing":
        die()
"""


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed(code: str, *arguments: object) -> None:
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False)
    assert run.returncode == -signal.SIGKILL


def old(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def test_a_run_killed_before_it_replaces_leaves_the_old_output(tmp_path: Path) -> None:
    output = old(tmp_path / "out")
    killed(DIES, output, "writing", "")
    assert (output / "file").read_text() == "old"
    assert len(hidden(tmp_path)) == 1
    recover(output)
    assert (output / "file").read_text() == "old"
    assert hidden(tmp_path) == []


def test_a_run_killed_between_the_two_renames_is_finished(tmp_path: Path) -> None:
    output = old(tmp_path / "out")
    killed(DIES, output, "rename", "new")
    assert not output.exists()
    with pytest.raises(OutputExistsError, match="there already"), atomic_folder(output):
        pass
    assert (output / "file").read_text() == "new"
    assert hidden(tmp_path) == []


def test_what_was_replaced_never_comes_back(tmp_path: Path) -> None:
    output = old(tmp_path / "out")
    # Killed while what was there before is being removed.
    code = DIES.replace(
        "import atomic", "import atomic\natomic.shutil.rmtree = lambda *a, **k: die()"
    )
    killed(code, output, "rename", "")
    assert (output / "file").read_text() == "new"
    (run,) = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (run / "old" / "file").exists()
    shutil.rmtree(output)
    recover(output)
    assert list(tmp_path.iterdir()) == []


def test_live_runs_and_those_of_other_machines_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with scratch_folder(output) as live:
        # A run of another process, also of another container, holds the lock.
        code = (
            "import sys\nfrom pathlib import Path\nfrom perta.store import atomic\n"
            "atomic._host = atomic._boot = lambda: sys.argv[2]\natomic.recover(Path(sys.argv[1]))"
        )
        for place in ("0" * 8, atomic._boot()):
            subprocess.run([sys.executable, "-c", code, output, place], check=True)
        assert live.is_dir()
    killed(DIES, output, "writing", "")
    (left,) = hidden(tmp_path)
    monkeypatch.setattr(atomic, "_host", lambda: "0" * 8)
    recover(output)  # another host, but this start of this kernel: a container that is gone
    assert hidden(tmp_path) == []
    monkeypatch.undo()
    killed(DIES, output, "writing", "")
    (left,) = hidden(tmp_path)
    for name in ("_host", "_boot"):
        monkeypatch.setattr(atomic, name, lambda: "0" * 8)
    with atomic_folder(output):
        pass
    assert hidden(tmp_path) == [left]
    assert "another machine" in capsys.readouterr().err
    monkeypatch.undo()
    recover(output)
    assert hidden(tmp_path) == []


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    names = {
        ".out.partial-x",
        ".out.partial-1-2-3",
        f".other.partial-{'0' * 8}-{'0' * 8}-{'0' * 6}",
    }
    for name in names:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert set(hidden(tmp_path)) == names


def test_everything_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    with atomic_folder(tmp_path / "out") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("x")
    assert sorted(events[:3]) == ["file", "inner", "new"]
    assert events[3:] == ["rename", tmp_path.name]
    events.clear()
    with atomic_file(tmp_path / "file.json") as new:
        new.write_text("x")
    assert events == ["new", "rename", tmp_path.name]


@pytest.mark.parametrize("kind", ["pipe", "link to a file", "link to a folder", "dangling link"])
def test_what_is_no_file_and_no_folder_is_never_replaced(tmp_path: Path, kind: str) -> None:
    place, target = tmp_path / "place", tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(target)
        if kind == "link to a file":
            target.touch()
        elif kind == "link to a folder":
            target.mkdir()

    def state() -> tuple[int, ...]:
        found = place.lstat()
        return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns

    before = state()
    for write in (atomic_file, atomic_folder):
        with pytest.raises(OutputExistsError), write(place, overwrite=True) as new:
            new.touch()
        with pytest.raises(OutputExistsError, match="not replaced"):
            check_output(place, overwrite=True)
    assert state() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"place", "target"}


def test_places_that_hold_more_than_an_output_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("home", "working", "mount")
    for name in names:
        (tmp_path / name / "inner").mkdir(parents=True)
        write_manifest(tmp_path / name, {"stage": "edit"})
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "inner"))
    monkeypatch.chdir(tmp_path / "working" / "inner")
    monkeypatch.setattr(atomic, "_mounts", lambda: [tmp_path / "mount" / "inner"])
    for place in (*(tmp_path / name for name in names), Path("/"), Path("..")):
        with pytest.raises(OutputExistsError, match="contains"):
            check_output(place, overwrite=True)
    for name in names:
        with (
            pytest.raises(OutputExistsError, match="contains"),
            atomic_folder(tmp_path / name, True),
        ):
            pass
        assert (tmp_path / name / "inner").is_dir()


def test_only_what_perta_wrote_is_replaced(tmp_path: Path) -> None:
    mine, file = tmp_path / "mine", tmp_path / "mine.json"
    mine.mkdir()
    file.touch()
    check_output(mine, overwrite=True)
    check_output(file, overwrite=True)
    (mine / "notes").touch()
    for text in ("notes", "{}", "[]", '{"perta": 1}', '{"key": '):
        file.write_text(text)
        with pytest.raises(OutputExistsError, match="not made by perta"):
            check_output(file, overwrite=True)
    with pytest.raises(OutputExistsError, match="not made by perta"):
        check_output(mine, overwrite=True)
    write_manifest(mine, {"stage": "edit"})
    file.write_text('{"perta": {"stage": "evaluate"}}')
    check_output(mine, overwrite=True)
    check_output(file, overwrite=True)


def test_an_output_is_no_input_and_holds_none(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    (folder / "rows.jsonl").touch()
    for output in (folder, tmp_path, folder / "inside", link / "inside"):
        with pytest.raises(ConfigError, match="overlaps"):
            check_separate(output, [folder])
    with pytest.raises(ConfigError, match="overlaps"):
        check_separate(folder / "rows.jsonl", [link / "rows.jsonl"], within=True)
    check_separate(folder / "results.json", [folder], within=True)


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name_has_nothing_beside_it(output: str) -> None:
    config = UnlearnConfig(base="b", full="f", forget="d", output=Path(output))
    with pytest.raises(ConfigError, match="is no name"):
        _ = config.work_folder
    with pytest.raises(ConfigError, match="is no name"):
        companion_folder(config.output)
    assert beside(Path("a/b.c"), ".direction") == Path("a/b.c.direction")


def test_a_signal_while_an_output_is_begun_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = atomic._begin

    def interrupted(*given: Any) -> Path:
        run = begin(*given)
        os.kill(os.getpid(), signal.SIGINT)
        return run

    monkeypatch.setattr(atomic, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_folder_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("PERTA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in containers with any number
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at ~nobody/x"):
        resolve_checkpoint("~nobody/x")
    with pytest.raises(DataError, match="no data file ~nobody"):
        load_examples("~nobody/x.jsonl")
    with pytest.raises(ConfigError, match="PERTA_CACHE"):
        cache_folder()
    write_text(tmp_path / "a", "1")
    write_text(tmp_path / "a", "2")
