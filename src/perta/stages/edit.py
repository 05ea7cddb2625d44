"""The stage `edit`: inputs found, a structured method's direction made or reused, one edit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from perta.engine.edit.direction import Solver, open_solver
from perta.engine.edit.formats.adapter import LowRank, write_adapter
from perta.engine.edit.formats.requantise import write_gguf, write_quantised
from perta.engine.edit.memory import Changes, changes_of
from perta.engine.edit.plan import (
    EditInputs,
    check_count,
    choose_layers,
    describe_layers,
    forget_role,
    mlps_are_known,
)
from perta.engine.edit.records import check_records
from perta.engine.edit.stored import WELL_STORED, Stored, check_stored, stored_of, tell_stored
from perta.engine.edit.write import EditSummary, write_edit
from perta.errors import CheckpointError, ConfigError
from perta.methods.method import Directions
from perta.methods.registry import get_method, refuse_unused, with_defaults
from perta.models.formats.adapters import adapter_settings, lasting_name
from perta.models.formats.gguf_write import gguf_plan
from perta.models.formats.quantised import quantised_tensors
from perta.models.load import pick_device
from perta.models.resolve import (
    base_of_adapter,
    quantised_checkpoint,
    resolve_checkpoint,
    resolve_tuned,
    tell_plain,
)
from perta.options import ComputeConfig, SaveType, WeightingConfig, at_home
from perta.progress import say, warn
from perta.stages.settings import EditConfig
from perta.stages.stage import At, as_part, earlier_full, refuse_other, run_stage
from perta.store.atomic import beside, scratch_folder
from perta.store.checkpoint import copy_companions, open_index
from perta.store.fingerprint import fingerprint
from perta.store.measured.moments import open_moments, write_shards
from perta.store.record import ADAPTER_CONFIG, check_separate, read_manifest, settings_of


def _write_direction(output: Path, solver: Solver, folders: Mapping[str, Path]) -> Path:
    """Write a weighted direction, float32 under the checkpoint's names, or reuse what is there."""
    settings = {**solver.method.record(), "device": solver.device.type, "names": solver.names}

    def make(folder: Path) -> Mapping[str, Any]:
        write_shards(folder, solver.run())
        return {"layers": solver.layers}

    is_ours = (read_manifest(output) or {}).get("stage") == "direction"

    def look() -> dict[str, str]:
        return {name: fingerprint(folder) for name, folder in folders.items()}

    run_stage("direction", At(output, is_ours), settings, look(), make, look=look)
    return output


def checkpoint_name(place: int) -> str:
    """Name of a forget checkpoint among the inputs of a stage, counted from 0."""
    return forget_role(place).replace(" ", "_")


_LEAST_HELD = 0.1  # share of the wanted step below which an adapter is not written
_ADAPTER_RANK = 64


def edit_checkpoint(
    config: EditConfig, *, forget_rows: str | None = None, part_of: str | None = None
) -> Path:
    """Edit a checkpoint, write the result and return its folder (`perta edit`); see `write_edit`.

    `forget_rows` is the fingerprint of the forget set, `part_of` the key of a run it ends.
    """
    refuse_unused(config.weighting)
    config = replace(config, weighting=with_defaults(config.weighting))
    if config.weighting.scaling_coef == "auto":
        raise ConfigError(
            "--scaling-coef auto needs the examples: use `perta unlearn`, or give a number."
        )
    method = get_method(config.weighting.method)
    given = _find_inputs(config)

    def look() -> dict[str, str]:
        return {name: fingerprint(folder) for name, folder in given.items()}

    plan = gguf_plan(config.output_format, config.full, given["full"], config.save_dtype)
    if config.output_format == "checkpoint":
        tell_plain(config.full)
    inputs = look()
    check_records(method, given, inputs, forget_rows)
    settings = {**settings_of(config), **method.record()}
    refuse_other("edit", config, settings, inputs)
    given = _with_direction(config, given)
    _tell_layers(config.weighting, given)
    if "direction" in given:
        inputs["direction"] = fingerprint(given["direction"])

    edit = partial(
        write_edit,
        inputs=_as_inputs(given),
        weighting=config.weighting,
        threads=config.edit_threads,
        fingerprints=inputs,
    )

    def make(folder: Path) -> Mapping[str, Any]:
        made: dict[str, Any] = {"done": method.done, "equation": method.equation}
        made |= {**earlier_full(at_home(config.full), given["full"]), **as_part(part_of)}
        original, seed = given.get("quantised"), config.weighting.weighting_seed
        if config.output_format == "checkpoint" and original is None:
            summary = edit(folder, save_dtype=cast(SaveType, config.save_dtype))
            tell_stored("edit", summary.stored)
            return {"edit": asdict(summary), **made}
        with scratch_folder(beside(config.output, ".edited")) as whole:
            if original is not None:
                summary = edit(whole, wide=quantised_tensors(open_index(original)))
                stored = write_quantised(folder, original, whole, seed)
            else:
                summary = edit(whole, save_dtype="float32")
                if plan is None:
                    adapter = _write_adapter(config, folder, whole, given["full"])
                    return {"edit": asdict(summary), "adapter": asdict(adapter), **made}
                stored = write_gguf(folder, plan, whole, seed)
            return {"edit": asdict(_as_stored(folder, whole, summary, stored)), **made}

    run_stage("edit", config, settings, inputs, make, look=look)
    return config.output


