"""Every stage in order.

    forget set ─ finetune(base) ────────── forget checkpoint ─┐  (one a seed)
    retain set ─ finetune(base) ────────── retain checkpoint ─┤  (`msa`)
    forget set ─ importance(base or full) ─ forget importance ─┤
    retain set ─ importance(base or full) ─ retain importance ─┼─ edit(full) ─ unlearned checkpoint
    sets ── moments(base or full) ── their moments ────────────┘  (structured methods)
    training methods instead: both sets ─ train(full) ───────── unlearned checkpoint
    all sets ─── evaluate(full), evaluate(unlearned checkpoint), evaluate(base) ─ report, verdict

A part of the retain set takes no part in any of it but the evaluation; see `recipes.held_back`.

Stages meet through files in the work folder; a finished one is reused when nothing it depends
on has changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from perta.data.examples import ExampleSet
from perta.engine.edit.plan import BASE, FORGET, RETAIN, check_linear, plan_edit
from perta.engine.train.unlearn import with_method_defaults
from perta.methods.objectives import TRAINING_METHODS
from perta.methods.table import at_strength, get_method, importance_order, with_defaults
from perta.models.load import pick_device, pick_dtype
from perta.models.resolve import resolve_checkpoint
from perta.options import LossOn, TuneConfig
from perta.progress import say
from perta.recipes.held_back import HELD_BACK, PROTECTED, Split
from perta.recipes.request import (
    check_options,
    check_output,
    check_retain_moments,
    known_method,
    load_sets,
    refuse_moments,
    refuse_without_effect,
    rows_config,
    split_retain,
)
from perta.recipes.rounds import write_rounds
from perta.recipes.settings import UnlearnConfig
from perta.recipes.strength import Strength, StrengthSettings, Unseen, calibrate, choose_strength
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.verdict.judge import Verdict, judge
from perta.report.write import write_report
from perta.stages.edit import edit_checkpoint, find_inputs, refuse_unused, with_direction
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint, learned_by_forgetting
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import (
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MergeMomentsConfig,
    MomentsConfig,
    TrainConfig,
)
from perta.stages.stage import changes, exists_error
from perta.stages.train import train_checkpoint
from perta.store.checkpoint import open_index
from perta.store.costs import seconds_of
from perta.store.fingerprint import fingerprint
from perta.store.record import make_manifest, read_manifest, settings_of, stage_key, write_manifest

T = TypeVar("T")


@dataclass(frozen=True)
class Unlearned:
    """Outcome of `unlearn`.

    Attributes:
        folder: the unlearned checkpoint.
        manifest: what made it; also in its `perta.json`.
        before: results of the quick evaluation of the full checkpoint, if it ran.
        after: the same for the unlearned checkpoint.
        report: the page about it, if the evaluation ran.
        verdict: what came of it, if the evaluation ran.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)
    before: Mapping[str, Any] | None = field(repr=False)
    after: Mapping[str, Any] | None = field(repr=False)
    report: Path | None = None
    verdict: Verdict | None = None


