"""The edit: θ_u = θ_full − α · W ⊙ direction [+ β · (θ_r − θ₀)], streamed from files to a file.

The direction is θ_f − θ₀ for most methods; the table in `weighting` says which takes what.

    edit_plan    headers of every input: what belongs together; stops if anything is wrong
    edit_passes  what no single chunk can know: averages over rows, the smallest value kept
    edit_output  the output's files, with room for what is to come
    edit_stream  chunk by chunk: read, edit, write
    edit         the stage: inputs, output folder, model card

The output has θ_full's files, header bytes and tensor places, unless another type is wanted.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from perta.card import write_card
from perta.checkpoint import copy_companions, fingerprint, open_index
from perta.config import ComputeConfig, SaveType, WeightingConfig
from perta.config_stages import EditConfig
from perta.direction import checkpoint_name, open_inputs, write_direction
from perta.edit_chunks import CHUNK, Blocks
from perta.edit_output import create_files, write_config
from perta.edit_passes import average_importance, find_cuts, find_unmeasured
from perta.edit_plan import (
    EditInputs,
    Target,
    check_count,
    choose_layers,
    describe_layers,
    is_named,
    mlps_are_known,
    open_sources,
    plan_edit,
    share_of_examples,
    some,
)
from perta.edit_records import check_records
from perta.edit_stream import Editor, Stored, TensorSummary, edit_all, stored_of
from perta.errors import CheckpointError, ConfigError
from perta.manifest import settings_of
from perta.model import pick_device, resolve_checkpoint, transposed_weights
from perta.moment_files import open_moments
from perta.progress import say, track, warn
from perta.stage import check_separate, refuse_other, run_stage
from perta.weighting import METHODS, Method, get_method, importance_order

LEAST_STORED = 0.1
"""Share of the wanted step below which an edit stops: it would report forgetting that is not in
the files."""

WELL_STORED = 0.9
"""Share of the wanted step below which an edit warns."""

_CURE = (
    "Store a wider type (--save-dtype float32), tune the forget checkpoint with a higher learning "
    "rate, or raise --scaling-coef."
)


@dataclass(frozen=True)
class EditSummary:
    """What the edit did.

    Attributes:
        output: the new checkpoint.
        stored: what rounding left of the step, over all edited tensors.
        tensors: every edited tensor, in the order of θ_full's files; a tied output head is
            part of its embedding.
        edited: number of weights edited.
        copied: number of values copied from θ_full as they are.
        seconds: duration of the edit.
    """

    output: Path
    stored: Stored
    tensors: tuple[TensorSummary, ...]
    edited: int
    copied: int
    seconds: float


def edit_checkpoint(config: EditConfig) -> Path:
    """Edit a checkpoint and write the result (`perta edit`).

    Args:
        config: inputs, output and settings.

    Returns:
        The output folder: a complete checkpoint.

    Raises:
        PertaError: see `write_edit`; inputs stay as they are and nothing is half-written.
    """
    refuse_unused(config.weighting)
    config = replace(config, weighting=with_defaults(config.weighting))
    _refuse_auto(config.weighting)
    method = get_method(config.weighting.method)
    given = find_inputs(config)
    inputs = {name: fingerprint(folder) for name, folder in given.items()}
    check_records(method, given, inputs)
    settings = settings_of(config)
    refuse_other("edit", config.output, settings, inputs, overwrite=config.overwrite)
    given = with_direction(config, given)
    _tell_layers(config.weighting, given)
    if "direction" in given:
        inputs["direction"] = fingerprint(given["direction"])

    def make(folder: Path) -> Mapping[str, Any]:
        summary = write_edit(
            folder,
            as_inputs(given),
            config.weighting,
            save_dtype=config.save_dtype,
            threads=config.edit_threads,
            fingerprints=inputs,
        )
        _report_stored(summary.stored)
        return {"edit": asdict(summary), "done": method.done, "equation": method.equation}

    run_stage("edit", config.output, settings, inputs, make, overwrite=config.overwrite)
    return config.output


def _tell_layers(weighting: WeightingConfig, given: Mapping[str, Path]) -> None:
    """Warn of layers that are edited, or not, otherwise than one would think."""
    if weighting.layers == "mlp" and not mlps_are_known(given["full"]):
        warn(
            f"The MLP layers of {given['full']} cannot be told from the structure of its model, so "
            "all of its linear layers are edited. Choose some with --include, or say so with "
            "--layers all."
        )
    if "direction" in given:
        moments = open_moments(given["retain_moments"])
        for line in describe_layers(choose_layers(open_index(given["full"]), moments, weighting)):
            warn(line)


def find_inputs(config: EditConfig) -> dict[str, Path]:
    """Find everything that an edit reads but a structured method's direction.

    Args:
        config: inputs and settings, with the method's defaults filled in.

    Returns:
        Name -> local folder; further forget checkpoints are `forget_checkpoint_2` and so on.

    Raises:
        PertaError: something is not there, or overlaps the output.
    """
    tuned: dict[str, str | None] = {
        checkpoint_name(place): checkpoint
        for place, checkpoint in enumerate(config.forget_checkpoints)
    }
    tuned["retain_checkpoint"] = config.retain_checkpoint
    folders = {
        "full": resolve_checkpoint(config.full, base=config.base),
        "base": resolve_checkpoint(config.base),
        **{
            name: resolve_checkpoint(checkpoint, base=config.base, exact=True)
            for name, checkpoint in tuned.items()
            if checkpoint is not None
        },
        "forget_importance": config.forget_importance,
        "retain_importance": config.retain_importance,
        "forget_moments": config.forget_moments,
        "retain_moments": config.retain_moments,
    }
    given = {name: folder for name, folder in folders.items() if folder is not None}
    check_separate(config.output, given.values())
    return given


def with_direction(config: EditConfig, given: Mapping[str, Path]) -> dict[str, Path]:
    """The inputs of an edit with a structured method's direction, which is made or reused now.

    Args:
        config: inputs and settings, with the method's defaults filled in.
        given: from `find_inputs`.

    Returns:
        Name -> local folder.

    Raises:
        PertaError: see `make_direction`.
    """
    if get_method(config.weighting.method).moments is None:
        return dict(given)
    return {**given, "direction": make_direction(config, given)}


def as_inputs(given: Mapping[str, Path]) -> EditInputs:
    """What `with_direction` found, as `write_edit` takes it."""
    return EditInputs(
        given["full"],
        given["base"],
        _forget_checkpoints(given),
        given.get("forget_importance"),
        given.get("retain_importance"),
        given.get("direction"),
        given.get("retain_checkpoint"),
    )


def _forget_checkpoints(given: Mapping[str, Path]) -> tuple[Path, ...]:
    return tuple(folder for name, folder in given.items() if name.startswith("forget_checkpoint"))


def write_edit(
    folder: Path,
    inputs: EditInputs,
    weighting: WeightingConfig,
    *,
    onto: Path | None = None,
    save_dtype: SaveType = "full",
    threads: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    chunk: int = CHUNK,
) -> EditSummary:
    """Edit into an existing empty folder, such as one from `atomic_folder`.

    Args:
        folder: where the weights, the companion files and the model card go.
        inputs: local folders to read.
        weighting: method and its settings.
        onto: checkpoint that is copied and subtracted from, in place of θ_full; what is
            subtracted stays the same.
        save_dtype: type of the output. θ_full is cast to it, to the nearest, and then edited.
        threads: threads that read, compute and write [default: all cores, at most 8].
        fingerprints: name of each input -> hash of its content, for the model card.
        chunk: elements worked on at once; it also bounds the reach of the method `random`.

    Returns:
        Statistics of every edited tensor.

    Raises:
        ConfigError: unknown method, missing importance, or a pattern that matches nothing.
        CheckpointMismatchError: the inputs differ in tensors or shapes.
        CorruptCheckpointError: an input is damaged or holds NaN or Inf.
        CheckpointError: an input is quantised, the forget checkpoint equals the base, W is 0
            everywhere, or rounding loses nearly all of the step.
        DivergenceError: the result does not fit the type of the output.
    """
    started = time.perf_counter()
    weighting = with_defaults(weighting)
    _refuse_auto(weighting)
    method = get_method(weighting.method)
    onto = onto or inputs.full
    source = open_index(onto)
    sources = open_sources(method, weighting, inputs)
    targets = plan_edit(source, sources, weighting)
    worker_count = threads or min(8, os.cpu_count() or 1)
    if method.needs_importance and "retain" in method.sides and weighting.rho:
        silent = find_unmeasured(targets, chunk, worker_count)
        targets = _without(targets, silent, weighting, tell=onto == inputs.full)
    transposed = transposed_weights(onto) if weighting.granularity == "row" else frozenset()
    averages = average_importance(targets, weighting, transposed, chunk, worker_count)
    blocks = Blocks(method, weighting, chunk, averages, _forget_share(method, inputs))
    cuts = find_cuts(targets, blocks, worker_count)
    outputs = create_files(source, folder, save_dtype).tensors
    with track("edit", len(targets)) as advance:
        summaries = edit_all(targets, Editor(outputs, blocks, cuts), worker_count, advance)
    _check_effect(summaries, method, inputs)
    stored = stored_of(summaries)
    _check_stored(stored)
    copy_companions(onto, folder)
    write_config(onto, folder, save_dtype)
    card = model_card(weighting, fingerprints or {})
    (folder / "README.md").write_text(card, encoding="utf-8")
    open_index(folder)
    edited = sum(target.full.numel for target in targets if target.sources)
    copied = sum(target.full.numel for target in targets if not target.sources)
    seconds = time.perf_counter() - started
    return EditSummary(folder, stored, summaries, edited, copied, seconds)


def _without(
    targets: Sequence[Target], silent: Collection[str], weighting: WeightingConfig, *, tell: bool
) -> list[Target]:
    """The plan without tensors of which the retain importance says nothing, but those named."""
    names = [target.full.name for target in targets if target.sources]
    measured = set(names) - set(silent)
    left = [name for name in names if name in silent]
    left = [name for name in left if not is_named(name, names, measured, weighting)]
    if left and len(left) == len(names):
        raise CheckpointError(
            "The importance on the retain set is 0 in every tensor to edit, so nothing says what "
            "must be kept. Measure it again on examples that the model can be wrong about."
        )
    if left and tell:
        warn(
            f"{some(left)} stay as they are: their importance on the retain set is 0 "
            "throughout, as of experts that none of its tokens reached, so nothing says what must "
            f"be kept. To edit them all the same, name them alone: --include '{left[0]}'."
        )
    return [
        replace(target, sources={}) if (target.alias_of or target.full.name) in left else target
        for target in targets
    ]


def with_defaults(weighting: WeightingConfig) -> WeightingConfig:
    """The settings with the method's own where the user gave none.

    Args:
        weighting: method and its settings.

    Returns:
        The settings to use and to record.

    Raises:
        ConfigError: there is no such method.
    """
    method = get_method(weighting.method)
    rho, alpha, keep = weighting.rho, weighting.scaling_coef, weighting.keep
    damping, mu = weighting.damping, weighting.forget_damping
    return replace(
        weighting,
        rho=method.default_rho if rho is None else rho,
        damping=method.default_damping if damping is None else damping,
        forget_damping=method.default_forget_damping if mu is None else mu,
        scaling_coef=method.default_scaling_coef if alpha is None else alpha,
        keep=method.default_keep if keep is None else keep,
        # Patterns that say what to edit are not cut short by a default.
        layers=weighting.layers or ("all" if weighting.include else method.default_layers),
    )


def refuse_unused(weighting: WeightingConfig) -> None:
    """Stop at a setting that the method does not look at; its defaults may stand.

    Args:
        weighting: method and its settings, as given or with defaults.

    Raises:
        ConfigError: there is one, or there is no such method.
    """
    method = get_method(weighting.method)
    for item in fields(weighting):
        own = getattr(method, f"default_{item.name}", item.default)
        if item.name in method.settings or item.name == "method":
            continue
        if getattr(weighting, item.name) in (item.default, own):
            continue
        flag = item.name.replace("_", "-")
        near = difflib.get_close_matches(item.name, method.settings, n=1, cutoff=0.4)
        hint = f" The nearest that it has is --{near[0].replace('_', '-')}." if near else ""
        having = [f"`{other.name}`" for other in METHODS.values() if item.name in other.settings]
        raise ConfigError(
            f"`{method.name}` has no --{flag}; {', '.join(having)} "
            f"{'has' if len(having) == 1 else 'have'}.{hint}"
        )


def at_strength(weighting: WeightingConfig, scaling_coef: float) -> WeightingConfig:
    """The settings at another strength α; β keeps its proportion to it.

    So an edit at any strength is the same direction, and a search needs to try α alone. β counts
    as given for the configured α, or for the method's own where that is `auto` or 0.

    Args:
        weighting: method and its settings.
        scaling_coef: α.

    Returns:
        The settings with both.
    """
    if not get_method(weighting.method).retain_vector:
        return replace(weighting, scaling_coef=scaling_coef)
    configured = with_defaults(weighting).scaling_coef
    if not isinstance(configured, float | int) or configured == 0:
        configured = get_method(weighting.method).default_scaling_coef
    retain_coef = weighting.retain_coef * scaling_coef / configured
    return replace(weighting, scaling_coef=scaling_coef, retain_coef=retain_coef)


def _forget_share(method: Method, inputs: EditInputs) -> float:
    forget, retain = inputs.forget_importance, inputs.retain_importance
    if not method.weighs_sets or forget is None or retain is None:
        return 0.5
    return share_of_examples(forget, retain)


def _refuse_auto(weighting: WeightingConfig) -> None:
    if weighting.scaling_coef == "auto":
        raise ConfigError(
            "--scaling-coef auto needs the examples: use `perta unlearn`, or give a number."
        )


def direction_folder(config: EditConfig) -> Path | None:
    """Where a structured method's direction goes; None for the others."""
    if get_method(config.weighting.method).moments is None:
        return None
    return config.direction or config.output.with_name(f"{config.output.name}.direction")


