"""Tables of the report, one form for the page and for CSV files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perta.evidence.measures import MEASURES, SUMMARY, Measure, Reading, measure_of
from perta.report._svg import Style
from perta.report.collect import Cost, Run
from perta.store.costs import STAGES

_GROUPS: Mapping[str, tuple[str, str]] = {
    "forget": ("On the removed examples", "What the model still knows of what was to go."),
    "retain": ("On the examples to keep", "What it still knows of what was to stay."),
    "holdout": ("On examples never seen", "What it makes of examples it was never trained on."),
    "utility": ("General ability", "How well it answers questions from outside the data."),
    "membership": (
        "Membership inference",
        "How well an attacker can tell from the model which examples it was trained on.",
    ),
    "other": ("Further values in the results", "Kept under the names that the results use."),
}

_ROLES: Mapping[str, str] = {
    "base": "before any tuning",
    "full": "before the edit",
    "retrained": "never saw what was removed",
    "forget checkpoint": "tuned on the forget set alone",
    "other": "part not known",
}
_LONG = 12  # rows from which a table is long


@dataclass(frozen=True)
class Entry:
    """One cell: what is read, what it stands for and is sorted by, and a smaller second line."""

    text: str
    raw: Reading | float | str | None
    small: str = ""


@dataclass(frozen=True)
class Column:
    """Heading and explanation of one column."""

    label: str
    meaning: str = ""


@dataclass(frozen=True)
class Row:
    """One row with the model it is about."""

    entries: tuple[Entry, ...]
    run: Run


@dataclass(frozen=True)
class Table:
    """One table, the first column of which holds names; the page folds a minor one away."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    minor: bool = False


def metric_tables(runs: Sequence[Run], *, fold: bool = False) -> list[Table]:
    """One table per group of measures, a row per model; `fold` folds long ones away."""
    evaluated = [run for run in runs if run.measures]
    keys = dict.fromkeys(key for run in evaluated for key in run.measures)
    known = [measure for measure in MEASURES if measure.key in keys]
    others = [measure_of(key) for key in keys if measure_of(key).group == "other"]
    tables = []
    for group, (title, meaning) in _GROUPS.items():
        measures = [measure for measure in (*known, *others) if measure.group == group]
        if measures:
            table = _metric_table(group, title, meaning, measures, evaluated)
            minor = group == "other" or (fold and len(table.rows) > _LONG)
            tables.append(replace(table, minor=minor))
    return tables


def seed_table(runs: Sequence[Run]) -> Table | None:
    """Mean and spread over seeds of each method and strength; None with a single seed each."""
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        if run.measures and run.role != "forget checkpoint":
            groups.setdefault((run.method or run.role, run.alpha), []).append(run)
    several = {
        name: group
        for name, group in groups.items()
        if len({run.seed for run in group}) > 1 and all(run.seed is not None for run in group)
    }
    if not several:
        return None
    keys = [
        m.key
        for m in MEASURES
        if all(m.key in run.measures for group in several.values() for run in group)
        and m.key in SUMMARY
    ]
    rows = []
    for (method, alpha), group in several.items():
        name = method if alpha is None else f"{method}, α {alpha:g}"
        entries = [Entry(name, name, f"{len(group)} seeds")]
        for key in keys:
            values = [run.measures[key].value for run in group]
            mean, spread = statistics.fmean(values), statistics.stdev(values)
            entries.append(Entry(_value_text(key, mean), mean, f"± {_value_text(key, spread)}"))
        rows.append(Row(tuple(entries), group[0]))
    return Table(
        "seeds",
        "Over seeds",
        "Mean and sample standard deviation over seeds of tuning.",
        (Column("model"), *(Column(_long_label(key), measure_of(key).meaning) for key in keys)),
        tuple(rows),
    )


def _long_label(key: str) -> str:
    measure = measure_of(key)
    where = measure.group in ("forget", "retain") and key != "forget_quality"
    return f"{measure.label}, {measure.group}" if where else measure.label


