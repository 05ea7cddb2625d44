"""One folder of what recipes stand on: tuned models, importance, moments, evaluations.

What is there and still right is reused, everything else is made; either way its duration is noted,
for a reused one that of when it was made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from perta.data.examples import Example, ExampleSet, general_config, load_examples
from perta.errors import EmptyDatasetError, NotLearnedError
from perta.evidence.results import Results
from perta.methods.method import Edit, Side
from perta.options import (
    ComputeConfig,
    DataConfig,
    EstimatorConfig,
    LossOn,
    MomentOptions,
    ScoringConfig,
    TuneConfig,
    TunedType,
)
from perta.progress import step
from perta.recipes._plan import Asked, Load, Sizes
from perta.recipes._request import read_set
from perta.stages.edit import checkpoint_name
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments, holds, merge_moments, moments_without
from perta.stages.settings import (
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LessMomentsConfig,
    MergeMomentsConfig,
    MomentsConfig,
)
from perta.stages.stage import Place
from perta.store.costs import passes_of, seconds_of, title_of
from perta.store.measured.moments import open_moments
from perta.store.record import check_separate, read_manifest

_T = TypeVar("_T")
_P = TypeVar("_P", bound=Place)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Makes or reuses what one run needs."""

    folder: Path
    base: Path  # θ₀, from which models are tuned
    measured: Path  # model at which importance and moments are measured
    sets: Mapping[str, str]  # name -> file or `datasets` id
    tune: TuneConfig
    save_dtype: TunedType | None = None  # of tuned models; an adapter is kept without one
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    moments: MomentOptions = field(default_factory=MomentOptions)
    data_config: DataConfig
    compute: ComputeConfig
    # whether to replace outputs of another origin; None: those made by this package
    overwrite: bool | None = None
    # what is made -> name of its folder, where it has another
    names: Mapping[str, str] = field(default_factory=dict)
    reads: Sequence[str | Path] = ()  # what the run reads; nothing is made in its place
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> duration
    passes: dict[str, float] = field(default_factory=dict)  # stage -> operations, see `store.costs`
    # stage -> output, as far as this run has asked for it
    made: dict[str, Path] = field(default_factory=dict)
    asked: Asked | None = None  # where nothing is to be made: what would be

    def make(
        self,
        method: Edit,
        *,
        orders: Sequence[float] = (),
        loss_on: LossOn | None = None,
        seeds: Sequence[int] = (),
        forget_checkpoint: Path | None = None,
        retain_checkpoint: Path | None = None,
        samples: str | None = None,
        protected: Sequence[str] = ("retain",),
        saved: Path | None = None,
        unwanted: Sequence[Example] = (),
    ) -> dict[str, Any]:
        """Everything that an edit by a method reads, as fields of `EditConfig`.

        `orders` of importance are made in one pass. `protected` are sets whose moments, added to
        `saved` ones without `unwanted` rows, stand for what is to be kept, and with them the forget
        set's facts, repeated, where the method wants these. A `forget_checkpoint`
        stands in place of one tuned with the first seed, a `retain_checkpoint` in place of one
        tuned on `samples`.
        """
        given: dict[str, Any] = {}
        wanted, first = method.needs, self.tune.seed
        if wanted.tuned:
            seeds = seeds or range(first, first + wanted.tuned)
            tuned = tuple(
                str(
                    forget_checkpoint
                    if forget_checkpoint and not i
                    else self._forget(i, s, loss_on)
                )
                for i, s in enumerate(seeds)
            )
            given["forget_checkpoint"] = tuned[0] if len(tuned) == 1 else tuned
        if wanted.retain_checkpoint:
            tune, name = replace(self.tune, loss_on="answer"), "retain_checkpoint"
            given[name] = str(
                retain_checkpoint or self.tuned(name, "retain", tune, "retain_finetune", samples)
            )
        for side in wanted.importance:
            given[f"{side}_importance"] = self._importance(side, tuple(orders) or (method.order,))
        for side in wanted.moments:
            parts = protected if side == "retain" else (side,)
            folders = [self._moments(part, wanted.gradients) for part in parts]
            if saved and side == "retain":
                folders.insert(0, self._less(saved, unwanted))
            if side == "retain" and wanted.facts and self._has_facts():
                folders += self._fact_moments(saved)
            given[f"{side}_moments"] = self._merged(folders, wanted.gradients)
        return given

    def tuned(
        self, name: str, data: str, tune: TuneConfig, stage: str, samples: str | None = None
    ) -> Path:
        """The base model tuned on one of the sets."""
        config = FinetuneConfig(
            base=str(self.base),
            data=self.sets[data],
            samples=samples,
            save_dtype=self.save_dtype,
            tune=tune,
            **self._common(self.place(name)),
        )
        return self.once(
            *(stage, finetune_checkpoint, config),
            lambda sizes: sizes.tuning(
                self._examples(data), samples, tune, merges=self.save_dtype is not None
            ),
        )

    def _forget(self, place: int, seed: int, loss_on: LossOn | None) -> Path:
        number = checkpoint_name(place).removeprefix(checkpoint_name(0))
        name = self.names.get(checkpoint_name(0), checkpoint_name(0)) + number
        tune = replace(self.tune, seed=seed, loss_on=loss_on)
        folder = self.tuned(name, "forget", tune, f"finetune{number}")
        share = (read_manifest(folder) or {}).get("learned_share", 1.0)
        # What is there before the stage has run may be of other rows or settings.
        if self.asked is None and tune.finds_rate and share < 0.5:
            raise NotLearnedError(
                f"Only {share:.0%} of the forget set was learned, at every learning rate that was "
                "tried. What is not learned cannot be removed, so the run stops before the edit. "
                "Give a --learning-rate or more --epochs."
            )
        return folder

    def _importance(self, side: Side, orders: tuple[float, ...]) -> Path:
        config = ImportanceConfig(
            checkpoint=str(self.measured),
            data=self.sets[side],
            orders=orders,
            estimator=self.estimator,
            shard=self.tune.shard if self.estimator.reduction == "mean_of_power" else None,
            **self._common(self.place(f"{side}_importance")),
        )
        return self.once(
            *(f"{side}_importance", compute_importance, config),
            lambda sizes: sizes.importance(self._examples(side), len(orders)),
        )

    def _moments(self, part: str, gradients: bool) -> Path:
        output, options = self.place(f"{part}_moments"), self.moments
        options = options if part == "retain" else replace(options, moment_samples=None)
        common = self._common(output)
        if part == "general":
            common["data_config"] = general_config(self.sets[part], self.data_config)
        config = MomentsConfig(
            checkpoint=str(self.measured),
            data=self.sets[part],
            gradients=gradients,
            shard=self.tune.shard,
            options=options,
            **common,
        )
        return self.once(
            *(f"{part}_moments", compute_moments, config),
            lambda sizes: sizes.moments(self._examples(part), gradients, options),
        )

    def _has_facts(self) -> bool:
        return all(example.kind != "text" for example in self._examples("forget").examples)

    def _fact_moments(self, saved: Path | None) -> list[Path]:
        """Moments of the facts; none where no fact can be said, or `saved` has them already."""
        options = replace(self.moments, moment_samples=None)
        there = open_moments(saved).facts if saved else {}
        gradients = bool(there.get("outputs"))  # as those have that these are added to
        options = replace(options, tokens=there.get("token_choice", options.tokens))
        config = MomentsConfig(
            checkpoint=str(self.measured),
            data=self.sets["forget"],
            gradients=gradients,
            facts_by=str(self.base),
            shard=self.tune.shard,
            options=options,
            **self._common(self.place("forget_fact_moments")),
        )
        try:
            made = self.once(
                *("forget_fact_moments", compute_moments, config),
                lambda sizes: sizes.moments(self._examples("forget"), gradients, options),
            )
        except EmptyDatasetError:
            return []
        if there and made.is_dir():  # it is not where nothing is to be made
            sets = {*open_moments(made).facts["data_fingerprints"]}
            return [] if sets <= {*there["data_fingerprints"]} else [made]
        return [made]

    def _less(self, saved: Path, unwanted: Sequence[Example]) -> Path:
        if not holds(saved, unwanted):
            return saved
        return self.once(
            "retain_moments",
            lambda config: moments_without(config, unwanted),
            self.less_config(saved, self.place("retain_moments")),
            lambda sizes: sizes.moments(self._examples("forget"), False, self.moments),
        )

    def less_config(self, saved: Path, output: Path) -> LessMomentsConfig:
        """How moments that were saved are made without some rows."""
        return LessMomentsConfig(
            moments=saved,
            checkpoint=str(self.measured),
            shard=self.tune.shard,
            options=self.moments,
            **self._common(output),
        )

    def _merged(self, folders: Sequence[Path], gradients: bool) -> Path:
        if len(folders) == 1:
            return folders[0]
        output = self.place("protected_moments")
        config = MergeMomentsConfig(
            folders=tuple(folders), output=output, overwrite=self.replaces(output)
        )
        return self.once(
            "merge_moments", merge_moments, config, lambda sizes: sizes.merged(gradients)
        )

    def edit_config(self, **given: Any) -> EditConfig:
        """An edit of what was made; `given` are its fields but for the base and the computer."""
        return EditConfig(
            base=str(self.base),
            solve_device=self.compute.device,
            edit_threads=self.compute.threads,
            **given,
        )

    def evaluate(
        self, name: str, checkpoint: Path, output: Path, scoring: ScoringConfig, **sets: str | None
    ) -> Results:
        """Evaluate a model on some sets, with a base model where `sets` has one."""
        given = {**self._common(output), "shard": self.tune.shard, **sets}
        config = EvaluateConfig(checkpoint=str(checkpoint), scoring=scoring, **given)
        stage = f"evaluate_{name}"
        if self.asked is None:
            return self.made_by(stage, lambda: evaluate_checkpoint(config))
        rows = [load_examples(s, self.data_config) for n, s in sets.items() if s and n != "base"]
        self.asked.look(
            stage, evaluate_checkpoint, config, lambda sizes: sizes.evaluation(scoring, rows)
        )
        return {}

    def once(
        self,
        stage: str,
        run: Callable[[_P], Path],
        config: _P,
        load: Callable[[Sizes], Load],
        *,
        looks: bool = True,
    ) -> Path:
        """The output of a stage, made or reused, or asked for: see `Asked.look`."""
        if stage not in self.made:
            if self.asked is None:
                self.made[stage] = self.made_by(stage, lambda: run(config))
            else:
                self.made[stage] = self.asked.look(stage, run, config, load, looks=looks)
        return self.made[stage]

    def timed(
        self, stage: str, run: Callable[[], _T], load: Callable[[Sizes], Load] = Sizes.small
    ) -> _T | None:
        """`made_by` for what is in no folder; None where steps are only asked for."""
        if self.asked is None:
            return self.made_by(stage, run)
        self.asked.note(stage, load(self.asked.sizes))
        return None

    def made_by(self, stage: str, run: Callable[[], _T]) -> _T:
        """Run a stage and note its duration, by its output's own record where that has one."""
        started = time.perf_counter()
        with step(stage, title_of(stage)):
            result = run()
        made = read_manifest(result) if isinstance(result, Path) else None
        if isinstance(result, dict):
            made = result.get("perta")
        self.seconds[stage] = seconds_of(made) if made else time.perf_counter() - started
        passes = passes_of(made) if made else getattr(result, "tokens", 0)
        if passes:
            self.passes[stage] = passes
        return result

    def place(self, name: str) -> Path:
        """Where something lies."""
        place = self.folder / self.names.get(name, name)
        check_separate(place, self.reads)
        if self.asked is None:
            # It holds a model tuned on the forget set, and texts.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    def _common(self, output: Path) -> dict[str, Any]:
        """What the configurations of all stages share."""
        return {
            "output": output,
            "overwrite": self.replaces(output),
            "data_config": self.data_config,
            "compute": self.compute,
        }

    def _examples(self, name: str) -> ExampleSet:
        return read_set(name, self.sets[name], self.data_config)

    def replaces(self, output: Path) -> bool:
        """Whether what lies there may be replaced."""
        return read_manifest(output) is not None if self.overwrite is None else self.overwrite
