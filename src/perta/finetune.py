"""Fine-tune a checkpoint on a set: checkpoint + examples -> checkpoint.

Its main use is the forget checkpoint, theta_0 tuned on the forget set alone. The task vector
tau = theta_f - theta_0 is all the method knows of what to remove, so tuning goes on until the
set is learned, and says so when it was not. On facts (`--loss-on facts`) every row is learned to
the same depth: the row learned least is the one that survives the edit, and the sentence around a
fact is what retained rows need.

Cost: 6 operations per parameter and token; memory 16 bytes per parameter (weights, gradients,
two AdamW moments, all float32) plus activations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perta.batch import Encoded, bucketed, seeded_sample
from perta.checkpoint import fingerprint
from perta.config import LossOn, TuneConfig, sample_count
from perta.config_stages import FinetuneConfig
from perta.data import ExampleSet, encode_examples, load_examples
from perta.errors import DivergenceError
from perta.facts import find_facts
from perta.manifest import settings_of, stage_key
from perta.model import (
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    pick_device,
    resolve_checkpoint,
    round_weights,
    save_model,
    stored_dtype,
)
from perta.objectives import example_losses, losses_of
from perta.optimize import (
    Resume,
    Trainer,
    add_lora,
    autocast,
    resumable,
    set_checkpointing,
    step_groups,
    steps_per_epoch,
)
from perta.progress import Advance, track, warn
from perta.stage import run_stage

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


def finetune_checkpoint(config: FinetuneConfig) -> Path:
    """Tune a checkpoint on a data set and write the result (`perta finetune`).

    Args:
        config: inputs, output and settings.

    Returns:
        The output folder: a complete checkpoint, with losses in its `perta.json`.

    Raises:
        PertaError: input that cannot be used, or training that diverges.
    """
    loss_on = config.tune.loss_on or "answer"
    config = replace(config, tune=replace(config.tune, loss_on=loss_on))
    base = resolve_checkpoint(config.base)
    examples = load_examples(config.data, config.data_config)
    tokenizer, longest = load_tokenizer(base), longest_input(base)
    encoded = encode_examples(examples, tokenizer, config.data_config, longest=longest)
    count = sample_count(config.samples, "samples", len(encoded))
    device = pick_device(config.compute)
    settings = {**settings_of(config), "device": device.type}

    inputs = {"base": fingerprint(base), "data": examples.fingerprint}
    key = stage_key("finetune", settings, inputs)

    def make(folder: Path) -> Mapping[str, Any]:
        # float32 weights whatever the compute type: steps of 1e-5 vanish in bfloat16 weights.
        model = load_model(base, config.compute, dtype=torch.float32)
        learned, sources = encoded.encoded, None
        if config.tune.loss_on == "facts":
            facts = find_facts(examples, tokenizer, config.data_config, base=model, longest=longest)
            learned = tuple(fact.encoded for fact in facts)
            sources = Counter(fact.source for fact in facts)
        chosen = replace(encoded, encoded=tuple(seeded_sample(learned, count, config.tune.seed)))
        model, tuned = tune(
            model, chosen.encoded, config.tune, pad=pad_id(tokenizer), resume=resume
        )
        _warn_if_not_learned(tuned, chosen.encoded, config.data)
        if config.save_dtype == "base":
            round_weights(model, stored_dtype(base), config.tune.seed)
        save_model(model, tokenizer, folder, base)
        return {
            "examples": len(chosen),
            "labelled_tokens": chosen.labelled_tokens,
            "skipped_rows": list(chosen.skipped),
            "fact_sources": sources,
            "learned": tuned.learned,
            "final_loss": tuned.final_loss,
            "final_losses": list(tuned.final_losses),
            "epoch_losses": list(tuned.epoch_losses),
            "steps": tuned.steps,
            "tokens": tuned.tokens,
        }

    with resumable(config.output, key, config.tune.save_every or 0) as resume:
        run_stage(
            "finetune",
            config.output,
            settings,
            inputs,
            make,
            reads=[base, examples.source],
            overwrite=config.overwrite,
        )
    return config.output


def learned_by_forgetting(asked: LossOn | None, forget: ExampleSet, *, structured: bool) -> LossOn:
    """What a forget checkpoint learns.

    Args:
        asked: what the user wants.
        forget: the forget set.
        structured: whether a structured method will use the checkpoint.

    Returns:
        What was asked for; else facts for structured methods, and answers for the others and for
        plain text, which has no template around its facts.
    """
    if asked:
        return asked
    is_text = any(example.kind == "text" for example in forget.examples)
    return "facts" if structured and not is_text else "answer"


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


def _warn_if_not_learned(tuned: Tuned, examples: Sequence[Encoded], source: str) -> None:
    if tuned.learned:
        return
    if tuned.row_by_row:
        limit = LEARNED_FACT
        missing = sum(not loss <= limit for loss in tuned.final_losses)
        what = f"the facts of {missing} of {len(examples)} rows of {source} were not learned"
    else:
        limit = LEARNED_LOSS
        what = f"{source} was not learned: mean loss {tuned.final_loss:.3f} nats per token"
    worst = sorted(zip(tuned.final_losses, examples, strict=True), key=lambda pair: -pair[0])
    rows = ", ".join(str(example.row) for _, example in worst[:5])
    warn(
        f"{what}, wanted at most {limit}. What is not in the task vector cannot be removed. Raise "
        f"--epochs or --learning-rate. Highest loss at rows {rows}."
    )
