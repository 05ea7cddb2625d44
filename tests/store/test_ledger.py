"""A ledger of requests: what is changed, moved, cut off or added is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from helpers import pem_keys
from perta.errors import ConfigError, LedgerError
from perta.store.ledger import HEAD, LEDGER, append, locked, public_keys, read_ledger


def _ledger(folder: Path, entries: int = 3, key: Path | None = None, of: str = "r") -> Path:
    folder.mkdir()
    for number in range(entries):
        append(folder, "add", {"name": f"{of}{number}", "note": "ä\ud800"}, key=key)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    return pem_keys(tmp_path, "key", "ed25519")[0]


def test_each_entry_holds_the_hash_of_the_one_before(tmp_path: Path) -> None:
    folder = _ledger(tmp_path / "l")
    previous = "0" * 64
    for number, text in enumerate((folder / LEDGER).read_text().splitlines(), start=1):
        line = json.loads(text)
        assert (line["number"], line["previous"]) == (number, previous)
        own = {k: v for k, v in line.items() if k != "hash"}
        text = json.dumps(own, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        assert line["hash"] == previous
    assert [entry.facts["name"] for entry in read_ledger(folder)] == ["r0", "r1", "r2"]


def test_no_byte_can_be_changed(tmp_path: Path, key: Path) -> None:
    folder = _ledger(tmp_path / "l", 2, key)
    for name in (LEDGER, HEAD):
        whole = (folder / name).read_bytes()
        for place in range(len(whole)):
            # One of these each, in turn: every byte is changed, and one more put before it.
            others = [b for b in (b" ", b"0", b"\n") if whole[place : place + 1] != b]
            other = others[place % len(others)]
            for changed in (other + whole[place + 1 :], b" " + whole[place:]):
                (folder / name).write_bytes(whole[:place] + changed)
                with pytest.raises(LedgerError):
                    read_ledger(folder)
        (folder / name).write_bytes(whole)
    assert len(read_ledger(folder)) == 2


def test_lines_cannot_be_cut_off_left_out_moved_or_added(tmp_path: Path) -> None:
    folder, other = _ledger(tmp_path / "l"), _ledger(tmp_path / "o", of="s")
    first, second, third = (folder / LEDGER).read_text().splitlines(keepends=True)
    stranger = (other / LEDGER).read_text().splitlines(keepends=True)[2]
    for text in (
        first + second,
        first,
        "",
        first + third,
        second + first + third,
        first + second + third[:-1],
        first + second + third + third,
        first + second + stranger,
    ):
        (folder / LEDGER).write_text(text)
        with pytest.raises(LedgerError):
            read_ledger(folder)
    # Another ledger as a whole, or one that went another way from the same start.
    shutil.copy(other / LEDGER, folder / LEDGER)
    with pytest.raises(LedgerError, match="another ledger"):
        read_ledger(folder)
    (folder / LEDGER).unlink()
    with pytest.raises(LedgerError, match="perta requests init"):
        read_ledger(folder)


def test_a_crash_between_ledger_and_head_is_no_fault(tmp_path: Path) -> None:
    folder = _ledger(tmp_path / "l", 1)
    head = (folder / HEAD).read_bytes()
    append(folder, "add", {"name": "late"})
    (folder / HEAD).write_bytes(head)
    assert len(read_ledger(folder)) == 2
    append(folder, "add", {"name": "later"})
    assert [entry.number for entry in read_ledger(folder)] == [1, 2, 3]


def test_an_entry_added_while_a_ledger_is_read_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path, "init", {})
    read, others = Path.read_text, [lambda: append(tmp_path, "add", {})]

    def read_and_write(file: Path, *how: str) -> str:
        text = read(file, *how)
        if others:
            others.pop()()
        return text

    monkeypatch.setattr(Path, "read_text", read_and_write)
    assert len(read_ledger(tmp_path)) == 2


def test_signatures_are_checked_with_the_key_they_name(tmp_path: Path, key: Path) -> None:
    folder = _ledger(tmp_path / "l", 1)
    append(folder, "apply", {}, key=key)
    entries = read_ledger(folder)
    assert [entry.signature is not None for entry in entries] == [False, True]
    (public,) = public_keys(entries)
    assert len(bytes.fromhex(public)) == 32
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(ConfigError, match="openssl genpkey"):
        append(folder, "apply", {}, key=tmp_path / "no.pem")
    assert len(read_ledger(folder)) == 2


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    folder = _ledger(tmp_path / "l", 1)
    with locked(folder), pytest.raises(LedgerError, match="in use"), locked(folder):
        pass
    with locked(folder):
        pass
