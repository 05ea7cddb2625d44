"""Delete what an unlearning leaves behind that still knows what was removed (`perta clean`).

    OUTPUT.work ── forget checkpoints, directions, measurements of the forget set, evaluations,
                   copies of rows
    OUTPUT.* ───── states of unfinished training, a direction, journals, unfinished outputs
    elsewhere ──── a direction that the record names; merged adapters in the cache

Only what this package wrote is deleted, and only where its own record says what it is. What was
given to the run stays and is named: it may be another run's. Moments and importance of retained
rows stay: they hold nothing of what was removed, and the next run uses them.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from perta.errors import ConfigError, PertaError
from perta.models.resolve import cache_folder
from perta.options import at_home
from perta.recipes._request import HELD_BACK, PROTECTED
from perta.recipes._run_record import STRENGTH
from perta.recipes.settings import WORK
from perta.store.atomic import beside, recover
from perta.store.fingerprint import fingerprint
from perta.store.provenance import FORGET_CHECKPOINT, Record, is_unlearned
from perta.store.record import read_manifest

_TUNED = {"finetune", "rounds"}
_MEASURED = {"importance", "moments"}
_GIVEN = {
    FORGET_CHECKPOINT: "a model tuned on the forget set",
    "forget_importance": "importance on the forget set",
    "forget_moments": "moments of the forget set",
}


@dataclass(frozen=True)
class Cleaned:
    """What was deleted, and what was not."""

    deleted: tuple[Path, ...]  # with a dry run what would be
    kept: tuple[Path, ...]  # what lies in the work folder and holds nothing of the forget set
    left: tuple[str, ...] = field(default=())  # sentences on what still knows it, or may


def clean(run: Path, *, dry_run: bool = False) -> Cleaned:
    """Delete what a run, or one that broke off before `run`, left that knows the forget set."""
    output = at_home(run).absolute()
    record = read_manifest(output) or {} if output.is_dir() else {}
    work = _work(output, record)
    if not is_unlearned(record) and (output.exists() or not _records(work)):
        raise ConfigError(
            f"{run} is no run that can be cleaned: it has no record (perta.json) of an edit or a "
            f"training, and there is no {output.name}{WORK} beside it with what a run left."
        )
    recover(output)
    if any(output.parent.glob(f".{output.name}.partial-*")):
        raise ConfigError(f"{output} is being written. Wait until that run has ended.")
    inputs = _inputs(record)
    found = [*_beside(output), *_named(record, inputs), *cached_models(record)]
    kept: list[Path] = []
    foreign: list[Path] = []
    for place in sorted(work.iterdir()) if work.is_dir() and not work.is_symlink() else ():
        if _knows(place, inputs):
            found.append(place)
        else:
            is_ours = _record_of(place) is not None or place.name == STRENGTH
            (kept if is_ours else foreign).append(place)
    deleted = tuple(dict.fromkeys(found))
    if not dry_run:
        for place in deleted:
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
        if work.is_dir() and not work.is_symlink() and not any(work.iterdir()):
            work.rmdir()
    left = (
        *_left(output, record, work, inputs, deleted),
        *(f"{place}: not known to be made by perta" for place in foreign),
        "copies, backups and snapshots of the disk, logs, and caches of the hub",
        "pages made with --show-texts, and results written to other places",
    )
    return Cleaned(deleted, tuple(kept), left)


def _work(output: Path, record: Record) -> Path:
    settings = record.get("unlearn", {}).get("settings", {})
    places = [settings.get(name) for name in ("work_dir", "output")]
    if all(isinstance(place, str) for place in places):
        written, named = map(Path, places)
        # From another folder than the run's a relative path may lead to the files of another run.
        is_its_own = written.is_absolute() or named.resolve() == output.resolve()
        if is_its_own and written.is_dir():
            return written.absolute()
    # A run that was moved as a whole still has its work folder beside it.
    return beside(output, WORK)


def _records(folder: Path) -> list[Record]:
    """Records of what lies in a folder."""
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    return [found for place in places if (found := _record_of(place)) is not None]


def _record_of(place: Path) -> Record | None:
    is_own = not place.is_symlink() and (place.is_dir() or place.suffix == ".json")
    return read_manifest(place) if is_own else None


def _beside(output: Path) -> Iterator[Path]:
    """States, a direction and a journal, which have the output's name."""
    states, journal = beside(output, ".resume"), beside(output, ".journal")
    if (states / "state.pt").is_file() and not states.is_symlink():
        yield states
    if journal.is_file():
        yield journal
    direction = beside(output, ".direction")
    if (_record_of(direction) or {}).get("stage") == "direction":
        yield direction


