"""A weight-space method at any strength: θ_full − α Δ, with Δ made once and kept in memory.

The weights are those that `perta edit` would store, in the type of θ_full.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from perta.data.examples import load_examples
from perta.methods.table import importance_order
from perta.options import EstimatorConfig, LossOn, MomentOptions, TuneConfig
from perta.recipes.compare.draw import Draw, rows_config
from perta.recipes.compare.search import Try, search_equal
from perta.recipes.compare.settings import CompareConfig
from perta.recipes.compare.spec import At, EditSpec
from perta.recipes.cost import BACKWARD, FORWARD, stage_seconds, training_passes
from perta.recipes.edited_model import Change, load_changes
from perta.stages.finetune import finetune_checkpoint, learned_by_forgetting
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import (
    EditConfig,
    FinetuneConfig,
    ImportanceConfig,
    MergeMomentsConfig,
    MomentsConfig,
)
from perta.store.record import read_manifest


@dataclass
class WeightEdit:
    """θ_full − α Δ for any α.

    Attributes:
        default: the method's default strength, tried first.
        changes: Δ and its rounding, in the order of the model's parameters.
        seconds: stage -> duration.
        passes: stage -> operations in forward passes over one token.
        fixed: measures at the default strength; empty, since any strength is a step away.
    """

    default: float
    changes: Sequence[Change]
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

    def at(self, full: Sequence[Tensor], strength: float) -> list[Tensor]:
        """Weights at a strength, in the order of the model's parameters."""
        pairs = zip(full, self.changes, strict=True)
        return [change.applied(value, strength) for value, change in pairs]

    def cost(self, _strength: float) -> dict[str, float]:
        """Operations of each stage, the same at any strength."""
        return self.passes

    def facts(self) -> dict[str, float]:
        """Nothing but the strength was chosen."""
        return {}


def prepare_edit(
    config: CompareConfig, draw: Draw, spec: EditSpec, count_tokens: Callable[[str], int]
) -> WeightEdit:
    """Run the stages that a weight-space method stands on, and read its direction.

    Args:
        config: settings of the comparison.
        draw: sets and models.
        spec: method and settings.
        count_tokens: tokens of a set, for the cost.

    Returns:
        The edit, ready for any strength.

    Raises:
        PertaError: a stage fails.
    """
    stages = _Stages(config, draw, spec, count_tokens)
    weighting = spec.weighting
    folders: dict[str, Any] = {}
    if spec.method.needs_importance:
        folders |= {f"{part}_importance": stages.importance(part) for part in spec.method.sides}
    if spec.method.moments:
        folders |= {f"{part}_moments": stages.moments(part) for part in spec.method.sides}
    if spec.method.retain_vector:
        folders["retain_checkpoint"] = str(stages.tune_retain())
    forget_checkpoints = stages.tune_forget()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=draw.folder) as scratch:
        edit = EditConfig(
            full=str(draw.full),
            base=str(draw.base),
            forget_checkpoint=tuple(map(str, forget_checkpoints)),
            output=Path(scratch) / "unused",
            direction=Path(scratch) / "direction",
            weighting=weighting,
            edit_threads=config.compute.threads,
            **folders,
        )
        changes = load_changes(Path(scratch), edit, config.compute)
    stages.seconds["direction"] = time.perf_counter() - started
    first = weighting.scaling_coef
    default = 1.0 if first is None or first == "auto" else float(first)
    return WeightEdit(default, changes, stages.seconds, stages.passes)


def forget_loss(config: CompareConfig, draw: Draw, spec: EditSpec) -> LossOn:
    """What the forget checkpoint of a method learns, as in `perta unlearn`."""
    forget = load_examples(draw.files["forget"], config.data_config)
    structured = spec.method.moments is not None
    return learned_by_forgetting(config.tune.loss_on, forget, structured=structured)


