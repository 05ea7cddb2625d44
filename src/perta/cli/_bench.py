"""`perta bench`: the comparison, benchmarks that come with the package, and one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from cyclopts import App

from perta.cli._app import AsJson, DryRun, app, note, tell
from perta.evidence.settings import BENCHMARKS, Offer
from perta.recipes.compare.settings import CompareConfig

bench = App(
    name="bench",
    help="Evaluate a checkpoint on a benchmark: one of these, or a Python file that defines one.",
)
app.command(bench)


@bench.command
def compare(config: CompareConfig, *, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Methods side by side: tune, edit and evaluate over seeds, at equal forgetting too.

    Finished runs are reused, so a comparison can be stopped, continued and extended.
    """
    from perta.recipes.compare.study import bench_compare, plan_compare
    from perta.terminal import print_plan

    if dry_run:
        print_plan(plan_compare(config), json=json)
        return
    records = bench_compare(config, shows=not json)
    message = f"Tables, results and report.html: {config.output}"
    tell(json, message, output=config.output, runs=records)


def _add_benchmark(
    name: str, summary: str, config: type[Any], run: Callable[[Any], Mapping[str, Any]]
) -> None:
    """Make `perta bench NAME` from what the registry or a file says."""

    def command(config: Any, *, json: bool = False) -> None:
        from perta.terminal import print_json, print_metrics, without_rows

        results = run(config)
        if json:
            print_json(without_rows(results))
            return
        print_metrics(results)
        note(f"Results: {config.output}")

    command.__annotations__ = {"config": config, "json": AsJson, "return": None}
    bench.command(command, name=name, help=summary)


def _run_offer(offer: Offer, config: Any) -> Mapping[str, Any]:
    module, _, function = offer.place.partition(":")
    results: Mapping[str, Any] = getattr(import_module(module), function)(config)
    return results


for _name, _offer in BENCHMARKS.items():
    _add_benchmark(_name, _offer.summary, _offer.config, partial(_run_offer, _offer))


def add_own_benchmark(tokens: Sequence[str]) -> None:
    """Make a user's benchmark file, given in place of a name, known under its path."""
    file = next((b for a, b in pairwise(tokens) if a == "bench" and b.endswith(".py")), None)
    if file is None:
        return
    from perta.evidence.benchmark import load_benchmark
    from perta.stages.bench import run_benchmark

    own = load_benchmark(Path(file))
    if file in bench:
        del bench[file]
    _add_benchmark(file, own.summary, own.config, partial(run_benchmark, own))
