"""`perta demo`: the whole method on a real model, with nothing but the installed package.

    fictitious people ─ full model, retrained reference (without the forget people)
                      └ forget checkpoint, importance, one edit per method, evaluation of all

Everything goes through the public stages, so a second run reuses what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from perta.data.examples import load_examples
from perta.methods.table import get_method
from perta.models.resolve import resolve_checkpoint
from perta.models.smollm import obtain_smollm
from perta.models.tiny import write_tiny_checkpoint
from perta.options import DataConfig, EstimatorConfig, ScoringConfig, TuneConfig, WeightingConfig
from perta.progress import say
from perta.recipes.settings import DemoConfig
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.tables import costs
from perta.report.write import write_report
from perta.stages.edit import edit_checkpoint
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.people import write_people
from perta.stages.settings import (
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MomentsConfig,
    PeopleConfig,
)
from perta.store.atomic import atomic_folder
from perta.terminal import print_comparison, print_costs, print_samples

T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """Sizes and settings of a demo.

    `strengths` are the methods' scaling coefficients. At equal scaling coefficients the
    methods forget unequally, which says nothing about them; these make all of
    them forget about as much as the retrained reference does on TOFU rows, another data set.
    """

    people: int
    questions: int
    forget_people: int
    tune: TuneConfig
    strengths: Mapping[str, float]


REAL = Scale(
    people=8,
    questions=4,
    forget_people=2,
    tune=TuneConfig(epochs=10, learning_rate=1e-4, batch_size=4, stop_loss=0.05),
    strengths={"tv": 0.85, "perta-grad": 1.6, "perta-fisher": 1.6, "perta-project": 2.7},
)
TINY = Scale(
    people=8,
    questions=4,
    forget_people=2,
    tune=TuneConfig(epochs=40, learning_rate=3e-3, batch_size=4, stop_loss=0.05),
    strengths={"tv": 0.85, "perta-grad": 1.6, "perta-fisher": 1.6, "perta-project": 4.0},
)


def run_demo(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """Run the demo and print its table.

    Args:
        config: output folder, model, seed.

    Returns:
        Model name -> results of its evaluation.

    Raises:
        PertaError: the model cannot be obtained, or the output folder holds something else.
    """
    started = time.perf_counter()
    scale = TINY if config.tiny else REAL
    if config.tiny and config.compute.threads is None:
        # With tensors this small, threads would mostly wait for each other.
        config = replace(config, compute=replace(config.compute, threads=1))
    data = _make_people(config, scale)
    base = _base_model(config, data)
    run = _Run(config, scale, base, data)
    say(
        f"{scale.people} fictitious people, {scale.questions} questions each; the answers about "
        f"{scale.forget_people} of them are to be forgotten"
    )
    full = run.tune("full", "full")
    retrained = run.tune("retrained", "retain")
    forget = run.tune("forget_checkpoint", "forget")
    importance = {f"{part}_importance": run.importance(part) for part in ("forget", "retain")}
    moments = {"retain_moments": run.moments("retain")}
    models = {"base": base, "full": full, "retrained": retrained}
    for method, strength in scale.strengths.items():
        row = get_method(method)
        needs = (importance if row.needs_importance else {}) | (moments if row.moments else {})
        models[method] = run.edit(method, strength, full, forget, needs)
    results = {name: run.evaluate(name, folder) for name, folder in models.items()}
    print_comparison(results)
    print_costs(*costs(collect([str(config.output)])))
    share = scale.forget_people / scale.people
    _console().print(
        f"{share:.0%} of the people are forgotten here; the cost falls with that share."
    )
    print_samples({name: results[name] for name in ("full", "retrained", "perta-project")}, 1)
    report = write_report(
        ReportConfig(
            results=(str(config.output),),
            output=config.output / "report.html",
            title="Demo of unlearning",
        )
    )
    _console().print(f"Report: {report}", markup=False)
    minutes = (time.perf_counter() - started) / 60
    _console().print(
        f"Everything is in {config.output}; this run took {minutes:.1f} minutes.", markup=False
    )
    return results


@dataclass
class _Run:
    """The stages of one demo."""

    config: DemoConfig
    scale: Scale
    base: Path
    data: Path

    def tune(self, name: str, part: str) -> Path:
        """Tune the base model on one part of the people."""
        say(f"── {name}: tune the base model on the {part} set")
        stage = FinetuneConfig(
            base=str(self.base),
            data=str(self.data / f"{part}.jsonl"),
            output=self.config.output / name,
            tune=replace(self.scale.tune, seed=self.config.seed),
            data_config=_DATA,
            compute=self.config.compute,
            overwrite=self.config.overwrite,
        )
        return finetune_checkpoint(stage)

    def importance(self, part: str) -> Path:
        """Measure both orders of importance in one pass."""
        stage = ImportanceConfig(
            checkpoint=str(self.base),
            data=str(self.data / f"{part}.jsonl"),
            output=self.config.output / f"{part}_importance",
            orders=(1.0, 2.0),
            estimator=EstimatorConfig(),
            data_config=_DATA,
            compute=self.config.compute,
            overwrite=self.config.overwrite,
        )
        return compute_importance(stage)

    def moments(self, part: str) -> Path:
        """Measure second moments of layer inputs."""
        stage = MomentsConfig(
            checkpoint=str(self.base),
            data=str(self.data / f"{part}.jsonl"),
            output=self.config.output / f"{part}_moments",
            data_config=_DATA,
            compute=self.config.compute,
            overwrite=self.config.overwrite,
        )
        return compute_moments(stage)

    def edit(
        self, method: str, strength: float, full: Path, forget: Path, needs: Mapping[str, Path]
    ) -> Path:
        """Edit the full model by one method, with the importance or moments that it needs."""
        stage = EditConfig(
            full=str(full),
            base=str(self.base),
            forget_checkpoint=str(forget),
            forget_importance=needs.get("forget_importance"),
            retain_importance=needs.get("retain_importance"),
            retain_moments=needs.get("retain_moments"),
            output=self.config.output / method,
            direction=self.config.output / f"{method}_direction",
            weighting=WeightingConfig(method=method, scaling_coef=strength),
            overwrite=self.config.overwrite,
        )
        return edit_checkpoint(stage)

    def evaluate(self, name: str, folder: Path) -> dict[str, Any]:
        """Evaluate one model on the forget and the retain people."""
        stage = EvaluateConfig(
            checkpoint=str(folder),
            forget=str(self.data / "forget.jsonl"),
            retain=str(self.data / "retain.jsonl"),
            output=self.config.output / "results" / f"{name}.json",
            scoring=ScoringConfig(max_new_tokens=32, evaluation_batch_size=16),
            data_config=_DATA,
            compute=self.config.compute,
            overwrite=self.config.overwrite,
        )
        return evaluate_checkpoint(stage)


_DATA = DataConfig(format="qa")


def _make_people(config: DemoConfig, scale: Scale) -> Path:
    folder = config.output / "data"
    write_people(
        PeopleConfig(
            output=folder,
            people=scale.people,
            questions=scale.questions,
            forget_people=scale.forget_people,
            people_seed=config.seed,
            overwrite=config.overwrite,
        )
    )
    return folder


def _base_model(config: DemoConfig, data: Path) -> Path:
    if config.model:
        return resolve_checkpoint(config.model)
    return _tiny_base(config, data) if config.tiny else obtain_smollm()


def _tiny_base(config: DemoConfig, data: Path) -> Path:
    """A tiny model that knows how to answer, from people who are in no other set."""
    others = config.output / "others"
    write_people(
        PeopleConfig(
            output=others,
            people=40,
            questions=4,
            people_seed=config.seed + 1000,
            overwrite=config.overwrite,
        )
    )
    texts = [
        text
        for file in (data / "full.jsonl", others / "full.jsonl")
        for example in load_examples(file, _DATA).examples
        for text in (example.prompt, example.answer)
    ]
    random = config.output / "random"
    with atomic_folder(random, overwrite=True) as folder:
        write_tiny_checkpoint(folder, [*texts, _DATA.system_prompt], seed=config.seed)
    say("── base: teach a tiny random model to answer questions about other people")
    stage = FinetuneConfig(
        base=str(random),
        data=str(others / "full.jsonl"),
        output=config.output / "base",
        tune=TuneConfig(epochs=8, learning_rate=3e-3, batch_size=8, seed=config.seed),
        data_config=_DATA,
        compute=config.compute,
        overwrite=config.overwrite,
    )
    return finetune_checkpoint(stage)


def _console() -> Console:
    return Console(highlight=False)
