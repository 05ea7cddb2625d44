"""Results and records that a report is made of, read from whatever is given.

Results files, checkpoint folders, an output of `perta unlearn` and a folder of results may be
mixed. They are joined by fingerprint: a results file names the checkpoint it measured by its
content, and a checkpoint's record names its inputs the same way. So roles (base, full,
retrained, edited) come from what happened, see `provenance`, or from the user, who may state one
as in `retrained=results.json`; never from names of files or from where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perta.errors import DataError
from perta.evidence.measures import Reading, read_measures
from perta.store.costs import Costs, costs_of, passes_of, seconds_of
from perta.store.parse import read_json
from perta.store.provenance import (
    STATED,
    Record,
    Request,
    Role,
    is_unlearned,
    method_of,
    refuse_claim,
    requests_of,
    role_of,
)
from perta.store.record import MANIFEST, aggregates, is_record, read_manifest, refuse_changed

_REFERENCES: Mapping[Role, str] = {
    "base": "base model",
    "full": "model before the edit",
    "retrained": "retrained model",
}

_COMPARISON = "bench compare"  # stage of results whose own record says what the model was


@dataclass(frozen=True)
class Run:
    """One model of the report."""

    label: str
    role: Role
    measures: Mapping[str, Reading] = field(default_factory=dict, repr=False)  # by key
    results: Record = field(default_factory=dict, repr=False)
    record: Record = field(default_factory=dict, repr=False)  # of the checkpoint, if it was found
    method: str | None = None
    alpha: float | None = None
    seed: int | None = None  # of the tuning behind it
    fingerprint: str | None = None  # content of the checkpoint
    stated: bool = False  # whether the role is the user's word, which no record confirms
    given: bool = False  # whether the folder of its checkpoint was named

    @property
    def made(self) -> Record:
        """The record of its results."""
        found: Record = self.results.get("perta", {})
        return found

    @property
    def edit(self) -> Record:
        """What the edit did to each tensor, if the record says so."""
        found: Record = self.record.get("edit") or {}
        return found

    @property
    def spent(self) -> Record:
        """The record of what it took: the checkpoint's, or of a comparison its results' own."""
        return self.made if self.made.get("stage") == _COMPARISON else self.record

    def fits(self, reference: Run) -> bool:
        """Whether a reference can be this model's, as far as the records of both tell."""
        inputs = {
            **self.record.get("unlearn", {}).get("inputs", {}),
            **self.record.get("inputs", {}),
        }
        if reference.role == "retrained":
            wanted, found = inputs.get("base"), reference.record.get("inputs", {}).get("base")
        else:
            wanted, found = inputs.get(reference.role), reference.fingerprint
        return not wanted or not found or wanted == found

    def same_set(self, other: Run, name: str) -> bool:
        """Whether two models were measured on the same examples, as far as files can tell."""
        mine, theirs = self.set_fingerprint(name), other.set_fingerprint(name)
        if mine and theirs:
            return mine == theirs
        return self.set_size(name) == other.set_size(name)

    def set_fingerprint(self, name: str) -> str | None:
        """Content of the set it was measured on, where the results say so."""
        inputs, settings = self.made.get("inputs", {}), self.made.get("settings", {})
        if name in inputs:
            return str(inputs[name])
        parts = [settings.get(part) for part in ("forget_split", "corpus", "limit")]
        if "data" in inputs and any(parts):  # a benchmark names a folder and what it took of it
            return "/".join(str(part) for part in (inputs["data"], *parts) if part)
        return None

    def set_size(self, name: str) -> int | None:
        """Number of examples it was measured on; None without per-example values."""
        sizes = {
            len(reading.examples)
            for key, reading in self.measures.items()
            if key.startswith(f"{name}_") and reading.examples
        }
        return max(sizes) if sizes else None


