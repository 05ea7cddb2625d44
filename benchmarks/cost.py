"""Cost of unlearning against retraining as the forget share shrinks, in operations and seconds.

    python benchmarks/cost.py [--size 8M] [--people 100] [--shares 0.1 0.05 0.01] [--threads 2]

Retraining tunes the base on the retain set. Unlearning tunes it on the forget set for as many
epochs, and then

    perta-fisher        measures importance on the forget set and on a sample of the retain set as
                        large as `--retain-sample` times the forget set, and edits;
    perta-project       solves and edits; the moments of the retain set are there, measured once
                        for all requests;
    perta-project, auto does that with `--scaling-coef auto`: calibration and search besides;
    ... from nothing    measures the moments of the retain set as well.

The model to clean is tuned once, untimed, for `--full-epochs`: the search needs facts to forget.
Operations: 6 per parameter and token for tuning and importance (forward and backward), 2 for
moments, calibration and search (forward alone, the tokens counted as they go through the model),
2 d^2 a token for the moment of a layer d wide, d^3 / 3 for its factor, and 2 o d^2 to solve for its
weight (o, d); bytes of the edit apart.
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
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.models.load import load_tokenizer
from perta.options import ComputeConfig, DataConfig, EstimatorConfig, TuneConfig, WeightingConfig
from perta.progress import set_quiet
from perta.recipes._strength import Strength, StrengthSettings, calibrate, choose_strength
from perta.recipes.settings import UnlearnConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import EditConfig, FinetuneConfig, ImportanceConfig, MomentsConfig
from perta.store.checkpoint import TensorEntry, open_index
from records import Record, add_option, save

STEPS = {
    "perta-fisher": ("tune", "importance", "edit"),
    "perta-project": ("tune", "solve and edit"),
    "perta-project, auto": ("tune", "calibrate", "search", "solve and edit"),
    "perta-project, auto, from nothing": (
        "tune",
        "retain moments",
        "calibrate",
        "search",
        "solve and edit",
    ),
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
    rate = options.learning_rate
    finetune_checkpoint(
        FinetuneConfig(
            base=str(base),
            data=str(data),
            output=output,
            tune=TuneConfig(epochs=epochs, batch_size=8, stop_loss=0, learning_rate=rate),
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

    def edit_config(method: str, *names: str) -> EditConfig:
        inputs: dict[str, Any] = {name: folder / name for name in names}
        return EditConfig(
            full=str(full),
            base=str(base),
            forget_checkpoint=str(folder / "forget"),
            output=folder / method,
            weighting=WeightingConfig(method=method),
            edit_threads=options.threads,
            **inputs,
        )

    sets = {name: load_examples(file) for name, file in data.items()}
    found: dict[str, Any] = {}

    def look() -> None:
        found["unseen"] = calibrate(full, base, sets, DataConfig(), compute)

    def search() -> None:
        project = edit_config("perta-project", "retain_moments")
        settings = StrengthSettings(UnlearnConfig.retain_budget, 0, folder)
        found["strength"] = choose_strength(
            project, sets, found["unseen"], settings, DataConfig(), compute
        )

    tune = functools.partial(finetune, base, options=options, epochs=options.epochs)
    seconds = {
        "retrain": timed(lambda: tune(data["retain"], folder / "retain")),
        "tune": timed(lambda: tune(data["forget"], folder / "forget")),
        "importance": timed(lambda: importance("forget", None))
        + timed(lambda: importance("retain", str(sample))),
        "edit": timed(
            lambda: edit_checkpoint(
                edit_config("perta-fisher", "forget_importance", "retain_importance")
            )
        ),
        "retain moments": timed(moments),
        "solve and edit": timed(
            lambda: edit_checkpoint(edit_config("perta-project", "retain_moments"))
        ),
        "calibrate": timed(look),
        "search": timed(search),  # the direction is there
    }
    sampled = tokens["retain"] * sample / rows["retain"]
    parameters, solve, moment = sizes(open_index(base).tensors.values())
    looked = 2 * parameters * (found["unseen"].tokens + found["strength"].tokens)
    measured = (2 * parameters + moment) * tokens["retain"]
    operations = {
        "perta-fisher": 6 * parameters * (tokens["forget"] + sampled),
        "perta-project": solve,
        "perta-project, auto": solve + looked,
        "perta-project, auto, from nothing": solve + looked + measured,
    }
    print(f"{_outcome(found['strength'])}", flush=True)
    tuning = 6 * parameters * options.epochs * tokens["forget"]
    retraining = 6 * parameters * options.epochs * tokens["retain"]
    return seconds, {name: (tuning + count) / retraining for name, count in operations.items()}


def _outcome(found: Strength) -> str:
    last = "reached" if found.reached else f"{len(found.standing_out)} stand out"
    looks = sum(point.retain_loss is not None for point in found.frontier)
    return (
        f"search: {len(found.frontier)} strengths, {looks} of them on {found.retain_rows} retained "
        f"rows, {found.tokens} tokens; {last} at {found.scaling_coef:.3g}"
    )


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
    """Print one line per forget share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8M")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--full-epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
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
        everyone = work / "data" / "full.jsonl"
        finetune(base, everyone, full, options=options, epochs=options.full_epochs)
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
