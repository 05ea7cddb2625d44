"""Fine-tuning in memory: a model and encoded examples.

Cost: 6 operations per parameter and token; memory 16 bytes per parameter (weights, gradients,
two AdamW moments, all float32) plus activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perta.data.batch import Encoded, bucketed
from perta.engine.train.optimizer import (
    Resume,
    Trainer,
    add_lora,
    autocast,
    set_checkpointing,
    step_groups,
    steps_per_epoch,
)
from perta.errors import DivergenceError
from perta.models.loss import example_losses, losses_of
from perta.options import TuneConfig
from perta.progress import Advance, track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LEARNED_LOSS = 0.2
"""Mean example loss in nats per token at which a set counts as learned: an answer's tokens then
have a geometric mean probability of 0.82."""
LEARNED_FACT = 0.05
"""Loss in nats per token at which a fact counts as learned, each row by itself."""


@dataclass(frozen=True)
class Tuned:
    """What tuning did.

    Attributes:
        epoch_losses: mean example loss during each epoch, nats per labelled token.
        final_losses: loss of every example after tuning, in file order.
        steps: optimizer steps taken.
        tokens: tokens that passed forward and backward, without padding.
        row_by_row: whether every example had to be learned, and not their mean.
    """

    epoch_losses: tuple[float, ...]
    final_losses: tuple[float, ...]
    steps: int
    tokens: int
    row_by_row: bool = False

    @property
    def final_loss(self) -> float:
        """Mean over examples of the loss after tuning."""
        return sum(self.final_losses) / len(self.final_losses)

    @property
    def learned(self) -> bool:
        """Whether the set counts as learned."""
        if self.row_by_row:
            return max(self.final_losses) <= LEARNED_FACT
        return self.final_loss <= LEARNED_LOSS


def tune(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    config: TuneConfig,
    *,
    pad: int,
    resume: Resume | None = None,
) -> tuple[PreTrainedModel, Tuned]:
    """Tune a model in memory with AdamW.

    The loss of a step is the mean over its examples of the mean negative log-likelihood of
    their answer tokens, the same per-example loss importance is taken of.

    Args:
        model: float32 causal language model, on its device; changed in place.
        examples: the training set.
        config: settings.
        pad: padding token.
        resume: where the state of an unfinished run is kept; None for nowhere.

    Returns:
        The tuned model (an adapter is merged) and what happened.

    Raises:
        DivergenceError: the loss is not finite, or far above where it began.
    """
    torch.manual_seed(config.seed)
    tuned_model: Any = add_lora(model, config) if config.lora_rank else model
    if config.gradient_checkpointing:
        set_checkpointing(tuned_model, True)
    per_epoch = steps_per_epoch(len(examples), config)
    trainer = Trainer.of(tuned_model, config, per_epoch * config.epochs)
    saved = resume.load(trainer) if resume else None
    epoch_losses: list[float] = saved[1]["epoch_losses"] if saved else []
    tuned_model.train()
    with track("Tuning", (config.epochs - len(epoch_losses)) * len(examples)) as advance:
        for epoch in range(len(epoch_losses) + 1, config.epochs + 1):
            loss, highest = _train_epoch(trainer, examples, config, pad, advance)
            epoch_losses.append(loss)
            _stop_on_divergence(epoch_losses)
            if (highest if config.row_by_row else loss) <= config.depth:
                break
            if resume and epoch < config.epochs:
                resume.save(trainer, epoch, {"epoch_losses": epoch_losses})
    if config.gradient_checkpointing:
        set_checkpointing(tuned_model, False)
    done: Any = tuned_model.merge_and_unload() if config.lora_rank else model
    done.eval()
    final = losses_of(done, examples, batch_size=config.batch_size, pad=pad)
    tokens = len(epoch_losses) * sum(len(e.input_ids) for e in examples)
    return done, Tuned(tuple(epoch_losses), tuple(final), trainer.steps, tokens, config.row_by_row)


def _train_epoch(
    trainer: Trainer, examples: Sequence[Encoded], config: TuneConfig, pad: int, advance: Advance
) -> tuple[float, float]:
    """One pass over the examples; mean and highest loss, each taken before the row's own step."""
    device = next(trainer.model.parameters()).device
    total, highest = 0.0, 0.0
    batches = bucketed(examples, config.batch_size, pad, trainer.generator)
    for group in step_groups(batches, config.accumulation):
        size = sum(len(batch) for batch in group)
        group_loss, wanting = 0.0, False
        for batch in group:
            with autocast(device):
                losses: Tensor = example_losses(trainer.model, batch.to(device))
            values = losses.detach()
            above = values > config.depth if config.row_by_row else torch.ones_like(values).bool()
            if above.any():
                wanting = True
                ((losses * batch.weights.to(device))[above].sum() / size).backward()
            group_loss += values.sum().item()
            highest = max(highest, values.max().item())
            advance(len(batch), f"loss {group_loss / size:.3f}")
        if not math.isfinite(group_loss):
            raise DivergenceError(_diverged(f"the loss became {group_loss}"))
        if wanting:
            trainer.step()
        total += group_loss
    return total / len(examples), highest


def _stop_on_divergence(epoch_losses: Sequence[float]) -> None:
    first, last = epoch_losses[0], epoch_losses[-1]
    if last > 3 * first + 1:
        raise DivergenceError(_diverged(f"the epoch's loss rose from {first:.2f} to {last:.2f}"))


def _diverged(what: str) -> str:
    return f"Tuning diverged: {what}. Lower --learning-rate. Nothing was written."
