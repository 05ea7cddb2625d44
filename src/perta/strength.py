"""`--scaling-coef auto`: the smallest strength at which the forget set looks unseen.

The weighted direction is held in memory and subtracted from a loaded model, with the values that
would be stored (see `edited_model`), so a try costs one evaluation of the forget set and of the
retain set, and no checkpoint.

Unseen means that a signal has risen to where it stands for what a model truly has not seen:

- with a held-out set, the mean loss of the forget examples, to the held-out set's loss under the
  full model;
- else, where the rows have paraphrased and wrong answers, how much less probable the paraphrased
  right answer is than the wrong ones (the logarithm of TOFU's truth ratio, arXiv 2401.06121,
  section 2.2.2), to where it stands under the base model. All these answers have one style, so
  what tuning taught about style cancels;
- else the mean loss of the forget examples, to where it stands under the base model.

One half of the retain set decides how far the strength
may go; the other half is only reported. Both halves were among the examples that the weighting
protects, so neither says how rows fare that gave no importance or moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from perta.atomic import scratch_folder
from perta.batch import Encoded
from perta.config import ComputeConfig, DataConfig
from perta.config_stages import EditConfig
from perta.data import ExampleSet, encode_example, encode_examples
from perta.edited_model import EditedModel, load_changes
from perta.errors import ConfigError
from perta.model import load_model, load_tokenizer, longest_input, pad_id
from perta.objectives import losses_of
from perta.progress import say, warn

Calibration = Literal[
    "held-out set", "truth ratios under the base model", "base model on the forget set"
]

_TRUTH_RATIOS: Final = "truth ratios under the base model"

_PARAPHRASED, _WRONG = "paraphrased_answer", "perturbed_answer"

LARGEST = 16.0
"""Strength beyond which no search goes."""

TOLERANCE = 0.02
"""Relative width of the interval of strengths at which bisection stops."""

_BATCH_SIZE = 8

_ROUNDING = 1e-4
"""Nats per token within which a signal counts as that of the unseen: an edit that leads back to
the base model must not miss it by the last digits."""


@dataclass(frozen=True)
class Point:
    """One strength that was tried; losses are means over examples, nats per token.

    Attributes:
        scaling_coef: α.
        signal: what is compared with the unseen: the forget loss, or the log truth ratio.
        forget_loss: of the forget set.
        selecting_loss: of the half of the retain set that decides.
        reporting_loss: of the other half.
    """

    scaling_coef: float
    signal: float
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
        unseen: where the signal stands for what was not seen, nats per token.
        retain_budget: largest rise of the selecting half's loss, nats per token.
        frontier: every strength tried, ascending.
    """

    scaling_coef: float
    reached: bool
    calibrated_on: Calibration
    unseen: float
    retain_budget: float
    frontier: tuple[Point, ...]


@dataclass(frozen=True)
class StrengthSettings:
    """Settings of a search.

    Attributes:
        retain_budget: largest rise of the selecting half's loss, nats per token.
        seed: seed of the halves of the retain set.
        scratch: folder for temporary files, two float32 checkpoints.
    """

    retain_budget: float
    seed: int
    scratch: Path


@dataclass(frozen=True)
class Unseen:
    """Where the signal stands for what a model truly has not seen.

    Attributes:
        calibrated_on: what it was measured on.
        signal: nats per token.
    """

    calibrated_on: Calibration
    signal: float


@dataclass(frozen=True)
class _Rows:
    """The sets as token sequences; `answers` is empty where they do not calibrate."""

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    holdout: Sequence[Encoded]
    answers: Sequence[Sequence[Encoded]]
    pad: int

    def signal(self, model: nn.Module) -> float:
        """What is compared with the unseen: the log truth ratio or the forget loss."""
        if self.answers:
            return log_truth_ratio(model, self.answers, self.pad)
        return mean_loss(model, self.forget, self.pad)


