"""`perta repair`: the step of a finished unlearning run, without what retained inputs see of it.

    FULL − THEIRS ── moments of the retain set ── (FULL − THEIRS) (I + ρ C / c)⁻¹ ── off FULL

Whatever made THEIRS, its weights are all that is needed. What is in no linear layer, or in one that
no retained token reached, stays as it is in FULL.

Source: SAGE, arXiv 2606.18309, up to its spectral cut.
"""

from __future__ import annotations

from pathlib import Path

from perta.engine.edit.plan import BASE, plan_edit
from perta.errors import ConfigError
from perta.methods.registry import get_method
from perta.models.formats.low_rank import is_adapter
from perta.models.resolve import resolve_checkpoint
from perta.options import WeightingConfig, at_home
from perta.recipes.settings import RepairConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.moments import compute_moments
from perta.stages.settings import EditConfig, MomentsConfig
from perta.stages.stage import refuse_other
from perta.store.atomic import beside, check_writable
from perta.store.checkpoint import open_index
from perta.store.fingerprint import fingerprint
from perta.store.provenance import is_unlearned
from perta.store.record import check_output, read_manifest


def repair_checkpoint(config: RepairConfig) -> Path:
    """Repair a checkpoint unlearned by any means; returns the output folder (`perta repair`)."""
    weighting = WeightingConfig(method=f"sage:rho={config.rho!r}")
    method = get_method(weighting.method)  # its settings fit
    full, theirs = map(resolve_checkpoint, (config.full, config.unlearned))
    inputs = {"full": fingerprint(full), "base": fingerprint(theirs)}
    if inputs["full"] == inputs["base"]:
        raise ConfigError(
            f"{config.unlearned} holds the weights of {config.full}: no step was taken. Give what "
            "an unlearning run ended with as --unlearned, and what it began with as --full."
        )
    made = read_manifest(at_home(config.full)) or {}
    if is_unlearned(made) and inputs["base"] == made.get("inputs", {}).get("full"):
        raise ConfigError(
            f"{config.full} was unlearned from {config.unlearned}, its record says. Give the model "
            "that the run began with as --full, and what it ended with as --unlearned."
        )
    check_writable(config.output)
    reads = (full, theirs, config.full, config.unlearned, config.retain, config.retain_moments)
    check_output(config.output, filter(None, reads), overwrite=config.overwrite)
    refuse_other("edit", config, {**method.record(), "save_dtype": config.save_dtype}, inputs)
    plan_edit(open_index(full), {BASE: open_index(theirs)}, weighting)
    edit = EditConfig(
        # An edit would merge an adapter into its --base, which is THEIRS here.
        full=str(full) if is_adapter(at_home(config.full)) else config.full,
        base=config.unlearned,
        output=config.output,
        retain_moments=config.retain_moments or _measured(config),
        solve_device=config.compute.device,
        edit_threads=config.compute.threads,
        save_dtype=config.save_dtype,
        overwrite=config.overwrite,
        weighting=weighting,
    )
    return edit_checkpoint(edit)


def _measured(config: RepairConfig) -> Path:
    """Moments of the retain set at θ_full, made or reused."""
    return compute_moments(
        MomentsConfig(
            checkpoint=config.full,
            data=str(config.retain),
            output=beside(config.output, ".retain_moments"),
            overwrite=config.overwrite,
            options=config.moments,
            data_config=config.data_config,
            compute=config.compute,
        )
    )
