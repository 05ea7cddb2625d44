"""What a ledger says, and whether models, sets and rows still are what it names."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perta.data.examples import ExampleSet, load_examples, rows_fingerprint
from perta.data.rows import read_rows
from perta.errors import LedgerError
from perta.options import DataConfig, at_home
from perta.recipes.requests.settings import LedgerConfig
from perta.store.atomic import beside
from perta.store.fingerprint import files_of, fingerprint
from perta.store.ledger import LEDGER, Entry, append, locked, read_ledger
from perta.store.measured.moments import KEY
from perta.store.parse import fits
from perta.store.record import MANIFEST, read_manifest

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of requests."""
KEY_BYTES = 32
"""Of the key of a ledger's fingerprints."""
_SOURCE = {"path": str, "blake3": str}
_FORM: Mapping[str, Any] = {
    "init": {**dict.fromkeys(("base", "full", "retain", "holdout?"), _SOURCE), "key?": str},
    "add": {"name": str, "received": (str, type(None)), "rows": int, "rows_hmac_sha256": [str]},
    "apply": {
        **{"names": [str], "before": str, "after": str, "checkpoint": str, "met": bool},
        **{"verdict": (str, type(None)), "signed?": {"public_key": str, "sha256": str}},
        "record?": str,
    },
    "recheck": {"still_there": {str: [int]}},
    "clean": {"names": [str]},
}
"""What the facts of each kind of entry are read as."""


@dataclass(frozen=True)
class Request:
    """Where one request stands."""

    name: str
    received: str | None  # day it came in, as the user gave it
    rows: int
    applied: int | None = None  # entry that applied it last; None while it waits
    verdict: str | None = None
    met: bool = False  # whether that found its rows forgotten
    # rows that a `recheck` since then found to stand out; None before one
    still_there: int | None = None
    cleaned: bool = False  # whether its rows are gone

    @property
    def is_forgotten(self) -> bool:
        """By the last look at it."""
        return self.met if self.still_there is None else self.still_there == 0


@dataclass(frozen=True)
class State:
    """What a ledger says: `current` is the newest checkpoint, and its fingerprint there.

    Methods raise a LedgerError where something is gone or is not what the ledger names.
    """

    folder: Path
    start: Mapping[str, Any] = field(repr=False)
    requests: tuple[Request, ...]
    current: tuple[Path, str]
    entries: tuple[Entry, ...] = field(repr=False)

    def of(self, kind: str) -> list[Entry]:
        """The entries of a kind."""
        return [entry for entry in self.entries if entry.kind == kind]

    def newest(self) -> Path:
        """The newest checkpoint."""
        check_fingerprint(*self.current)
        return self.current[0]

    def model(self, name: str) -> Path:
        """Base or full model."""
        source = self.start[name]
        check_fingerprint(Path(source["path"]), source["blake3"])
        return Path(source["path"])

    def examples(self, name: str, data_config: DataConfig) -> ExampleSet:
        """Retain or held-out set."""
        found = load_examples(self.start[name]["path"], data_config)
        if set_fingerprint(found, self._secret()) != self.start[name]["blake3"]:
            raise LedgerError(
                f"{found.source} is not the {name} set that the ledger names: it was changed, or "
                "an earlier version began the ledger. Put it back, or begin a new ledger from the "
                "newest checkpoint."
            )
        return found

    def kept(self, data_config: DataConfig) -> ExampleSet:
        """The retain set without the rows of any request so far."""
        retain = self.examples("retain", data_config)
        gone = {mark for entry in self.of("add") for mark in entry.facts["rows_hmac_sha256"]}
        pairs = zip(retain.examples, self.fingerprints(retain), strict=True)
        return replace(retain, examples=tuple(e for e, mark in pairs if mark not in gone))

    def holdout(self, data_config: DataConfig) -> str | None:
        """Where the held-out set lies, where there is one."""
        return self.examples("holdout", data_config).source if "holdout" in self.start else None

    def rows_file(self, name: str) -> Path:
        """Where the rows of a request lie."""
        return self.folder / "rows" / f"{name}.jsonl"

    def rows(self, requests: Sequence[Request], data_config: DataConfig) -> list[dict[str, Any]]:
        """The rows of some requests, which must be those that were asked for."""
        asked = {entry.facts["name"]: entry.facts["rows_hmac_sha256"] for entry in self.of("add")}
        rows: list[dict[str, Any]] = []
        for request in requests:
            file = self.rows_file(request.name)
            if not file.is_file():
                raise LedgerError(
                    f"{file}, the rows of {request.name}, is gone. If a `perta requests clean` was "
                    "cut off, run it again; if not, put the file back."
                )
            if self.fingerprints(load_examples(file, data_config)) != asked[request.name]:
                raise LedgerError(
                    f"{file} does not hold the rows that {request.name} asked for: it or the key "
                    "was changed, or the options that name columns are not those of `perta "
                    "requests add`."
                )
            rows += read_rows(str(file), "")
        return rows

    def fingerprints(self, examples: ExampleSet) -> list[str]:
        """HMAC-SHA256 of each example's messages under the folder's key, in hexadecimal."""
        key = self._secret()
        texts = (example.as_text.encode() for example in examples.examples)
        return [hmac.new(key, text, hashlib.sha256).hexdigest() for text in texts]

    def key(self) -> bytes:
        """The key of the folder's fingerprints, as in its file."""
        return self._secret().hex().encode("ascii")

    def _secret(self) -> bytes:
        """The same as bytes; another one would recognise no row, and an empty one hides none."""
        try:
            found = bytes.fromhex((self.folder / KEY).read_text("ascii"))
            if len(found) != KEY_BYTES or self.start.get("key", key_mark(found)) != key_mark(found):
                raise ValueError("another key")
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"{self.folder / KEY}, the key by which rows are recognised, is missing or another "
                "one: put it back."
            ) from error
        return found

    def write(self, kind: str, config: LedgerConfig, facts: Mapping[str, Any]) -> Entry:
        """Add an entry, with who did it, to the ledger; call it within `opened`."""
        facts = {**facts, "operator": config.operator}
        return append(self.folder, kind, facts, key=config.key)


