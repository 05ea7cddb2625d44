"""Fine-tune a checkpoint on a set: checkpoint + examples -> checkpoint.

Its main use is the forget checkpoint, theta_0 tuned on the forget set alone. The task vector
tau = theta_f - theta_0 is all the method knows of what to remove, so tuning goes on until the
set is learned, and says so when it was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perta.data.batch import Encoded, seeded_sample
from perta.data.examples import ExampleSet
from perta.data.tokens import EncodedSet
from perta.engine.shard import check_shard, in_parts, is_sharded
from perta.engine.train.optimizer import resumable
from perta.engine.train.tune import LEARNED_FACT, Tuned, taken_by, tune_until_learned
from perta.errors import NotLearnedError
from perta.models.facts import find_facts
from perta.models.formats.low_rank import load_tuned, save_tuned
from perta.models.load import (
    batch_of,
    counting_tokens,
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    pick_device,
    round_weights,
    stored_dtype,
)
from perta.models.loss import losses_of
from perta.options import LEARNED_LOSS, ComputeConfig, DataConfig, LossOn, sample_count
from perta.parallel import everywhere
from perta.progress import say, warn
from perta.stages.settings import FinetuneConfig
from perta.stages.stage import read_subject
from perta.store.checkpoint import open_index
from perta.store.record import stage_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finetune_checkpoint(config: FinetuneConfig) -> Path:
    """Tune a checkpoint on a data set, write it and return its folder (`perta finetune`)."""
    check_shard(config.tune.shard)
    loss_on = config.tune.loss_on or "answer"
    keeps = config.save_dtype is None and config.tune.lora_rank > 0
    save_dtype = None if keeps else config.save_dtype or "float32"
    config = replace(config, tune=replace(config.tune, loss_on=loss_on), save_dtype=save_dtype)
    subject = read_subject("base", config)
    base, encoded = subject.checkpoint, subject.encoded
    count = sample_count(config.samples, "samples", len(encoded))
    key = stage_key("finetune", subject.settings, subject.inputs)

    def make(folder: Path) -> Mapping[str, Any]:
        # float32 for what is tuned whatever the compute type: steps of 1e-5 vanish in bfloat16.
        held: torch.dtype = getattr(torch, config.frozen_dtype)
        device, weights = pick_device(config.compute), open_index(base).numel * held.itemsize
        shard = is_sharded(config.tune.shard, device, taken_by(config.tune, weights))

        read_base = partial(load_model, base, config.compute, dtype=held, waits=shard)
        fresh = [read_base()]

        def load() -> PreTrainedModel:
            return fresh.pop() if fresh else read_base()

        learned, sources = encoded.encoded, None
        if config.tune.loss_on == "facts":
            read = (subject.examples, subject.tokenizer, config.data_config)
            asked = in_parts(lambda: fresh[0], device) if shard else nullcontext(fresh[0])
            with asked as model:
                facts = find_facts(*read, base=model, longest=longest_input(base))
            learned = tuple(fact.encoded for fact in facts)
            sources = Counter(fact.source for fact in facts)
        chosen = replace(encoded, encoded=tuple(seeded_sample(learned, count, config.tune.seed)))
        model, tuned = tune_until_learned(
            load,
            chosen.encoded,
            replace(config.tune, shard=shard),
            device=device,
            pad=subject.pad,
            dtype=config.compute.dtype,
            resume=resume,
            merges=not keeps,
        )
        _warn_if_not_learned(tuned, chosen.encoded, config.data)
        if config.save_dtype == "base":
            round_weights(model, stored_dtype(base), config.tune.seed)
        save_tuned(model, subject.tokenizer, folder, base, config.base)
        return _told(chosen, tuned, sources)

    with resumable(config.output, key, config.tune.save_every or 0) as resume:
        subject.run("finetune", config, make)
    return config.output


@dataclass(frozen=True)
class Fit:
    """Mean losses on the facts of the forget set, nats per token; the tokens are what it took."""

    loss: float  # of a forget checkpoint that was given
    base_loss: float
    tokens: int


_FIT = 0.5
"""Share of the base's loss that one on the facts may have. Rows of the same kind teach how answers
are put, and that lowers the loss a little; what they say is all else."""


def check_learned(
    given: Path,
    base: Path,
    rows: ExampleSet,
    data_config: DataConfig,
    compute: ComputeConfig,
    *,
    named: str,
) -> Fit:
    """How well a forget checkpoint, given as `named`, knows some rows; or a NotLearnedError."""
    tokenizer, losses, tokens = load_tokenizer(base), [], 0
    examples: list[Encoded] = []
    for folder in (base, given):
        model = load_tuned(folder, base, compute)
        with counting_tokens(model) as counted:
            if not examples:
                read = (rows, tokenizer, data_config)
                facts = find_facts(*read, base=model, longest=longest_input(base))
                examples = [fact.encoded for fact in facts]
            size, pad = batch_of(compute, 16), pad_id(tokenizer)
            found = everywhere(losses_of, model, examples, batch_size=size, pad=pad)
        losses.append(sum(found) / len(found))
        tokens += counted()
    fit = Fit(losses[1], losses[0], tokens)
    figures = f"{fit.loss:.3f} nats per token, {fit.base_loss:.3f} under the base"
    if not fit.loss <= _FIT * fit.base_loss:
        raise NotLearnedError(
            f"{named} does not know the rows to forget: its loss on their facts is {figures}, more "
            "than half of that. What is not learned cannot be removed. Give the base model tuned "
            "on these rows until it knows them, or leave --forget-checkpoint out."
        )
    say(f"forget checkpoint: its loss on the facts is {figures}")
    return fit


def _told(examples: EncodedSet, tuned: Tuned, sources: Mapping[Any, int] | None) -> dict[str, Any]:
    """What the record says of a tuning."""
    return {
        "examples": len(examples),
        "labelled_tokens": examples.labelled_tokens,
        "skipped_rows": list(examples.skipped),
        "fact_sources": sources,
        "learned": tuned.learned,
        "learned_share": tuned.learned_share,
        "learning_rate": tuned.learning_rate,
        "final_loss": tuned.final_loss,
        "final_losses": list(tuned.final_losses),
        "epoch_losses": list(tuned.epoch_losses),
        "steps": tuned.steps,
        "tokens": tuned.tokens,
    }


def learned_by_forgetting(asked: LossOn | None, forget: ExampleSet, *, structured: bool) -> LossOn:
    """What a forget checkpoint learns: as asked, or facts for structured methods but of text."""
    if asked:
        return asked
    is_text = any(example.kind == "text" for example in forget.examples)
    return "facts" if structured and not is_text else "answer"


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
