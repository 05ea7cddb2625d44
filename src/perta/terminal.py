"""Results as tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod, OverflowMethod
from rich.markup import escape
from rich.table import Table

from perta.progress import PlainConsole, visible
from perta.store.costs import Plan, details, duration, operations, percent, size
from perta.store.record import aggregates

if TYPE_CHECKING:
    from perta.report.collect import Cost

Results = Mapping[str, Any]

SETS = ("forget", "retain", "holdout")
_COLUMNS = {
    "loss": "loss",
    "probability": "prob.",
    "rougeL_recall": "ROUGE-L",
    "exact_memorization": "exact mem.",
    "extraction_strength": "extr. str.",
}


_WIDE = 1000


def print_comparison(models: Mapping[str, Results]) -> None:
    """One table per set: a row per model, a column per metric."""
    for name in SETS:
        known = {key for results in models.values() for key in results}
        present = [metric for metric in _COLUMNS if f"{name}_{metric}" in known]
        if present:
            rows = (
                (model, *(_cell(results.get(f"{name}_{metric}")) for metric in present))
                for model, results in models.items()
            )
            columns = ("model", *(_COLUMNS[metric] for metric in present))
            _print_table(f"{name} set", columns, rows, right=range(1, len(columns)))


def print_samples(models: Mapping[str, Results], count: int) -> None:
    """Generated answers side by side with the reference, for the first `count` forget rows."""
    for name in ("forget", "retain") if count > 0 else ():
        key = f"{name}_rougeL_recall"
        rows: Mapping[str, Any] = next(
            (r[key]["value_by_index"] for r in models.values() if key in r), {}
        )
        for index in list(rows)[:count]:
            lines = [("question", rows[index]["input"]), ("reference", rows[index]["ground_truth"])]
            for model, results in models.items():
                entry = results.get(key, {}).get("value_by_index", {}).get(index)
                if entry is not None:
                    lines.append((model, entry["generation"].strip()))
            _print_table(f"{name} example {int(index) + 1}", ("", "answer"), lines)


def print_costs(found: Sequence[Cost], retraining: float | None) -> None:
    """What each way to forget took, against retraining where that is known."""
    columns = ("way", "took", "share of retraining", "of its operations", "of which")
    rows = []
    if retraining is not None:
        whole = ("100%", "100%", "tuning without the forget set")
        rows.append(("retrained", duration(retraining), *whole))
    for cost in found:
        share = "–" if cost.share is None else f"{cost.share:.0%}"
        stages, evaluation = details(cost.took.stages), cost.took.evaluation
        apart = f"; evaluation apart {duration(evaluation)}" if evaluation else ""
        part = "–" if cost.operations is None else percent(cost.operations)
        rows.append((cost.run.label, duration(cost.took.total), share, part, stages + apart))
    _print_table("cost", columns, rows, right=(1, 2, 3), whole=range(4))


def print_plan(plan: Plan, *, json: bool) -> None:
    """The steps of a run, what is reused, and what it takes."""
    if json:
        print_json({**asdict(plan), "operations": plan.operations})
        return
    rows = (
        (str(number), "reused" if step.reused else operations(step.operations), step.title)
        for number, step in enumerate(plan.steps, start=1)
    )
    _print_table("plan", ("step", "operations, at most", "what it is"), rows, right=(0, 1))
    console().print(
        f"Operations: at most about {operations(plan.operations)}\n"
        f"Memory: about {size(plan.memory)} for weights and sums, activations apart\n"
        f"Disk: about {size(plan.work)} in {plan.work_folder}"
        f"{f', {size(plan.output)} in {plan.output_folder}' if plan.output else ''}\n"
        "Nothing was written.",
        markup=False,
        soft_wrap=True,
    )


def print_metrics(results: Results) -> None:
    """Every metric of a benchmark, with the reason where one is missing."""
    rows = []
    for name, value in aggregates(results).items():
        reason = f"– ({results[name].get('missing', 'no value')})"
        rows.append((name, reason if value is None else f"{value:.4g}"))
    _print_table(None, ("metric", "value"), rows, right=(1,))


def print_audit(results: Results) -> None:
    """One line per probe of an audit, and what was not looked at."""
    rows = []
    for probe in results["probes"]:
        value, yardstick, worst = probe["value"], probe["yardstick"], probe["worst_row"]
        cells = (
            "–" if value is None else f"{value['value']:.3f}",
            "–" if yardstick is None else f"{yardstick['value']:.3f} ({yardstick['name']})",
            "–" if probe["full"] is None else f"{probe['full']:.3f}",
            "–" if worst is None else f"{worst['value']:.3f} (row {worst['row']})",
        )
        rows.append((probe["title"], probe["verdict"], *cells, probe["reason"]))
    columns = ("probe", "verdict", "cleaned", "yardstick", "full", "worst row", "why")
    _print_table(f"Audit, level {results['level']}", columns, rows)
    left_out: dict[str, list[str]] = {}
    for entry in results["not_checked"]:
        left_out.setdefault(entry["why"], []).append(entry["name"])
    for why, names in left_out.items():
        console().print(f"Not checked, {why}: {', '.join(names)}", markup=False, soft_wrap=True)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON object on standard output, whole whatever the width."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    print(visible(text, escaped=True))  # noqa: T201


def without_rows(results: Results) -> dict[str, Any]:
    """Results without the values of single rows, which the file has."""
    return {
        name: {
            key: value
            for key, value in results[name].items()
            if not (isinstance(value, Mapping) and "value_by_index" in {key, *value})
        }
        for name in aggregates(results)
    }


def method_cards() -> dict[str, dict[str, Any]]:
    """Name -> what is said of a method, with its settings; those that edit come first."""
    from perta.methods.method import Edit
    from perta.methods.objectives import Training
    from perta.methods.registry import known

    said = {"edit": ("strength", "layers"), "training": ("epochs", "learning_rate")}
    cards: dict[str, dict[str, Any]] = {}
    for kind, base in (("edit", Edit), ("training", Training)):
        for name, method in known(base).items():
            parts = ("name", "formula", "summary", "source", *said[kind])
            cards[name] = {"kind": kind, **{part: getattr(method, part) for part in parts}}
            cards[name]["settings"] = [
                {"name": item.name, "default": item.default, **item.metadata}
                for item in method.options()
            ]
    return cards


def print_methods() -> None:
    """The tables of methods."""
    cards = method_cards().values()
    for kind, title, formula in (
        ("edit", "Edits of the weights", "W"),
        ("training", "Training from the full model", "loss"),
    ):
        parts = ("name", "formula", "summary", "source")
        rows = (tuple(card[part] for part in parts) for card in cards if card["kind"] == kind)
        _print_table(title, ("method", formula, "what it does", "source"), rows)


def print_method(card: Mapping[str, Any]) -> None:
    """One method with its settings."""
    lines = [f"{card['name']}: {card['summary']}", card["formula"], f"Source: {card['source']}"]
    if card["kind"] == "training":
        lines.append(f"{card['epochs']} epochs at learning rate {card['learning_rate']:g}")
    if not card["settings"]:
        lines.append("It has no settings.")
    for item in card["settings"]:
        default = f"{item['name']} = {item['default']}, in {item['within']}"
        lines += ["", default, f"  {item['help']}"]
    console().print("\n".join(lines), markup=False, soft_wrap=True)


def print_requests(requests: Iterable[Mapping[str, Any]]) -> None:
    """One line per request of a ledger, given as plain values."""
    rows = []
    for request in requests:
        waits, left = request["applied"] is None, request["still_there"]
        # The verdict's first sentence: its figures make the table wider than most screens.
        stands = "waits" if waits else (request["verdict"] or "applied").partition(". ")[0]
        row = (request["name"], request["received"] or "", str(request["rows"]), stands)
        rows.append((*row, "" if left is None else str(left)))
    columns = ("request", "received", "rows", "where it stands", "facts that stand out")
    _print_table(None, columns, rows)


def _print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[int] = (),
    whole: Collection[int] = (),
) -> None:
    """A table of plain texts; places of columns that are aligned right, and that are not folded."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        justify: JustifyMethod = "right" if place in right else "left"
        overflow: OverflowMethod = "ellipsis" if place in right else "fold"
        table.add_column(column, justify=justify, no_wrap=place in whole, overflow=overflow)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def _cell(metric: Mapping[str, Any] | None) -> str:
    value = None if metric is None else metric.get("agg_value")
    return "–" if value is None else f"{value:.3f}"


def console() -> PlainConsole:
    """Where results go, standard output."""
    found = PlainConsole()
    if not found.is_terminal:
        # Nothing is cut where nobody looks at it: a file or a pipe has no width.
        found.width = max(found.width, _WIDE)
    return found
