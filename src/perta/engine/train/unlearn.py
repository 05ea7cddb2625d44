"""Unlearn by training a model in memory: the loop behind every training method.

Each optimizer step takes a batch of forget examples and as many retain examples. An epoch is
one pass over the forget set; retain examples come in turn, in a seeded order, shuffled anew
whenever all have been seen (Maini et al., arXiv 2401.06121, pair them at random). Methods
without a forget term pass over the retain set instead.

Memory: 16 bytes per trained parameter as in fine-tuning. What is needed of θ_full is measured
before training where it is one number per example (`npo`, `dpo`); `kl`, `rmu`, `undial` and
`jensun` need θ_full itself: a frozen copy, 4 bytes per parameter, or with LoRA the same model with
its adapter turned off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perta.data.batch import Batch, Encoded, bucketed, collate
from perta.engine.train._loop import add_gradient, losses_after, train
from perta.engine.train._steering import (
    chosen_layer,
    layer_activations,
    train_only_down_projections,
    warn_if_short,
)
from perta.engine.train.optimizer import Resume, Trainer
from perta.errors import ConfigError, DivergenceError, EmptyDatasetError
from perta.methods.objectives import (
    Influence,
    Rmu,
    Scene,
    Training,
    answer_log_probs,
    answer_losses,
    control_vector,
    distance,
    divergence,
    jensen_shannon,
)
from perta.methods.registry import parse
from perta.models.loss import answer_logits, mean_by_example
from perta.models.precision import product_type_of, products_in
from perta.options import DType, TrainSettings
from perta.parallel import Own, everywhere, portion, share, summed
from perta.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AfterEpoch = Callable[[int], bool]
"""`after_epoch(epoch)`, from 1: called with the model in evaluation mode; True ends training."""


@dataclass(frozen=True)
class Trained:
    """What training did."""

    # Mean forget term during each epoch, before weighting; empty without one.
    forget_terms: tuple[float, ...]
    retain_terms: tuple[float, ...]  # mean retain term during each epoch; empty without one
    # Answer loss of every forget example after training, in the order given, nats per token; of the
    # retain examples for methods without a forget term.
    final_losses: tuple[float, ...]
    steps: int  # optimizer steps taken
    forget_tokens: int  # tokens of forget examples and refusals that passed forward and backward
    retain_tokens: int  # the same of retain examples

    @property
    def final_loss(self) -> float:
        """Mean over examples of the answer loss after training."""
        return sum(self.final_losses) / len(self.final_losses)


def with_method_defaults(method: Training, settings: TrainSettings, seed: int = 0) -> TrainSettings:
    """The settings with the method's passes and learning rate, and a seed, where none are given."""
    return replace(
        settings,
        epochs=settings.epochs or method.epochs,
        learning_rate=settings.learning_rate or method.learning_rate,
        seed=settings.seed or seed,
    )


def unlearn_by_training(
    model: PreTrainedModel,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    config: TrainSettings,
    *,
    method: Training | str,
    pad: int,
    dtype: DType = "auto",
    refusals: Sequence[Encoded] | None = None,
    after_epoch: _AfterEpoch | None = None,
    resume: Resume | None = None,
) -> tuple[PreTrainedModel, Trained]:
    """Train a model in memory until it has forgotten; it comes back in evaluation mode.

    The model is θ_full, or θ₀ for `retrain`, in float32 on its device; it is changed in place, an
    adapter merged. Sets that the method does not look at may be empty; what is None in `config` is
    the method's own; `dtype` is the type of products. `refusals` are what `with_refusals` gives
    beside the forget examples, in their order. `after_epoch` is called with each epoch from 1, the
    model in evaluation mode, with LoRA the adapter active in it; True ends training. `resume` is
    where the state of an unfinished run is kept. ConfigError where the method is none, or lacks
    what it needs; DivergenceError where a loss is not finite, or the retain term far above where it
    began.
    """
    method = parse(method, Training) if isinstance(method, str) else method
    settings = with_method_defaults(method, config)
    examples = _sets(method, forget, retain, refusals)
    measured = forget if method.sees_forget_set else retain
    run = (model, method, settings, examples, measured, pad, product_type_of(model, dtype))
    # What the caller does after an epoch is its own, and may ask the other processes for help.
    if after_epoch is not None:
        return _unlearn(*run, after_epoch, Own(resume))
    return everywhere(_unlearn, *run, None, Own(resume))