def _metric_table(
    group: str, title: str, meaning: str, measures: Sequence[Measure], runs: Sequence[Run]
) -> Table:
    columns = [Column(measure.label, measure.meaning) for measure in measures]
    rows = [
        Row(
            (
                Entry(
                    run.label,
                    run.label,
                    "as stated by the user" if run.stated else _ROLES.get(run.role, ""),
                ),
                *(_entry(measure.key, run.measures.get(measure.key)) for measure in measures),
            ),
            run,
        )
        for run in runs
        if any(measure.key in run.measures for measure in measures)
    ]
    counts = sorted(
        {
            reading.interval.n
            for run in runs
            for measure in measures
            if (reading := run.measures.get(measure.key)) and reading.interval
        }
    )
    caption = meaning
    if counts:
        many = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        caption += f" n = {many} examples; small print: 95% interval."
    return Table(f"measures_{group}", title, caption, (Column("model"), *columns), tuple(rows))


def _entry(key: str, reading: Reading | None) -> Entry:
    if reading is None:
        return Entry("–", None)
    small = ""
    if reading.interval:
        low, high = reading.interval.low, reading.interval.high
        small = f"{_value_text(key, low)} to {_value_text(key, high)}"
    return Entry(_value_text(key, reading.value), reading, small)


def _value_text(key: str, value: float) -> str:
    """A value with the digits that its measure deserves."""
    if key == "privleak":
        return f"{value:.1f}".replace("-", "−")
    if key == "forget_quality" and 0 < value < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3f}".replace("-", "−")


def edit_lines(run: Run) -> list[list[Any]]:
    """For the CSV file: what the edit did to every tensor."""
    tensors = run.edit["tensors"]
    fields = [name for name in tensors[0] if name != "name"]
    return [["tensor", *fields], *([t.get(f) for f in ("name", *fields)] for t in tensors)]


def cost_lines(found: Sequence[Cost], retraining: float | None) -> list[list[Any]]:
    """Costs for the CSV file."""
    names = [name for name in STAGES.values() if any(name in c.took.stages for c in found)]
    columns = ["total seconds", "share of retraining", "evaluation"]
    columns += ["forward passes over a token", "share of its operations"]
    lines: list[list[Any]] = [["model", *names, *columns]]
    for cost in found:
        took = cost.took
        values = [cost.run.label, *map(took.stages.get, names), took.total, cost.share]
        lines.append([*values, took.evaluation, took.operations or None, cost.operations])
    if retraining is not None:
        lines.append(["retrained", *(None for _ in names), retraining, 1.0, *[None] * 3])
    return lines


def table_lines(table: Table) -> list[list[Any]]:
    """A table for its CSV file; readings become value, interval and number of examples."""
    wide = [
        any(isinstance(entry.raw, Reading) for entry in column)
        for column in zip(*(row.entries for row in table.rows), strict=True)
    ]
    header: list[str] = []
    for column, is_reading in zip(table.columns, wide, strict=True):
        parts = ("", " low", " high", " n") if is_reading else ("",)
        header += [column.label + part for part in parts]
    lines: list[list[Any]] = [header]
    for row in table.rows:
        cells = zip(row.entries, wide, strict=True)
        lines.append([cell for entry, is_reading in cells for cell in _cells(entry, is_reading)])
    return lines


def _cells(entry: Entry, is_reading: bool) -> list[Any]:
    if not isinstance(entry.raw, Reading):
        return [entry.raw, *[None] * (3 * is_reading)]
    interval = entry.raw.interval
    ends = (interval.low, interval.high, interval.n) if interval else [None] * 3
    return [entry.raw.value, *ends]


def file_name(label: str) -> str:
    """A label as part of a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in label).strip("_.") or "model"


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """A look for every model: one colour and mark per method, grey for references."""
    methods = list(dict.fromkeys(run.method for run in runs if run.role == "edited"))
    shapes = ("circle", "diamond", "triangle", "plus", "down", "cross", "hexagon", "square")
    references = {
        "base": Style("r-base", "circle"),
        "full": Style("r-full", "square"),
        "retrained": Style("r-retrained", "star"),
        "forget checkpoint": Style("r-other", "down"),
        "other": Style("r-other", "plus"),
    }
    looks = {}
    for run in runs:
        if run.role == "edited":
            i = methods.index(run.method)
            looks[run.label] = Style(f"s{i % 8}", shapes[i % 8], f"t-{i}")
        else:
            looks[run.label] = references[run.role]
    return looks
