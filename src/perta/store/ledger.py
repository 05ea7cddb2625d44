"""An append-only ledger of erasure requests: JSON lines, chained by hashes, signed where wanted.

Each line is one entry. Its `hash` is the SHA-256 of the entry without `hash` and `signature`, as
JSON with sorted keys, no spaces and ASCII alone, in which form the line stands as well; `previous`
is the hash of the entry before, so that no entry can be changed, moved or taken out without the
next one telling. `signature` is Ed25519 over the hash's 32 bytes (RFC 8032), in hexadecimal.

A chain says nothing of entries cut off at its end. So `head.json` beside it holds the number of
entries and the last hash, and whoever keeps that hash elsewhere can check it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from perta.errors import LedgerError
from perta.store.atomic import write_text
from perta.store.signing import check_hash, entry_key, sign_hash

LEDGER = "ledger.jsonl"
HEAD = "head.json"
_VERSION = 1  # of the entries' form

_START = "0" * 64  # what the first entry has for `previous`


@dataclass(frozen=True)
class Entry:
    """One line of a ledger."""

    number: int  # from 1
    kind: str  # `init`, `add`, `apply`, `recheck` or `clean`
    time: str  # of writing, UTC
    facts: Mapping[str, Any] = field(repr=False)
    hash: str  # SHA-256, in hexadecimal, of all that
    signature: Mapping[str, str] | None = None  # of the hash, with its public key


@contextmanager
def locked(folder: Path, key: Path | None = None) -> Iterator[None]:
    """Keep other processes from writing to a ledger, to be signed with `key`, a good one."""
    if key is not None:
        entry_key(key)
    with ExitStack() as stack:
        try:
            # What a link points to is not this package's to open.
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(f"{folder / LEDGER} is in use by another run. Wait for it.") from None
        except OSError as error:
            raise LedgerError(
                f"{folder} cannot be written ({error.strerror}), so nothing can be added to its "
                "ledger. Make it writable, or copy it to a place that is."
            ) from error
        yield


def append(folder: Path, kind: str, facts: Mapping[str, Any], *, key: Path | None = None) -> Entry:
    """Write one more entry of plain values. Call it within `locked`.

    `key` is a file with an Ed25519 private key, PEM without a password. LedgerError where the
    ledger is not whole, ConfigError where the key cannot be used.
    """
    entries = read_ledger(folder) if (folder / LEDGER).exists() else []
    signer = None if key is None else entry_key(key)
    body: dict[str, Any] = {
        "version": _VERSION,
        "number": len(entries) + 1,
        "kind": kind,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "facts": dict(facts),
        "previous": entries[-1].hash if entries else _START,
    }
    line = {**body, "hash": _hash(body)}
    if signer is not None:
        line["signature"] = sign_hash(signer, line["hash"])
    old = (folder / LEDGER).read_text("utf-8") if entries else ""
    # Both whole or as they were; where a crash comes between, the head is one behind.
    write_text(folder / LEDGER, old + _canonical(line) + "\n")
    write_text(folder / HEAD, _head(line))
    return _entry(line)


def read_ledger(folder: Path) -> list[Entry]:
    """Every entry in order; chain, signatures and head are checked, or it is a LedgerError."""
    file = folder / LEDGER
    head = _head_text(folder)  # before the entries: another process may add one in between
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise LedgerError(
            f"{file} cannot be read ({error.strerror}). `perta requests init` makes a ledger."
        ) from error
    except UnicodeDecodeError as error:
        raise LedgerError(f"{file} is not UTF-8 (byte {error.start}): it was changed.") from error
    lines, previous = list[dict[str, Any]](), _START
    *whole, rest = text.split("\n")
    if rest or not whole:
        raise LedgerError(f"{file} ends within a line: the end was cut off.")
    for number, text_line in enumerate(whole, start=1):
        lines.append(_checked(text_line, number, previous, file))
        previous = lines[-1]["hash"]
    if head is None:
        raise LedgerError(
            f"{folder / HEAD} cannot be read, so nobody can tell whether the ledger's end is "
            "there. Put it back."
        )
    # A crash between the two leaves the head one behind.
    if head not in [_head(line) for line in lines[-2:]]:
        raise LedgerError(
            f"{file} has {len(lines)} entries and its last is not the one that {HEAD} names: its "
            "end was cut off or added to, or it is another ledger."
        )
    return [_entry(line) for line in lines]


def public_keys(entries: Sequence[Entry]) -> list[str]:
    """The keys that entries are signed with, in order of first use."""
    found = (entry.signature["public_key"] for entry in entries if entry.signature)
    return list(dict.fromkeys(found))


def _checked(text: str, number: int, previous: str, file: Path) -> dict[str, Any]:
    where = f"{file}, line {number}"
    try:
        line = json.loads(text)
        body = {k: v for k, v in line.items() if k not in ("hash", "signature")}
        facts = (line["version"], line["number"], line["previous"], line["hash"])
        kind, when, what = line["kind"], line["time"], line["facts"]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise LedgerError(f"{where} is no entry: it was changed.") from None
    if facts[0] != _VERSION:
        raise LedgerError(f"{where} is in form {facts[0]}; this version reads form {_VERSION}.")
    if facts[1:] != (number, previous, _hash(body)) or text != _canonical(line):
        raise LedgerError(f"{where} does not fit its hash or the line before: it was changed.")
    if not (isinstance(kind, str) and isinstance(when, str) and isinstance(what, dict)):
        raise LedgerError(f"{where} is no entry: it was changed.")
    if "signature" in line:
        check_hash(line["hash"], line["signature"], where)
    return dict(line)


def _head_text(folder: Path) -> str | None:
    try:
        return (folder / HEAD).read_text("utf-8")
    except (OSError, ValueError):
        return None


def _head(line: Mapping[str, Any]) -> str:
    return _canonical({"entries": line["number"], "hash": line["hash"]}) + "\n"


def _entry(line: Mapping[str, Any]) -> Entry:
    parts: dict[str, Any] = {part.name: line.get(part.name) for part in fields(Entry)}
    return Entry(**parts)


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode("ascii")).hexdigest()


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