def _unlearn(
    model: PreTrainedModel,
    method: Training,
    settings: TrainSettings,
    examples: _Sets,
    measured: Sequence[Encoded],
    pad: int,
    products: torch.dtype,
    after_epoch: _AfterEpoch | None,
    resume: Own[Resume],
) -> tuple[PreTrainedModel, Trained]:
    model.eval()
    wanted = _Wanted.measure(model, method, settings, examples, pad, products)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    if isinstance(method, Rmu):
        names = train_only_down_projections(model, wanted.layer)
        settings = replace(settings, lora_targets=names if settings.lora_rank else ())
    trainer = Trainer.of(model, settings, len(examples.anchor), products)
    run = _Unlearning(_Terms(trainer, method, examples, wanted, pad), settings.seed, after_epoch)
    title = f"Unlearning ({method.name})"
    train(trainer, run, examples.anchor, title=title, pad=pad, resume=resume.value)
    done = trainer.finish()
    for name, parameter in done.named_parameters():
        parameter.requires_grad_(trainable[name])
    final = losses_after(trainer, done, measured, pad)
    _warn_if_ruined(final, done.config.vocab_size, method)
    terms_of = (tuple(run.seen.forget_terms), tuple(run.seen.retain_terms))
    tokens = (run.seen.forget_tokens, run.seen.retain_tokens)
    return done, Trained(*terms_of, tuple(final), trainer.steps, *tokens)


# --- what a run works on --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sets:
    """Examples of a run; `anchor` is passed over once an epoch."""

    anchor: Sequence[Encoded]
    retain: Sequence[Encoded]
    refusals: Sequence[Encoded]


def _sets(
    method: Training,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    refusals: Sequence[Encoded] | None,
) -> _Sets:
    if isinstance(method, Influence):
        raise ConfigError(
            f"`{method.name}` does not train. Use `perta train --method {method.name}`, or "
            "`perta.methods.influence.remove_influence` in a program."
        )
    if not method.sees_forget_set and method.retain is None:
        raise ConfigError(f"`{method.name}` has neither a `forget` term nor a retain term.")
    if method.sees_forget_set and not forget:
        raise EmptyDatasetError(f"`{method.name}` needs forget examples, but there are none.")
    if method.retain and not retain:
        raise EmptyDatasetError(f"`{method.name}` needs retain examples, but there are none.")
    if method.refusals and len(refusals or ()) != len(forget):
        raise ConfigError(
            f"`{method.name}` needs one refusal for each of the {len(forget)} forget examples, in "
            f"the same order, but there are {len(refusals or ())}."
        )
    if not method.sees_forget_set:
        return _Sets(retain, retain, ())
    if method.refusals == "instead":
        return _Sets(refusals or (), retain, ())
    return _Sets(forget, retain, refusals or () if method.refusals else ())


@dataclass(frozen=True)
class _Wanted:
    """What of θ_full the terms compare with, each empty or None where it is not needed.

    Log-probabilities of each forget answer and refusal are (examples,). `frozen` is θ_full itself,
    with LoRA the model with its adapter off. `rmu` steers `layer` to `vector`, (D,).
    """

    log_probs: Tensor
    refusal_log_probs: Tensor
    frozen: nn.Module | None
    vector: Tensor
    layer: int

    @classmethod
    def measure(
        cls,
        model: Any,
        method: Training,
        settings: TrainSettings,
        examples: _Sets,
        pad: int,
        products: torch.dtype,
    ) -> _Wanted:
        size = settings.batch_size
        scored = method.reference == "log_probs"
        copied = method.keeps_frozen_model and not settings.lora_rank
        vector, layer = torch.empty(0), 0
        if isinstance(method, Rmu):
            layer = chosen_layer(model, method.steering_layer)
            length = method.steering_coef
            width = model.config.get_text_config().hidden_size
            vector = control_vector(width, length, settings.seed)
            warn_if_short(model, layer, length, collate(examples.anchor[:size], pad))
        return cls(
            _log_probs(model, examples.anchor if scored else (), size, pad, products),
            _log_probs(model, examples.refusals if scored else (), size, pad, products),
            copy.deepcopy(model).requires_grad_(False) if copied else None,
            vector,
            layer,
        )


