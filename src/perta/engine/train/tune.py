"""Fine-tuning in memory: a model and encoded examples.

Cost: 6 operations per parameter and token; memory 16 bytes per parameter (weights, gradients,
two AdamW moments, all float32) plus activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perta.data.batch import Batch, Encoded
from perta.engine.shard import Whole, is_sharded
from perta.engine.train._loop import add_gradient, losses_after, train
from perta.engine.train.optimizer import Resume, Trainer
from perta.errors import ConfigError, DivergenceError
from perta.models.loss import example_losses
from perta.models.precision import product_type_of
from perta.options import LEARNED_LOSS, DType, TuneConfig
from perta.parallel import Own, count, everywhere
from perta.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LEARNED_FACT = 0.05  # loss in nats per token at which a fact counts as learned, each row by itself
_TUNED = 4  # times a weight's bytes: itself, its gradient and two means of AdamW
_RATES = (1.0, 4.0, 16.0)
"""Multiples of the usual learning rate that are tried, in order, until the set is learned."""
_LONGER = 4  # how many times the epochs the best rate gets where none learns the set
_MOST = 0.9  # share of the examples that is learned well enough: higher rates harm the rest


@dataclass(frozen=True)
class Tuned:
    """What tuning did."""

    epoch_losses: tuple[float, ...]  # mean example loss during each epoch, nats per labelled token
    final_losses: tuple[float, ...]  # loss of every example after tuning, in file order
    steps: int  # optimizer steps taken
    tokens: int  # tokens that passed forward and backward, without padding
    learning_rate: float  # the peak learning rate
    row_by_row: bool = False  # whether every example had to be learned, and not their mean

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

    @property
    def learned_share(self) -> float:
        """Share of the examples that count as learned by themselves."""
        limit = LEARNED_FACT if self.row_by_row else LEARNED_LOSS
        return sum(loss <= limit for loss in self.final_losses) / len(self.final_losses)


def taken_by(config: TuneConfig, weights: int) -> int:
    """Bytes that are known before tuning, by those of the weights."""
    return weights * (1 if config.tunes_adapter else _TUNED)


def _usual_rate(model: PreTrainedModel, config: TuneConfig) -> float:
    """Learning rate of AdamW where the user gives none.

    A step of Adam moves a weight by the rate whatever its gradient, so a layer's output moves by
    the rate times the number of its inputs: the rate falls with the width (Yang et al. 2022,
    "Tensor Programs V"). Adapters start from nothing and want more.
    """
    embedding: Any = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    return 5e-5 * 576 / width * (10 if config.tunes_adapter else 1)


def tune_until_learned(
    load: Callable[[], PreTrainedModel],
    examples: Sequence[Encoded],
    config: TuneConfig,
    *,
    pad: int,
    dtype: DType = "auto",
    resume: Resume | None = None,
    merges: bool = True,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, Tuned]:
    """Tune a model; without a learning rate of the user's, at the first that learns the set.

    `load` gives the model as it was before, for each rate tried; `resume` keeps the state of a run
    at the first. The tokens of the outcome are those of all tries. Errors as of `tune`.
    """
    how: dict[str, Any] = {"pad": pad, "dtype": dtype, "merges": merges, "device": device}
    if not config.finds_rate:
        return tune(load(), examples, config, resume=resume, **how)

    def tried(factor: float, epochs: int) -> tuple[PreTrainedModel, Tuned]:
        model = load()
        settings = replace(config, learning_rate=factor * _usual_rate(model, config), epochs=epochs)
        kept = resume if (factor, epochs) == (_RATES[0], config.epochs) else None
        return tune(model, examples, settings, resume=kept, **how)

    tokens, best, share = 0, _RATES[0], -1.0
    for factor in _RATES:
        try:
            model, tuned = tried(factor, config.epochs)
        except DivergenceError:
            if factor == _RATES[0]:
                raise
            break
        tokens += tuned.tokens
        if tuned.learned or tuned.learned_share >= _MOST:
            return model, replace(tuned, tokens=tokens)
        say(
            f"{tuned.learned_share:.0%} of {len(examples)} rows were learned at a learning rate of "
            f"{tuned.learning_rate:.1e}"
        )
        if tuned.learned_share < share:
            break
        best, share = factor, tuned.learned_share
    model, tuned = tried(best, _LONGER * config.epochs)
    return model, replace(tuned, tokens=tokens + tuned.tokens)


def tune(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    config: TuneConfig,
    *,
    pad: int,
    dtype: DType = "auto",
    resume: Resume | None = None,
    after_epoch: Callable[[int], None] | None = None,
    merges: bool = True,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, Tuned]:
    """Tune a float32 model in memory with AdamW, in place; `merges` an adapter, or leaves it on.

    The loss of a step is the mean over its examples of the mean negative log-likelihood of their
    answer tokens, the same per-example loss importance is taken of. `dtype` is the type of the
    products; `resume` is where the state of an unfinished run is kept; `after_epoch` is called with
    each epoch from 1, the model in evaluation mode; `device` is where it is tuned, by default where
    it lies. DivergenceError where the loss is not finite,
    or far above where it began.
    """
    config = replace(config, learning_rate=config.learning_rate or _usual_rate(model, config))
    device = device or model.device
    run = (model, examples, config, pad, product_type_of(model, dtype, device), merges)
    # What the caller does after an epoch is its own, and may ask the other processes for help.
    if after_epoch is not None:
        return _tune(*run, Own(resume), after_epoch)
    weights = sum(p.nbytes for p in model.parameters())
    if not is_sharded(config.shard, device, taken_by(config, weights)):
        nn.Module.to(model, device)
        return everywhere(_tune, *run, Own(resume), None)
    if resume is not None and resume.every:
        raise ConfigError(
            "--save-every keeps the state of a model that each process holds whole. Leave it out "
            "where the weights are divided, or say --no-shard."
        )
    whole = Whole.of(model, device)
    return everywhere(_tune, whole.outline(), *run[1:], Own(None), None, whole)


def _tune(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    config: TuneConfig,
    pad: int,
    products: torch.dtype,
    merges: bool,
    resume: Own[Resume],
    after_epoch: Callable[[int], None] | None,
    whole: Whole | None = None,
) -> tuple[PreTrainedModel, Tuned]:
    if whole is not None and count() == 1:  # the others could not be sent it
        model, whole = whole.model.to(whole.device), None
    trainer = Trainer.of(model, config, len(examples), products, whole)
    learning = _Learning(trainer, config, len(examples), after_epoch)
    train(trainer, learning, examples, title="Tuning", pad=pad, resume=resume.value)
    final = losses_after(trainer, trainer.model, examples, pad)
    done = trainer.finish(merges)
    losses = tuple(learning.epoch_losses)
    tokens = len(losses) * sum(len(e.input_ids) for e in examples)
    rate = trainer.settings.learning_rate or 0.0
    return done, Tuned(losses, tuple(final), trainer.steps, tokens, rate, config.row_by_row)


@dataclass
class _Learning:
    """The loss of every example's answer; with facts, each is learned to the same depth."""

    trainer: Trainer
    settings: TuneConfig
    examples: int
    after_epoch: Callable[[int], None] | None = None
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
            self.trainer, lambda rows: example_losses(model, rows), batch, 1 / size, above=depth
        ).cpu()  # once, for a GPU waits at each number that is read
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
        if self.after_epoch:
            self.after_epoch(epoch)
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
