"""Cost of unlearning against retraining as the forget share shrinks, in operations and seconds.

    python benchmarks/cost.py [--size 8M] [--people 100] [--shares 0.1 0.05 0.01] [--threads 2]

Retraining tunes the base on the retain set. Unlearning tunes it on the forget set for as many
epochs, and then

    perta-fisher  measures importance on the forget set and on a sample of the retain set as large
                  as `--retain-sample` times the forget set, and edits;
    perta-project solves and edits; the moments of the retain set are there, measured once for all
                  requests, and their time is shown apart.

The model to clean is tuned once, untimed, and for one epoch: its values change no time.
Operations: 6 per parameter and token for tuning and importance (forward and backward), d^3 / 3
for the factor of a layer d wide, and 2 o d^2 to solve for its weight (o, d); bytes of the edit
apart.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from models import SIZES, write_people_sets, write_random_model
from perta.checkpoint import TensorEntry, open_index
from perta.config import (
    ComputeConfig,
    EstimatorConfig,
    TuneConfig,
    WeightingConfig,
)
from perta.config_stages import EditConfig, FinetuneConfig, ImportanceConfig, MomentsConfig
from perta.data import encode_examples, load_examples
from perta.edit import edit_checkpoint
from perta.finetune import finetune_checkpoint
from perta.importance import compute_importance
from perta.model import load_tokenizer
from perta.moments import compute_moments
from perta.progress import set_quiet
from records import Record, add_option, save

STEPS = {
    "perta-fisher": ("tune", "importance", "edit"),
    "perta-project": ("tune", "solve and edit"),
}
"""Method -> steps that a request takes."""


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def finetune(
    base: Path, data: Path, output: Path, *, options: argparse.Namespace, epochs: int
) -> None:
    """Tune the base on a file."""
    finetune_checkpoint(
        FinetuneConfig(
            base=str(base),
            data=str(data),
            output=output,
            tune=TuneConfig(epochs=epochs, batch_size=8, stop_loss=0),
            compute=ComputeConfig(device="cpu", threads=options.threads),
        )
    )


def measure(
    work: Path, base: Path, full: Path, options: argparse.Namespace, forget_people: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each step; and operations of each method as a share of retraining's."""
    folder = work / f"forget{forget_people}"
    write_people_sets(folder / "data", options.people, 4, forget_people)
    data = {name: folder / "data" / f"{name}.jsonl" for name in ("forget", "retain")}
    tokenizer = load_tokenizer(base)
    tokens, rows = {}, {}
    for name, file in data.items():
        encoded = encode_examples(load_examples(file), tokenizer)
        tokens[name] = sum(len(example.input_ids) for example in encoded.encoded)
        rows[name] = len(encoded)
    sample = min(rows["retain"], options.retain_sample * rows["forget"])
    compute = ComputeConfig(device="cpu", threads=options.threads)

    def importance(part: str, samples: str | None) -> None:
        compute_importance(
            ImportanceConfig(
                checkpoint=str(base),
                data=str(data[part]),
                output=folder / f"{part}_importance",
                orders=(2.0,),
                estimator=EstimatorConfig(importance_samples=samples),
                compute=compute,
            )
        )

    def moments() -> None:
        compute_moments(
            MomentsConfig(
                checkpoint=str(base),
                data=str(data["retain"]),
                output=folder / "retain_moments",
                compute=compute,
            )
        )

    def edit(method: str, *names: str) -> None:
        inputs: dict[str, Any] = {name: folder / name for name in names}
        edit_checkpoint(
            EditConfig(
                full=str(full),
                base=str(base),
                forget_checkpoint=str(folder / "forget"),
                output=folder / method,
                weighting=WeightingConfig(method=method),
                edit_threads=options.threads,
                **inputs,
            )
        )

    tune = functools.partial(finetune, base, options=options, epochs=options.epochs)
    seconds = {
        "retrain": timed(lambda: tune(data["retain"], folder / "retain")),
        "tune": timed(lambda: tune(data["forget"], folder / "forget")),
        "importance": timed(lambda: importance("forget", None))
        + timed(lambda: importance("retain", str(sample))),
        "edit": timed(lambda: edit("perta-fisher", "forget_importance", "retain_importance")),
        "retain moments": timed(moments),
        "solve and edit": timed(lambda: edit("perta-project", "retain_moments")),
    }
    sampled = tokens["retain"] * sample / rows["retain"]
    parameters, solve = sizes(open_index(base).tensors.values())
    operations = {
        "perta-fisher": 6 * parameters * (tokens["forget"] + sampled),
        "perta-project": solve,
    }
    tuning = 6 * parameters * options.epochs * tokens["forget"]
    retraining = 6 * parameters * options.epochs * tokens["retain"]
    return seconds, {name: (tuning + count) / retraining for name, count in operations.items()}


def sizes(tensors: Iterable[TensorEntry]) -> tuple[int, float]:
    """Parameters, and operations of all solves, as if no weights shared their moments."""
    parameters, solve = 0, 0.0
    for tensor in tensors:
        parameters += tensor.numel
        if len(tensor.shape) == 2 and "embed" not in tensor.name:
            rows, width = tensor.shape
            solve += width**3 / 3 + 2 * rows * width**2
    return parameters, solve


def main() -> None:
    """Print one line per forget share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8M")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--retain-sample", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.05, 0.01])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    add_option(parser)
    options = parser.parse_args()
    if min(options.shares) * options.people < 1:
        parser.error(f"--people {options.people}: the smallest share is less than one person")
    if options.threads:
        torch.set_num_threads(options.threads)
    set_quiet(True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base, full = work / "base", work / "full"
        count = write_random_model(base, options.size)
        write_people_sets(work / "data", options.people, 4, 1)
        finetune(base, work / "data" / "full.jsonl", full, options=options, epochs=1)
        conditions = (
            f"{count / 1e6:.0f}M parameters, {options.people} people, {options.epochs} epochs, "
            f"{torch.get_num_threads()} threads"
        )
        print(f"{conditions}\nforget share | method: operations, seconds | each step (s)")
        values: dict[str, list[float]] = {}
        for repeat, share in itertools.product(range(options.repeats), options.shares):
            place = work / f"repeat{repeat}"
            people = round(share * options.people)
            seconds, operations = measure(place, base, full, options, people)
            print(f"{share:12.0%}", end="", flush=True)
            for method, steps in STEPS.items():
                ratio = sum(seconds[step] for step in steps) / seconds["retrain"]
                print(f" | {method}: {operations[method]:.1%}, {ratio:.1%}", end="")
                name = f"{method}, forget {share:.0%}"
                values[f"{name}, operations"] = [100 * operations[method]]
                values.setdefault(f"{name}, seconds", []).append(100 * ratio)
            parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            print(f" | {parts}", flush=True)
    claim = "Unlearning against retraining as the forget share shrinks"
    save(Record(claim, "% of retraining", conditions, values), options.json)


if __name__ == "__main__":
    main()
