"""A weight-space method at any strength: θ_full − α Δ, with Δ made once and kept in memory.

The weights are those that `perta edit` would store, in the type of θ_full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from perta.data.examples import load_examples
from perta.engine.edit.memory import Changes, EditedModel
from perta.options import EstimatorConfig, LossOn, MomentOptions
from perta.recipes._workspace import Workspace
from perta.recipes.compare._draw import Draw
from perta.recipes.compare._model import Bench
from perta.recipes.compare._search import Try, search_equal
from perta.recipes.compare._spec import EditSpec
from perta.recipes.compare.settings import CompareConfig
from perta.stages.edit import load_changes
from perta.stages.finetune import learned_by_forgetting
from perta.store.atomic import scratch_folder


@dataclass
class WeightEdit:
    """θ_full − α Δ for any α; `fixed` is empty, since any strength is a step away."""

    default: float
    changes: Changes
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)

    fixed: dict[str, float] = field(default_factory=dict)
    largest = math.inf

    def search(
        self, config: CompareConfig, measure: Callable[[float], float], start: float, target: float
    ) -> list[Try]:
        """Look for the strength of equal forgetting; see `search_equal`."""
        return search_equal(
            measure, start, self.default, target, config.equal_tolerance, config.tries
        )

    def put(self, bench: Bench, full: Sequence[Tensor], strength: float) -> None:
        """Give a model the weights at a strength."""
        bench.load(full)
        EditedModel(bench.model, self.changes).move(strength)

    def cost(self, _strength: float) -> dict[str, float]:
        """Operations of each stage, the same at any strength."""
        return self.passes

    def facts(self) -> dict[str, float]:
        """Nothing but the strength was chosen."""
        return {}


def prepare_edit(config: CompareConfig, draw: Draw, spec: EditSpec) -> WeightEdit:
    """Run the stages that a weight-space method stands on, and read its direction."""
    work, given = _stands_on(config, draw, spec)
    with scratch_folder(draw.folder / "changes") as scratch:
        edit = work.edit_config(
            full=str(draw.full),
            output=scratch / "unused",
            direction=scratch / "direction",
            weighting=spec.weighting,
            **given,
        )
        changes = work.made_by("direction", lambda: load_changes(edit, config.compute))
    first = spec.weighting.scaling_coef
    default = 1.0 if first is None or first == "auto" else float(first)
    return WeightEdit(default, changes, work.seconds, work.passes)


def ask_edit(config: CompareConfig, draw: Draw, spec: EditSpec) -> None:
    """Note what `prepare_edit` would do."""
    work, _ = _stands_on(config, draw, spec)
    work.timed("direction", lambda: None, lambda sizes: sizes.edit(spec.weighting, disk=False))


def _stands_on(
    config: CompareConfig, draw: Draw, spec: EditSpec
) -> tuple[Workspace, dict[str, Any]]:
    work = _workspace(config, draw, spec)
    count = spec.forget_seeds or spec.method.needs.tuned
    parts = ("retain", "general") if spec.share else ("general",)
    return work, work.make(
        spec.method,
        orders=_orders(spec),
        loss_on=forget_loss(config, draw, spec),
        seeds=[draw.seed + 1000 * place for place in range(count)],
        # As many rows as there are to forget.
        samples=str(draw.files["forget"].read_text("utf-8").count("\n")),
        protected=parts if spec.general else ("retain",),
    )


def _orders(spec: EditSpec) -> tuple[float, ...]:
    # One pass serves both named methods.
    order = spec.method.order
    return (1.0, 2.0) if order in (1.0, 2.0) else (order,)


def forget_loss(config: CompareConfig, draw: Draw, spec: EditSpec) -> LossOn:
    """What the forget checkpoint of a method learns, as in `perta unlearn`."""
    forget = load_examples(draw.files["forget"], config.data_config)
    structured = bool(spec.method.needs.moments)
    return learned_by_forgetting(config.tune.loss_on, forget, structured=structured)


def _workspace(config: CompareConfig, draw: Draw, spec: EditSpec) -> Workspace:
    """The folder of a draw, in which methods with the same settings share what they stand on."""
    theirs = spec.method.needs
    at = spec.at or theirs.at
    reduction = theirs.reduction or EstimatorConfig.reduction
    loss_on = forget_loss(config, draw, spec)
    is_usual = loss_on == (config.tune.loss_on or "answer")
    orders = "_".join(f"{order:g}" for order in _orders(spec))
    reduced = "" if reduction == EstimatorConfig.reduction else f"_{reduction}"
    counted = f"{spec.tokens}_{'kron' if theirs.gradients else 'input'}"
    names = {"forget_checkpoint": "forget_checkpoint" + ("" if is_usual else f"_on_{loss_on}")}
    for part in ("forget", "retain"):
        names[f"{part}_importance"] = f"{part}_importance_{at}_{spec.share:g}_{orders}{reduced}"
        names[f"{part}_moments"] = f"{part}_moments_{at}_{spec.share:g}_{counted}"
    names["general_moments"] = f"general_moments_{at}_{counted}"
    names["forget_fact_moments"] = f"forget_fact_moments_{at}_{counted}"
    more = "_and_facts" * theirs.facts + "_and_general" * spec.general
    names["protected_moments"] = names["retain_moments"] + more
    # All protected rows are there to tune on.
    retain = draw.share_of_protected(1.0 if theirs.retain_checkpoint else spec.share or 1.0)
    sets = {"forget": str(draw.files["forget"]), "retain": str(retain)}
    return Workspace(
        folder=draw.folder,
        base=draw.base,
        measured=draw.base if at == "base" else draw.full,
        sets=sets | ({"general": config.general} if config.general else {}),
        tune=replace(config.tune, seed=draw.seed),
        save_dtype=config.save_dtype,
        estimator=EstimatorConfig(reduction=reduction),
        moments=MomentOptions(tokens=spec.tokens),
        data_config=config.data_config,
        compute=config.compute,
        names=names,
        asked=draw.asked,
    )
