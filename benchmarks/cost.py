"""Cost of whole requests against retraining as the forget share shrinks, in operations and seconds.

    python benchmarks/cost.py [--size tiny] [--people 100] [--shares 0.1 0.05 0.01] [--threads 2]

A base is tuned on other people, untimed, and the full model from it on `--people` of its own.
Retraining tunes the base on the retain set as the full model was tuned. Every request is a whole
`perta unlearn` without its evaluation:

    perta-fisher          alpha given; importance on the forget set and on a retain sample
                          `--retain-sample` times as large;
    perta-project         alpha given, moments of the retain set saved before;
    default               method, strength, rounds and moments as by default, nothing given;
    default, saved        the same, moments of the whole retain set saved before;
    default, all rows     the same, moments of the whole retain set measured for this request.

Operations come from the records of the stages (`perta.store.costs`): 6 per parameter and token for
tuning and importance (forward and backward), 2 for moments, calibration, rounds and search (forward
alone, the tokens counted as they go through the model). Added here: 2 d^2 a token for the moment of
a layer d wide, and d^3 / 3 + 2 o d^2 to solve for its weight (o, d), for every direction that is
made; bytes of the edit apart.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models import SIZES, write_people_sets, write_random_model
from perta.data.rows import write_jsonl
from perta.evidence.people import generate_people
from perta.options import ComputeConfig, EstimatorConfig, TuneConfig, WeightingConfig
from perta.progress import set_quiet
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.moments import compute_moments
from perta.stages.settings import FinetuneConfig, MomentsConfig
from perta.store.checkpoint import TensorEntry, open_index
from perta.store.costs import BACKWARD, FORWARD, costs_of, seconds_of
from perta.store.record import read_manifest
from records import Record, add_option, save

QUESTIONS = 4
OTHERS_SEED = 1


@dataclass(frozen=True)
class Cost:
    """Operations and seconds of a request, as shares of retraining's, and what was found."""

    operations: float
    seconds: float | None
    parts: Mapping[str, float]
    found: str


class Bench:
    """Models and sets of one forget share.

    Attributes:
        base: tuned on other people.
        full: the base tuned on all people.
        tune: how the full model was tuned, and is retrained.
        saved: moments of the whole retain set.
        seconds: of retraining; None where it was left out.
    """

    def __init__(
        self, work: Path, base: Path, full: Path, tune: TuneConfig, options: argparse.Namespace
    ) -> None:
        self.base, self.full, self.tune, self._options, self._work = base, full, tune, options, work
        self._compute = ComputeConfig(device="cpu", threads=options.threads)
        self.parameters, self._solve, self._moment = sizes(open_index(base).tensors.values())
        self.saved = self._measured()
        tokens = (read_manifest(self.saved) or {})["tokens_counted"]
        self._passes = (FORWARD + BACKWARD) * tune.epochs * tokens
        self.seconds = None if options.no_retraining else seconds_of(self._retrained())
        self.rows = {name: rows_of(self._file(name)) for name in ("forget", "retain")}

    def _file(self, name: str) -> Path:
        return self._work / "data" / f"{name}.jsonl"

    def _retrained(self) -> Mapping[str, Any]:
        output = self._work / "retrained"
        return tuned(self.base, self._file("retain"), output, self.tune, self._compute)

    def _measured(self) -> Path:
        return compute_moments(
            MomentsConfig(
                checkpoint=str(self.base),
                data=str(self._file("retain")),
                output=self._work / "saved",
                compute=self._compute,
            )
        )

    def request(self, name: str, **more: Any) -> Cost:
        """Cost of one request."""
        # Up to the default number of epochs, at the rate that the model was tuned with.
        forget = replace(self.tune, epochs=TuneConfig.epochs, stop_loss=None)
        config = UnlearnConfig(
            base=str(self.base),
            full=str(self.full),
            forget=str(self._file("forget")),
            retain=str(self._file("retain")),
            output=self._work / name,
            tune=forget,
            compute=self._compute,
            evaluate=False,
            **more,
        )
        made = unlearn(config).manifest
        costs = costs_of(made, {})
        work = config.output.with_name(f"{name}.work")
        own = read_manifest(work / "retain_moments") or {}
        rounds = (read_manifest(work / "forget_rounds") or {}).get("rounds", [])
        given = config.retain_moments is not None or own
        solves = (len(rounds) + 1) * bool(given)
        added = solves * self._solve + self._moment * own.get("tokens_counted", 0)
        each = 2 * self.parameters
        whole = each * self._passes
        parts = {stage: each * passes / whole for stage, passes in costs.passes.items()}
        parts["solves and sums"] = added / whole
        operations = sum(parts.values())
        found = f"moments of {own['examples']} rows, " if own else ""
        if rounds:
            found += f"rounds of {', '.join(str(r['rows']) for r in rounds)} rows, "
        if strength := made["unlearn"].get("strength"):
            found += (
                f"alpha {strength['scaling_coef']:.3g}, {len(strength['standing_out'])} stand out"
            )
        seconds = costs.total / self.seconds if self.seconds else None
        return Cost(operations, seconds, parts, found.strip(", "))


