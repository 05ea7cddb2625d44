"""Train the full model until it has forgotten: checkpoint + sets -> unlearned checkpoint.

The baselines that weight-space edits are compared with, and the reference they all aim at
(`retrain`). `influence` solves instead of training; it needs the full model as a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perta.data.batch import Encoded
from perta.data.examples import ExampleSet, load_examples
from perta.data.tokens import encode_examples
from perta.engine.edit.formats.requantise import write_quantised
from perta.engine.edit.stored import TensorSummary, stored_of, tell_stored
from perta.engine.train.optimizer import Resume, resumable
from perta.engine.train.refusals import check_questions, with_refusals
from perta.engine.train.unlearn import unlearn_by_training, with_method_defaults
from perta.errors import ConfigError
from perta.methods.card import training_card
from perta.methods.influence import remove_influence
from perta.methods.objectives import Influence, Training
from perta.methods.registry import parse
from perta.models.formats.adapters import put_on
from perta.models.load import (
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    picked,
    round_weights,
    save_model,
    save_type,
)
from perta.models.resolve import (
    base_of_adapter,
    quantised_checkpoint,
    resolve_checkpoint,
    tell_plain,
)
from perta.options import at_home
from perta.progress import warn
from perta.stages.settings import TrainConfig
from perta.stages.stage import as_part, earlier_full, run_stage
from perta.store.atomic import beside, scratch_folder
from perta.store.checkpoint import open_index
from perta.store.costs import BACKWARD, FORWARD
from perta.store.fingerprint import fingerprint
from perta.store.record import ADAPTER_CONFIG, settings_of, stage_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_checkpoint(config: TrainConfig, *, part_of: str | None = None) -> Path:
    """Unlearn by training, write and return the result (`perta train`); the end of `part_of`."""
    method = parse(config.method, Training)
    config = replace(config, training=with_method_defaults(method, config.training, config.seed))
    start = _start(config, method)
    original = _original(config, method)
    sets = _load_sets(config, method)

    def look() -> dict[str, str]:
        found: dict[str, str] = {method.start: fingerprint(start)}
        if isinstance(method, Influence):
            found["adapter"] = fingerprint(_adapter(config))
        if original is not None:
            found["quantised"] = fingerprint(original)
        return found | {name: examples.fingerprint for name, examples in sets.items()}

    inputs = look()
    # An input the method does not look at decides nothing.
    unused = {"full", "base", "forget", "retain"} - inputs.keys()
    settings = {k: v for k, v in settings_of(config).items() if k not in {*unused, "seed"}}
    settings |= method.record()
    settings |= picked(config.compute, start)
    key = stage_key("train", settings, inputs)

    def make(folder: Path) -> Mapping[str, Any]:
        tokenizer, longest = load_tokenizer(start), longest_input(start)
        encoded = {
            name: encode_examples(examples, tokenizer, config.data_config, longest=longest)
            for name, examples in sets.items()
        }
        forget, retain = (encoded[n].encoded if n in encoded else () for n in ("forget", "retain"))
        if isinstance(method, Influence):
            model, done = _solve(config, method, forget, retain, pad_id(tokenizer))
        else:
            asked = sets.get("forget")
            model, done = _train(config, method, start, asked, tokenizer, forget, retain, resume)
        if original is None:
            round_weights(model, save_type(config.save_dtype, start), config.training.seed)
            save_model(model, tokenizer, folder, start)
        else:
            with scratch_folder(beside(config.output, ".trained")) as whole:
                save_model(model, tokenizer, whole, start)
                done["stored"] = _write_as_stored(folder, original, whole, config.training.seed)
        (folder / "README.md").write_text(training_card(method, config.training, inputs), "utf-8")
        skipped = {f"skipped_{name}_rows": list(one.skipped) for name, one in encoded.items()}
        said = {"done": method.done, "equation": method.equation, **as_part(part_of)}
        before = earlier_full(at_home(str(config.full)), start) if method.start == "full" else {}
        return {**done, **skipped, **said, **before}

    with resumable(config.output, key, config.save_every) as resume:
        reads: list[str | Path] = [start, *(examples.source for examples in sets.values())]
        run_stage("train", config, settings, inputs, make, look=look, reads=reads)
    return config.output


def _start(config: TrainConfig, method: Training) -> Path:
    """Folder of the checkpoint training starts from."""
    given = config.full if method.start == "full" else config.base
    if given is None:
        raise ConfigError(
            f"`{method.name}` starts from the {method.start} model. Give it with --{method.start}."
        )
    return resolve_checkpoint(given, base=config.base)


def _original(config: TrainConfig, method: Training) -> Path | None:
    """The quantised checkpoint whose format the result is written in, if it is."""
    given = str(config.full if method.start == "full" else config.base)
    if config.save_dtype != "full" or isinstance(method, Influence):
        return None
    tell_plain(given)
    return quantised_checkpoint(given)


def _write_as_stored(folder: Path, original: Path, trained: Path, seed: int) -> dict[str, Any]:
    """Write a trained model in the format that it came in; what was stored of its step."""
    found, entries = write_quantised(folder, original, trained, seed), open_index(trained).tensors
    parts = [
        TensorSummary(
            name=name,
            elements=entries[name].numel,
            mean_weighting=1.0,
            task_vector_norm=stored.wanted_norm,
            **vars(stored),
        )
        for name, stored in found.items()
    ]
    total = stored_of(parts)
    tell_stored("train", total)
    return asdict(total)


def needed_sets(method: Training, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the sets given that a method trains on; ConfigError where one is missing."""
    wanted = {"forget": method.sees_forget_set, "retain": method.retain is not None}
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    for name in names:
        if given[name] is None:
            raise ConfigError(f"`{method.name}` needs the {name} set. Give it with --{name}.")
    return {name: given[name] for name in names}


