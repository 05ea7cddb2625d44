"""Every stage in order.

    forget set ─ finetune(base) ────────── forget checkpoint ─┐  (one a seed)
    retain set ─ finetune(base) ────────── retain checkpoint ─┤  (`msa`)
    forget set ─ importance(base or full) ─ forget importance ─┤
    retain set ─ importance(base or full) ─ retain importance ─┼─ edit(full) ─ unlearned checkpoint
    sets ── moments(base or full) ── their moments ────────────┘  (structured methods)
    training methods instead: both sets ─ train(full) ───────── unlearned checkpoint
    all sets ─── evaluate(full), evaluate(unlearned checkpoint), evaluate(base) ─ report, verdict

A part of the retain set takes no part in any of it but the evaluation.

Stages meet through files in the work folder; a finished one is reused when nothing it depends
on has changed. Work folders of other outputs, beside this one, are looked in as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from perta.data.examples import Example, ExampleSet
from perta.data.rows import as_source
from perta.engine.edit.plan import BASE, FORGET, RETAIN, check_linear, plan_edit
from perta.engine.train.refusals import check_questions
from perta.engine.train.unlearn import with_method_defaults
from perta.errors import PertaError
from perta.evidence.audit.document import AUDIT, told_in_short
from perta.evidence.audit.probe import Role
from perta.methods.method import Method
from perta.methods.objectives import Training
from perta.methods.registry import (
    at_strength,
    get_method,
    parse,
    refuse_unused,
    where_set,
    with_defaults,
)
from perta.models.formats.gguf_write import gguf_plan
from perta.models.formats.low_rank import is_adapter, open_tuned
from perta.models.resolve import quantised_checkpoint, resolve_checkpoint, resolve_tuned
from perta.options import LossOn, SaveType, with_options
from perta.progress import running, say, telling_once
from perta.recipes._plan import Asked, Sizes
from perta.recipes._request import (
    HELD_BACK,
    PROTECTED,
    Split,
    check_options,
    check_order,
    check_places,
    check_retain_moments,
    check_same_tokens,
    check_tuned,
    load_sets,
    page_of,
    read_by,
    refuse_moments,
    refuse_without_effect,
    split_retain,
    with_picked_rows,
)
from perta.recipes._run_record import STRENGTH, RunRecord, other_work_folders
from perta.recipes._workspace import Workspace
from perta.recipes.settings import UnlearnConfig
from perta.recipes.strength.choose import Strength, Unseen, calibrate, choose_strength
from perta.recipes.strength.rounds import write_rounds
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.verdict.judge import Verdict, judge
from perta.report.write import write_report
from perta.stages.audit import quick_audit
from perta.stages.edit import edit_checkpoint, make_direction
from perta.stages.finetune import Fit, check_learned, learned_by_forgetting
from perta.stages.moments import check_less, holds
from perta.stages.settings import EditConfig, TrainConfig
from perta.stages.stage import At, taking_over
from perta.stages.train import needed_sets, train_checkpoint
from perta.store.atomic import write_text
from perta.store.checkpoint import open_index
from perta.store.costs import Plan, size
from perta.store.provenance import FORGET_CHECKPOINT
from perta.store.record import aggregates, read_manifest

_ROUNDS = 10  # each leaves at most half of its rows, so hardly a request needs more


@dataclass(frozen=True)
class Unlearned:
    """Outcome of `unlearn`; what is of the evaluation is None where that did not run.

    Attributes:
        folder: the unlearned checkpoint.
        manifest: what made it; also in its `perta.json`.
        before: results of the quick evaluation of the full checkpoint.
        after: the same for the unlearned checkpoint.
        report: the page about it.
        verdict: what came of it.
        audit: the audit of level quick, see `perta.audit_checkpoint`.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(repr=False)
    before: Mapping[str, Any] | None = field(repr=False)
    after: Mapping[str, Any] | None = field(repr=False)
    report: Path | None = None
    verdict: Verdict | None = None
    audit: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every mean as a row of a table: `pandas.DataFrame(result.rows)`."""
        return [
            {"model": model, "metric": metric, "value": value}
            for model, found in {"full": self.before, "unlearned": self.after}.items()
            for metric, value in aggregates(found or {}).items()
        ]


@telling_once()
def unlearn(config: UnlearnConfig | None = None, **options: Any) -> Unlearned:
    """Remove a forget set from a checkpoint (`perta unlearn`).

    `options` stand in place of `config` or over what it has: its fields, and those of its groups by
    the names of the command line, such as `method`, `alpha` and `epochs`. Places may be text or
    paths; sets of examples may be rows as well. PertaError at input that cannot be used, before the
    first long step; nothing is left half-written.
    """
    run = _request(_configured(config, options))
    output, plan = run.config.output, run.plan(looks=False)
    say(f"{plan.output_folder}: about {size(plan.output)}; {plan.work_folder}: {size(plan.work)}")
    work = {step.name: step.operations for step in plan.steps}
    with taking_over(other_work_folders(run.config)), running(work):
        if run.record.is_finished():
            say(f"unlearn: {output} is up to date, reused")
        else:
            try:
                run.check_order()
                run.write_split()
                run.record.write({}, **run.made())
            except PertaError:
                with suppress(OSError):  # as long as there is nothing in it
                    run.work.folder.rmdir()
                raise
        return run.evaluated()


def plan_unlearn(config: UnlearnConfig | None = None, **options: Any) -> Plan:
    """What `unlearn` would do, after all of its checks; nothing is written but to the cache."""
    run = _request(_configured(config, options))
    with taking_over(other_work_folders(run.config)):
        return run.plan(looks=True)


def _configured(config: UnlearnConfig | None, options: Mapping[str, Any]) -> UnlearnConfig:
    return with_options(UnlearnConfig if config is None else config, options, where_set)


def _request(config: UnlearnConfig) -> _Run:
    """A run after every check."""
    config = with_picked_rows(config)
    refuse_without_effect(config)
    method = parse(config.weighting.method, Method)
    training = method if isinstance(method, Training) else None
    if training is None:
        config = _for_an_edit(config)
    else:
        refuse_moments(config)
        needed_sets(training, {"forget": config.forget, "retain": config.retain})
        loop = with_method_defaults(training, config.training, config.tune.seed)
        config = replace(config, training=loop)
    run = _checked(config, training)
    if not run.record.is_finished():
        run.record.refuse_foreign()
    return run


def _for_an_edit(config: UnlearnConfig) -> UnlearnConfig:
    """The settings of a method that edits, with its own where the user gave none."""
    refuse_unused(config.weighting)
    weighting, estimator = config.weighting, config.estimator
    method = get_method(weighting.method)
    if weighting.scaling_coef is None and method.searched and config.retain is not None:
        weighting = replace(weighting, scaling_coef="auto")
    seeds = config.forget_seeds or max(1, method.needs.tuned)
    is_even = method.needs.moments and weighting.scaling_coef == "auto" and seeds == 1
    moments = config.moments
    # Moments that serve many requests are of the base, which every one of them starts from.
    is_shared = bool(method.needs.moments) and bool(config.retain_moments or config.general)
    if method.needs.moments:
        # Beside general text a sample would not keep the proportion of the sets.
        alone = config.general is None and config.retain_moments is None
        samples = config.retain_samples or moments.moment_samples or ("enough" if alone else None)
        moments = replace(moments, moment_samples=samples)
    return replace(
        config,
        weighting=with_defaults(weighting),
        importance_at=config.importance_at or ("base" if is_shared else method.needs.at),
        forget_seeds=seeds,
        rounds=config.rounds or (_ROUNDS if is_even else 1),
        moments=moments,
        estimator=replace(estimator, reduction=method.needs.reduction or estimator.reduction),
    )


def _checked(config: UnlearnConfig, training: Training | None) -> _Run:
    """A run after every check that needs no long step; they raise what would stop it later."""
    base = resolve_checkpoint(config.base)
    full = resolve_checkpoint(config.full, base=config.base)
    tuned = {
        name: resolve_tuned(given, base)
        for name in (FORGET_CHECKPOINT, "retain_checkpoint")
        if (given := getattr(config, name)) is not None
    }
    reads, folder = read_by(config, base, full), config.work_folder
    check_places(config, reads)
    gguf_plan(config.output_format, config.full, full, config.save_dtype)
    if training is None:
        sources = {BASE: base, FORGET: tuned.get(FORGET_CHECKPOINT, base)}
        if "retain_checkpoint" in tuned:
            sources[RETAIN] = tuned["retain_checkpoint"]
        start = open_index(base)
        opened = {role: open_tuned(folder, start) for role, folder in sources.items()}
        targets = plan_edit(open_index(full), opened, config.weighting)
        if get_method(config.weighting.method).needs.moments:
            check_linear(targets)
    sets = load_sets(config)
    if training is not None:
        check_questions(training, sets["forget"])
    check_same_tokens(base, full, sets["forget"], config.data_config)
    split, held_back = split_retain(config, sets)
    record = RunRecord.of(config, base, full, tuned, sets, held_back)
    judged = config.retain
    if split is not None and split.held_back is not None:
        judged = str(folder / HELD_BACK)
        config = replace(config, retain=str(folder / PROTECTED))
    given = {name: getattr(config, name) for name in ("forget", "retain", "general")}
    work = Workspace(
        folder=folder,
        base=base,
        measured=full if config.importance_at == "full" else base,
        sets={name: data for name, data in given.items() if data is not None},
        tune=config.tune,
        estimator=config.estimator,
        moments=config.moments,
        data_config=config.data_config,
        compute=config.compute,
        reads=reads,
        seconds=record.seconds,
        passes=record.passes,
    )
    run = _Run(config, training, full, sets, split, judged, work, record)
    if training is None:
        check_options(config, run.used)
        check_tuned(config, sets, record.folders, record.inputs)
        check_retain_moments(config, work.measured, sets)
        if config.retain_moments is not None and holds(config.retain_moments, run.unwanted):
            check_less(work.less_config(config.retain_moments, folder / "less"), run.unwanted)
    return run


@dataclass(frozen=True)
class _Run:
    """One run with its inputs; retention is `judged` on the second part of `split`."""

    config: UnlearnConfig
    training: Training | None
    full: Path
    sets: Mapping[str, ExampleSet]
    split: Split | None
    judged: str | None
    work: Workspace
    record: RunRecord

    @property
    def used(self) -> Mapping[str, ExampleSet]:
        """The sets that may decide what the result is."""
        return {**self.sets, "retain": self.split.protected} if self.split else self.sets

    @property
    def unwanted(self) -> list[Example]:
        """Rows that must not be among what is protected: to be forgotten, or to judge by."""
        held = self.split.held_back if self.split else None
        return [*self.sets["forget"].examples, *(held.examples if held else ())]

    def plan(self, *, looks: bool) -> Plan:
        """What the run would do; `looks` says whether to look for what is there already."""
        work, judged = self.work, self.judged
        if self.split and self.split.held_back:  # nothing is written here for stages to read
            parts = {"retain": self.split.protected, "judged": self.split.held_back}
            kept, judged = (
                as_source([e.fields for e in part.examples], name) for name, part in parts.items()
            )
            work = replace(work, sets={**work.sets, "retain": kept})
        sizes = Sizes(self.full, work.base, self.config.data_config)
        asked = Asked(sizes, looks)
        run = replace(self, work=replace(work, asked=asked, made={}), judged=judged)
        if not self.record.is_finished():
            run.made()
        if self.config.evaluate:
            run._evaluations()
        return asked.plan(self.work.folder, self.config.output, self._stored(sizes))

    def _stored(self, sizes: Sizes) -> float:
        """Bytes of a checkpoint like θ_full, in the type or format that is asked for."""
        wanted = {"float32": 4, "bfloat16": 2, "float16": 2, "q8_0": 34 / 32}
        if self.config.save_dtype in wanted:
            return float(wanted[self.config.save_dtype] * sizes.parameters)
        stored = quantised_checkpoint(self.config.full) or self.full
        return float(sum(entry.nbytes for entry in open_index(stored).tensors.values()))

    def check_order(self) -> None:
        """Stop where base and full model were given for each other, which a search finds itself."""
        config = self.config
        if config.weighting.scaling_coef != "auto":
            read = (self.work.base, self.full, self.sets["forget"])
            check_order(*read, config.data_config, config.compute)

    def made(self) -> dict[str, Any]:
        """Edit or train; what the search for the strength found."""
        return self._train() if self.training else self._edit()

    def write_split(self) -> None:
        """Write the parts of the retain set where the stages read them, in a private folder."""
        self.work.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.split is not None:
            self.split.write(self.work.folder)

    def _edit(self) -> dict[str, Any]:
        """Make what the method needs and edit."""
        started, config, work = time.perf_counter(), self.config, self.work
        is_auto, used = config.weighting.scaling_coef == "auto", self.used
        unseen: Unseen | None = None
        if is_auto:  # before the first long step
            unseen = work.timed(
                "calibrate",
                lambda: calibrate(self.full, work.base, used, config.data_config, config.compute),
                lambda sizes: sizes.calibrate(used["forget"], used.get("holdout")),
            )
        found: dict[str, Any] = {}
        if (given := self.record.folders.get(FORGET_CHECKPOINT)) and (fit := self._fit(given)):
            found = {FORGET_CHECKPOINT: asdict(fit)}
        edit = self._edit_config()
        if in_rounds := is_auto and (config.rounds or 1) > 1:
            edit = self._rounds(edit, unseen)
        rank = self._rank * ((config.rounds or 1) if in_rounds else len(edit.forget_checkpoints))
        if get_method(config.weighting.method).needs.moments:  # search and edit share it
            work.once(
                "direction",
                lambda _: make_direction(edit),
                At(work.place("direction")),
                lambda sizes: sizes.direction(edit.weighting, rank),
                looks=not in_rounds,
            )
        made = read_manifest(Path(str(edit.forget_checkpoint))) if in_rounds else None
        if rounds := (made or {}).get("rounds"):
            found["rounds"] = rounds
        if is_auto and (strength := self._strength(edit, unseen, in_rounds=bool(rounds))):
            found["strength"] = asdict(strength)
            edit = replace(edit, weighting=at_strength(edit.weighting, strength.scaling_coef))
        work.timed("edit", lambda: self._edited(edit))
        self.record.seconds["total"] = time.perf_counter() - started
        return found

    def _fit(self, given: Path) -> Fit | None:
        """Whether a given forget checkpoint knows what is to be removed."""
        config, work = self.config, self.work
        look = (given, work.base, self.sets["forget"], config.data_config, config.compute)
        forget = self.used["forget"]
        return work.timed(
            "given",
            lambda: check_learned(*look, named=str(config.forget_checkpoint)),
            lambda sizes: sizes.given(forget),
        )

    def _edited(self, edit: EditConfig) -> Path:
        self.record.check(self.work.made.values())
        edit_checkpoint(edit, forget_rows=self.sets["forget"].fingerprint, part_of=self.record.key)
        self.record.check([edit.output])
        return edit.output

    def _edit_config(self) -> EditConfig:
        """The edit, with what it reads made or reused."""
        config = self.config
        # As the user names them: in what format they lie there, and what an adapter is made for.
        edit = self.work.edit_config(
            full=config.full,
            output=config.output,
            direction=self.work.place("direction"),
            save_dtype=config.save_dtype,
            output_format=config.output_format,
            adapter_rank=config.adapter_rank,
            overwrite=config.overwrite,
            weighting=config.weighting,
            **self._needed(),
        )
        return replace(edit, base=config.base)

    def _needed(self) -> dict[str, Any]:
        """Everything that the edit reads, made or reused."""
        config, work, first = self.config, self.work, self.config.tune.seed
        method, given = get_method(config.weighting.method), self.record.folders
        protected = ("general",) if config.retain_moments else ("retain", "general")
        return work.make(
            method,
            forget_checkpoint=given.get(FORGET_CHECKPOINT),
            retain_checkpoint=given.get("retain_checkpoint"),
            loss_on=self._loss_on,
            seeds=range(first, first + (config.forget_seeds or 1)),
            # All of the retain set would cost as much as training again without the forget set.
            samples=None
            if config.retain_samples == "all"
            else config.retain_samples or str(len(self.sets["forget"])),
            protected=[name for name in protected if name in work.sets],
            saved=config.retain_moments,
            unwanted=self.unwanted,
        )

    @property
    def _loss_on(self) -> LossOn:
        structured = bool(get_method(self.config.weighting.method).needs.moments)
        asked = self.config.tune.loss_on
        return learned_by_forgetting(asked, self.sets["forget"], structured=structured)

    @property
    def _rank(self) -> int:
        """Rank of each task vector, 0 where one that was given is whole."""
        given = self.record.folders.get(FORGET_CHECKPOINT)
        return self.config.tune.lora_rank if given is None or is_adapter(given) else 0

    def _rounds(self, edit: EditConfig, unseen: Unseen | None) -> EditConfig:
        """The edit with a forget checkpoint of several rounds."""
        config, work = self.config, self.work
        output, most = work.place("forget_rounds"), config.rounds or 1
        learned = read_manifest(Path(str(edit.forget_checkpoint)))
        rate = config.tune.learning_rate or (learned or {}).get("learning_rate")
        tune = replace(config.tune, loss_on=self._loss_on, learning_rate=rate)
        made = work.once(
            "rounds",
            lambda at: write_rounds(at, edit, cast(Unseen, unseen), tune, config.compute, most),
            At(output, work.replaces(output)),
            lambda sizes: sizes.rounds(
                self.used["forget"], most, config.tune, config.weighting, self._rank
            ),
            looks=False,
        )
        return replace(edit, forget_checkpoint=str(made))

    def _strength(
        self, edit: EditConfig, unseen: Unseen | None, *, in_rounds: bool
    ) -> Strength | None:
        """Search for the strength and save every point of it as `strength.json`."""
        config, work, used = self.config, self.work, self.used
        found = work.timed(
            "strength",
            lambda: choose_strength(
                edit,
                used,
                cast(Unseen, unseen),
                config.retain_budget,
                config.data_config,
                config.compute,
                in_rounds=in_rounds,
            ),
            lambda sizes: sizes.strength(
                used["forget"], used["retain"], config.weighting, self._rank
            ),
        )
        if found:
            write_text(work.place(STRENGTH), json.dumps(asdict(found), indent=1) + "\n")
        return found

    def _train(self) -> dict[str, Any]:
        """Train in place of an edit."""
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
            save_dtype=cast(SaveType, config.save_dtype),
            save_every=1 if every is None else every,
            training=config.training,
            data_config=config.data_config,
            compute=config.compute,
        )
        method, sets = cast(Training, self.training), self.used
        self.work.timed(
            "train",
            lambda: train_checkpoint(stage, part_of=self.record.key),
            lambda sizes: sizes.training(
                method, config.training, sets["forget"], sets.get("retain")
            ),
        )
        if self.work.asked is None:
            self.record.check([stage.output])
            self.record.seconds["total"] = self.record.seconds["train"]
        return {}

    def evaluated(self) -> Unlearned:
        """The outcome, once the output is there: evaluation and report, where wanted."""
        output = self.config.output
        if not self.config.evaluate:
            return Unlearned(output, read_manifest(output) or {}, None, None)
        self.write_split()
        results = self._evaluations()
        self.record.write({name: aggregates(found) for name, found in results.items()})
        models: dict[Role, str] = {"cleaned": "after", "full": "before", "base": "base"}
        place = self.work.place(AUDIT)  # the evaluations pay for it
        audit = quick_audit({role: results[name] for role, name in models.items()}, place)
        say(f"{told_in_short(audit)} ({place}); `perta audit` looks further")
        report = write_report(ReportConfig(results=(str(output),), output=page_of(output)))
        verdicts = judge(collect([str(output)]))
        return Unlearned(
            output,
            read_manifest(output) or {},
            results["before"],
            results["after"],
            report,
            verdicts[0] if verdicts else None,
            audit,
        )

    def _evaluations(self) -> dict[str, dict[str, Any]]:
        config, scoring = self.config, self.config.scoring
        sets = {"forget": config.forget, "retain": self.judged, "holdout": config.holdout}
        # The base model is asked for what it would make of the removed rows, and that alone.
        alone = {"forget": config.forget}
        return {
            name: self.work.evaluate(
                *(name, model, self.work.place(f"evaluation_{name}.json"), how),
                **asked,
                base=config.base,
            )
            for name, model, how, asked in (
                ("before", self.full, scoring, sets),
                ("after", config.output, scoring, sets),
                ("base", self.work.base, replace(scoring, generate=False), alone),
            )
        }
