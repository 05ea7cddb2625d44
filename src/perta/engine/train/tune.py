"""Fine-tuning in memory: a model and encoded examples.

Cost: 6 operations per parameter and token; memory 16 bytes per parameter (weights, gradients,
two AdamW moments, all float32) plus activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perta.data.batch import Batch, Encoded
from perta.engine.train._loop import add_gradient, train
from perta.engine.train.optimizer import Resume, Trainer
from perta.errors import DivergenceError
from perta.models.loss import example_losses, losses_of
from perta.options import TuneConfig
from perta.progress import say

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
    """Tune a float32 model in memory with AdamW, in place; an adapter is merged.

    The loss of a step is the mean over its examples of the mean negative log-likelihood of
    their answer tokens, the same per-example loss importance is taken of. `resume` is where the
    state of an unfinished run is kept.

    Raises:
        DivergenceError: the loss is not finite, or far above where it began.
    """
    trainer = Trainer.of(model, config, len(examples))
    learning = _Learning(trainer, config, len(examples))
    train(trainer, learning, examples, title="Tuning", pad=pad, resume=resume)
    done = trainer.finish()
    final = losses_of(done, examples, batch_size=config.batch_size, pad=pad)
    losses = tuple(learning.epoch_losses)
    tokens = len(losses) * sum(len(e.input_ids) for e in examples)
    return done, Tuned(losses, tuple(final), trainer.steps, tokens, config.row_by_row)


@dataclass
class _Learning:
    """The loss of every example's answer; with facts, each is learned to the same depth.

    Losses of an epoch are taken before each row's own step.
    """

    trainer: Trainer
    settings: TuneConfig
    examples: int
    epoch_losses: list[float] = field(default_factory=list)
    _step: float = 0.0
    _epoch: float = 0.0
    _highest: float = 0.0
    _wanting: bool = False

    @property
    def history(self) -> Mapping[str, Any]:
        return {"epoch_losses": self.epoch_losses}

    def restore(self, history: Mapping[str, Any]) -> None:
        self.epoch_losses = history["epoch_losses"]

    def backward(self, batch: Batch, size: int) -> str:
        model, depth = self.trainer.model, self._row_depth
        losses = add_gradient(
            model, lambda rows: example_losses(model, rows), batch, 1 / size, above=depth
        )
        highest = losses.max().item()
        self._wanting |= depth is None or highest > depth
        self._step += losses.sum().item()
        self._highest = max(self._highest, highest)
        return f"loss {self._step / size:.3f}"

    def finish_step(self, size: int, epoch: int) -> bool:
        del size, epoch
        if not math.isfinite(self._step):
            raise _diverged(f"the loss became {self._step}")
        self._epoch += self._step
        wanting, self._wanting, self._step = self._wanting, False, 0.0
        return wanting

    def finish_epoch(self, epoch: int) -> bool:
        loss, highest = self._epoch / self.examples, self._highest
        self._epoch = self._highest = 0.0
        self.epoch_losses.append(loss)
        if loss > 3 * self.epoch_losses[0] + 1:
            rise = f"from {self.epoch_losses[0]:.2f} to {loss:.2f}"
            raise _diverged(f"the epoch's loss rose {rise}")
        settings = self.settings
        reached = highest if settings.row_by_row else loss
        if reached <= settings.depth and epoch < settings.epochs:
            what = "the highest loss of a row" if settings.row_by_row else "the mean loss"
            say(
                f"Stopped after epoch {epoch} of {settings.epochs}: {what} is {reached:.3f}, at or "
                f"below {settings.depth:g}"
            )
        return reached <= settings.depth

    @property
    def _row_depth(self) -> float | None:
        return self.settings.depth if self.settings.row_by_row else None


def _diverged(what: str) -> DivergenceError:
    return DivergenceError(f"Tuning diverged: {what}. Lower --learning-rate. Nothing was written.")