def _as_stored(
    folder: Path, edited: Path, summary: EditSummary, found: Mapping[str, Stored]
) -> EditSummary:
    """Finish an output that was written in a format of its own; tells what it holds."""
    shutil.copyfile(edited / "README.md", folder / "README.md")
    tensors = tuple(
        replace(tensor, **vars(found[tensor.name])) if tensor.name in found else tensor
        for tensor in summary.tensors
    )
    summary = replace(summary, tensors=tensors, stored=stored_of(tensors))
    check_stored(summary.stored)
    tell_stored("edit", summary.stored)
    return summary


def _write_adapter(config: EditConfig, folder: Path, edited: Path, full: Path) -> LowRank:
    """Write the edit as an adapter of θ_full, or of what θ_full adapts; tells what it holds."""
    own, reference, named = at_home(config.full), full, config.full
    rank = config.adapter_rank or _ADAPTER_RANK
    if (own / ADAPTER_CONFIG).exists():
        settings = adapter_settings(own)
        reference, named = base_of_adapter(own, config.base), config.base
        rank += max((settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()))
        # Its tokenizer or chat template, where it has its own.
        copy_companions(own, folder)
        (folder / "config.json").unlink(missing_ok=True)
    named = lasting_name(named)
    adapter = write_adapter(folder, edited, full, reference, named=named, rank=rank)
    shutil.copyfile(edited / "README.md", folder / "README.md")
    share, cut = adapter.stored.stored_share or 0.0, len(adapter.truncated)
    what = f"{len(adapter.ranks)} layers, rank {max(adapter.ranks.values())} at most"
    say(f"edit: the adapter ({what}) holds {share:.1%} of the step; {cut} layers are cut off")
    if share < WELL_STORED:
        cure = "Raise --adapter-rank, tune the forget checkpoint with LoRA, or write a checkpoint."
        if share < _LEAST_HELD:
            raise CheckpointError(
                f"At this rank the adapter would hold {share:.1%} of the step. {cure}"
            )
        warn(f"The adapter lacks {1 - share:.0%} of the step. {cure}")
    return adapter


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


def _find_inputs(config: EditConfig) -> dict[str, Path]:
    """Name -> local folder of everything that an edit reads but a structured method's direction."""
    tuned: dict[str, str | None] = {
        checkpoint_name(place): checkpoint
        for place, checkpoint in enumerate(config.forget_checkpoints)
    }
    tuned["retain_checkpoint"] = config.retain_checkpoint
    base = resolve_checkpoint(config.base)
    folders = {
        "full": resolve_checkpoint(
            config.full, base=config.base, exact=config.output_format != "checkpoint"
        ),
        "base": base,
        **{name: resolve_tuned(given, base) for name, given in tuned.items() if given is not None},
        "forget_importance": config.forget_importance,
        "retain_importance": config.retain_importance,
        "forget_moments": config.forget_moments,
        "retain_moments": config.retain_moments,
    }
    if get_method(config.weighting.method).direction == "full - base":
        exact = resolve_checkpoint(config.full, base=config.base, exact=True)
        folders["exact"] = exact if exact != folders["full"] else None
    if config.save_dtype == "full" and config.output_format == "checkpoint":
        folders["quantised"] = quantised_checkpoint(config.full)
    given = {name: folder for name, folder in folders.items() if folder is not None}
    named = [config.full, config.base, *filter(None, tuned.values())]
    check_separate(config.output, [*given.values(), *named])
    return given