def tuned(
    base: Path, data: Path, output: Path, tune: TuneConfig, compute: ComputeConfig
) -> Mapping[str, Any]:
    """Tune a model on a file; the record of it."""
    config = FinetuneConfig(
        base=str(base), data=str(data), output=output, tune=tune, compute=compute
    )
    return read_manifest(finetune_checkpoint(config)) or {}


def rows_of(file: Path) -> int:
    """Rows of a file."""
    return len(file.read_text("utf-8").splitlines())


def requests(bench: Bench, retain_sample: int) -> dict[str, Cost]:
    """Every kind of request."""
    sample = str(min(bench.rows["retain"], retain_sample * bench.rows["forget"]))
    return {
        "perta-fisher": bench.request(
            "fisher",
            weighting=WeightingConfig(method="perta-fisher", scaling_coef=1.0),
            estimator=EstimatorConfig(importance_samples=sample),
        ),
        "perta-project": bench.request(
            "project", weighting=WeightingConfig(scaling_coef=1.0), retain_moments=bench.saved
        ),
        "default": bench.request("default"),
        "default, saved": bench.request("saved-default", retain_moments=bench.saved),
        "default, all rows": bench.request("all-default", retain_samples="all"),
    }


def sizes(tensors: Iterable[TensorEntry]) -> tuple[int, float, float]:
    """Parameters, operations of all solves, and of all moments a token.

    As if no weights shared their moments.
    """
    parameters, solve, moment = 0, 0.0, 0.0
    for tensor in tensors:
        parameters += tensor.numel
        if len(tensor.shape) == 2 and "embed" not in tensor.name:
            rows, width = tensor.shape
            solve += width**3 / 3 + 2 * rows * width**2
            moment += 2 * width**2
    return parameters, solve, moment


def main() -> None:
    """Print one line per request and forget share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--retain-sample", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.05, 0.01])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--no-retraining",
        action="store_true",
        help="do not run what requests are compared with: its operations are known, seconds not",
    )
    add_option(parser)
    options = parser.parse_args()
    if min(options.shares) * options.people < 1:
        parser.error(f"--people {options.people}: the smallest share is less than one person")
    if options.threads:
        torch.set_num_threads(options.threads)
    set_quiet(True)
    compute = ComputeConfig(device="cpu", threads=options.threads)
    tune = TuneConfig(
        epochs=options.epochs, batch_size=8, stop_loss=0, learning_rate=options.learning_rate
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        count = write_random_model(work / "random", options.size)
        others = generate_people(options.people, QUESTIONS, seed=OTHERS_SEED)
        write_jsonl(others, work / "others.jsonl")
        write_people_sets(work / "data", options.people, QUESTIONS, 1)
        tuned(work / "random", work / "others.jsonl", work / "base", tune, compute)
        everyone = work / "data" / "full.jsonl"
        tuned(work / "base", everyone, work / "full", tune, compute)
        conditions = (
            f"{count / 1e6:.0f}M parameters, {options.people} people, {options.epochs} epochs, "
            f"{torch.get_num_threads()} threads"
        )
        print(f"{conditions}\nforget share | request | operations, seconds | parts", flush=True)
        values: dict[str, list[float]] = {}
        for repeat, share in itertools.product(range(options.repeats), options.shares):
            people = round(share * options.people)
            place = work / f"repeat{repeat}-{people}"
            write_people_sets(place / "data", options.people, QUESTIONS, people)
            bench = Bench(place, work / "base", work / "full", tune, options)
            for method, cost in requests(bench, options.retain_sample).items():
                parts = ", ".join(f"{stage} {part:.1%}" for stage, part in cost.parts.items())
                seconds = "" if cost.seconds is None else f", {cost.seconds:.1%}"
                print(
                    f"{share:12.0%} | {method} | {cost.operations:.1%}{seconds} | {parts} | "
                    f"{cost.found}",
                    flush=True,
                )
                name = f"{method}, forget {share:.0%}"
                values[f"{name}, operations"] = [100 * cost.operations]
                if cost.seconds is not None:
                    values.setdefault(f"{name}, seconds", []).append(100 * cost.seconds)
    claim = "Whole requests against retraining as the forget share shrinks"
    save(Record(claim, "% of retraining", conditions, values), options.json)


if __name__ == "__main__":
    main()