def _encode(
    full: Path, sets: Mapping[str, ExampleSet], data_config: DataConfig, *, answers: bool
) -> _Rows:
    tokenizer, longest = load_tokenizer(full), longest_input(full)
    encoded = {
        name: encode_examples(sets[name], tokenizer, data_config, longest=longest).encoded
        for name in ("forget", "retain", "holdout")
        if name in sets
    }
    limit = min(data_config.max_length, longest or data_config.max_length)
    made = _encode_answers(sets["forget"], tokenizer, data_config, limit) if answers else ()
    holdout = encoded.get("holdout", ())
    return _Rows(encoded["forget"], encoded["retain"], holdout, made, pad_id(tokenizer))


def calibrate(
    full: Path,
    base: Path,
    sets: Mapping[str, ExampleSet],
    data_config: DataConfig,
    compute: ComputeConfig,
) -> Unseen:
    """Measure what unseen means, and that the full model is not there already.

    Args:
        full: θ_full.
        base: θ₀.
        sets: `forget`, `retain`, and `holdout` if there is one.
        data_config: how rows become tokens.
        compute: device; weights are float32 whatever it says.

    Returns:
        The signal that the search is for.

    Raises:
        ConfigError: too few retain rows, or the forget set looks unseen to the full model.
        PertaError: input that cannot be used.
    """
    rows = _encode(full, sets, data_config, answers="holdout" not in sets)
    if len(rows.retain) < 2:
        raise ConfigError(
            "--scaling-coef auto selects on one half of the retain set and reports on the other; "
            "one example is too few. Give a number, or a larger retain set."
        )
    model = load_model(full, compute, dtype=torch.float32)
    start = rows.signal(model)
    if rows.holdout:
        found = Unseen("held-out set", mean_loss(model, rows.holdout, rows.pad))
        cure = "Is --holdout really unseen?"
    else:
        del model
        signal = rows.signal(load_model(base, compute, dtype=torch.float32))
        found = Unseen(_TRUTH_RATIOS if rows.answers else "base model on the forget set", signal)
        cure = f"Was {full} tuned on the forget set?"
    if not start < found.signal - _ROUNDING:
        raise ConfigError(
            f"The forget set looks unseen to {full} already: its {_signal_name(found)} is "
            f"{start:.3f} nats per token, and unseen is {found.signal:.3f} (by "
            f"{found.calibrated_on}). {cure} Otherwise give --scaling-coef a number."
        )
    return found


def choose_strength(
    edit: EditConfig,
    sets: Mapping[str, ExampleSet],
    unseen: Unseen,
    settings: StrengthSettings,
    data_config: DataConfig,
    compute: ComputeConfig,
) -> Strength:
    """Search for the strength of an edit, and say what was found.

    Args:
        edit: the edit, its checkpoints being local folders; its strength is not used.
        sets: `forget`, `retain`, and `holdout` if there is one.
        unseen: from `calibrate`, for the same sets.
        settings: of the search.
        data_config: how rows become tokens.
        compute: device; weights are float32 whatever it says.

    Returns:
        The strength and the frontier.

    Raises:
        PertaError: input that cannot be used.
    """
    full = Path(edit.full)
    with_answers = unseen.calibrated_on == _TRUTH_RATIOS
    rows = _encode(full, sets, data_config, answers=with_answers)
    with scratch_folder(settings.scratch / "strength") as scratch:
        changes = load_changes(scratch, edit, compute)
    order = torch.randperm(
        len(rows.retain), generator=torch.Generator().manual_seed(settings.seed)
    ).tolist()
    shuffled = [rows.retain[i] for i in order]
    half = len(shuffled) // 2
    parts = (rows.forget, shuffled[:half], shuffled[half:])
    edited = EditedModel(load_model(full, compute, dtype=torch.float32), changes)
    measure = Trials(edited, parts, rows.answers, rows.pad).at
    chosen, reached, points = search_strength(measure, unseen.signal, settings.retain_budget)
    found = Strength(
        chosen.scaling_coef,
        reached,
        unseen.calibrated_on,
        unseen.signal,
        settings.retain_budget,
        points,
    )
    _report(found, chosen)
    return found


def _report(found: Strength, chosen: Point) -> None:
    before = found.frontier[0].reporting_loss
    say(
        f"strength {found.scaling_coef:.3g}: {_signal_name(found)} {chosen.signal:.3f} nats per "
        f"token, unseen is {found.unseen:.3f} (by {found.calibrated_on}); retain loss "
        f"{before:.3f} -> {chosen.reporting_loss:.3f} on the half that did not decide"
    )
    if not found.reached:
        warn(
            "The forget set does not look unseen at the largest strength within the retain budget "
            f"of {found.retain_budget:g} nats per token. Raise --retain-budget, or choose another "
            "method."
        )


