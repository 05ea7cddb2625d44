"""Results as tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from perta.progress import PlainConsole, visible
from perta.store.costs import Plan, details, duration, operations, percent, size

if TYPE_CHECKING:
    from perta.report.tables import Cost

Results = Mapping[str, Any]

SETS = ("forget", "retain", "holdout")
COLUMNS = {
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
        present = [metric for metric in COLUMNS if f"{name}_{metric}" in known]
        if not present:
            continue
        table = Table(title=f"{name} set", title_justify="left")
        table.add_column("model")
        for metric in present:
            table.add_column(COLUMNS[metric], justify="right")
        for model, results in models.items():
            cells = [_cell(results.get(f"{name}_{metric}")) for metric in present]
            table.add_row(escape(model), *cells)
        console().print(table)


def print_samples(models: Mapping[str, Results], count: int) -> None:
    """Generated answers side by side with the reference, for the first `count` forget rows."""
    if count <= 0:
        return
    for name in ("forget", "retain"):
        key = f"{name}_rougeL_recall"
        rows: Mapping[str, Any] = next(
            (r[key]["value_by_index"] for r in models.values() if key in r), {}
        )
        for index in list(rows)[:count]:
            table = Table(title=f"{name} example {int(index) + 1}", title_justify="left")
            table.add_column("")
            table.add_column("answer", overflow="fold")
            table.add_row("question", escape(rows[index]["input"]))
            table.add_row("reference", escape(rows[index]["ground_truth"]))
            for model, results in models.items():
                entry = results.get(key, {}).get("value_by_index", {}).get(index)
                if entry is not None:
                    table.add_row(escape(model), escape(entry["generation"].strip()))
            console().print(table)


def print_costs(found: Sequence[Cost], retraining: float | None) -> None:
    """What each way to forget took, against retraining where that is known."""
    table = Table(title="cost", title_justify="left")
    for column in ("way", "took", "share of retraining", "of its operations"):
        right = column != "way"
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    table.add_column("of which", overflow="fold")
    if retraining is not None:
        table.add_row(
            "retrained", duration(retraining), "100%", "100%", "tuning without the forget set"
        )
    for cost in found:
        share = "–" if cost.share is None else f"{cost.share:.0%}"
        stages = details(cost.took.stages)
        evaluation = cost.took.evaluation
        apart = f"; evaluation apart {duration(evaluation)}" if evaluation else ""
        operations = "–" if cost.operations is None else percent(cost.operations)
        table.add_row(
            escape(cost.run.label),
            duration(cost.took.total),
            share,
            operations,
            escape(stages + apart),
        )
    console().print(table)


def print_plan(plan: Plan, *, json: bool) -> None:
    """The steps of a run, what is reused, and what it takes."""
    if json:
        print_json({**asdict(plan), "operations": plan.operations})
        return
    table = Table(title="plan", title_justify="left")
    for column in ("step", "operations, at most", "what it is"):
        table.add_column(column, justify="left" if column == "what it is" else "right")
    for number, step in enumerate(plan.steps, start=1):
        work = "reused" if step.reused else operations(step.operations)
        table.add_row(str(number), work, step.title)
    console().print(table)
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
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, metric in results.items():
        if isinstance(metric, Mapping) and "agg_value" in metric:
            value = metric["agg_value"]
            reason = f"– ({metric.get('missing', 'no value')})"
            table.add_row(escape(name), escape(reason) if value is None else f"{value:.4g}")
    console().print(table)


def print_audit(results: Results) -> None:
    """One line per probe of an audit, and what was not looked at."""
    table = Table(title=f"Audit, level {results['level']}", title_justify="left")
    for column in ("probe", "verdict", "cleaned", "yardstick", "full", "worst row", "why"):
        table.add_column(column, overflow="fold")
    for probe in results["probes"]:
        value, yardstick, worst = probe["value"], probe["yardstick"], probe["worst_row"]
        cells = (
            "–" if value is None else f"{value['value']:.3f}",
            "–" if yardstick is None else f"{yardstick['value']:.3f} ({yardstick['name']})",
            "–" if probe["full"] is None else f"{probe['full']:.3f}",
            "–" if worst is None else f"{worst['value']:.3f} (row {worst['row']})",
        )
        table.add_row(escape(probe["title"]), probe["verdict"], *cells, escape(probe["reason"]))
    console().print(table)
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
            for key, value in metric.items()
            if not (isinstance(value, Mapping) and "value_by_index" in {key, *value})
        }
        for name, metric in results.items()
        if isinstance(metric, Mapping) and "agg_value" in metric
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
    for kind, title, formula in (
        ("edit", "Edits of the weights", "W"),
        ("training", "Training from the full model", "loss"),
    ):
        table = Table(title=title, title_justify="left")
        for column in ("method", formula, "what it does", "source"):
            table.add_column(column, overflow="fold")
        for card in method_cards().values():
            if card["kind"] == kind:
                parts = ("name", "formula", "summary", "source")
                table.add_row(*(escape(card[part]) for part in parts))
        console().print(table)


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
    table = Table()
    for column in ("request", "received", "rows", "where it stands", "facts that stand out"):
        table.add_column(column, overflow="fold")
    for request in requests:
        waits, left = request["applied"] is None, request["still_there"]
        stands = "waits" if waits else request["verdict"] or "applied"
        row = (request["name"], request["received"] or "", str(request["rows"]), stands)
        table.add_row(*map(escape, row), "" if left is None else str(left))
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
