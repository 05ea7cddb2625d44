"""Tables of the report, one form for the page and for CSV files."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perta.evidence.measures import MEASURES, SUMMARY, Measure, Reading, measure_of
from perta.progress import visible
from perta.report._svg import Style
from perta.report.collect import Collection, Run
from perta.store.costs import STAGES, Costs, costs_of, passes_of, seconds_of

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
_LONG = 12
"""Rows from which a table is long."""


@dataclass(frozen=True)
class Entry:
    """One cell: what is read, what it is sorted by, and a smaller second line."""

    text: str
    sort: float | str = ""
    small: str = ""
    raw: Any = None


@dataclass(frozen=True)
class Column:
    """One column: heading, explanation, and whether it holds numbers."""

    label: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """One row with the model it is about."""

    entries: tuple[Entry, ...]
    run: Run | None = None


@dataclass(frozen=True)
class Table:
    """One table, the first column of which holds names; the page folds a minor one away."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    minor: bool = False


@dataclass(frozen=True)
class Segment:
    """One stage's share of a cost bar."""

    name: str
    seconds: float
    percent: float
    stage: int


@dataclass(frozen=True)
class Cost:
    """What one way to forget took.

    Attributes:
        share: of the seconds that retraining took, where it is known.
        evaluation: seconds apart from these.
        passes: operations, as forward passes over one token.
        operations: their share of those of retraining, where both are known.
    """

    run: Run
    label: str
    segments: tuple[Segment, ...]
    total: float
    share: float | None
    evaluation: float
    passes: float
    operations: float | None


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
        entries = [Entry(name, name, f"{len(group)} seeds", name)]
        for key in keys:
            values = [run.measures[key].value for run in group]
            spread = statistics.stdev(values)
            mean = statistics.fmean(values)
            entries.append(
                Entry(_value_text(key, mean), mean, f"± {_value_text(key, spread)}", mean)
            )
        rows.append(Row(tuple(entries), group[0]))
    columns = [Column("model", "", numeric=False)]
    columns += [Column(_long_label(key), measure_of(key).meaning) for key in keys]
    return Table(
        "seeds",
        "Over seeds",
        "Mean and sample standard deviation over seeds of tuning.",
        tuple(columns),
        tuple(rows),
    )


def _long_label(key: str) -> str:
    measure = measure_of(key)
    where = measure.group in ("forget", "retain") and key != "forget_quality"
    return f"{measure.label}, {measure.group}" if where else measure.label