@torch.no_grad()
def _log_probs(
    model: nn.Module, examples: Sequence[Encoded], size: int, pad: int, products: torch.dtype
) -> Tensor:
    """Log-probability of each whole answer, (examples,) float32 on the CPU."""
    device = next(model.parameters()).device
    found = torch.zeros(len(examples))
    for batch in share(bucketed(examples, portion(size, len(examples)), pad)):
        with products_in(products, device):
            answers = answer_logits(model, batch.to(device))
        found[batch.index] = answer_log_probs(answers, len(batch)).cpu()
    return summed(found)


# --- terms of one batch ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Terms:
    """Forget and retain terms of a batch, one number per example."""

    trainer: Trainer
    method: Training
    examples: _Sets
    wanted: _Wanted
    pad: int

    @property
    def model(self) -> Any:
        """The model in training."""
        return self.trainer.model

    def forget(self, batch: Batch) -> Tensor:
        """The forget term, (B,)."""
        method, size = self.method, len(batch)
        if isinstance(method, Rmu):
            found, example = layer_activations(self.model, self.wanted.layer, batch)
            to = self.wanted.vector.to(found.device)
            return mean_by_example(distance(found, to), example, size)
        places = batch.index.cpu()
        device = batch.labels.device
        beside = bool(self.examples.refusals)
        scene = Scene(
            answer_logits(self.model, batch),
            size,
            reference_log_probs=_at(self.wanted.log_probs, places, device),
            reference_logits=self._frozen_logits(batch) if method.reference == "logits" else None,
            refusals=answer_logits(self.model, self._refusals(places).to(device))
            if beside
            else None,
            reference_refusal_log_probs=_at(self.wanted.refusal_log_probs, places, device),
        )
        return method.forget(scene)

    def retain(self, batch: Batch) -> Tensor:
        """The retain term, (B,)."""
        size = len(batch)
        if isinstance(self.method, Rmu):
            found, example = layer_activations(self.model, self.wanted.layer, batch)
            with self._frozen() as frozen:
                to, _ = layer_activations(frozen, self.wanted.layer, batch)
            return mean_by_example(distance(found, to), example, size)
        answers = answer_logits(self.model, batch)
        if self.method.retain in ("kl", "js"):
            apart = divergence if self.method.retain == "kl" else jensen_shannon
            terms = apart(answers.wide, self._frozen_logits(batch))
            return mean_by_example(terms, answers.example, size)
        return answer_losses(answers, size)

    def tokens(self, batch: Batch) -> int:
        """Tokens of a forget batch and the refusals beside it, without padding."""
        found = int(batch.attention_mask.sum())
        if self.examples.refusals:
            found += int(self._refusals(batch.index).attention_mask.sum())
        return found

    def _refusals(self, places: Tensor) -> Batch:
        return collate([self.examples.refusals[i] for i in places.tolist()], self.pad)

    def _frozen_logits(self, batch: Batch) -> Tensor:
        with self._frozen() as frozen:
            return answer_logits(frozen, batch).wide

    @contextmanager
    def _frozen(self) -> Iterator[Any]:
        """θ_full, without dropout and gradients."""
        with torch.no_grad():
            if self.wanted.frozen is not None:
                yield self.wanted.frozen
                return
            self.model.eval()
            with self.model.disable_adapter():
                yield self.model
            self.model.train()


def _at(values: Tensor, places: Tensor, device: torch.device) -> Tensor | None:
    return values[places].to(device) if len(values) else None


# --- what the loop trains for -----------------------------------------------------------------


@dataclass
class _History:
    """What has happened so far; a killed run goes on from it."""

    forget_terms: list[float] = field(default_factory=list)
    retain_terms: list[float] = field(default_factory=list)
    first_retain_term: float | None = None
    retain_weight: float | None = None  # that of the method until there was a step
    retain_drawn: int = 0
    forget_tokens: int = 0
    retain_tokens: int = 0


def _retain_place(draw: int, count: int, seed: int) -> int:
    """Place of the next of `count` retain examples: each once in turn, each turn in its own order.

    `draw` examples were handed out before, over all epochs.
    """
    turn, place = divmod(draw, count)
    # The generator uses the low 32 bits of a seed; a large odd factor keeps seeds apart.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % 2**32)
    return int(torch.randperm(count, generator=generator)[place])