def _with_direction(config: EditConfig, given: Mapping[str, Path]) -> dict[str, Path]:
    """The inputs of an edit with a structured method's direction, which is made or reused now."""
    if not get_method(config.weighting.method).needs.moments:
        return dict(given)
    return {**given, "direction": make_direction(config, given)}


def _as_inputs(given: Mapping[str, Path]) -> EditInputs:
    """What `_with_direction` found, as `write_edit` takes it."""
    return EditInputs(
        given["full"],
        given["base"],
        _forget_checkpoints(given),
        given.get("forget_importance"),
        given.get("retain_importance"),
        given.get("direction"),
        given.get("retain_checkpoint"),
        given.get("exact"),
    )


def _forget_checkpoints(given: Mapping[str, Path]) -> tuple[Path, ...]:
    return tuple(folder for name, folder in given.items() if name.startswith("forget_checkpoint"))


def load_changes(config: EditConfig, compute: ComputeConfig) -> Changes:
    """What an edit does to θ_full in memory, at any strength; its direction is made or reused."""
    config = replace(config, weighting=with_defaults(config.weighting))
    given = _with_direction(config, _find_inputs(config))
    original, seed = given.get("quantised"), config.weighting.weighting_seed
    plan = gguf_plan(config.output_format, config.full, given["full"], config.save_dtype)
    codes = quantised_tensors(open_index(original)) if original else {}
    # What an adapter's rank cuts off is not tried.
    is_plain = config.output_format == "checkpoint"
    return changes_of(
        _as_inputs(given),
        config.weighting,
        save_dtype=cast(SaveType, config.save_dtype) if is_plain else "float32",
        formats={name: partial(one.rounded, seed=seed) for name, one in codes.items()}
        | (plan.roundings(seed) if plan else {}),
        device=pick_device(compute),
        threads=config.edit_threads,
    )


def direction_folder(config: EditConfig) -> Path | None:
    """Where a structured method's direction goes; None for the others."""
    if not get_method(config.weighting.method).needs.moments:
        return None
    return config.direction or beside(config.output, ".direction")


def make_direction(config: EditConfig, folders: Mapping[str, Path] | None = None) -> Path:
    """Compute a structured method's direction from the edit's inputs, or reuse it."""
    folders = folders or _find_inputs(config)
    method, weighting = get_method(config.weighting.method), config.weighting
    needs, tuned = method.needs, _forget_checkpoints(folders)
    measured = folders["base"], folders["full"]
    if method.direction == "full - base":
        tuned, measured = (folders.get("exact", folders["full"]),), measured[::-1]
    check_count(method, folders["base"], len(tuned))
    for name in needs.moments:
        if f"{name}_moments" not in folders:
            option = " --gradients" if needs.gradients else ""
            raise ConfigError(
                f"`{method.name}` needs --{name}-moments. Make it with `perta moments "
                f"--checkpoint {measured[0]} --data {name.upper()}_SET{option} --output ...`."
            )
    output = cast(Path, direction_folder(config))
    check_separate(output, folders.values())
    check_separate(config.output, [output])
    device = pick_device(ComputeConfig(device=config.solve_device, threads=config.edit_threads))
    if device.type == "mps":
        device = torch.device("cpu")  # Apple's GPUs have no float64
    solver = open_solver(
        cast(Directions, method),
        folders["base"],
        tuned,
        {side: folders[f"{side}_moments"] for side in sorted(needs.moments, reverse=True)},
        measured,
        lambda moments: choose_layers(open_index(folders["full"]), moments, weighting).chosen,
        device,
    )
    read = {"base": folders["base"]}
    read |= (
        {checkpoint_name(i): f for i, f in enumerate(tuned)} if needs.tuned else {"full": tuned[0]}
    )
    read |= {f"{side}_moments": moments.folder for side, moments in solver.moments.items()}
    return _write_direction(output, solver, read)