def _named(record: Record, inputs: Mapping[str, str]) -> Iterator[Path]:
    """The direction of an edit, if it is still the one that was subtracted."""
    written = record.get("settings", {}).get("direction")
    if record.get("stage") != "edit" or not isinstance(written, str):
        return
    made = _record_of(Path(written)) or {}
    if made.get("stage") == "direction" and made.get("content") == inputs.get("direction"):
        yield Path(written).absolute()


def cached_models(record: Record) -> Iterator[Path]:
    """Models of the cache that know what a run removed, or one before it: its record says which.

    They are adapters merged, and files and quantised models converted to be read.
    """
    inputs = _inputs(record)
    knowing = {
        print_
        for name, print_ in inputs.items()
        if name == "full" or name.startswith(FORGET_CHECKPOINT)
    }
    knowing.update(record.get("earlier_full", ()))
    knowing.discard(inputs.get("base", ""))
    for kind in ("merged", "gguf", "plain"):
        folder = cache_folder() / kind
        for place in sorted(folder.iterdir()) if folder.is_dir() else ():
            with suppress(PertaError, OSError):  # another's, or one that is no model
                if not place.is_symlink() and fingerprint(place) in knowing:
                    yield place


def _inputs(record: Record) -> dict[str, str]:
    """Fingerprints of what a run read, as a whole and in its last stage."""
    return {**record.get("unlearn", {}).get("inputs", {}), **record.get("inputs", {})}


def _knows(place: Path, inputs: Mapping[str, str]) -> bool:
    """Whether something in a work folder holds rows, or was made from the forget set."""
    name = place.name
    if place.is_symlink():
        return False
    if place.is_file():
        if name in (PROTECTED, HELD_BACK) or name.endswith(".journal"):
            return True
        return (_record_of(place) or {}).get("stage") == "evaluate"
    if name.endswith(".resume") and (place / "state.pt").is_file():
        return True
    made = _record_of(place) or {}
    stage, data = made.get("stage"), made.get("inputs", {}).get("data")
    if stage in _TUNED:
        return not name.startswith("retain") or data == inputs.get("forget")
    if stage in _MEASURED:
        return data == inputs.get("forget") or name.startswith("forget")
    return stage in ("direction", "merge-moments")  # these add up facts of the forget set


def _several(written: object) -> list[str]:
    """Places in a record, which has one as text and several as a list."""
    return [str(one) for one in (written if isinstance(written, list) else [written]) if one]


def _left(
    output: Path, record: Record, work: Path, inputs: Mapping[str, str], deleted: Collection[Path]
) -> Iterator[str]:
    """What clean cannot delete, or cannot know."""
    whole = record.get("unlearn", {})
    # A whole run gave its edit what it had made itself, by a path that may no longer lead there.
    given = whole.get("sources") or record.get("settings", {})
    sources = {**record.get("settings", {}), **given}
    for name, what in (("forget", "the forget set"), ("full", "the model that knows it")):
        if isinstance(sources.get(name), str):
            yield f"{sources[name]}: {what}, which is yours to delete"
    for name, what in _GIVEN.items():
        for place in dict.fromkeys(_several(given.get(name))):
            there = Path(place).absolute()
            if there not in deleted and not there.is_relative_to(work):
                yield f"{place}: {what}, which is yours to delete"
    for other in sorted(output.parent.glob(f"*{WORK}")):
        same = [made.get("inputs", {}).get("data") for made in _records(other)]
        if other != work and inputs.get("forget") in same:
            yield f"{other}: another run's, with what was made from the same forget set"