@dataclass(frozen=True)
class Collection:
    """All that a report is made of."""

    runs: tuple[Run, ...]  # in the order of the page: base, full, retrained, then edited ones
    records: Mapping[str, Record] = field(repr=False)  # content -> record of all outputs found
    notices: tuple[str, ...] = ()

    def by_role(self, role: Role) -> list[Run]:
        """The runs of one role."""
        return [run for run in self.runs if run.role == role]

    def input_record(self, record: Record, name: str) -> Record:
        """Record of an input of an output, empty if it was not found."""
        return self.records.get(str(record.get("inputs", {}).get(name)), {})


def collect(paths: Iterable[str]) -> Collection:
    """Join results files and folders, each optionally as `label=path`, or stop with a DataError."""
    found = _Found()
    for text in paths:
        label, path = _split_label(text)
        found.add(path, label)
    if not found.items and not any(map(is_unlearned, found.records.values())):
        raise DataError(
            "Nothing to report on: none of the paths holds evaluation results. Give results of "
            "`perta evaluate` or `perta bench`, an output of `perta unlearn`, or a demo folder."
        )
    found.follow()
    found.refuse_stale()
    requests = requests_of(found.records, [item.made for item in found.items])
    runs = [_make_run(item, found, requests) for item in (*found.items, *found.unevaluated())]
    order = (*_REFERENCES, "edited")
    place = {role: i for i, role in enumerate(order)}
    named = _relabel(sorted(_distinct(runs), key=lambda run: place.get(run.role, len(order))))
    stated = (
        f"{run.label} is the {_REFERENCES[run.role]} as stated by the user; no record confirms it."
        for run in named
        if run.stated
    )
    notices = (*found.notices, *stated, *_unknown(named))
    return Collection(_judgeable(named), found.records, notices)


@dataclass(frozen=True)
class _Item:
    """One set of results before its role is known."""

    name: str
    path: Path
    results: Record
    label: str | None = None
    role: Role | None = None
    record: Record = field(default_factory=dict)
    given: bool = False

    @property
    def made(self) -> Record:
        found: Record = self.results.get("perta", {})
        return found

    @property
    def fingerprint(self) -> str | None:
        """Content of the checkpoint that was measured."""
        return self.made.get("inputs", {}).get("checkpoint") or self.record.get("content")


