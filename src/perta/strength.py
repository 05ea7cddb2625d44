"""`--scaling-coef auto`: the smallest strength at which the forget set looks unseen.

The weighted direction is held in memory and subtracted from a loaded model in place, so a try
costs one evaluation of the forget set and of the retain set, and no checkpoint.

Unseen means: the mean loss of the forget examples has risen to that of examples the model truly
has not seen, which are a held-out set under the full model if there is one, and otherwise the
forget set itself under the base model. One half of the retain set decides how far the strength
may go; the other half is only reported. Both halves were among the examples that the weighting
protects, so neither says how rows fare that gave no importance or moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from perta.batch import Encoded
from perta.checkpoint import copy_companions, open_index, write_tensors
from perta.config import ComputeConfig, WeightingConfig
from perta.edit import write_edit
from perta.errors import ConfigError
from perta.finetune import losses_of
from perta.model import load_model

Calibration = Literal["held-out set", "base model on the forget set"]

LARGEST = 16.0
"""Strength beyond which no search goes."""

TOLERANCE = 0.02
"""Relative width of the interval of strengths at which bisection stops."""

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Point:
    """One strength that was tried; losses are means over examples, nats per token.

    Attributes:
        scaling_coef: α.
        forget_loss: of the forget set.
        selecting_loss: of the half of the retain set that decides.
        reporting_loss: of the other half.
    """

    scaling_coef: float
    forget_loss: float
    selecting_loss: float
    reporting_loss: float


@dataclass(frozen=True)
class Strength:
    """Outcome of a search.

    Attributes:
        scaling_coef: the strength to use.
        reached: whether the forget set looks unseen at it; otherwise it is the largest found
            within the retain budget.
        calibrated_on: what unseen was measured on.
        unseen_loss: loss of what was not seen, nats per token.
        retain_budget: largest rise of the selecting half's loss, nats per token.
        frontier: every strength tried, ascending.
    """

    scaling_coef: float
    reached: bool
    calibrated_on: Calibration
    unseen_loss: float
    retain_budget: float
    frontier: tuple[Point, ...]


def search_strength(
    measure: Callable[[float], Point], unseen_loss: float, retain_budget: float
) -> tuple[Point, bool, tuple[Point, ...]]:
    """Smallest strength at which the forget loss is that of unseen examples, by bisection.

    The strength is doubled from 1/4 until the forget set looks unseen or the budget is spent,
    and goes no further: what lies behind is a model that collapses.

    Args:
        measure: strength -> losses.
        unseen_loss: forget loss wanted, nats per token.
        retain_budget: largest rise of the selecting half's loss, nats per token.

    Returns:
        The point chosen, whether the forget set looks unseen there, and all points, ascending.
    """
    start = measure(0.0)
    points = [start]

    def fits(point: Point) -> bool:
        rise = point.selecting_loss - start.selecting_loss
        return math.isfinite(point.forget_loss) and rise <= retain_budget

    def forgets(point: Point) -> bool:
        return point.forget_loss >= unseen_loss

    low, high = start, start
    while not forgets(high) and fits(high) and high.scaling_coef < LARGEST:
        low, high = high, measure(max(0.25, 2 * high.scaling_coef))
        points.append(high)
    # From here `low` is within the budget and remembers; `high` forgets or breaks the budget.
    while high.scaling_coef - low.scaling_coef > TOLERANCE * high.scaling_coef and (
        forgets(high) or not fits(high)
    ):
        middle = measure((low.scaling_coef + high.scaling_coef) / 2)
        points.append(middle)
        if forgets(middle) or not fits(middle):
            high = middle
        else:
            low = middle
    reached = forgets(high) and fits(high)
    chosen = high if fits(high) else low
    return chosen, reached, tuple(sorted(points, key=lambda point: point.scaling_coef))


def find_strength(
    model: nn.Module,
    delta: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    unseen: tuple[Calibration, float],
    *,
    retain_budget: float,
    seed: int,
    pad: int,
) -> Strength:
    """Try strengths in place on a loaded model.

    Args:
        model: θ_full in float32; left as it was, up to rounding.
        delta: the weighted direction in the shape of the same model, float32.
        forget: examples to forget.
        retain: examples to keep, at least two; a seeded half decides.
        unseen: what was not seen, and its loss in nats per token.
        retain_budget: see `search_strength`.
        seed: seed of the halves.
        pad: padding token.

    Returns:
        The strength and the frontier.

    Raises:
        ConfigError: the retain set cannot be halved.
    """
    if len(retain) < 2:
        raise ConfigError(
            "--scaling-coef auto selects on one half of the retain set and reports on the other; "
            "one example is too few. Give a number, or a larger retain set."
        )
    order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    pairs = list(zip(model.parameters(), delta.parameters(), strict=True))
    current = 0.0

    def mean_loss(examples: Sequence[Encoded]) -> float:
        losses = losses_of(model, examples, batch_size=_BATCH_SIZE, pad=pad)
        return math.fsum(losses) / len(losses)

    def move(scaling_coef: float) -> None:
        nonlocal current
        with torch.no_grad():
            for parameter, step in pairs:
                parameter.sub_(step, alpha=scaling_coef - current)
        current = scaling_coef

    def measure(scaling_coef: float) -> Point:
        move(scaling_coef)
        selecting, reporting = (mean_loss([retain[i] for i in half]) for half in halves)
        return Point(scaling_coef, mean_loss(forget), selecting, reporting)

    chosen, reached, frontier = search_strength(measure, unseen[1], retain_budget)
    move(0.0)
    return Strength(chosen.scaling_coef, reached, *unseen, retain_budget, frontier)


def load_delta(
    folder: Path,
    full: Path,
    base: Path,
    forget_checkpoint: Path,
    weighting: WeightingConfig,
    importance: tuple[Path | None, Path | None],
    direction: Path | None,
    compute: ComputeConfig,
) -> nn.Module:
    """The weighted direction W ⊙ τ of any method, as a model.

    It is what the edit makes of a checkpoint of zeros at α = −1, so names, tied weights and
    patterns are treated as in the edit itself.

    Args:
        folder: empty folder for intermediate files, two float32 checkpoints.
        full: θ_full.
        base: θ₀.
        forget_checkpoint: θ_f.
        weighting: method and its settings; its strength is not used.
        importance: importance folders of forget and retain set, where the method needs them.
        direction: weighted direction, for the structured methods.
        compute: device.

    Returns:
        A float32 model whose parameters are W ⊙ τ.
    """
    zeros, delta = folder / "zeros", folder / "delta"
    zeros.mkdir()
    delta.mkdir()
    index = open_index(full)
    tensors = {
        name: torch.zeros((), dtype=torch.float32).expand(entry.shape)
        for name, entry in index.tensors.items()
        if entry.dtype.is_floating_point
    }
    write_tensors(zeros, tensors, index.shards)
    copy_companions(full, zeros)
    settings = replace(weighting, scaling_coef=-1.0)
    write_edit(delta, zeros, base, forget_checkpoint, settings, *importance, direction=direction)
    return load_model(delta, compute, dtype=torch.float32)