def make_direction(config: EditConfig, folders: Mapping[str, Path]) -> Path:
    """Compute a structured method's direction, or reuse it.

    Args:
        config: settings, with the method's defaults filled in.
        folders: `full`, `base`, forget checkpoints, and the moment folders of the method's sides.

    Returns:
        The folder of the direction.

    Raises:
        ConfigError: a forget checkpoint or moment folder was not given.
        PertaError: the inputs do not belong together.
    """
    method, weighting = get_method(config.weighting.method), config.weighting
    kind, tuned = method.moments or "input", _forget_checkpoints(folders)
    check_count(method, folders["base"], len(tuned))
    for name in method.sides:
        if f"{name}_moments" not in folders:
            option = " --gradients" if method.moments == "kron" else ""
            raise ConfigError(
                f"`{method.name}` needs --{name}-moments. Make it with `perta moments "
                f"--checkpoint {folders['base']} --data {name.upper()}_SET{option} --output ...`."
            )
    output = cast(Path, direction_folder(config))
    check_separate(output, folders.values())
    check_separate(config.output, [output])
    inputs = open_inputs(
        folders["base"],
        tuned,
        folders["forget_moments"] if "forget" in method.sides else None,
        folders["retain_moments"],
        (folders["base"], folders["full"]),
        kind,
        lambda moments: choose_layers(open_index(folders["full"]), moments, weighting).chosen,
    )
    device = pick_device(ComputeConfig(device=config.solve_device, threads=config.edit_threads))
    if device.type == "mps":
        device = torch.device("cpu")  # Apple's GPUs have no float64
    dampings = (weighting.damping or 0.0, weighting.forget_damping or 0.0)
    return write_direction(output, inputs, kind, weighting.rho or 0.0, dampings, device)


