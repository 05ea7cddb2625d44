"""A ledger begun, and requests taken down."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from perta.data.examples import load_examples
from perta.errors import ConfigError, OutputExistsError
from perta.models.resolve import quantised_checkpoint, resolve_checkpoint
from perta.options import at_home
from perta.recipes._request import check_order, check_same_tokens, write_rows
from perta.recipes.requests.settings import RequestsAddConfig, RequestsInitConfig
from perta.recipes.requests.state import ID, KEY_BYTES, key_mark, opened, set_fingerprint
from perta.store.atomic import atomic_folder
from perta.store.fingerprint import fingerprint
from perta.store.ledger import Entry, append
from perta.store.measured.moments import KEY


def start_ledger(config: RequestsInitConfig) -> Entry:
    """Begin a ledger in a new folder (`perta requests init`).

    PertaError at input that cannot be used, or models that were given for each other.
    """
    folder = config.folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is there already. Give a new folder.")
    base = resolve_checkpoint(config.base)
    full = resolve_checkpoint(config.full, base=config.base)
    models = {"base": _lasting(config.base, base), "full": _lasting(config.full, full)}
    key = secrets.token_bytes(KEY_BYTES)
    facts: dict[str, Any] = {"operator": config.operator, "key": key_mark(key)}
    for name, place in models.items():
        facts[name] = {"path": str(place.absolute()), "blake3": fingerprint(place)}
    for name in ("retain", "holdout"):
        if (source := getattr(config, name)) is not None:
            found, file = load_examples(source, config.data_config), at_home(source)
            check_same_tokens(base, full, found, config.data_config)
            if name == "retain":
                check_order(base, full, found, config.data_config, config.compute)
            where = str(file.absolute()) if file.exists() else source
            facts[name] = {"path": where, "blake3": set_fingerprint(found, key)}
    with atomic_folder(folder) as made:
        made.chmod(0o700)
        (made / KEY).touch(mode=0o600)
        (made / KEY).write_text(key.hex(), "ascii")
        return append(made, "init", facts, key=config.key)


def _lasting(reference: str, found: Path) -> Path:
    """Where a model lies: what the cache holds of an adapter or a GGUF file may be deleted."""
    own = at_home(reference)
    return own if own.exists() else quantised_checkpoint(reference) or found


def add_request(config: RequestsAddConfig) -> Entry:
    """Take a request down (`perta requests add`).

    The rows are copied to the ledger's folder; the ledger itself holds their number and keyed
    fingerprints, HMAC-SHA256 under a key that never leaves the folder. PertaError at rows that
    cannot be read, or a name that is taken.
    """
    if not ID.fullmatch(config.name):
        raise ConfigError(
            f"--name {config.name!r}: use up to 64 letters, digits, dots, dashes and underscores."
        )
    with opened(config) as state:
        # Some file systems take names that differ in case for one.
        taken = {request.name.casefold(): request.name for request in state.requests}
        if name := taken.get(config.name.casefold()):
            raise ConfigError(f"There is a request {name} already. Choose another --name.")
        examples = load_examples(config.forget, config.data_config)
        prints = state.fingerprints(examples)
        open_requests = {request.name for request in state.requests if not request.cleaned}
        before = {
            mark
            for entry in state.of("add")
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
        fields = [example.fields for example in examples.examples]
        together = [*state.rows(waiting, config.data_config), *fields]
        load_examples(together, config.data_config)  # raises now what would stop `apply`
        write_rows(state.rows_file(config.name), examples)
        facts = {"name": config.name, "received": config.received}
        counted = {"rows": len(examples), "rows_hmac_sha256": prints}
        return state.write("add", config, {**facts, **counted})