class _Found:
    """What the given paths hold."""

    def __init__(self) -> None:
        self.items: list[_Item] = []
        self.records: dict[str, Record] = {}
        self.notices: list[str] = []
        self.named: set[str] = set()
        self._places: dict[str, Path] = {}

    def add(self, path: Path, label: str | None) -> None:
        if path.is_dir():
            self._add_folder(path, label)
        elif path.is_file():
            self._add_file(path, label)
        else:
            raise DataError(
                f"There is no {path}. Give a results file, a checkpoint folder or a folder of "
                "results; a name can be put before it as in full=results/full.json."
            )

    def follow(self) -> None:
        """Find the records of checkpoints that results and other records point to."""
        for item in list(self.items):
            self._look(item.made, item.path)
        # Those found on the way are followed as well: a tuned model's base, what moments join.
        followed: set[str] = set()
        while waiting := [content for content in self.records if content not in followed]:
            for content in waiting:
                followed.add(content)
                self._look(self.records[content], self._places.get(content))

    def unevaluated(self) -> list[_Item]:
        """Unlearned models that were given without results: what was done can still be shown."""
        known = {item.fingerprint for item in self.items}
        return [
            _Item("edited", self._places[content], {}, None, "edited", record, given=True)
            for content, record in self.records.items()
            if is_unlearned(record) and content in self.named and content not in known
        ]

    def refuse_stale(self) -> None:
        """Stop at results of a model that is no longer the one in the folder that was named."""
        folders = {self._places[content].resolve(): content for content in self.named}
        for item in self.items:
            measured = item.made.get("settings", {}).get("checkpoint")
            wanted = item.made.get("inputs", {}).get("checkpoint")
            if not isinstance(measured, str) or not wanted:
                continue
            there = folders.get(Path(measured).resolve())
            if there is not None and there != wanted:
                raise DataError(
                    f"{item.path} measured another model than the one in {measured}: fingerprint "
                    f"{wanted[:16]} there, {there[:16]} here. Evaluate it again, or leave one of "
                    "them out."
                )

    def _look(self, record: Record, near: Path | None) -> None:
        """Find the records of a record's inputs where its settings say that they lie."""
        settings = record.get("settings", {})
        for name, wanted in record.get("inputs", {}).items():
            written = _place_of(name, settings)
            if not isinstance(written, str) or wanted in self.records:
                continue
            last = Path(written).name
            # A results folder that was moved as a whole keeps its neighbours.
            around = [] if near is None else [near.parent / last, near.parent.parent / last]
            for place in (Path(written), *around):
                found = read_manifest(place) if place.is_dir() else None
                if found is not None and found.get("content") == wanted:
                    self._remember(found, place)
                    break

    def _remember(self, record: Record, place: Path, *, named: bool = False) -> None:
        content = record.get("content")
        if isinstance(content, str):
            if named:
                self.named.add(content)
            self.records.setdefault(content, record)
            self._places.setdefault(content, place)

    def _remember_children(self, folder: Path, *, named: bool = False) -> bool:
        """Whether there are any."""
        children = sorted(folder.iterdir()) if folder.is_dir() else ()
        found = [(read_manifest(child), child) for child in children if child.is_dir()]
        for record, child in found:
            if record is not None:
                self._remember(record, child, named=named)
        return any(record is not None for record, _ in found)

    def _add_folder(self, folder: Path, label: str | None) -> None:
        record, before = read_manifest(folder), len(self.items)
        if record is not None:
            self._remember(record, folder, named=True)
            if "unlearn" in record:
                self._add_unlearned(folder, record, label)
            elif is_unlearned(record) and label:
                self.items.append(_Item(folder.name, folder, {}, label, "edited", record))
        else:
            results = folder / "results"
            files = sorted((results if results.is_dir() else folder).glob("*.json"))
            files = [file for file in files if aggregates(_load(file) or {})]
            for file in files:
                self._add_file(file, label if len(files) == 1 else None)
            if not self._remember_children(folder, named=True) and not files:
                raise DataError(
                    f"{folder} holds neither results (*.json, or a folder results/) nor a record "
                    f"({MANIFEST}) of an output of perta."
                )
        if label and label not in {item.label for item in self.items[before:]}:
            raise DataError(
                f"{label}={folder}: there are no results of one model that could have that name. "
                "Give the file of them, as `perta evaluate` writes it."
            )

    def _add_unlearned(self, folder: Path, record: Record, label: str | None) -> None:
        made = record["unlearn"]
        written = made.get("settings", {}).get("work_dir")
        places = [Path(place) for place in (written, f"{folder}.work") if place]
        for place in places:
            self._remember_children(place)
        inputs = {**record.get("inputs", {}), **made.get("inputs", {})}
        # A run that retrained has an output too, and it is not an unlearned model.
        output: Role | None = "edited" if is_unlearned(record) else None
        parts: tuple[tuple[str, Role | None, str | None], ...] = (
            ("base", "base", inputs.get("base")),
            ("before", "full", inputs.get("full")),
            ("after", output, record.get("content")),
        )
        for when, role, content in parts:
            results, file = self._evaluation(places, when, content)
            if results is None:
                results = _from_aggregates(made, when, content)
                if results is not None:
                    self.notices.append(
                        f"The per-example results of {folder.name} ({_WHEN[when]}) are gone; its "
                        "means are shown without intervals."
                    )
                elif when == "after" and label:
                    results = {}  # its edit can still be shown under that name
                else:
                    continue
            place = file or folder
            if when == "after":
                name = label or (folder.name if output else None)
                item = _Item(folder.name, place, results, name, role, record, given=True)
            else:
                item = _Item(str(role), place, results, None, role)
            self.items.append(item)

    def _evaluation(
        self, places: Iterable[Path], when: str, content: str | None
    ) -> tuple[Record | None, Path | None]:
        """The results of one model of a run; a work folder may hold those of another run."""
        for file in (place / f"evaluation_{when}.json" for place in places):
            results = _load(file)
            if results is None:
                continue
            measured = results.get("perta", {}).get("inputs", {}).get("checkpoint")
            if measured and measured == content:
                return results, file
            self.notices.append(
                f"{file.name} in {file.parent.name} is of another model, so it is not used."
            )
        return None, None

    def _add_file(self, path: Path, label: str | None) -> None:
        results = _load(path)
        if results is None or not aggregates(results):
            raise DataError(
                f"{path} holds no evaluation results: expected a JSON object of measures, each "
                'as {"agg_value": …, "value_by_index": {…}}.'
            )
        self.items.append(_Item(path.stem, path, results, label))