def unlearn(config: UnlearnConfig | None = None, **options: Any) -> Unlearned:
    """Remove a forget set from a checkpoint (`perta unlearn`).

    Everything that can be wrong with the input is checked before the first long step.

    Args:
        config: inputs, output and settings.
        **options: fields of the configuration, in its place or over those it has; places may be
            text or paths.

    Returns:
        The unlearned checkpoint with its evaluation.

    Raises:
        PertaError: input that cannot be used; nothing is left half-written.
    """
    config = UnlearnConfig(**options) if config is None else replace(config, **options)
    refuse_without_effect(config)
    if known_method(config.weighting.method) in TRAINING_METHODS:
        return _unlearn_by_training(config)
    refuse_unused(config.weighting)
    config = _with_defaults(config)
    method = get_method(config.weighting.method)
    order = importance_order(method, config.weighting.order)
    base = resolve_checkpoint(config.base)
    full = resolve_checkpoint(config.full, base=config.base)
    check_output(config, base, full, work_folder(config))
    sources = {BASE: open_index(base), FORGET: open_index(base)}
    if config.retain_checkpoint is not None:
        sources[RETAIN] = open_index(
            resolve_checkpoint(config.retain_checkpoint, base=base, exact=True)
        )
    # Both raise now what would stop the run later.
    targets = plan_edit(open_index(full), sources, config.weighting)
    if method.moments is not None:
        check_linear(targets)
    sets = load_sets(config)
    split, held_back = split_retain(config, sets)
    used = {**sets, "retain": split.protected} if split else sets
    check_options(config, used)
    if config.retain_moments is not None:
        check_retain_moments(config, base if config.importance_at == "base" else full, sets)
    record = _Record.of(config, base, full, sets, held_back)
    stages = _Stages.of(config, base, full, record, split)
    if record.is_finished():
        say(f"unlearn: {config.output} is up to date, reused")
    else:
        record.refuse_foreign()
        stages.write_split()
        started = time.perf_counter()
        is_auto = config.weighting.scaling_coef == "auto"
        unseen = stages.calibrate(used) if is_auto else None
        forget_checkpoints = (
            stages.finetune(used["forget"]) if method.direction == "forget - base" else []
        )
        retain_checkpoint = stages.tune_retain(len(used["forget"]))
        importance = [
            stages.importance(name, order)
            if method.needs_importance and name in method.sides
            else None
            for name in ("forget", "retain")
        ]
        moments = [
            stages.moments(name, gradients=method.moments == "kron")
            if method.moments and name in method.sides
            else None
            for name in ("forget", "retain")
        ]
        edit = stages.edit_config(forget_checkpoints, retain_checkpoint, *importance, *moments)
        if unseen is not None and config.rounds > 1:
            edit = stages.rounds(edit, unseen, used["forget"])
        stages.solve(edit)
        found: dict[str, Any] = {}
        if unseen is not None:
            strength = stages.find_strength(edit, used, unseen)
            found = {"strength": asdict(strength)}
            edit = replace(edit, weighting=at_strength(edit.weighting, strength.scaling_coef))
        stages.edit(edit)
        record.seconds["total"] = time.perf_counter() - started
        record.write({}, **found)
    return _evaluated(stages, record)


def _unlearn_by_training(config: UnlearnConfig) -> Unlearned:
    """The run of a training method: one stage in place of fine-tuning, importance and edit."""
    method = TRAINING_METHODS[known_method(config.weighting.method)]
    refuse_moments(config)
    config = replace(
        config,
        weighting=replace(config.weighting, method=method.name),
        training=with_method_defaults(method, config.training),
    )
    base = resolve_checkpoint(config.base)
    full = resolve_checkpoint(config.full, base=config.base)
    check_output(config, base, full, work_folder(config))
    sets = load_sets(config)
    split, held_back = split_retain(config, sets)
    record = _Record.of(config, base, full, sets, held_back)
    stages = _Stages.of(config, base, full, record, split)
    if record.is_finished():
        say(f"unlearn: {config.output} is up to date, reused")
    else:
        record.refuse_foreign()
        stages.write_split()
        stages.train()
        record.seconds["total"] = record.seconds["train"]
        record.write({})
    return _evaluated(stages, record)


def _evaluated(stages: _Stages, record: _Record) -> Unlearned:
    """The outcome of a run whose output is there: evaluation and report, where wanted."""
    output = stages.config.output
    if not stages.config.evaluate:
        return Unlearned(output, read_manifest(output) or {}, None, None)
    stages.write_split()
    before = stages.evaluate("before", stages.full)
    after = stages.evaluate("after", output)
    base = stages.evaluate("base", stages.base)
    results = {"before": before, "after": after, "base": base}
    record.write({name: aggregates(found) for name, found in results.items()})
    report = stages.report()
    verdicts = judge(collect([str(output)]))
    verdict = verdicts[0] if verdicts else None
    return Unlearned(output, read_manifest(output) or {}, before, after, report, verdict)