@contextmanager
def opened(config: LedgerConfig) -> Iterator[State]:
    """The ledger for a step that writes to it; no other process does meanwhile."""
    folder = _folder(config.folder)
    with locked(folder, config.key):
        yield read_state(folder)


def read_state(folder: Path) -> State:
    """What a ledger says, once its chain is checked."""
    folder = _folder(folder)
    entries = read_ledger(folder)
    _check_facts(folder, entries)
    start = entries[0].facts
    requests: dict[str, Request] = {}
    current = (Path(start["full"]["path"]), start["full"]["blake3"])
    for entry in entries:
        facts = entry.facts
        if entry.kind == "add":
            requests[facts["name"]] = Request(facts["name"], facts["received"], facts["rows"])
        elif entry.kind == "apply":
            current = (folder / facts["checkpoint"], facts["after"])
            change = {"applied": entry.number, "verdict": facts["verdict"], "met": facts["met"]}
            change["still_there"] = None
            _change(requests, dict.fromkeys(facts["names"], change))
        elif entry.kind == "recheck":
            _change(requests, {i: {"still_there": len(r)} for i, r in facts["still_there"].items()})
        elif entry.kind == "clean":
            _change(requests, {name: {"cleaned": True} for name in facts["names"]})
    return State(folder, start, tuple(requests.values()), current, tuple(entries))


def key_mark(key: bytes) -> str:
    """What tells a ledger's key from others, and nothing of it: SHA-256 of random bytes."""
    return hashlib.sha256(key).hexdigest()


def set_fingerprint(examples: ExampleSet, key: bytes) -> str:
    """That of a ledger's retain or held-out set, under the folder's key."""
    return rows_fingerprint([example.fields for example in examples.examples], key)


def check_fingerprint(place: Path, wanted: str) -> None:
    """Stop with a LedgerError at a model that is gone, or not what the ledger says."""
    if not place.exists():
        raise LedgerError(f"{place} is gone, and the ledger says it should be there.")
    if fingerprint(place) != wanted:
        raise LedgerError(f"{place} is not what the ledger says: it was changed.")


def check_files(checkpoint: Path, record: str) -> None:
    """Stop at a checkpoint whose record, or a file that this names, was changed.

    Its fingerprint counts what makes it the model it is, and neither of the two.
    """
    check_fingerprint(checkpoint / MANIFEST, record)
    written, found = (read_manifest(checkpoint) or {}).get("files", {}), files_of(checkpoint)
    for name in (name for name in written if found.get(name) != written[name]):
        raise LedgerError(f"{checkpoint / name} is not what the ledger says: it was changed.")


def signature_file(checkpoint: Path) -> Path:
    """Where a checkpoint's signature lies."""
    return beside(checkpoint, ".sig")


def _folder(folder: Path) -> Path:
    folder = at_home(folder).absolute()
    if not (folder / LEDGER).is_file():
        raise LedgerError(f"{folder} holds no ledger. `perta requests init` makes one.")
    return folder


def _check_facts(folder: Path, entries: Sequence[Entry]) -> None:
    """Stop at entries that fit their chain and that this package has not written."""
    known = set[str]()
    for entry in entries:
        facts, number = entry.facts, entry.number
        fits_ = fits(facts, _FORM.get(entry.kind, bool)) and (entry.kind == "init") == (number == 1)
        if fits_ and entry.kind == "add":
            fits_ = bool(ID.fullmatch(facts["name"])) and facts["name"] not in known
            known.add(facts["name"])
        elif fits_ and entry.kind == "apply":
            fits_ = facts["checkpoint"] == f"checkpoints/{number}"
        if not fits_ or not known.issuperset(facts.get("names", facts.get("still_there", ()))):
            raise LedgerError(
                f"{folder / LEDGER}, line {number} is no entry that perta writes, though its hash "
                "fits: somebody else wrote it."
            )


def _change(requests: dict[str, Request], changes: Mapping[str, Mapping[str, Any]]) -> None:
    for name, change in changes.items():
        requests[name] = replace(requests[name], **change)
