"""A ledger's state looked at: facts that are still there, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perta.data.examples import load_examples
from perta.data.rows import as_source
from perta.errors import ConfigError, LedgerError
from perta.evidence.audit.document import summary_of
from perta.models.load import load_model, load_tokenizer, pad_id
from perta.models.resolve import resolve_checkpoint
from perta.options import at_home
from perta.progress import say
from perta.recipes.requests.settings import RequestsRecheckConfig
from perta.recipes.requests.state import (
    Request,
    State,
    check_files,
    check_fingerprint,
    opened,
    read_state,
    signature_file,
)
from perta.recipes.strength.choose import calibrate, surprises_of
from perta.stages.audit import audit_checkpoint
from perta.stages.settings import AuditConfig
from perta.store.fingerprint import fingerprint
from perta.store.ledger import LEDGER, Entry
from perta.store.signing import check_checkpoint, check_signed_by, is_model_key, public_key


def recheck_requests(config: RequestsRecheckConfig) -> Entry:
    """Look for the facts of every request in the newest checkpoint (`perta requests recheck`).

    A row stands out by the rule of `recipes.strength.choose`, with the base model as yardstick, or
    the held-out set where the ledger has one. The entry names, of each request that was applied and
    not cleaned, the rows that do, and its audit in short, beside the rows to keep. PertaError where
    there is no such request, or the checkpoint is not the ledger's.
    """
    with opened(config) as state:
        current = resolve_checkpoint(state.newest())
        chosen = [r for r in state.requests if r.applied is not None and not r.cleaned]
        if not chosen:
            raise ConfigError(f"{state.folder} has no request that was applied and has its rows.")
        base = resolve_checkpoint(state.model("base"))
        full = resolve_checkpoint(state.model("full"), base=base)
        holdout = state.holdout(config.data_config)
        sets: dict[str, str | Path] = {"holdout": holdout} if holdout else {}
        state.rows(chosen, config.data_config)  # as they were asked for
        pad = pad_id(load_tokenizer(current))
        found: dict[str, list[int]] = {}
        for request in chosen:
            sources = {"forget": state.rows_file(request.name), **sets}
            loaded = {n: load_examples(s, config.data_config) for n, s in sources.items()}
            unseen = calibrate(full, base, loaded, config.data_config, config.compute)
            model = load_model(current, config.compute, dtype=torch.float32)
            now = surprises_of(model, unseen.facts, unseen.calibrated_on, pad)
            found[request.name] = [unseen.facts[place].row for place in unseen.standing_out(now)]
            say(f"{request.name}: {len(found[request.name])} of {request.rows} rows stand out")
        # Of a model that is its base again there is nothing to compare.
        is_base = fingerprint(current) == fingerprint(base)
        audits = {} if is_base else _audits(config, state, chosen)
        facts = {"checkpoint": state.current[1], "still_there": found, "audits": audits}
        return state.write("recheck", config, facts)


def _audits(
    config: RequestsRecheckConfig, state: State, requests: Sequence[Request]
) -> dict[str, Any]:
    """Of each request its audit on the newest checkpoint, in short; the whole lies in `audits`."""
    start, kept = state.start, state.kept(config.data_config).examples
    number = str(len(state.entries) + 1)
    (state.folder / "audits").mkdir(mode=0o700, exist_ok=True)
    return {
        request.name: summary_of(
            audit_checkpoint(
                AuditConfig(
                    str(state.current[0]),
                    full=start["full"]["path"],
                    base=start["base"]["path"],
                    forget=str(state.rows_file(request.name)),
                    retain=as_source([e.fields for e in kept], "retain") if kept else None,
                    holdout=start.get("holdout", {}).get("path"),
                    output=state.folder / "audits" / number / request.name,
                    level=config.level,
                    overwrite=True,
                    data_config=config.data_config,
                    compute=config.compute,
                )
            )
        )
        for request in requests
    }


def verify_requests(
    folder: Path, *, head: str | None = None, public_keys: Sequence[Path] = ()
) -> State:
    """Check ledger, signatures and checkpoints (`perta requests verify`).

    `head` is the hash of an entry, noted elsewhere, that the ledger must hold. With an Ed25519 key
    among the `public_keys` (PEM files) every entry must be signed with one of them, and with a key
    of a curve every checkpoint that is there. LedgerError says what does not fit.
    """
    trusted = [public_key(at_home(file)) for file in public_keys]
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
    state.key()
    for name in ("base", "full"):
        state.model(name)
    for entry in state.of("apply"):
        place = state.folder / entry.facts["checkpoint"]
        # Earlier checkpoints may be deleted; what is there must be what was written.
        if not place.exists() and place != state.current[0]:
            continue
        check_fingerprint(place, entry.facts["after"])
        signed = entry.facts.get("signed")
        if any(map(is_model_key, trusted)):
            check_signed_by({str(place): signed and signed["public_key"]}, trusted)
        if signed:
            check_checkpoint(place, signature_file(place), signed)
        if "record" in entry.facts:
            check_files(place, entry.facts["record"])
    return state