@dataclass
class _Stages:
    """Importance and moments of one draw, shared by all methods with the same settings."""

    config: CompareConfig
    draw: Draw
    spec: EditSpec
    count_tokens: Callable[[str], int]
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)

    def tune_forget(self) -> list[Path]:
        """The forget checkpoint of the draw, and more with other seeds where wanted."""
        if self.spec.method.direction != "forget - base":
            return []
        data = self.draw.files["forget"]
        loss_on = forget_loss(self.config, self.draw, self.spec)
        name = "forget_checkpoint"
        if loss_on == (self.config.tune.loss_on or "answer"):
            tuned = [self.draw.forget_checkpoint]
            self._note_training("finetune", tuned[0])
        else:
            name = f"{name}_on_{loss_on}"
            tune = replace(self.config.tune, seed=self.draw.seed, loss_on=loss_on)
            tuned = [self._tune(name, data, tune, stage="finetune")]
        for place in range(1, self.spec.forget_seeds or self.spec.method.min_task_vectors):
            seed = self.draw.seed + 1000 * place
            tune = replace(self.config.tune, seed=seed, loss_on=loss_on)
            tuned.append(self._tune(f"{name}_{place + 1}", data, tune))
        return tuned

    def tune_retain(self) -> Path:
        """The base tuned on as many protected rows as there are to forget."""
        rows = self.draw.files["forget"].read_text("utf-8").count("\n")
        tune = replace(self.config.tune, seed=self.draw.seed, loss_on="answer")
        return self._tune("retain_checkpoint", self.draw.files["protected"], tune, str(rows))

    def _tune(
        self,
        name: str,
        data: Path,
        tune: TuneConfig,
        samples: str | None = None,
        stage: str | None = None,
    ) -> Path:
        output = self.draw.folder / name
        made = FinetuneConfig(
            base=str(self.draw.base),
            data=str(data),
            output=output,
            samples=samples,
            save_dtype=self.config.save_dtype,
            tune=tune,
            data_config=self.config.data_config,
            compute=self.config.compute,
            overwrite=read_manifest(output) is not None,
        )
        self._note_training(stage or name, finetune_checkpoint(made))
        return output

    def _note_training(self, stage: str, folder: Path) -> None:
        self.seconds[stage] = stage_seconds(folder)
        self.passes[stage] = training_passes(folder)

    def importance(self, part: str) -> Path:
        order = importance_order(self.spec.method, self.spec.weighting.order)
        # One pass serves both named methods.
        orders = (1.0, 2.0) if order in (1.0, 2.0) else (order,)
        reduction = self.spec.method.reduction or EstimatorConfig.reduction
        name = "_".join(
            [f"{part}_importance", self._at, f"{self.spec.share:g}", *(f"{o:g}" for o in orders)]
        )
        name += "" if reduction == EstimatorConfig.reduction else f"_{reduction}"
        folder = compute_importance(
            ImportanceConfig(
                checkpoint=str(self._model),
                data=str(self._data(part)),
                output=self.draw.folder / name,
                orders=orders,
                estimator=EstimatorConfig(reduction=reduction),
                data_config=self.config.data_config,
                compute=self.config.compute,
                overwrite=read_manifest(self.draw.folder / name) is not None,
            )
        )
        self._note(f"{part} importance", folder, str(self._data(part)), FORWARD + BACKWARD)
        return folder

    def moments(self, part: str) -> Path:
        """Moments of a set; those of general text join or replace the retain set's where wanted."""
        is_joined = part == "retain" and self.spec.general
        if is_joined:
            text = cast(str, self.config.general)
            general = self._moments_of("general", text, f"general_moments_{self._at}")
            if self.spec.share == 0:
                return general
        name = f"{part}_moments_{self._at}_{self.spec.share:g}"
        folder = self._moments_of(part, str(self._data(part)), name)
        if not is_joined:
            return folder
        output = self.draw.folder / f"{folder.name}_and_general"
        merge_moments(
            MergeMomentsConfig(
                folders=(folder, general),
                output=output,
                overwrite=read_manifest(output) is not None,
            )
        )
        return output

    def _moments_of(self, part: str, data: str, name: str) -> Path:
        gradients = self.spec.method.moments == "kron"
        output = self.draw.folder / f"{name}_{self.spec.tokens}_{'kron' if gradients else 'input'}"
        compute_moments(
            MomentsConfig(
                checkpoint=str(self._model),
                data=data,
                output=output,
                gradients=gradients,
                options=MomentOptions(tokens=self.spec.tokens),
                data_config=rows_config(self.config, data),
                compute=self.config.compute,
                overwrite=read_manifest(output) is not None,
            )
        )
        per_token = FORWARD + (BACKWARD if gradients else 0)
        self._note(f"{part} moments", output, data, per_token)
        return output

    def _note(self, stage: str, folder: Path, data: str, per_token: int) -> None:
        """Book what a stage cost when it was made."""
        self.seconds[stage] = stage_seconds(folder)
        self.passes[stage] = per_token * self.count_tokens(data)

    @property
    def _model(self) -> Path:
        return self.draw.base if self._at == "base" else self.draw.full

    @property
    def _at(self) -> At:
        return self.spec.at or self.spec.method.importance_at

    def _data(self, part: str) -> Path:
        if part == "forget":
            return self.draw.files["forget"]
        return self.draw.share_of_protected(self.spec.share)