def _check_effect(summaries: Sequence[TensorSummary], method: Method, inputs: EditInputs) -> None:
    """Stop at an edit that would report forgetting where none happened."""
    if not any(summary.task_vector_norm for summary in summaries):
        raise _no_direction(method, inputs)
    if method.needs_importance and not any(summary.mean_weighting for summary in summaries):
        cure = " Lower --selection." if method.direction == "full" else ""
        raise CheckpointError(
            f"`{method.name}` gives every weight the share 0, so the edit would forget nothing; "
            f"{inputs.forget_importance} shows no weight that matters to the forget set.{cure}"
        )


def _check_stored(stored: Stored) -> None:
    """Stop where next to nothing of the wanted step is in the files.

    Raises:
        CheckpointError: the message says what to do.
    """
    if stored.stored_share is not None and abs(stored.stored_share) < LEAST_STORED:
        raise CheckpointError(
            f"Of the step that the edit takes {stored.stored_share:.1%} would be stored: it is too "
            "small beside the weights for the type of the output. "
            f"{_CURE} Nothing was written."
        )


def _report_stored(stored: Stored) -> None:
    """Say in one line what was stored."""
    if stored.stored_share is None:
        return
    say(
        f"edit: {stored.stored_share:.1%} of the step is stored, with rounding noise of "
        f"{stored.noise:.2g} of its norm; {stored.changed:.1%} of the edited weights changed"
    )
    if stored.stored_share < WELL_STORED:
        warn(f"The stored weights lack {1 - stored.stored_share:.0%} of the step. {_CURE}")


