"""Cost of unlearning against retraining as the forget share shrinks, in operations and seconds.

    python benchmarks/cost.py [--size 8M] [--people 100] [--threads 2]

Retraining tunes the base on the retain set; unlearning tunes it on the forget set for as many
epochs, measures importance on the forget set and on a sample of the retain set as large as
`--retain-sample` times the forget set, and edits. Operations: 6 per parameter and token for
tuning and for importance (forward and backward), bytes of the edit apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from models import SIZES, write_people_sets, write_random_model
from perta.config import (
    ComputeConfig,
    EditConfig,
    EstimatorConfig,
    FinetuneConfig,
    ImportanceConfig,
    TuneConfig,
    WeightingConfig,
)
from perta.data import encode_examples, load_examples
from perta.edit import edit_checkpoint
from perta.finetune import finetune_checkpoint
from perta.importance import compute_importance
from perta.model import load_tokenizer
from perta.progress import set_quiet


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(
    work: Path, base: Path, options: argparse.Namespace, forget_people: int
) -> tuple[dict[str, float], float]:
    """Seconds of each step, and the share of retraining in operations."""
    folder = work / f"forget{forget_people}"
    write_people_sets(folder / "data", options.people, 4, forget_people)
    tokenizer = load_tokenizer(base)
    tokens, rows = {}, {}
    for name in ("forget", "retain", "full"):
        encoded = encode_examples(load_examples(folder / "data" / f"{name}.jsonl"), tokenizer)
        tokens[name] = sum(len(example.input_ids) for example in encoded.encoded)
        rows[name] = len(encoded)
    sample = min(rows["retain"], options.retain_sample * rows["forget"])
    compute = ComputeConfig(device="cpu", threads=options.threads)
    tune = TuneConfig(epochs=options.epochs, batch_size=8, stop_loss=0)

    def finetune(part: str, output: str) -> None:
        data = str(folder / "data" / f"{part}.jsonl")
        place = folder / output
        finetune_checkpoint(
            FinetuneConfig(base=str(base), data=data, output=place, tune=tune, compute=compute)
        )

    def importance(part: str, samples: str | None) -> None:
        compute_importance(
            ImportanceConfig(
                checkpoint=str(base),
                data=str(folder / "data" / f"{part}.jsonl"),
                output=folder / f"{part}_importance",
                orders=(2.0,),
                estimator=EstimatorConfig(importance_samples=samples),
                compute=compute,
            )
        )

    def edit() -> None:
        edit_checkpoint(
            EditConfig(
                full=str(folder / "full"),
                base=str(base),
                forget_checkpoint=str(folder / "forget"),
                forget_importance=folder / "forget_importance",
                retain_importance=folder / "retain_importance",
                output=folder / "unlearned",
                weighting=WeightingConfig(method="perta-fisher"),
            )
        )

    finetune("full", "full")
    seconds = {
        "retrain": timed(lambda: finetune("retain", "retrained")),
        "tune": timed(lambda: finetune("forget", "forget")),
        "importance": timed(lambda: importance("forget", None))
        + timed(lambda: importance("retain", str(sample))),
        "edit": timed(edit),
    }
    sampled = tokens["retain"] * sample / rows["retain"]
    operations = options.epochs * tokens["forget"] + tokens["forget"] + sampled
    return seconds, operations / (options.epochs * tokens["retain"])


def main() -> None:
    """Print one line per forget share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="8M")
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--retain-sample", type=int, default=2)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    set_quiet(True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        count = write_random_model(work / "base", options.size)
        print(f"{count / 1e6:.0f}M parameters, {options.people} people, {options.epochs} epochs")
        print("forget share | operations | seconds | retrain  tune  importance  edit (s)")
        for share in (0.1, 0.05, 0.01):
            seconds, operations = measure(
                work, work / "base", options, max(1, round(share * options.people))
            )
            unlearning = seconds["tune"] + seconds["importance"] + seconds["edit"]
            parts = "  ".join(f"{value:.1f}" for value in seconds.values())
            ratio = unlearning / seconds["retrain"]
            print(f"{share:11.0%} | {operations:9.1%} | {ratio:6.1%} | {parts}", flush=True)


if __name__ == "__main__":
    main()
