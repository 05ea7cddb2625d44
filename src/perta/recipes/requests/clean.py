"""What holds forgotten data, deleted from a ledger's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from perta.progress import warn
from perta.recipes.clean import cached_models
from perta.recipes.requests.settings import LedgerConfig
from perta.recipes.requests.state import State, opened
from perta.store.ledger import Entry
from perta.store.record import read_manifest


def clean_requests(config: LedgerConfig) -> tuple[Entry, list[Path]]:
    """Delete what holds forgotten data (`perta requests clean`).

    Rows of requests that are forgotten go, and with them all work folders and every cleaned
    checkpoint but the newest: an older one still knows what later requests removed. So do copies of
    it and of the full model in the cache, which are made again where they are needed. Rows that the
    last look found to be still there stay, so that they can be forgotten again. Base, full model
    and the data sets are the user's and stay, and so does what a link points to; a warning says so,
    and names what is not where it was left.
    LedgerError, and nothing deleted, where the newest checkpoint is not the ledger's.
    """
    with opened(config) as state:
        newest = state.newest()
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
        records = (read_manifest(place) for place in _within(state.folder / "checkpoints"))
        cached = {place for record in records if record for place in cached_models(record)}
        gone = [place for place in found if not place.is_symlink()]
        for link in (place for place in found if place not in gone):
            warn(f"{link} is a link: what it points to is yours to delete")
        lost = _lost(state)
        for name in lost:
            warn(
                f"{state.folder / name} is not there. If it was moved or copied, what became of it "
                "is yours to delete."
            )
        for place in (*gone, *cached):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        facts = {
            "names": [request.name for request in forgotten],
            "deleted": [str(place.relative_to(state.folder)) for place in gone],
            "not_found": lost,
        }
        return state.write("clean", config, facts), [*gone, *sorted(cached)]


def _lost(state: State) -> list[str]:
    """What requests left that know forgotten data, and nobody knows where it went.

    A clean that was cut off may have deleted it.
    """
    told = {
        name
        for entry in state.of("clean")
        for kind in ("deleted", "not_found")
        for name in entry.facts.get(kind, ())
    }
    applied = [r for r in state.requests if r.applied is not None and not r.cleaned]
    left = [str(state.rows_file(r.name).relative_to(state.folder)) for r in applied]
    for entry in state.of("apply"):
        left += [entry.facts["checkpoint"], f"work/{entry.number}"]
    return [name for name in left if name not in told and not (state.folder / name).exists()]


def _within(folder: Path) -> list[Path]:
    """What lies in a folder; of a link to one, the link."""
    return [folder] if folder.is_symlink() else sorted(folder.glob("*"))