def _no_direction(method: Method, inputs: EditInputs) -> CheckpointError:
    if method.direction != "forget - base":
        return CheckpointError(
            f"{inputs.full} equals {inputs.base} in every tensor to edit, so the edit would change "
            "nothing. Give the model before it saw the data as --base."
        )
    if len(inputs.forget_checkpoints) > 1:
        return CheckpointError(
            f"`{method.name}` leaves nothing of {len(inputs.forget_checkpoints)} task vectors: the "
            "forget checkpoints equal the base, or agree nowhere. Tune them with a higher learning "
            "rate, or give fewer."
        )
    return CheckpointError(
        f"{inputs.forget_checkpoints[0]} equals {inputs.base} in every tensor to edit, so the edit "
        "would forget nothing. Tune the base on the forget set with `perta finetune`, with a "
        "learning rate high enough to change the stored values."
    )


def model_card(weighting: WeightingConfig, fingerprints: Mapping[str, str]) -> str:
    """Text of the output's README: how it was made, from what, and what it does not promise.

    Args:
        weighting: method and its settings.
        fingerprints: name of each input -> hash of its content.

    Returns:
        Markdown; it never holds the forgotten examples.
    """
    weighting = with_defaults(weighting)
    method = get_method(weighting.method)
    done = (
        "Part of this model's fine-tuning data was removed by one edit of its weights: "
        f"{method.equation}. {method.done}"
    )
    caveat = (
        "An edit of the weights is not a proof of erasure: measure forgetting and retention "
        "before relying on it."
    )
    return write_card(done, _shown_settings(method, weighting), fingerprints, caveat)


