"""Equal forgetting on real TOFU rows: every method over its scaling coefficient.

    python runs/tofu_rows.py --base SMOLLM2_FOLDER --data TOFU_FOLDER --output OUT --seed 0

The full model is the base tuned on 60 retain rows and 20 forget rows (one author); the
reference is the base tuned on the retain rows alone. Each method's edit is computed once and
tried in place at every strength. The last table reads off each method at equal forgetting:
where its forget probability, interpolated over the strengths, equals the reference's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perta.checkpoint import open_index, order_folder, read_tensor
from perta.config import (
    ComputeConfig,
    DataConfig,
    FinetuneConfig,
    ImportanceConfig,
    ScoringConfig,
    TuneConfig,
)
from perta.data import load_examples
from perta.evaluate import quick_evaluation
from perta.finetune import finetune_checkpoint
from perta.importance import compute_importance
from perta.model import load_model, load_tokenizer, resolve_checkpoint
from perta.weighting import share

STRENGTHS = {
    "tv": (0.6, 0.7, 0.8, 1.0),
    "perta-grad": (1.2, 1.4, 1.8),
    "perta-fisher": (1.2, 1.4, 1.7, 2.0),
}
METRICS = (
    "forget_probability",
    "forget_extraction_strength",
    "retain_probability",
    "retain_extraction_strength",
    "facts_probability",
)


def rows(file: Path, first: int, last: int | None) -> list[str]:
    """Lines of a JSONL file, by Python's slice rules."""
    return file.read_text("utf-8").splitlines()[first:last]


def write_sets(data: Path, output: Path, seed: int) -> dict[str, Path]:
    """The sets of one seed: seed 0 takes the last rows, each further seed 60 + 20 rows before."""
    stop = {name: -size * seed or None for name, size in (("forget", 20), ("retain", 60))}
    forget = rows(data / "forget10.jsonl", -20 * (seed + 1), stop["forget"])
    retain = rows(data / "retain90.jsonl", -60 * (seed + 1), stop["retain"])
    sets = {"forget": forget, "retain": retain, "full": retain + forget}
    sets["facts"] = rows(data / "world_facts_perturbed.jsonl", 0, None)
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in sets.items():
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return {name: output / f"{name}.jsonl" for name in sets}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint or importance folder, float32."""
    return {name: read_tensor(entry).float() for name, entry in open_index(folder).tensors.items()}


def main() -> None:
    """Tune, measure importance, try every strength, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    compute = ComputeConfig(threads=options.threads)
    base = resolve_checkpoint(options.base)
    files = write_sets(options.data, options.output / "data", options.seed)
    folders = {
        name: finetune_checkpoint(
            FinetuneConfig(
                base=str(base),
                data=str(files[part]),
                output=options.output / name,
                tune=TuneConfig(epochs=10, learning_rate=options.learning_rate, seed=options.seed),
                compute=compute,
            )
        )
        for name, part in (("full", "full"), ("retrained", "retain"), ("forget", "forget"))
    }
    importance = {
        part: compute_importance(
            ImportanceConfig(
                checkpoint=str(base),
                data=str(files[part]),
                output=options.output / f"{part}_importance",
                orders=(1.0, 2.0),
                compute=compute,
            )
        )
        for part in ("forget", "retain")
    }

    data_config = DataConfig()
    sets = {name: load_examples(files[name], data_config) for name in ("forget", "retain", "facts")}
    tokenizer = load_tokenizer(base)
    model = load_model(folders["full"], compute)
    scoring = ScoringConfig(generate=False)

    def measure() -> dict[str, float]:
        results = quick_evaluation(model, tokenizer, sets, scoring, data_config)
        return {name: results[name]["agg_value"] for name in METRICS}

    table: list[dict[str, Any]] = []

    def report(name: str, strength: float | None) -> None:
        table.append({"method": name, "strength": strength, **measure()})
        line = " ".join(f"{table[-1][metric]:.3f}" for metric in METRICS)
        print(f"{name:14} {'' if strength is None else strength:5} {line}", flush=True)
        (options.output / "table.json").write_text(json.dumps(table, indent=1), "utf-8")

    parameters = dict(model.named_parameters())

    def load(values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    start, full = read_all(base), read_all(folders["full"])
    task_vector = {name: value - start[name] for name, value in read_all(folders["forget"]).items()}
    for name, values in (
        ("base", start),
        ("full", full),
        ("retrained", read_all(folders["retrained"])),
    ):
        load(values)
        report(name, None)
    del start
    for method, strengths in STRENGTHS.items():
        weighted = task_vector
        if method.startswith("perta"):
            order = 1.0 if method == "perta-grad" else 2.0
            forget, retain = (
                read_all(order_folder(importance[part], order)) for part in ("forget", "retain")
            )
            weighted = {
                name: share(forget[name], retain[name], 1.0) * value
                for name, value in task_vector.items()
            }
        for strength in strengths:
            load({name: full[name] - strength * value for name, value in weighted.items()})
            report(method, strength)
    equal_forgetting(table)


def equal_forgetting(table: list[dict[str, Any]]) -> None:
    """Each method where its forget probability equals the retrained reference's."""
    target = next(row for row in table if row["method"] == "retrained")["forget_probability"]
    print(f"at the reference's forget probability, {target:.3f}:")
    for method in STRENGTHS:
        points = sorted(
            (row for row in table if row["method"] == method),
            key=lambda row: row["forget_probability"],
        )
        if len(points) < 2:
            continue
        forget = np.log([row["forget_probability"] for row in points])
        found = [
            np.interp(np.log(target), forget, [row[name] for row in points])
            for name in ("strength", *METRICS[1:])
        ]
        print(f"{method:14} " + " ".join(f"{value:.3f}" for value in found))


if __name__ == "__main__":
    main()
