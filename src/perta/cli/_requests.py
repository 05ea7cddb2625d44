"""`perta requests`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App

from perta.cli._app import AsJson, app, note
from perta.options import Repeated
from perta.recipes.requests.settings import (
    LedgerConfig,
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
    RequestsRecheckConfig,
)

_requests = App(name="requests", help="Many erasure requests over time, in a ledger that tells.")
app.command(_requests)


@_requests.command(name="init")
def _init(config: RequestsInitConfig) -> None:
    """Begin a ledger for a model and its data."""
    from perta.recipes.requests.take import start_ledger

    note(f"Ledger: {config.folder}; head {start_ledger(config).hash}")


@_requests.command(name="add")
def _add(config: RequestsAddConfig) -> None:
    """Take a request down: rows that have to go."""
    from perta.recipes.requests.take import add_request

    entry = add_request(config)
    note(f"{config.name}: {entry.facts['rows']} rows; head {entry.hash}")


@_requests.command(name="apply")
def _apply(config: RequestsApplyConfig) -> None:
    """Forget all that waits, in one edit of the newest checkpoint."""
    from perta.recipes.requests.apply import apply_requests

    entry = apply_requests(config)
    facts = entry.facts
    note(
        f"Applied: {', '.join(facts['names'])}\nVerdict: {facts['verdict']}\n"
        f"Checkpoint: {config.folder / facts['checkpoint']}\nHead: {entry.hash}"
    )


@_requests.command(name="status")
def _status(folder: Path, *, json: AsJson = False) -> None:
    """List the requests and where each stands.

    Args:
        folder: of the ledger.
        json: print them as one JSON object.
    """
    from perta.recipes.requests.state import read_state
    from perta.terminal import print_json, print_requests

    state = read_state(folder)
    requests = [asdict(request) for request in state.requests]
    if json:
        print_json({"requests": requests})
    else:
        print_requests(requests)
        note(f"Newest checkpoint: {state.current[0]}")


@_requests.command(name="recheck")
def _recheck(config: RequestsRecheckConfig) -> None:
    """Look for the facts of all earlier requests in the newest checkpoint."""
    from perta.evidence.audit.document import told_in_short
    from perta.recipes.requests.look import recheck_requests

    entry = recheck_requests(config)
    for name, rows in entry.facts["still_there"].items():
        numbers = f": rows {', '.join(map(str, rows))}" if rows else ""
        note(f"{name}: {len(rows)} facts stand out{numbers}")
    for name, audit in entry.facts["audits"].items():
        note(f"{name}: {told_in_short(audit)}")


@_requests.command(name="verify")
def _verify(
    folder: Path, *, head: str | None = None, public_key: Annotated[tuple[Path, ...], Repeated] = ()
) -> None:
    """Check the ledger, its signatures and every checkpoint it names.

    Args:
        folder: of the ledger.
        head: hash of an entry, noted elsewhere, that the ledger must hold.
        public_key: file of a public key (PEM): with an Ed25519 key every entry must be signed with
            one that is given, with a key of a curve every checkpoint that is there.
    """
    from perta.recipes.requests.look import verify_requests
    from perta.store.ledger import public_keys
    from perta.store.signing import short

    state = verify_requests(folder, head=head, public_keys=public_key)
    signed = sum(entry.signature is not None for entry in state.entries)
    note(
        f"{len(state.entries)} entries fit, {signed} of them signed; head {state.entries[-1].hash}"
    )
    for key in public_keys(state.entries):
        note(f"Signed with {key}")
    for entry in state.entries:
        if by := entry.facts.get("signed"):
            note(f"{entry.facts['checkpoint']} was signed with {short(by['public_key'])}")


@_requests.command(name="clean")
def _clean(config: LedgerConfig) -> None:
    """Delete rows, work folders and older checkpoints of requests that were applied."""
    from perta.recipes.requests.clean import clean_requests
    from perta.recipes.requests.state import read_state

    _, gone = clean_requests(config)
    for place in gone:
        note(f"Deleted: {place}")
    for request in read_state(config.folder).requests:
        if request.applied is not None and not request.cleaned:
            note(f"Kept: rows of {request.name}, which is not forgotten yet by the last look")
    note("Base and full model, the data sets, copies and backups are not this command's to delete.")
