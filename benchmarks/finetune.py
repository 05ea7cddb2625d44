"""Fine-tuning speed: this package's loop against transformers' Trainer, same model and rows.

    python benchmarks/finetune.py [--size 34M] [--repeats 5] [--threads 2]

Both make the same number of AdamW steps over the same examples with the same batch size, in
turn, in one process. Trainer pads each batch to its longest row and computes the output head at
every position, which is what a plain loop does; ours sorts batches by length and computes the
head at labelled positions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from models import SIZES, write_people_sets, write_random_model
from perta.data.batch import IGNORE, Encoded, collate
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.train.tune import tune
from perta.models.load import load_model, load_tokenizer
from perta.options import ComputeConfig, TuneConfig
from perta.progress import set_quiet
from records import Record, add_option, save


def ours(folder: Path, examples: tuple[Encoded, ...], batch_size: int) -> float:
    """Seconds of one epoch through `tune`."""
    model = load_model(folder, ComputeConfig(device="cpu"))
    settings = TuneConfig(epochs=1, batch_size=batch_size, stop_loss=0)
    started = time.perf_counter()
    tune(model, examples, settings, pad=0)
    return time.perf_counter() - started


def trainer(folder: Path, examples: tuple[Encoded, ...], batch_size: int) -> float:
    """Seconds of one epoch through Trainer."""
    model = load_model(folder, ComputeConfig(device="cpu"))

    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([row["example"] for row in rows], 0)
        labels = batch.labels.masked_fill(batch.attention_mask == 0, IGNORE)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels,
        }

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            learning_rate=5e-5,
            weight_decay=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        loop = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"example": example} for example in examples],
            data_collator=collator,
        )
        started = time.perf_counter()
        loop.train()
        return time.perf_counter() - started


def main() -> None:
    """Measure in turn and print tokens per second and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int)
    add_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    set_quiet(True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_people_sets(folder, people=16, questions=8, forget_people=1)
        count = write_random_model(folder / "model", options.size)
        rows = load_examples(folder / "full.jsonl")
        examples = encode_examples(rows, load_tokenizer(folder / "model")).encoded
        tokens = sum(len(example.input_ids) for example in examples)
        print(f"{count / 1e6:.0f}M parameters, {len(examples)} examples, {tokens} tokens")
        # `tune` ends with the losses of every example, a forward pass more; it is counted.
        seconds: dict[str, list[float]] = {"perta": [], "Trainer": []}
        for repeat in range(options.repeats + 1):
            for name, run in (("perta", ours), ("Trainer", trainer)):
                taken = run(folder / "model", examples, options.batch_size)
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
    for name, values in seconds.items():
        print(f"{name:8} {tokens / median(values):7.0f} tokens/s ({sorted(values)})")
    ratios = sorted(b / a for a, b in zip(seconds["perta"], seconds["Trainer"], strict=True))
    print(f"Trainer / perta: {ratios[0]:.2f} {median(ratios):.2f} {ratios[-1]:.2f} (min med max)")
    save(
        Record(
            "Fine-tuning with transformers' Trainer against this package's loop",
            "time of Trainer over ours",
            f"{count / 1e6:.0f}M parameters, {len(examples)} examples in batches of "
            f"{options.batch_size}, {torch.get_num_threads()} threads",
            {"Trainer / perta": ratios},
            reference=1.0,
        ),
        options.json,
    )


if __name__ == "__main__":
    main()