@dataclass
class _Unlearning:
    """A forget and a retain term for each batch, as the loop asks; taken before its own step."""

    terms: _Terms
    seed: int
    after_epoch: _AfterEpoch | None
    seen: _History = field(default_factory=_History)
    # Sums of the forget and the retain term over a step and over an epoch.
    _step: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _epoch: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def history(self) -> Mapping[str, Any]:
        return asdict(self.seen)

    def restore(self, history: Mapping[str, Any]) -> None:
        self.seen = _History(**history)

    def backward(self, batch: Batch, size: int) -> str:
        terms, method = self.terms, self.terms.method
        if method.sees_forget_set:
            weight = method.forget_weight / size
            add = partial(add_gradient, terms.trainer, terms.forget, batch, weight)
            with terms.trainer.uphill(method.radius, add) if method.radius else nullcontext():
                self._step[0] += float(add().sum())
            self.seen.forget_tokens += terms.tokens(batch) * (2 if method.radius else 1)
        if method.retain:
            beside = self._beside(batch)
            weight = self._retain_weight / size
            self._step[1] += float(add_gradient(terms.trainer, terms.retain, beside, weight).sum())
            self.seen.retain_tokens += int(beside.attention_mask.sum())
        return f"forget {self._step[0] / size:.3f} retain {self._step[1] / size:.3f}"

    @property
    def _retain_weight(self) -> float:
        given = self.seen.retain_weight
        return self.terms.method.retain_weight if given is None else given

    def _beside(self, batch: Batch) -> Batch:
        """The retain examples that go with a batch; itself where it is of the retain set."""
        if not self.terms.method.sees_forget_set:
            return batch
        kept, drawn = self.terms.examples.retain, self.seen.retain_drawn
        self.seen.retain_drawn += len(batch)
        draws = range(drawn, self.seen.retain_drawn)
        beside = [kept[_retain_place(draw, len(kept), self.seed)] for draw in draws]
        return collate(beside, self.terms.pad)

    def finish_step(self, size: int, epoch: int) -> bool:
        if not all(map(math.isfinite, self._step)):
            what = f"the forget and retain terms became {self._step}"
            raise _diverged(self.terms.method, epoch, what)
        if self.seen.first_retain_term is None:
            self.seen.first_retain_term = self._step[1] / size
        self.seen.retain_weight = self.terms.method.next_retain_weight(
            self._retain_weight, self._step[1] / size, epoch
        )
        self._epoch = [sum(pair) for pair in zip(self._epoch, self._step, strict=True)]
        self._step = [0.0, 0.0]
        return True

    def finish_epoch(self, epoch: int) -> bool:
        method, seen, count = self.terms.method, self.seen, len(self.terms.examples.anchor)
        forget, retain = self._epoch
        self._epoch = [0.0, 0.0]
        if method.sees_forget_set:
            seen.forget_terms.append(forget / count)
        if method.retain:
            seen.retain_terms.append(retain / count)
        if method.protects and method.retain_weight:
            _stop_on_divergence(method, seen, epoch)
        if self.after_epoch is None:
            return False
        # Random numbers drawn by a measurement must not change what is trained.
        with torch.random.fork_rng(self.terms.trainer.gpus):
            return self.after_epoch(epoch)


def _stop_on_divergence(method: Training, seen: _History, epoch: int) -> None:
    first, last = seen.first_retain_term, seen.retain_terms[-1]
    if first is not None and last > 3 * first + 2:
        raise _diverged(method, epoch, f"the retain term rose from {first:.2f} to {last:.2f} nats")


def _diverged(method: Training, epoch: int, what: str) -> DivergenceError:
    return DivergenceError(
        f"`{method.name}` diverged in epoch {epoch}: {what}. Lower --unlearn-learning-rate or "
        "--unlearn-epochs, or raise the method's retain_weight. Nothing was written."
    )


def _warn_if_ruined(losses: Sequence[float], vocabulary: int, method: Training) -> None:
    mean, chance = sum(losses) / len(losses), math.log(vocabulary)
    if method.sees_forget_set and mean > chance:
        warn(
            f"After `{method.name}` the forget answers cost {mean:.1f} nats per token, more than "
            f"guessing at random ({chance:.1f}). The model is probably damaged beyond the forget "
            "set: use fewer --unlearn-epochs, a lower --unlearn-learning-rate or a method with a "
            "retain term, and look at the retain set."
        )