def _shown_settings(method: Method, weighting: WeightingConfig) -> dict[str, str]:
    """Name -> value of every setting that the method uses, for people."""
    rho, is_structured = f"{weighting.rho:g}", method.moments is not None
    rows = [
        (True, "method", f"`{method.name}`: {method.summary}"),
        (True, "weighting", f"`{method.formula}`"),
        (True, "scaling coefficient α", f"{weighting.scaling_coef:g}"),
        (
            method.needs_importance,
            "order of the importance",
            f"{importance_order(method, weighting.order):g}",
        ),
        ("rho I_r" in method.formula, "weight ρ of the retain importance", rho),
        (method.needs_importance, "granularity", weighting.granularity),
        (is_structured, "weight ρ of the retain moments", rho),
        (weighting.damping is not None, "damping λ", str(weighting.damping)),
        (
            method.moments == "input",
            "damping μ of the forget side",
            f"{weighting.forget_damping:g}",
        ),
        (method.name == "constant", "constant W", f"{weighting.constant:g}"),
        (method.name in ("random", "dare"), "seed", str(weighting.weighting_seed)),
        (method.name == "dare", "dropped share", f"{weighting.drop:g}"),
        (method.scores is not None, "kept share", f"{weighting.keep:g}"),
        (
            method.retain_vector,
            "strength β of the retain vector",
            f"{weighting.retain_coef:g}",
        ),
        (method.name == "ssd", "selection", f"{weighting.selection:g}"),
        (method.name == "ssd", "dampening λ", f"{weighting.dampening:g}"),
    ]
    settings = {name: value for is_used, name, value in rows if is_used}
    for flag, patterns in (("included", weighting.include), ("excluded", weighting.exclude)):
        if patterns:
            settings[f"{flag} tensors"] = ", ".join(f"`{pattern}`" for pattern in patterns)
    return settings