def _split_label(text: str) -> tuple[str | None, Path]:
    label, separator, rest = text.partition("=")
    if separator and label and rest and not Path(text).exists():
        return label.strip(), Path(rest)
    return None, Path(text)


def _load(path: Path) -> Record | None:
    try:
        content = read_json(path, DataError, nan=True)
    except DataError:
        return None
    if not is_record(content.get("perta", {})):
        # A record of another form than this package writes says nothing.
        return {**content, "perta": {}}
    refuse_changed(content, path)
    return content


_WHEN = {"base": "the base model", "before": "before the edit", "after": "after the edit"}


def _place_of(name: str, settings: Record) -> Any:
    """Where an input lay, by the settings; of several forget checkpoints and moments, by number."""
    stem, _, number = name.rpartition("_")
    if not number.isdigit():
        stem, number = name, "1"
    written = settings.get("folders" if stem == "moments" else stem)
    if isinstance(written, list):
        place = int(number) - 1
        return written[place] if place < len(written) else None
    return settings.get(name)


def _from_aggregates(made: Record, when: str, content: str | None) -> Record | None:
    values = made.get("evaluation", {}).get(when)
    if not values:
        return None
    sets = {name: made["inputs"][name] for name in ("forget", "retain") if name in made["inputs"]}
    inputs = {"checkpoint": content, **sets}
    return {
        **{name: {"agg_value": value} for name, value in values.items()},
        "perta": {"inputs": {name: value for name, value in inputs.items() if value}},
    }


def _make_run(item: _Item, found: _Found, requests: list[Request]) -> Run:
    record = item.record or found.records.get(str(item.fingerprint), {})
    role, is_stated = _role(item, found, requests)
    # A comparison writes no checkpoints; its results say what was measured.
    told = item.made if item.made.get("stage") == _COMPARISON else record
    alpha = told.get("settings", {}).get("scaling_coef")
    is_edited = role == "edited"
    label = item.label or _default_label(item, record)
    return Run(
        label=label,
        role=role,
        measures=read_measures(item.results),
        results=item.results,
        record=record,
        method=(method_of(told) or label) if is_edited else None,
        alpha=float(alpha) if is_edited and isinstance(alpha, int | float) else None,
        seed=_seed_of(told, found),
        fingerprint=item.fingerprint,
        stated=is_stated,
        given=item.given,
    )


def _default_label(item: _Item, record: Record) -> str:
    """The name of an output's folder says more than that of the file with its results."""
    made = item.made
    if made.get("stage") == _COMPARISON:
        return method_of(made) or str(made.get("settings", {}).get("role", item.name))
    written = record.get("settings", {}).get("output") if is_unlearned(record) else None
    return Path(str(written)).name if written else item.name


