"""Records of finished runs as means with their spread over seeds, on the terminal and as files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from perta.data.rows import csv_text
from perta.store.atomic import write_text
from perta.store.costs import costs_of
from perta.store.provenance import Record
from perta.terminal import console

_VIEWS = {
    "equal": "at equal forgetting",
    "fixed": "at the default strength",
    "resistant": "at equal resistance to relearning",
}
_FACTS_OF = {"forget": "forget", "retain": "unseen retain", "relearned": "relearned"}
_FACTS = {
    "choice_accuracy": "facts chosen",
    "choice_probability": "choice prob.",
    "fact_probability": "fact prob.",
    "hit_64": "hit in 64",
    "worst_answer": "worst answer",
    "worst_fact": "worst fact",
    "beyond": "rows beyond 95%",
}
COLUMNS = {
    "strength": "α",
    "forget_probability": "forget prob.",
    "forget_extraction_strength": "forget extr.",
    "retain_probability": "unseen retain prob.",
    "retain_extraction_strength": "unseen retain extr.",
    "protected_probability": "protected prob.",
    "protected_extraction_strength": "protected extr.",
    **{
        f"{name}_{measure}": f"{title} {column}"
        for name, title in _FACTS_OF.items()
        for measure, column in _FACTS.items()
    },
    "facts_probability": "facts prob.",
    "general_loss": "general loss",
    "relearned": "relearned",
    "suite_forget_quality": "forget quality",
    "suite_model_utility": "model utility",
    "suite_forget_truth_ratio": "forget truth ratio",
    "suite_privleak": "privleak",
    "seconds": "seconds without search",
    "passes": "forward passes over a token",
    "share": "share of retraining",
    "tries": "strengths tried",
    "attempts": "learning rates tried",
    "learning_rate": "learning rate",
}
_ABILITY = "ability_"
_NAME_WIDTH = 24
_PRINTED = (
    "strength",
    "forget_probability",
    "forget_choice_accuracy",
    "forget_hit_64",
    "forget_worst_answer",
    "retain_probability",
    "relearned",
    "share",
)
"""Columns that fit on a terminal; the files have all."""


def summarise(records: Sequence[Record], view: str) -> list[dict[str, str]]:
    """One row per method: the mean of every column ± its standard deviation over seeds."""
    return [
        {"method": method, "seeds": f"{reached}/{seeds}"}
        | {name: spread(values) for name, values in found.items()}
        for method, reached, seeds, found in _by_method(records, view)
    ]


def seed_rows(records: Sequence[Record], view: str) -> list[dict[str, Any]]:
    """One row per method and seed that the view has, with the numbers of its columns."""
    retraining = {
        record["seed"]: costs_of(record, {}).operations
        for record in records
        if record["method"] == "retrained"
    }
    methods = list(dict.fromkeys(record["method"] for record in records))
    return [
        {"method": r["method"], "seed": r["seed"], **_values(r, view, retraining)}
        for r in sorted(records, key=lambda record: methods.index(record["method"]))
        if view in r
    ]


def _by_method(
    records: Sequence[Record], view: str
) -> Iterator[tuple[str, int, int, dict[str, list[float]]]]:
    """Of each method how many seeds reached the view, of how many, and columns with any values."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in seed_rows(records, view):
        found.setdefault(row["method"], []).append(row)
    for method, rows in found.items():
        mine = [record for record in records if record["method"] == method]
        reached = sum(view in r and (view != "equal" or r.get("reached", False)) for r in mine)
        columns = {n: [row[n] for row in rows if row.get(n) is not None] for n in _columns(rows)}
        yield method, reached, len(mine), {n: values for n, values in columns.items() if values}