def search_strength(
    measure: Callable[[float], Point], unseen: float, retain_budget: float
) -> tuple[Point, bool, tuple[Point, ...]]:
    """Smallest strength at which the signal is that of unseen examples, by bisection.

    The strength is doubled from 1/4 until the forget set looks unseen or the budget is spent,
    and goes no further: what lies behind is a model that collapses.

    Args:
        measure: strength -> losses.
        unseen: signal wanted, nats per token.
        retain_budget: largest rise of the selecting half's loss, nats per token.

    Returns:
        The point chosen, whether the forget set looks unseen there, and all points, ascending.
    """
    start = measure(0.0)
    points = [start]

    def fits(point: Point) -> bool:
        rise = point.selecting_loss - start.selecting_loss
        return math.isfinite(point.signal) and rise <= retain_budget

    def forgets(point: Point) -> bool:
        return point.signal >= unseen - _ROUNDING

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


class Trials:
    """Losses at any strength."""

    def __init__(
        self,
        edited: EditedModel,
        sets: tuple[Sequence[Encoded], Sequence[Encoded], Sequence[Encoded]],
        answers: Sequence[Sequence[Encoded]],
        pad: int,
    ) -> None:
        self._edited = edited
        self._sets, self._answers = sets, answers
        self._pad = pad

    def at(self, scaling_coef: float) -> Point:
        """Losses of θ_full − α Δ."""
        self._edited.move(scaling_coef)
        model = self._edited.model
        losses = [mean_loss(model, examples, self._pad) for examples in self._sets]
        signal = losses[0]
        if self._answers:
            signal = log_truth_ratio(model, self._answers, self._pad)
        return Point(scaling_coef, signal, *losses)


def mean_loss(model: nn.Module, examples: Sequence[Encoded], pad: int) -> float:
    """Mean over examples of their loss, nats per token."""
    losses = losses_of(model, examples, batch_size=_BATCH_SIZE, pad=pad)
    return math.fsum(losses) / len(losses)


def log_truth_ratio(model: nn.Module, answers: Sequence[Sequence[Encoded]], pad: int) -> float:
    """How much less probable the right answer is than the wrong ones.

    Args:
        model: causal language model.
        answers: of each row the paraphrased right answer, then the wrong ones.
        pad: padding token.

    Returns:
        Mean over rows of the right answer's loss less the mean loss of the wrong ones, nats per
        token: below 0 where the model knows the right one.
    """
    every = [answer for row in answers for answer in row]
    losses = iter(losses_of(model, every, batch_size=_BATCH_SIZE, pad=pad))
    margins = []
    for row in answers:
        right, *wrong = (next(losses) for _ in row)
        margins.append(right - math.fsum(wrong) / len(wrong))
    return math.fsum(margins) / len(margins)


def _encode_answers(
    examples: ExampleSet, tokenizer: PreTrainedTokenizerBase, data_config: DataConfig, limit: int
) -> tuple[tuple[Encoded, ...], ...]:
    """Of each row the paraphrased answer and the wrong ones; empty unless every row has them."""
    rows = []
    for example in examples.examples:
        right, wrong = example.fields.get(_PARAPHRASED), example.fields.get(_WRONG)
        if not isinstance(right, str) or not isinstance(wrong, list) or not wrong:
            return ()
        texts = (right, *wrong)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            return ()
        row = tuple(encode_example(example.with_answer(t), tokenizer, data_config) for t in texts)
        size = max(len(answer.input_ids) for answer in row)
        if size > limit:
            warn(
                f"{examples.source}: row {example.row}: a paraphrased or wrong answer makes {size} "
                f"tokens, and the limit is {limit}. Unseen is calibrated without such answers."
            )
            return ()
        rows.append(row)
    return tuple(rows)


def _signal_name(found: Strength | Unseen) -> str:
    return "log truth ratio" if found.calibrated_on == _TRUTH_RATIOS else "forget loss"