@dataclass(frozen=True)
class _Stages:
    """The stages of one run with its inputs; each adds its duration to `seconds`.

    Stages without an output of their own, which would record it, add to `passes` what they
    compute, in forward passes over one token. The retain set of `config` is what the run may use;
    `judged` is what retention is judged on.
    """

    config: UnlearnConfig
    base: Path
    full: Path
    seconds: dict[str, float]
    passes: dict[str, float]
    judged: str | None
    split: Split | None

    @classmethod
    def of(
        cls, config: UnlearnConfig, base: Path, full: Path, record: _Record, split: Split | None
    ) -> _Stages:
        judged = config.retain
        if split is not None and split.held_back is not None:
            judged = str(work_folder(config) / HELD_BACK)
            config = replace(config, retain=str(work_folder(config) / PROTECTED))
        return cls(config, base, full, record.seconds, record.passes, judged, split)

    def write_split(self) -> None:
        """Write the parts of the retain set where the stages read them."""
        if self.split is not None:
            self.split.write(work_folder(self.config))

    def finetune(self, forget: ExampleSet) -> list[Path]:
        """Tune a forget checkpoint for every seed."""
        loss_on = self._loss_on(forget)
        tuned = []
        for place in range(self.config.forget_seeds or 1):
            more = f"_{place + 1}" if place else ""
            tune = replace(self.config.tune, seed=self.config.tune.seed + place, loss_on=loss_on)
            stage = self._tuning("forget_checkpoint" + more, self.config.forget, tune)
            tuned.append(self._timed("finetune" + more, partial(finetune_checkpoint, stage)))
        return tuned

    def _loss_on(self, forget: ExampleSet) -> LossOn:
        structured = get_method(self.config.weighting.method).moments is not None
        return learned_by_forgetting(self.config.tune.loss_on, forget, structured=structured)

    def rounds(self, edit: EditConfig, unseen: Unseen, forget: ExampleSet) -> EditConfig:
        """The edit with a forget checkpoint of several rounds."""
        output = self._place("forget_rounds")
        tune = replace(self.config.tune, loss_on=self._loss_on(forget))
        made = self._timed(
            "rounds",
            lambda: write_rounds(
                output,
                edit,
                unseen,
                tune,
                self.config.compute,
                most=self.config.rounds,
                overwrite=_is_ours(output),
            ),
        )
        self.passes["rounds"] = (read_manifest(made) or {})["passes"]
        return replace(edit, forget_checkpoint=str(made))

    def tune_retain(self, forget_rows: int) -> Path | None:
        """Tune on retained examples, where the method adds a retain vector and none was given."""
        if not get_method(self.config.weighting.method).retain_vector:
            return None
        if self.config.retain_checkpoint is not None:
            return resolve_checkpoint(self.config.retain_checkpoint, base=self.base, exact=True)
        # All of the retain set would cost as much as training again without the forget set.
        samples = self.config.retain_samples or str(forget_rows)
        data = cast(str, self.config.retain)
        tune = replace(self.config.tune, loss_on="answer")
        stage = self._tuning("retain_checkpoint", data, tune, samples)
        return self._timed("retain_finetune", lambda: finetune_checkpoint(stage))

    def _tuning(
        self, name: str, data: str, tune: TuneConfig, samples: str | None = None
    ) -> FinetuneConfig:
        output = self._place(name)
        return FinetuneConfig(
            base=str(self.base),
            data=data,
            output=output,
            samples=samples,
            overwrite=_is_ours(output),
            tune=tune,
            data_config=self.config.data_config,
            compute=self.config.compute,
        )

    def importance(self, name: str, order: float) -> Path:
        output = self._place(f"{name}_importance")
        at = self.base if self.config.importance_at == "base" else self.full
        stage = ImportanceConfig(
            checkpoint=str(at),
            data=cast(str, getattr(self.config, name)),
            output=output,
            orders=(order,),
            overwrite=_is_ours(output),
            estimator=self.config.estimator,
            data_config=self.config.data_config,
            compute=self.config.compute,
        )
        return self._timed(f"{name}_importance", lambda: compute_importance(stage))

    def moments(self, name: str, *, gradients: bool) -> Path:
        """Moments of the forget set, or of what is protected: retain set, general text or both."""
        saved = self.config.retain_moments if name == "retain" else None
        parts = [saved] if saved else []
        measured = {
            "forget": ("forget",),
            "retain": ("general",) if saved else ("retain", "general"),
        }
        for part in measured[name]:
            data = getattr(self.config, part)
            if data is not None:
                parts.append(self._moments_of(part, data, gradients))
        if len(parts) == 1:
            return parts[0]
        output = self._place("protected_moments")
        stage = MergeMomentsConfig(folders=tuple(parts), output=output, overwrite=_is_ours(output))
        return self._timed("merge_moments", lambda: merge_moments(stage))

    def _moments_of(self, name: str, data: str, gradients: bool) -> Path:
        output = self._place(f"{name}_moments")
        at = self.base if self.config.importance_at == "base" else self.full
        stage = MomentsConfig(
            checkpoint=str(at),
            data=data,
            output=output,
            gradients=gradients,
            overwrite=_is_ours(output),
            options=self.config.moments,
            data_config=rows_config(self.config, name),
            compute=self.config.compute,
        )
        return self._timed(f"{name}_moments", lambda: compute_moments(stage))

    def train(self) -> Path:
        config = self.config
        every = config.tune.save_every
        stage = TrainConfig(
            method=config.weighting.method,
            # `influence` needs the adapter itself, so what the user gave goes on.
            full=config.full,
            base=config.base,
            forget=config.forget,
            retain=config.retain,
            output=config.output,
            overwrite=config.overwrite,
            save_dtype=config.save_dtype,
            save_every=1 if every is None else every,
            training=config.training,
            data_config=config.data_config,
            compute=config.compute,
        )
        return self._timed("train", lambda: train_checkpoint(stage))

    def edit_config(
        self,
        forget_checkpoints: Sequence[Path],
        retain_checkpoint: Path | None,
        forget: Path | None,
        retain: Path | None,
        forget_moments: Path | None,
        retain_moments: Path | None,
    ) -> EditConfig:
        names = tuple(map(str, forget_checkpoints))
        return EditConfig(
            full=str(self.full),
            base=str(self.base),
            forget_checkpoint=names[0] if len(names) == 1 else names,
            retain_checkpoint=None if retain_checkpoint is None else str(retain_checkpoint),
            forget_importance=forget,
            retain_importance=retain,
            forget_moments=forget_moments,
            retain_moments=retain_moments,
            direction=self._place("direction"),
            solve_device=self.config.compute.device,
            save_dtype=self.config.save_dtype,
            output=self.config.output,
            overwrite=self.config.overwrite,
            edit_threads=self.config.compute.threads,
            weighting=self.config.weighting,
        )

    def solve(self, stage: EditConfig) -> None:
        """Make a structured method's direction, which search and edit share."""
        if get_method(stage.weighting.method).moments:
            self._timed("direction", lambda: with_direction(stage, find_inputs(stage))["direction"])

    def edit(self, stage: EditConfig) -> Path:
        return self._timed("edit", lambda: edit_checkpoint(stage))

    def calibrate(self, sets: Mapping[str, ExampleSet]) -> Unseen:
        """Measure what unseen means, before the first long step."""
        data_config, compute = self.config.data_config, self.config.compute
        unseen = self._timed(
            "calibrate", lambda: calibrate(self.full, self.base, sets, data_config, compute)
        )
        self.passes["calibrate"] = unseen.tokens
        return unseen

    def find_strength(
        self, stage: EditConfig, sets: Mapping[str, ExampleSet], unseen: Unseen
    ) -> Strength:
        """Search for the strength and save every point of it as `strength.json`."""
        settings = StrengthSettings(
            self.config.retain_budget, self.config.strength_seed, work_folder(self.config)
        )
        found = self._timed(
            "strength",
            lambda: choose_strength(
                stage, sets, unseen, settings, self.config.data_config, self.config.compute
            ),
        )
        self.passes["strength"] = found.tokens
        text = json.dumps(asdict(found), indent=1) + "\n"
        self._place("strength.json").write_text(text, "utf-8")
        return found

    def evaluate(self, name: str, checkpoint: Path) -> dict[str, Any]:
        output = self._place(f"evaluation_{name}.json")
        # The base model is asked for what it would make of the removed rows, and that alone.
        is_base = name == "base"
        scoring = self.config.scoring
        stage = EvaluateConfig(
            checkpoint=str(checkpoint),
            forget=self.config.forget,
            retain=None if is_base else self.judged,
            holdout=None if is_base else self.config.holdout,
            base=self.config.base,
            output=output,
            overwrite=_is_ours(output),
            scoring=replace(scoring, generate=False) if is_base else scoring,
            data_config=self.config.data_config,
            compute=self.config.compute,
        )
        return self._timed(f"evaluate_{name}", lambda: evaluate_checkpoint(stage))

    def report(self) -> Path:
        output = self.config.output.with_name(f"{self.config.output.name}.report.html")
        return write_report(ReportConfig(results=(str(self.config.output),), output=output))

    def _place(self, name: str) -> Path:
        folder = work_folder(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _timed(self, name: str, run: Callable[[], T]) -> T:
        clock = time.perf_counter()
        result = run()
        # By its own record, so that a stage that was reused is noted as when it was made.
        made = read_manifest(result) if isinstance(result, Path) else None
        if isinstance(result, dict):
            made = result.get("perta")
        self.seconds[name] = seconds_of(made) if made else time.perf_counter() - clock
        return result


@dataclass(frozen=True)
class _Record:
    """What a run as a whole was made from, kept in the output's manifest under `unlearn`.

    It lets a run with an output that does not match stop before the first long step, and one
    whose output matches skip them all, even when the work folder is gone.
    """

    config: UnlearnConfig
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    held_back: Mapping[str, Any]
    seconds: dict[str, float]
    passes: dict[str, float]

    @classmethod
    def of(
        cls,
        config: UnlearnConfig,
        base: Path,
        full: Path,
        sets: Mapping[str, ExampleSet],
        held_back: Mapping[str, Any],
    ) -> _Record:
        inputs = {
            "base": fingerprint(base),
            "full": fingerprint(full),
            **{name: sets[name].fingerprint for name in ("forget", "retain") if name in sets},
        }
        if "holdout" in sets and config.weighting.scaling_coef == "auto":
            inputs["holdout"] = sets["holdout"].fingerprint
        if "general" in sets:
            inputs["general"] = sets["general"].fingerprint
        if config.retain_moments is not None:
            inputs["retain_moments"] = fingerprint(config.retain_moments)
        if config.retain_checkpoint is not None:
            retain_checkpoint = resolve_checkpoint(config.retain_checkpoint, base=base, exact=True)
            inputs["retain_checkpoint"] = fingerprint(retain_checkpoint)
        return cls(config, _resolved(config), inputs, held_back, {}, {})

    def is_finished(self) -> bool:
        manifest = read_manifest(self.config.output) or {}
        return manifest.get("unlearn", {}).get("key") == stage_key(
            "unlearn", self.settings, self.inputs
        ) and manifest.get("content") == fingerprint(self.config.output)

    def refuse_foreign(self) -> None:
        output = self.config.output
        if self.config.overwrite or not output.exists():
            return
        manifest = read_manifest(output)
        if manifest is None:
            why = "was not made by perta"
        elif "unlearn" not in manifest:
            why = f"was made by `perta {manifest.get('stage')}`"
        else:
            changed = changes(manifest["unlearn"], self.settings, self.inputs)
            why = f"was made with other {', '.join(changed)}" if changed else "was changed since"
        raise exists_error(output, why)

    def write(self, evaluation: Mapping[str, Any], **found: Any) -> None:
        manifest = read_manifest(self.config.output) or {}
        earlier = manifest.get("unlearn", {})
        manifest["unlearn"] = make_manifest(
            "unlearn",
            self.settings,
            self.inputs,
            seconds={**earlier.get("seconds", {}), **self.seconds},
            passes={**earlier.get("passes", {}), **self.passes},
            sources={name: getattr(self.config, name) for name in self.inputs},
            evaluation=evaluation or earlier.get("evaluation", {}),
            **({"held_back": dict(self.held_back)} if self.held_back else {}),
            **({"strength": earlier["strength"]} if "strength" in earlier else {}),
            **found,
        )
        write_manifest(self.config.output, manifest)


def work_folder(config: UnlearnConfig) -> Path:
    """Folder of a run's intermediate results."""
    return config.work_dir or config.output.with_name(config.output.name + ".work")


def _with_defaults(config: UnlearnConfig) -> UnlearnConfig:
    """The settings with the method's own where the user gave none."""
    method = get_method(config.weighting.method)
    weighting = config.weighting
    if weighting.scaling_coef is None and method.searched and config.retain is not None:
        weighting = replace(weighting, scaling_coef="auto")
    weighting = with_defaults(weighting)
    estimator = config.estimator
    return replace(
        config,
        weighting=weighting,
        importance_at=config.importance_at or method.importance_at,
        forget_seeds=config.forget_seeds or method.min_task_vectors,
        estimator=replace(estimator, reduction=method.reduction or estimator.reduction),
    )


def _resolved(config: UnlearnConfig) -> dict[str, Any]:
    # How the result is evaluated does not decide what it is; how it is chosen does.
    evaluation = {"evaluate", "fail_unless", *settings_of(config.scoring)}
    if config.weighting.scaling_coef != "auto":
        evaluation |= {"holdout", "retain_budget", "strength_seed"}
    settings = {k: v for k, v in settings_of(config).items() if k not in evaluation}
    return {
        **settings,
        "device": pick_device(config.compute).type,
        "dtype": str(pick_dtype(config.compute)).removeprefix("torch."),
        "work_dir": str(work_folder(config)),
    }


def _is_ours(output: Path) -> bool:
    """Whether an intermediate result may be replaced: one that perta made."""
    return read_manifest(output) is not None


def aggregates(results: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> aggregate value of a results file."""
    return {
        name: value["agg_value"]
        for name, value in results.items()
        if isinstance(value, Mapping) and "agg_value" in value
    }
