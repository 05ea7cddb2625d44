"""A life with many erasure requests: `perta requests`.

    FOLDER/ledger.jsonl, head.json   what happened, chained and signed (`store.ledger`)
    FOLDER/rows/NAME.jsonl             the rows of a request, until `clean`
    FOLDER/key                       of the fingerprints of these rows; without it they say nothing
    FOLDER/checkpoints/N             the checkpoint after entry N, with its `perta unlearn` record
    FOLDER/checkpoints/N.sig         its signature, where it was signed (`store.signing`)
    FOLDER/work/N                    what that run made on the way
    FOLDER/moments                   of retained rows, made once, without those of any request; its
                                     hashes of rows are keyed
    FOLDER/audits/N/NAME             the audit of a request's rows that entry N names; numbers alone

A request is applied to the current checkpoint, several at once in one edit. Rows of all requests so
far are taken out of the retain set first, so nothing protects what is to go.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from perta.data.examples import ExampleSet, load_examples
from perta.data.rows import read_rows, write_jsonl
from perta.engine.edit.direction import check_moments
from perta.errors import ConfigError, LedgerError, OutputExistsError, PertaError, nearest
from perta.evidence.audit.document import summary_of
from perta.methods.method import Edit, Method
from perta.methods.registry import parse
from perta.models.load import load_model, load_tokenizer, pad_id, picked
from perta.models.resolve import quantised_checkpoint, resolve_checkpoint
from perta.options import DataConfig, MomentOptions
from perta.progress import say, warn
from perta.recipes._request import write_rows
from perta.recipes.settings import (
    LedgerConfig,
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
    RequestsRecheckConfig,
    UnlearnConfig,
)
from perta.recipes.strength.choose import calibrate, surprises_of
from perta.recipes.unlearn import unlearn
from perta.report.verdict.judge import require_verdict
from perta.stages.audit import audit_checkpoint
from perta.stages.moments import compute_moments, holds, moments_without
from perta.stages.settings import AuditConfig, LessMomentsConfig, MomentsConfig
from perta.stages.stage import changes
from perta.store.atomic import atomic_folder, beside
from perta.store.fingerprint import content_of, files_of, fingerprint
from perta.store.ledger import LEDGER, Entry, append, locked, read_ledger
from perta.store.measured.moments import KEY, key_rows
from perta.store.parse import fits
from perta.store.record import read_manifest, settings_of, write_manifest
from perta.store.signing import (
    check_checkpoint,
    check_signed_by,
    is_model_key,
    model_key,
    public_key,
    sign_checkpoint,
)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SOURCE = {"path": str, "blake3": str}
_FORM: Mapping[str, Any] = {
    "init": {**dict.fromkeys(("base", "full", "retain", "holdout?"), _SOURCE)},
    "add": {"name": str, "received": (str, type(None)), "rows": int, "rows_hmac_sha256": [str]},
    "apply": {
        **{"names": [str], "before": str, "after": str, "checkpoint": str, "met": bool},
        **{"verdict": (str, type(None)), "signed?": {"public_key": str, "sha256": str}},
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
    """What a ledger says: `current` is the newest checkpoint, and its fingerprint there."""

    folder: Path
    start: Mapping[str, Any] = field(repr=False)
    requests: tuple[Request, ...]
    current: tuple[Path, str]
    entries: tuple[Entry, ...] = field(repr=False)


def start_ledger(config: RequestsInitConfig) -> Entry:
    """Begin a ledger in a new folder (`perta requests init`)."""
    folder = config.folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is there already. Give a new folder.")
    base = resolve_checkpoint(config.base)
    full = resolve_checkpoint(config.full, base=config.base)
    models = {"base": base, "full": quantised_checkpoint(config.full) or full}
    facts: dict[str, Any] = {"operator": config.operator}
    for name, place in models.items():
        facts[name] = {"path": str(place.absolute()), "blake3": fingerprint(place)}
    for name in ("retain", "holdout"):
        if (source := getattr(config, name)) is not None:
            found, file = load_examples(source, config.data_config), Path(source).expanduser()
            where = str(file.absolute()) if file.exists() else source
            facts[name] = {"path": where, "blake3": found.fingerprint}
    with atomic_folder(folder) as made:
        made.chmod(0o700)
        (made / KEY).touch(mode=0o600)
        (made / KEY).write_text(secrets.token_hex(32), "ascii")
        return append(made, "init", facts, key=config.key)


def add_request(config: RequestsAddConfig) -> Entry:
    """Take a request down (`perta requests add`).

    The rows are copied to the ledger's folder; the ledger itself holds their number and keyed
    fingerprints, HMAC-SHA256 under a key that never leaves the folder.

    Raises:
        PertaError: rows that cannot be read, or a name that is taken.
    """
    if not _ID.fullmatch(config.name):
        raise ConfigError(
            f"--name {config.name!r}: use up to 64 letters, digits, dots, dashes and underscores."
        )
    with locked(_folder(config.folder), config.key):
        state = read_state(config.folder)
        # Some file systems take names that differ in case for one.
        taken = {request.name.casefold(): request.name for request in state.requests}
        if name := taken.get(config.name.casefold()):
            raise ConfigError(f"There is a request {name} already. Choose another --name.")
        examples = load_examples(config.forget, config.data_config)
        prints = _fingerprints(state.folder, examples)
        open_requests = {request.name for request in state.requests if not request.cleaned}
        before = {
            mark
            for entry in _of(state, "add")
            if entry.facts["name"] in open_requests
            for mark in entry.facts["rows_hmac_sha256"]
        }
        pairs = zip(examples.examples, prints, strict=True)
        if twice := [example.row for example, mark in pairs if mark in before]:
            raise ConfigError(
                f"{config.forget}: {len(twice)} of the rows belong to an earlier request (row "
                f"{twice[0]}{', …' if len(twice) > 1 else ''}). Leave them out, or forget that "
                "request once more with `perta requests apply --again NAME`."
            )
        waiting = [request for request in state.requests if request.applied is None]
        together = [
            *_rows(state, waiting, config.data_config),
            *(example.fields for example in examples.examples),
        ]
        load_examples(together, config.data_config)  # raises now what would stop `apply`
        write_rows(_rows_file(state.folder, config.name), examples)
        facts = {
            "name": config.name,
            "received": config.received,
            "operator": config.operator,
            "rows": len(examples),
            "rows_hmac_sha256": prints,
        }
        return append(state.folder, "add", facts, key=config.key)


def apply_requests(config: RequestsApplyConfig) -> Entry:
    """Forget what waits, in one edit of the newest checkpoint (`perta requests apply`).

    Raises:
        PertaError: nothing waits, the checkpoint is not the ledger's, the run fails, or its verdict
            is worse than was asked for; nothing is written to the ledger then.
    """
    if config.model_key is not None:
        model_key(config.model_key)  # raises now what would stop it at the end
    with locked(_folder(config.folder), config.key):
        state = read_state(config.folder)
        chosen = _chosen(state, config.again)
        current = _checked_checkpoint(state)
        _checked_model(state, "base")
        rows = _rows(state, chosen, config.data_config)
        number = len(state.entries) + 1
        work = state.folder / "work" / str(number)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        forget = write_jsonl(rows, work / "forget.jsonl")
        retain = _retained(state, work, config.data_config)
        settings = UnlearnConfig(
            base=state.start["base"]["path"],
            full=str(current),
            forget=str(forget),
            retain=str(retain),
            retain_moments=_kept_moments(config, state, work, retain),
            holdout=_holdout(state, config.data_config),
            output=state.folder / "checkpoints" / str(number),
            work_dir=work / "run",
            # Of a run that the ledger does not know of: it failed, or was not good enough.
            overwrite=True,
            retain_budget=config.retain_budget,
            weighting=config.weighting,
            tune=config.tune,
            data_config=config.data_config,
            compute=config.compute,
        )
        made = unlearn(settings)
        require_verdict(config.fail_unless, made.verdict, f"The ledger in {state.folder}")
        asked, verdict = made.manifest["settings"], made.verdict
        facts = {
            "names": [request.name for request in chosen],
            "operator": config.operator,
            "method": asked.get("method"),
            "scaling_coef": asked.get("scaling_coef"),
            "before": state.current[1],
            "after": fingerprint(made.folder),
            "checkpoint": str(made.folder.relative_to(state.folder)),
            "verdict": verdict.line if verdict else None,
            "met": verdict is not None and verdict.forgetting.status == "met",
            "audit": made.audit and summary_of(made.audit),
        }
        if config.model_key is not None:
            signature = _signature_file(made.folder)
            facts["signed"] = sign_checkpoint(made.folder, signature, config.model_key)
        return append(state.folder, "apply", facts, key=config.key)


def recheck_requests(config: RequestsRecheckConfig) -> Entry:
    """Look for the facts of every request in the newest checkpoint (`perta requests recheck`).

    A row stands out by the rule of `recipes.strength.choose`, with the base model as yardstick, or
    the held-out set where the ledger has one.

    Returns:
        The entry: of each request that was applied and not cleaned, the rows that stand out, and
        its audit in short.

    Raises:
        PertaError: there is no such request, or the checkpoint is not the ledger's.
    """
    with locked(_folder(config.folder), config.key):
        state = read_state(config.folder)
        current = _checked_checkpoint(state)
        chosen = [r for r in state.requests if r.applied is not None and not r.cleaned]
        if not chosen:
            raise ConfigError(f"{state.folder} has no request that was applied and has its rows.")
        base, full = (_checked_model(state, name) for name in ("base", "full"))
        holdout = _holdout(state, config.data_config)
        sets: dict[str, str | Path] = {"holdout": holdout} if holdout else {}
        _rows(state, chosen, config.data_config)  # as they were asked for
        pad = pad_id(load_tokenizer(current))
        found: dict[str, list[int]] = {}
        for request in chosen:
            sources = {"forget": _rows_file(state.folder, request.name), **sets}
            loaded = {n: load_examples(s, config.data_config) for n, s in sources.items()}
            unseen = calibrate(full, base, loaded, config.data_config, config.compute)
            model = load_model(current, config.compute, dtype=torch.float32)
            now = surprises_of(model, unseen.facts, unseen.calibrated_on, pad)
            found[request.name] = [unseen.facts[place].row for place in unseen.standing_out(now)]
            say(f"{request.name}: {len(found[request.name])} of {request.rows} rows stand out")
        facts = {
            "checkpoint": state.current[1],
            "still_there": found,
            "audits": _audits(config, state, chosen),
            "operator": config.operator,
        }
        return append(state.folder, "recheck", facts, key=config.key)


def verify_requests(
    folder: Path, *, head: str | None = None, public_keys: Sequence[Path] = ()
) -> State:
    """Check ledger, signatures and checkpoints (`perta requests verify`).

    Args:
        folder: of the ledger.
        head: hash of an entry, noted elsewhere, that the ledger must hold.
        public_keys: files of keys (PEM). With an Ed25519 key among them every entry must be signed
            with one of them, and with a key of a curve every checkpoint that is there.

    Raises:
        LedgerError: something does not fit; the message says what.
    """
    trusted = [public_key(file) for file in public_keys]
    state = read_state(folder)
    if head is not None and head not in {entry.hash for entry in state.entries}:
        raise LedgerError(
            f"{state.folder / LEDGER} has no entry with the hash {head}: its end was cut off, or "
            "it is another ledger."
        )
    if not all(map(is_model_key, trusted)):
        signers = {
            f"{state.folder / LEDGER}, line {entry.number}": (entry.signature or {}).get(
                "public_key"
            )
            for entry in state.entries
        }
        check_signed_by(signers, trusted)
    for name in ("base", "full"):
        _checked_model(state, name)
    for entry in _of(state, "apply"):
        place = state.folder / entry.facts["checkpoint"]
        # Earlier checkpoints may be deleted; what is there must be what was written.
        if not place.exists() and place != state.current[0]:
            continue
        _check_fingerprint(place, entry.facts["after"])
        signed = entry.facts.get("signed")
        if any(map(is_model_key, trusted)):
            check_signed_by({str(place): signed and signed["public_key"]}, trusted)
        if signed:
            check_checkpoint(place, _signature_file(place), signed)
    return state


def clean_requests(config: LedgerConfig) -> tuple[Entry, list[Path]]:
    """Delete what holds forgotten data (`perta requests clean`).

    Rows of requests that are forgotten go, and with them all work folders and every cleaned
    checkpoint but the newest: an older one still knows what later requests removed. Rows that the
    last look found to be still there stay, so that they can be forgotten again. Base, full model
    and the data sets are the user's and stay, and so does what a link points to; a warning says so.

    Raises:
        LedgerError: the newest checkpoint is not the ledger's: nothing is deleted then.
    """
    with locked(_folder(config.folder), config.key):
        state = read_state(config.folder)
        newest = _checked_checkpoint(state)
        applied = [request for request in state.requests if request.applied is not None]
        forgotten = [request for request in applied if request.is_forgotten]
        kept = {r.name for r in state.requests} - {r.name for r in forgotten}
        # Rows of no request are what an `add` left that was cut off.
        found = [
            p for p in _within(state.folder / "rows") if p.name.removesuffix(".jsonl") not in kept
        ]
        found += _within(state.folder / "work")
        found += [
            place
            for place in _within(state.folder / "checkpoints")
            if place.name.partition(".")[0] != newest.name
        ]
        gone = [place for place in found if not place.is_symlink()]
        for link in (place for place in found if place not in gone):
            warn(f"{link} is a link: what it points to is yours to delete")
        for place in gone:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        facts = {
            "names": [request.name for request in forgotten],
            "deleted": [str(place.relative_to(state.folder)) for place in gone],
            "operator": config.operator,
        }
        return append(state.folder, "clean", facts, key=config.key), gone


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


def _check_facts(folder: Path, entries: Sequence[Entry]) -> None:
    """Stop at entries that fit their chain and that this package has not written."""
    known = set[str]()
    for entry in entries:
        facts, number = entry.facts, entry.number
        fits_ = fits(facts, _FORM.get(entry.kind, bool)) and (entry.kind == "init") == (number == 1)
        if fits_ and entry.kind == "add":
            fits_ = bool(_ID.fullmatch(facts["name"])) and facts["name"] not in known
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


def _chosen(state: State, again: Sequence[str]) -> list[Request]:
    """What waits, and what is to be forgotten once more."""
    known = {request.name: request for request in state.requests}
    for name in again:
        if name not in known:
            raise ConfigError(f"--again {name}: there is no such request.{nearest(name, known)}")
        if known[name].cleaned:
            raise ConfigError(f"--again {name}: its rows were cleaned. Add them by another name.")
    chosen = [r for r in state.requests if r.applied is None or r.name in again]
    if not chosen:
        raise ConfigError(
            f"No request waits in {state.folder}. Add one, or name one that is to be forgotten "
            "once more with --again."
        )
    return chosen


def _rows(
    state: State, requests: Sequence[Request], data_config: DataConfig
) -> list[dict[str, Any]]:
    """The rows of some requests, which must be those that were asked for."""
    asked = {entry.facts["name"]: entry.facts["rows_hmac_sha256"] for entry in _of(state, "add")}
    rows: list[dict[str, Any]] = []
    for request in requests:
        file = _rows_file(state.folder, request.name)
        if not file.is_file():
            raise LedgerError(
                f"{file}, the rows of {request.name}, is gone. If a `perta requests clean` was cut "
                "off, run it again; if not, put the file back."
            )
        examples = load_examples(file, data_config)
        if _fingerprints(state.folder, examples) != asked[request.name]:
            raise LedgerError(
                f"{file} does not hold the rows that {request.name} asked for: it or the key was "
                "changed, or the options that name columns are not those of `perta requests add`."
            )
        rows += read_rows(str(file), "")
    return rows


def _of(state: State, kind: str) -> list[Entry]:
    return [entry for entry in state.entries if entry.kind == kind]


def _folder(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    if not (folder / LEDGER).is_file():
        raise LedgerError(f"{folder} holds no ledger. `perta requests init` makes one.")
    return folder


def _audits(
    config: RequestsRecheckConfig, state: State, requests: Sequence[Request]
) -> dict[str, Any]:
    """Of each request its audit on the newest checkpoint, in short; the whole lies in `audits`."""
    start, (current, print_) = state.start, state.current
    if print_ == start["base"]["blake3"]:
        return {}  # nothing to compare with
    number = str(len(state.entries) + 1)
    (state.folder / "audits").mkdir(mode=0o700, exist_ok=True)
    return {
        request.name: summary_of(
            audit_checkpoint(
                AuditConfig(
                    str(current),
                    full=start["full"]["path"],
                    base=start["base"]["path"],
                    forget=str(_rows_file(state.folder, request.name)),
                    holdout=start.get("holdout", {}).get("path"),
                    output=state.folder / "audits" / number / request.name,
                    level=config.level,
                    overwrite=True,
                    data_config=config.data_config,
                    compute=config.compute,
                ),
                earlier=[start["full"]["blake3"]],
            )
        )
        for request in requests
    }


def _signature_file(checkpoint: Path) -> Path:
    return beside(checkpoint, ".sig")


def _within(folder: Path) -> list[Path]:
    """What lies in a folder; of a link to one, the link."""
    return [folder] if folder.is_symlink() else sorted(folder.glob("*"))


def _rows_file(folder: Path, name: str) -> Path:
    return folder / "rows" / f"{name}.jsonl"


def _checked_checkpoint(state: State) -> Path:
    """The newest checkpoint, once it is found to be what the ledger says."""
    _check_fingerprint(*state.current)
    return state.current[0]


def _checked_model(state: State, name: str) -> Path:
    """Base or full model, once it is found to be what the ledger says."""
    source = state.start[name]
    _check_fingerprint(Path(source["path"]), source["blake3"])
    return Path(source["path"])


def _holdout(state: State, data_config: DataConfig) -> str | None:
    """Where the held-out set lies, where there is one."""
    if "holdout" not in state.start:
        return None
    return _checked_set(state, "holdout", data_config).source


def _checked_set(state: State, name: str, data_config: DataConfig) -> ExampleSet:
    """A set that the ledger names, once it is found to be what it was."""
    found = load_examples(state.start[name]["path"], data_config)
    if found.fingerprint != state.start[name]["blake3"]:
        raise LedgerError(
            f"{found.source} is not the {name} set that the ledger names: it was changed. Put it "
            "back, or begin a new ledger from the newest checkpoint."
        )
    return found


def _check_fingerprint(place: Path, wanted: str) -> None:
    if not place.exists():
        raise LedgerError(f"{place} is gone, and the ledger says it should be there.")
    if fingerprint(place) != wanted:
        raise LedgerError(f"{place} is not what the ledger says: it was changed.")


def _retained(state: State, work: Path, data_config: DataConfig) -> Path:
    """The retain set without the rows of any request so far."""
    retain = _checked_set(state, "retain", data_config)
    gone = {mark for entry in _of(state, "add") for mark in entry.facts["rows_hmac_sha256"]}
    marks = _fingerprints(state.folder, retain)
    kept = [e for e, mark in zip(retain.examples, marks, strict=True) if mark not in gone]
    if not kept:
        raise ConfigError(f"{retain.source}: every row is part of a request; none is to be kept.")
    write_rows(work / "retain.jsonl", replace(retain, examples=tuple(kept)))
    return work / "retain.jsonl"


def _kept_moments(
    config: RequestsApplyConfig, state: State, work: Path, retain: Path
) -> Path | None:
    """Moments of retained rows: those of the last request without the rows of this one."""
    method = parse(config.weighting.method, Method)
    if not isinstance(method, Edit) or "retain" not in method.needs.moments:
        return None
    kept, base = state.folder / "moments", state.start["base"]["path"]
    place: dict[str, Any] = {
        **{"output": work / "moments", "overwrite": True},
        **{"data_config": config.data_config, "compute": config.compute},
    }
    asked = load_examples(work / "forget.jsonl", config.data_config).examples
    try:
        facts = check_moments(kept, [Path(base)], method.needs.gradients).facts
        if other := changes(read_manifest(kept) or {}, settings_of(config.data_config), {}):
            raise ConfigError(f"They were measured with other {', '.join(other)}.")
        if facts["dtype"] != picked(config.compute, Path(base))["dtype"]:
            raise ConfigError(f"They were measured with --dtype {facts['dtype']}.")
        if facts.get("taken_out", 0) > facts["tokens"]:
            raise ConfigError("More than half of what was measured is gone by now.")
        if "rows_key" not in facts:  # or hashes that anybody can make get into a record
            _keep(kept, kept)
        if not holds(kept, asked):
            return kept
        made = moments_without(LessMomentsConfig(moments=kept, checkpoint=base, **place), asked)
    except PertaError as error:
        if kept.exists():
            say(f"The moments that were kept are made again. {error}")
        made = compute_moments(
            MomentsConfig(
                checkpoint=base,
                data=str(retain),
                gradients=method.needs.gradients,
                options=MomentOptions(moment_samples="enough"),
                **place,
            )
        )
    return _keep(made, kept)


def _keep(made: Path, kept: Path) -> Path:
    """Copy moments to their place in the ledger's folder, with keyed hashes."""
    with atomic_folder(kept, overwrite=True, private=True) as partial:
        shutil.copytree(made, partial, dirs_exist_ok=True)
        key_rows(partial, _key(kept.parent))
        held = {"content": content_of(partial), "files": files_of(partial)}
        write_manifest(partial, {**(read_manifest(partial) or {}), **held})
    return kept


def _fingerprints(folder: Path, examples: ExampleSet) -> list[str]:
    """HMAC-SHA256 of each example's messages under the folder's key, in hexadecimal."""
    try:
        key = bytes.fromhex(_key(folder).decode("ascii"))
    except ValueError as error:
        raise _without_key(folder) from error
    texts = (example.as_text.encode() for example in examples.examples)
    return [hmac.new(key, text, hashlib.sha256).hexdigest() for text in texts]


def _key(folder: Path) -> bytes:
    """The key of a ledger's folder, as in its file."""
    try:
        return (folder / KEY).read_bytes()
    except OSError as error:
        raise _without_key(folder) from error


def _without_key(folder: Path) -> LedgerError:
    return LedgerError(
        f"{folder / KEY} is missing or damaged, so rows cannot be recognised: put it back."
    )
