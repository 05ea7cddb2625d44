"""Weights of an edit learned on a few rows, beside the closed form: docs/experiments/learned.md.

    python benchmarks/learned.py WORK --base SMOLLM2_FOLDER --forget-checkpoint FOLDER --seed 1

People, models and measures are those of rivals.py, WORK is its folder, and FOLDER is the base tuned
on the forget rows. The edit takes from every MLP weight a sum of parts of its task vector, one part
for each of `--bins` groups of directions of the layer's inputs, sorted by how much retained rows
use them; with `--bins 0` it is one part, the direction of `perta-project`. How much of each part is
taken is

    closed   the share of `perta-project` at ρ = 3, the mean over a group, times one strength
    learned  from there on some steps down  mean p_f + w mean l_r  over forget and retain rows;
             p_f is the probability per token of an answer and l_r the loss of one

Both are then scaled to equal facts. One JSON line each goes to WORK/learned.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perta.data.batch import collate, seeded_sample
from perta.methods.directions import projected_direction
from perta.models.loss import example_losses
from perta.progress import set_quiet
from perta.stages.moments import compute_moments
from perta.stages.settings import MomentsConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.measured.moments import open_moments
from perta.store.measured.second_moment import matrix
from rivals import DATA, MARGIN, Seed

RHO, STRENGTH, RATE, ROWS = 3.0, 2.7, 0.3, 8
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Parts:
    """A weight, where it was, and K parts of its task vector (K, out, in), a share each (K,)."""

    weight: nn.Parameter
    start: Tensor
    parts: Tensor
    shares: Tensor


def split_by_use(vector: Tensor, moment: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """A task vector (out, in) in parts (K, out, in) along groups of directions, and their shares.

    Without groups it is one part, projected, with all of it as the share.

    Directions are the eigenvectors of the moment of retained inputs, in groups of about one size
    from the most used on; the share is the mean of 1 / (1 + ρ s / c) over a group.
    """
    if not bins:
        whole = projected_direction(vector, moment, RHO).delta.float()
        return whole.unsqueeze(0), torch.ones(1)
    values, vectors = torch.linalg.eigh(matrix(moment))
    shares = 1 / (1 + RHO * values.clamp(min=0) / values.mean())
    groups = torch.arange(len(values)).flip(0).tensor_split(bins)
    rotated = vector.double() @ vectors
    parts = [(rotated[:, g] @ vectors[:, g].T).float() for g in groups]
    return torch.stack(parts), torch.stack([shares[g].mean() for g in groups]).float()


def parts_of(seed: Seed, tuned: Path, bins: int) -> list[Parts]:
    """The parts of every MLP weight of the model in memory, which is the full one."""
    output = seed.folder / "learned.moments"
    full = str(seed.folder / "full")
    moments = open_moments(
        compute_moments(
            MomentsConfig(
                checkpoint=full, data=str(seed.files["protected"]), output=output, data_config=DATA
            )
        )
    )
    before, after, found = open_index(seed.base).tensors, open_index(tuned).tensors, []
    for name, weight in seed.model.named_parameters():
        if name.removesuffix(".weight").endswith(MLP):
            vector = read_tensor(after[name]) - read_tensor(before[name])
            parts, shares = split_by_use(vector, moments.input_moment(name), bins)
            found.append(Parts(weight, weight.detach().clone(), parts, shares))
    return found


@torch.no_grad()
def put(parts: Sequence[Parts], logs: Sequence[Tensor]) -> None:
    """Give every weight its place at these logarithms of how much is taken."""
    for part, log in zip(parts, logs, strict=True):
        taken = torch.einsum("k,koi->oi", log.exp(), part.parts)
        part.weight.copy_(part.start - taken)


def learn(
    seed: Seed, parts: Sequence[Parts], logs: list[Tensor], steps: int, retain_weight: float
) -> None:
    """Change the logarithms, in place, down the loss; the model ends there."""
    optimizer = torch.optim.Adam(logs, lr=RATE)
    for step in range(steps):
        put(parts, logs)
        rows = [seeded_sample(seed.encoded[name], ROWS, step) for name in ("forget", "protected")]
        batches = [collate(some, seed.pad) for some in rows]
        with seed.products():
            known = (-example_losses(seed.model, batches[0])).exp().mean()
            kept = example_losses(seed.model, batches[1]).mean()
        gradients = torch.autograd.grad(
            known + retain_weight * kept, [part.weight for part in parts]
        )
        for part, log, gradient in zip(parts, logs, gradients, strict=True):
            log.grad = -torch.einsum("oi,koi->k", gradient, part.parts) * log.exp()
        optimizer.step()
        print(f"    step {step}: {known.item():.3f} {kept.item():.3f}", flush=True)
    put(parts, logs)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--forget-checkpoint", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bins", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--retain-weight", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", default=["closed", "learned"])
    options = parser.parse_args()
    set_quiet(True)
    seed = Seed(options.work, options.base, options.seed)
    journal = (options.work / "results.jsonl").read_text("utf-8").splitlines()
    gold = {"seed": options.seed, "method": "retrained"}
    target = next(line["hit"] for line in map(json.loads, journal) if gold.items() <= line.items())
    for kind in options.kinds:
        seed.model, started = seed.read(seed.folder / "full"), time.perf_counter()
        parts = parts_of(seed, options.forget_checkpoint, options.bins)
        logs = [(STRENGTH * part.shares).log() for part in parts]
        put(parts, logs)
        if kind == "learned":
            learn(seed, parts, logs, options.steps, options.retain_weight)
        seconds = time.perf_counter() - started
        del parts  # room for the search
        line: dict[str, Any] = {"seed": options.seed, "kind": kind, "bins": options.bins}
        line |= {"steps": options.steps, "retain_weight": options.retain_weight}
        line |= {"seconds": seconds, **seed.scaled(target + MARGIN), **seed.measure()}
        line["shares"] = [[round(v, 3) for v in log.exp().tolist()] for log in logs]
        print(json.dumps({**line, "shares": None}), flush=True)
        with (options.work / "learned.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