def _role(item: _Item, found: _Found, requests: list[Request]) -> tuple[Role, bool]:
    """A model's role, and whether it is the user's word alone."""
    if item.role is not None and item.label not in STATED:
        return item.role, False
    made, fingerprint = item.made, item.fingerprint
    known = role_of(fingerprint, made.get("inputs", {}).get("forget"), found.records, requests)
    if made.get("stage") == _COMPARISON and made.get("settings", {}).get("role"):
        known = made["settings"]["role"]
    if item.label in STATED:
        claim: Role = item.label
        if claim != known:
            refuse_claim(claim, fingerprint, str(item.path), found.records, requests)
        return claim, claim != known
    # Whatever else the user calls a model is a model to be judged.
    return ("edited" if known == "other" and item.label else known), False


def _judgeable(runs: list[Run]) -> tuple[Run, ...]:
    """Where no record and no name says which model was edited, each of unknown part may be."""
    if any(run.role == "edited" for run in runs):
        return tuple(runs)
    return tuple(
        replace(run, role="edited", method=run.label) if run.role == "other" else run
        for run in runs
    )


def _unknown(runs: list[Run]) -> list[str]:
    names = [run.label for run in runs if run.role == "other"]
    if not names:
        return []
    known = any(run.role == "edited" for run in runs)
    done = "they are shown and not judged" if known else "each is judged as if it were the result"
    return [
        f"No record says what part these models played, so {done}: {', '.join(names)}. A name "
        "before a path says it, as in retrained=PATH, full=PATH, base=PATH or edited=PATH."
    ]


def _seed_of(record: Record, found: _Found) -> int | None:
    forget = found.records.get(str(record.get("inputs", {}).get("forget_checkpoint")), {})
    for made in (record.get("unlearn", {}), forget, record):
        seed = made.get("settings", {}).get("seed")
        if isinstance(seed, int):
            return seed
    return None


def _distinct(runs: Iterable[Run]) -> list[Run]:
    """The same results given twice, or as the full model of several runs, count once."""
    kept: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        values = tuple(sorted((key, reading.value) for key, reading in run.measures.items()))
        kept.setdefault((run.role, run.fingerprint or run.label, values), run)
    return list(kept.values())


def _relabel(runs: list[Run]) -> list[Run]:
    """Give every run a name of its own; strengths and seeds are added where names collide."""
    seeds = {run.seed for run in runs if run.seed is not None}
    named: list[Run] = []
    for run in runs:
        peers = [other for other in runs if other is not run and other.role == run.role]
        twins = [other for other in peers if other.label == run.label]
        parts = [run.label if peers or run.role not in _REFERENCES else run.role]
        if any(other.alpha != run.alpha for other in twins) and run.alpha is not None:
            parts.append(f"α {run.alpha:g}")
        if twins and len(seeds) > 1 and run.seed is not None:
            parts.append(f"seed {run.seed}")
        label = " ".join(parts)
        number = sum(other.label == label for other in named)
        named.append(replace(run, label=label if not number else f"{label} ({number + 1})"))
    return named


# --- what it took -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one way to forget took."""

    run: Run
    took: Costs
    share: float | None  # of the seconds that retraining took, where it is known
    operations: float | None  # share of the operations of retraining, where both are known


def costs(collection: Collection) -> tuple[list[Cost], float | None]:
    """What every edited model took whose stages are recorded, and retraining, in seconds."""
    retrained = [run for run in collection.by_role("retrained") if seconds_of(run.spent)]
    found = []
    for run in collection.by_role("edited"):
        apart = run.made if run.made is not run.spent else None
        took = costs_of(run.spent, collection.records, apart)
        if took.stages:
            found.append(_cost(run, took, retrained))
    return found, seconds_of(retrained[0].spent) if retrained else None


def _cost(run: Run, took: Costs, retrained: Sequence[Run]) -> Cost:
    """One cost beside that of the retrained model that belongs to it, of its seed if there is."""
    fitting = sorted((r for r in retrained if run.fits(r)), key=lambda r: r.seed != run.seed)
    whole = fitting[0].spent if fitting else {}
    seconds, passes = seconds_of(whole), passes_of(whole)
    share = took.total / seconds if seconds else None
    operations = took.operations / passes if passes and took.operations else None
    return Cost(run, took, share, operations)