def _numbers(records: Sequence[Record], view: str) -> list[dict[str, Any]]:
    """One row per method with the mean, standard deviation and number of seeds of each column."""
    rows = []
    for method, reached, seeds, found in _by_method(records, view):
        row: dict[str, Any] = {"method": method, "reached": reached, "seeds": seeds}
        for name, values in found.items():
            row[name] = statistics.fmean(values)
            row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{name}_n"] = len(values)
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of one value, the value."""
    mean = statistics.fmean(values)
    form = ".1f" if abs(mean) >= 100 else ".3f" if abs(mean) >= 0.001 or mean == 0 else ".1e"
    if len(values) == 1:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {statistics.stdev(values):{form}}"


def summary_files() -> list[str]:
    """Names of all that `write_summary` may write."""
    return [
        "summary.md",
        *(f"{v}{part}" for v in _VIEWS for part in (".csv", "_seeds.csv", ".tex")),
    ]


def write_summary(records: Sequence[Record], folder: Path, *, shows: bool = True) -> None:
    """For each view VIEW.csv (mean, `_sd`, `_n`), VIEW_seeds.csv, VIEW.tex; all in summary.md."""
    page = []
    for view, title in _VIEWS.items():
        rows = summarise(records, view)
        if not rows or (view != "equal" and not any(view in record for record in records)):
            continue
        columns = [name for name in _columns(rows) if any(name in row for row in rows)]
        names = ["method", "seeds", *columns]
        printed = ["method", "seeds", *(n for n in columns if n in _PRINTED)]
        if shows:
            _print(title, rows, printed)
        parts = [f"{name}{part}" for name in columns for part in ("", "_sd", "_n")]
        numbers = _csv(_numbers(records, view), ["method", "reached", "seeds", *parts])
        write_text(folder / f"{view}.csv", numbers)
        seeds = _csv(seed_rows(records, view), ["method", "seed", *columns])
        write_text(folder / f"{view}_seeds.csv", seeds)
        write_text(folder / f"{view}.tex", _latex(rows, printed))
        page.append(f"## {title.capitalize()}\n\n{_markdown(rows, names)}")
    write_text(folder / "summary.md", "\n".join(page))


def _values(
    record: Record, view: str, retraining: Mapping[int, float]
) -> Mapping[str, float | None]:
    whole, cost = retraining.get(record["seed"]), costs_of(record, {})
    apart = {
        f"{part}_{name}": value
        for part in ("suite", "ability")
        if view == "equal"
        for name, value in record.get(part, {}).items()
    }
    return {
        **record[view],
        **apart,
        "seconds": cost.total or None,
        "passes": cost.operations or None,
        "share": cost.operations / whole if whole and cost.operations else None,
        "tries": len(record["tries"]) if "tries" in record else None,
        "attempts": record.get("attempts"),
        "learning_rate": record.get("learning_rate"),
    }


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The known columns, then general ability, which has the columns its tasks give it."""
    return [*COLUMNS, *sorted({name for row in rows for name in row if name.startswith(_ABILITY)})]


def _header(name: str) -> str:
    return COLUMNS.get(name, name.removeprefix(_ABILITY))


def _print(title: str, rows: Iterable[Mapping[str, str]], names: Sequence[str]) -> None:
    listed = list(rows)
    # A narrow terminal folds names; cut short, several of one family would look alike.
    width = min(_NAME_WIDTH, max(len(row["method"]) for row in listed))
    table = Table(title=title, title_justify="left")
    table.add_column(escape(_header(names[0])), min_width=width, overflow="fold")
    for name in names[1:]:
        table.add_column(escape(_header(name)), justify="right", overflow="fold")
    for row in listed:
        table.add_row(*(escape(row.get(name, "–")) for name in names))
    console().print(table)


def _csv(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    return csv_text([names, *([row.get(name, "") for name in names] for row in rows)])


def _latex(rows: Iterable[Mapping[str, str]], names: Sequence[str]) -> str:
    """The columns that fit on a page, as a booktabs table."""
    lines = [" & ".join(_tex(_header(name)) for name in names)]
    lines += [" & ".join(_tex(row.get(name, "–")) for name in names) for row in rows]
    head, *body = (f"{line} \\\\\n" for line in lines)
    layout = "l" + "r" * (len(names) - 1)
    return (
        f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{head}\\midrule\n{''.join(body)}"
        "\\bottomrule\n\\end{tabular}\n"
    )


_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "α": r"$\alpha$",
        "–": "--",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _markdown(rows: Iterable[Mapping[str, str]], names: Sequence[str]) -> str:
    lines = [" | ".join(map(_header, names)), " | ".join("---" for _ in names)]
    lines += [" | ".join(row.get(name, "–") for name in names) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)
