"""Importance of every weight for a set: checkpoint + examples -> importance files.

    I_p(D)_i = (1/|D|) sum_{x in D} |d loss(theta; x) / d theta_i|^p

p = 1 is the mean gradient magnitude, p = 2 the diagonal of the empirical Fisher information.
The power is taken of each example's own gradient, before the mean.

The files carry the checkpoint's own tensor names, shapes and shards, one sub-folder per order:

    OUTPUT/importance.json            what was measured, on what, how
    OUTPUT/order-1/model.safetensors  float32
    OUTPUT/order-2/model.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta.data.batch import Encoded, bucketed, seeded_sample
from perta.engine.gradients.engine import Moments, Progress, abs_of_mean, batched_moments
from perta.models.load import batch_of, exact_on_cpu
from perta.options import EstimatorConfig, SumsOn
from perta.parallel import Own, everywhere, portion
from perta.progress import track
from perta.stages.settings import ImportanceConfig
from perta.stages.stage import Subject, run_measurement
from perta.store.checkpoint import IMPORTANCE_SIDECAR, open_index, write_tensors
from perta.store.costs import BACKWARD, FORWARD
from perta.store.measured.importance import order_name
from perta.store.record import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compute_importance(config: ImportanceConfig) -> Path:
    """Measure importance on a data set, write it and return the folder (`perta importance`)."""
    # bfloat16 would double the error that rounding the weights to it makes, for an eighth of the
    # time; see docs/experiments/bfloat16.md.
    config = replace(config, compute=exact_on_cpu(config.compute))

    def measure(model: PreTrainedModel, subject: Subject, folder: Path) -> Mapping[str, Any]:
        from transformers.core_model_loading import revert_weight_conversion

        chosen = sample(subject.encoded.encoded, config.estimator)
        moments = estimate(
            model,
            chosen,
            config.orders,
            config.estimator,
            pad=subject.pad,
            batch_size=batch_of(config.compute, 8),
            gradient_checkpointing=config.gradient_checkpointing,
            accumulate_on=config.accumulate_on,
        )
        index = open_index(subject.checkpoint)
        for order, tensors in moments.by_order.items():
            target = folder / order_name(order)
            target.mkdir()
            named = revert_weight_conversion(model, dict(tensors))
            stored = {getattr(index.find(n), "name", n): tensor for n, tensor in named.items()}
            write_tensors(target, stored, index.shards)
        facts = _facts(config, moments, subject)
        (folder / IMPORTANCE_SIDECAR).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        return {
            "examples": moments.examples,
            "labelled_tokens": moments.tokens,
            "passes": (FORWARD + BACKWARD) * sum(len(example.input_ids) for example in chosen),
            "slow_parameters": list(moments.fallback),
        }

    if config.estimator.reduction == "abs_of_mean":
        config = replace(config, shard=False)  # sums of gradients, whole as these are
    beside = 4 * len(config.orders) if config.accumulate_on == "device" else 0
    return run_measurement("importance", config, measure, beside)


def sample(examples: Sequence[Encoded], config: EstimatorConfig) -> list[Encoded]:
    """A seeded sample of the examples, in file order; all of them by default."""
    return seeded_sample(examples, config.sample_count(len(examples)), config.importance_seed)


def estimate(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    orders: Sequence[float],
    config: EstimatorConfig,
    *,
    pad: int,
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
    accumulate_on: SumsOn = "device",
) -> Moments:
    """Importance in memory: order -> parameter name -> float32 of the parameter's shape.

    `gradient_checkpointing` and `accumulate_on`, the sums' place, save memory with the reduction
    `mean_of_power`; `abs_of_mean` does without them. Errors are those of `batched_moments`.
    """
    with track("Importance", len(examples)) as progress:
        sparing = {
            "gradient_checkpointing": gradient_checkpointing,
            "accumulate_on": "cpu" if accumulate_on == "cpu" else None,
        }
        how = (orders, config.reduction, pad, batch_size, sparing)
        return everywhere(_measure, model, examples, *how, Own(progress))


def _measure(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    orders: Sequence[float],
    reduction: str,
    pad: int,
    batch_size: int,
    sparing: Mapping[str, Any],
    progress: Own[Progress],
) -> Moments:
    batches = bucketed(examples, portion(batch_size, len(examples)), pad)
    if reduction == "abs_of_mean":
        return abs_of_mean(model, batches, orders, progress=progress.value)
    return batched_moments(model, batches, orders, progress=progress.value, **sparing)


def _facts(config: ImportanceConfig, moments: Moments, subject: Subject) -> dict[str, Any]:
    return {
        "orders": sorted(moments.by_order),
        "reduction": config.estimator.reduction,
        "loss": "mean negative log-likelihood of the answer tokens, nats per token",
        "examples": moments.examples,
        "examples_available": len(subject.encoded),
        "tokens": moments.tokens,
        "model_fingerprint": subject.inputs["checkpoint"],
        "data_fingerprint": subject.inputs["data"],
        "seed": config.estimator.importance_seed,
        "dtype": subject.settings["dtype"],
        "versions": versions(),
    }