def _load_sets(config: TrainConfig, method: Training) -> dict[str, ExampleSet]:
    sources = needed_sets(method, {"forget": config.forget, "retain": config.retain})
    sets = {name: load_examples(place, config.data_config) for name, place in sources.items()}
    if "forget" in sets:
        check_questions(method, sets["forget"])
    return sets


def _train(
    config: TrainConfig,
    method: Training,
    start: Path,
    asked: ExampleSet | None,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    resume: Resume,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    # float32 weights whatever the compute type: steps of 1e-5 vanish in bfloat16 weights.
    model = load_model(start, config.compute, dtype=torch.float32)
    refusals: Sequence[Encoded] = ()
    if asked is not None:
        seed, data = config.training.seed, config.data_config
        forget, refusals = with_refusals(method, asked, forget, model, tokenizer, data, seed)
    model, trained = unlearn_by_training(
        model,
        forget,
        retain,
        config.training,
        method=method,
        pad=pad_id(tokenizer),
        dtype=config.compute.dtype,
        refusals=refusals,
        resume=resume,
    )
    passes = (FORWARD + BACKWARD) * (trained.forget_tokens + trained.retain_tokens)
    return model, {**asdict(trained), "final_loss": trained.final_loss, "passes": passes}


def _solve(
    config: TrainConfig,
    method: Influence,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    pad: int,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    adapter = _adapter(config)
    base = base_of_adapter(adapter, config.base)
    adapted = put_on(load_model(base, config.compute, dtype=torch.float32), adapter, base)
    removed = remove_influence(
        adapted,
        forget,
        retain,
        damping=method.damping,
        pad=pad,
        tolerance=method.tolerance,
        iterations=method.iterations,
        batch_size=config.training.batch_size,
    )
    if removed.loss_after <= removed.loss_before:
        warn(
            f"The step did not raise the loss on {config.forget}, {removed.loss_before:.3f} before "
            f"and {removed.loss_after:.3f} after: the adapter is not at a minimum there, or "
            "the method's damping is too high."
        )
    return adapted.merge_and_unload(), {"influence": asdict(removed)}


def _adapter(config: TrainConfig) -> Path:
    """The adapter folder given as the full model."""
    folder = at_home(str(config.full))
    if not (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"`influence` works on LoRA weights, but {config.full} is no adapter folder. Give "
            "--full the folder that PEFT's `save_pretrained` wrote, or use another method."
        )
    return folder