def _metric_table(
    group: str, title: str, meaning: str, measures: Sequence[Measure], runs: Sequence[Run]
) -> Table:
    columns = [Column("model", "", numeric=False)]
    columns += [Column(measure.label, measure.meaning) for measure in measures]
    rows = [
        Row(
            (
                Entry(run.label, run.label, _part(run), run.label),
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
    return Table(f"measures_{group}", title, caption, tuple(columns), tuple(rows))


def _part(run: Run) -> str:
    return "as stated by the user" if run.stated else _ROLES.get(run.role, "")


def _entry(key: str, reading: Reading | None) -> Entry:
    if reading is None:
        return Entry("–", -math.inf, "", None)
    small = ""
    if reading.interval:
        low, high = reading.interval.low, reading.interval.high
        small = f"{_value_text(key, low)} to {_value_text(key, high)}"
    return Entry(_value_text(key, reading.value), reading.value, small, reading)


def _value_text(key: str, value: float) -> str:
    """A value with the digits that its measure deserves."""
    if key == "privleak":
        return f"{value:.1f}".replace("-", "−")
    if key == "forget_quality" and 0 < value < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3f}".replace("-", "−")


def edit_tables(runs: Sequence[Run]) -> list[Table]:
    """For each edited model, what the edit did to every tensor."""
    tables = []
    for run in runs:
        tensors = run.edit.get("tensors", [])
        if not tensors:
            continue
        fields = [name for name in tensors[0] if name != "name"]
        columns = [Column("tensor", "", numeric=False), *(Column(name) for name in fields)]
        rows = tuple(_raw_row(t.get(f) for f in ("name", *fields)) for t in tensors)
        name = f"edit_{file_name(run.label)}"
        tables.append(Table(name, run.label, "", tuple(columns), rows))
    return tables


def costs(collection: Collection) -> tuple[list[Cost], float | None]:
    """What every edited model took whose stages are recorded, and retraining, in seconds."""
    retrained = [run for run in collection.by_role("retrained") if seconds_of(run.spent)]
    found = []
    for run in collection.by_role("edited"):
        own = run.results.get("perta")
        apart = own if own is not run.spent else None
        cost = costs_of(run.spent, collection.records, apart)
        if cost.stages:
            found.append((run, cost))
    times = [seconds_of(run.spent) for run in retrained]
    longest = max([cost.total for _, cost in found] + times) if found or times else 1.0
    return [_cost(run, cost, longest or 1.0, retrained) for run, cost in found], (
        times[0] if times else None
    )


def _cost(run: Run, cost: Costs, longest: float, retrained: Sequence[Run]) -> Cost:
    """One cost beside that of the retrained model that belongs to it, of its seed if there is."""
    fitting = sorted((r for r in retrained if run.fits(r)), key=lambda r: r.seed != run.seed)
    whole = fitting[0].spent if fitting else {}
    passes = passes_of(whole)
    return Cost(
        run,
        run.label,
        tuple(
            Segment(name, s, 100 * s / longest, 1 + place % 4)
            for place, (name, s) in enumerate(cost.stages.items())
        ),
        cost.total,
        cost.share(seconds_of(whole)),
        cost.evaluation,
        cost.operations,
        cost.operations / passes if passes and cost.operations else None,
    )


def cost_table(found: Sequence[Cost], retraining: float | None) -> Table:
    """Costs for the CSV file."""
    names = [n for n in STAGES.values() if any(n == s.name for c in found for s in c.segments)]
    columns = [Column("model", "", numeric=False), *(Column(name) for name in names)]
    columns += [Column("total seconds"), Column("share of retraining"), Column("evaluation")]
    columns += [Column("forward passes over a token"), Column("share of its operations")]
    lines = []
    for cost in found:
        seconds = {segment.name: segment.seconds for segment in cost.segments}
        values = [cost.label, *(seconds.get(name) for name in names), cost.total, cost.share]
        lines.append([*values, cost.evaluation, cost.passes or None, cost.operations])
    if retraining is not None:
        lines.append(["retrained", *(None for _ in names), retraining, 1.0, *[None] * 3])
    return Table("costs", "Cost", "", tuple(columns), tuple(map(_raw_row, lines)))


def _raw_row(values: Iterable[Any]) -> Row:
    return Row(tuple(Entry(str(value), raw=value) for value in values))


def to_csv(table: Table) -> str:
    """A table as CSV; readings become value, interval and number of examples."""
    wide = [
        any(isinstance(row.entries[i].raw, Reading) for row in table.rows)
        for i in range(len(table.columns))
    ]
    header: list[str] = []
    for column, is_reading in zip(table.columns, wide, strict=True):
        header.append(column.label)
        if is_reading:
            header += [f"{column.label} {part}" for part in ("low", "high", "n")]
    lines: list[list[Any]] = [header]
    for row in table.rows:
        line: list[Any] = []
        for entry, is_reading in zip(row.entries, wide, strict=True):
            line += _csv_cells(entry, is_reading)
        lines.append(line)
    return csv_text(lines)


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as CSV, texts such that no spreadsheet runs one as a formula."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerows([_inert(cell) for cell in line] for line in lines)
    return target.getvalue()


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    line = visible(cell.replace("\r", "\n"))  # unquoted, it would end the row for many readers
    return f"'{line}" if line.startswith(tuple("=+-@\t\n＝＋－＠")) else line


def write_csv(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table that has rows."""
    files = []
    for table in tables:
        if table.rows:
            file = folder / f"{table.name}.csv"
            file.write_text(to_csv(table), "utf-8")
            files.append(file)
    return files


def _csv_cells(entry: Entry, is_reading: bool) -> list[Any]:
    if not is_reading:
        return ["" if entry.raw is None else entry.raw]
    reading = entry.raw
    if not isinstance(reading, Reading):
        return ["", "", "", ""]
    if reading.interval is None:
        return [reading.value, "", "", ""]
    return [reading.value, reading.interval.low, reading.interval.high, reading.interval.n]


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
