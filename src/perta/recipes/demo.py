"""`perta demo`: the whole method on a real model, with nothing but the installed package.

    fictitious people ─ full model, retrained reference (without the forget people)
                      └ forget checkpoint, importance, one edit per method, evaluation of all

Everything goes through the public stages, so a second run reuses what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perta.data.examples import load_examples
from perta.methods.registry import get_method
from perta.models.demo.smollm import obtain_smollm
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.resolve import resolve_checkpoint
from perta.options import DataConfig, ScoringConfig, TuneConfig, WeightingConfig
from perta.progress import say, telling_once
from perta.recipes._workspace import Workspace
from perta.recipes.settings import DemoConfig
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.tables import costs
from perta.report.write import write_report
from perta.stages.bench import write_people
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import PeopleConfig
from perta.stages.stage import At, run_stage
from perta.store.fingerprint import fingerprint
from perta.terminal import console, print_comparison, print_costs, print_samples

_PEOPLE, _QUESTIONS, _FORGET_PEOPLE = 8, 4, 2
_STRENGTHS = {"tv": 0.85, "perta-grad": 1.6, "perta-fisher": 1.6, "perta-project": 2.7}
"""The methods' scaling coefficients. At equal ones the methods forget unequally, which says nothing
about them; these make all of them forget about as much as the retrained reference does on TOFU
rows, another data set."""
_TUNE = TuneConfig(epochs=10, learning_rate=1e-4, batch_size=4, stop_loss=0.05)


@telling_once()
def run_demo(config: DemoConfig, *, shows: bool = True) -> dict[str, dict[str, Any]]:
    """Run the demo and print its table: model name -> results of its evaluation."""
    started = time.perf_counter()
    tune, strengths = _TUNE, _STRENGTHS
    if config.tiny:
        tune = replace(tune, epochs=40, learning_rate=3e-3)
        strengths = {**strengths, "perta-project": 4.0}
    if config.tiny and config.compute.threads is None:
        # With tensors this small, threads would mostly wait for each other.
        config = replace(config, compute=replace(config.compute, threads=1))
    data = _make_people(config)
    base = _base_model(config, data)
    work = _workspace(config, base, tune, data)
    say(
        f"{_PEOPLE} fictitious people, {_QUESTIONS} questions each; the answers about "
        f"{_FORGET_PEOPLE} of them are to be forgotten"
    )
    models = {"base": base}
    for name, part in (("full", "full"), ("retrained", "retain")):
        say(f"── {name}: tune the base model on the {part} set")
        models[name] = work.tuned(name, part, work.tune, name)
    say("── forget_checkpoint: tune the base model on the forget set")
    for method, strength in strengths.items():
        models[method] = _edited(config, work, models["full"], method, strength)
    results = {name: _evaluated(config, work, name, place) for name, place in models.items()}
    report = write_report(
        ReportConfig(
            results=(str(config.output),),
            output=config.output / "report.html",
            title="Demo of unlearning",
        )
    )
    if shows:
        _show(config, results)
        minutes = (time.perf_counter() - started) / 60
        console().print(
            f"Report: {report}\nEverything is in {config.output}; this run took {minutes:.1f} "
            "minutes.",
            markup=False,
        )
    return results


def _show(config: DemoConfig, results: Mapping[str, dict[str, Any]]) -> None:
    """Print what came of it."""
    print_comparison(results)
    print_costs(*costs(collect([str(config.output)])))
    share = _FORGET_PEOPLE / _PEOPLE
    console().print(
        f"{share:.0%} of the people are forgotten here; the cost falls with that share."
    )
    print_samples({name: results[name] for name in ("full", "retrained", "perta-project")}, 1)


def _workspace(config: DemoConfig, base: Path, tune: TuneConfig, data: Path) -> Workspace:
    """Everything in the demo's folder, about the people of one folder of data."""
    return Workspace(
        folder=config.output,
        base=base,
        measured=base,
        sets={part: str(data / f"{part}.jsonl") for part in ("full", "forget", "retain")},
        tune=replace(tune, seed=config.seed),
        data_config=_DATA,
        compute=config.compute,
        overwrite=config.overwrite,
    )


def _edited(config: DemoConfig, work: Workspace, full: Path, method: str, strength: float) -> Path:
    """The full model edited by one method, with what it needs made before."""
    # One pass measures both orders of importance, for both methods that use one.
    given = work.make(get_method(method), orders=(1.0, 2.0))
    edit = work.edit_config(
        full=str(full),
        output=config.output / method,
        direction=config.output / f"{method}_direction",
        weighting=WeightingConfig(method=method, scaling_coef=strength),
        overwrite=config.overwrite,
        **given,
    )
    return edit_checkpoint(edit)


def _evaluated(config: DemoConfig, work: Workspace, name: str, model: Path) -> dict[str, Any]:
    """Results of one model on the forget and the retain people."""
    output = config.output / "results" / f"{name}.json"
    scoring = ScoringConfig(max_new_tokens=32)
    sets = {part: work.sets[part] for part in ("forget", "retain")}
    return work.evaluate(name, model, output, scoring, **sets)


_DATA = DataConfig(format="qa")


def _make_people(config: DemoConfig) -> Path:
    folder = config.output / "data"
    write_people(
        PeopleConfig(
            output=folder,
            people=_PEOPLE,
            questions=_QUESTIONS,
            forget_people=_FORGET_PEOPLE,
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
    random, settings = config.output / "random", {"seed": config.seed}
    inputs = {part.name: fingerprint(part / "full.jsonl") for part in (data, others)}

    def make(folder: Path) -> dict[str, Any]:
        write_tiny_checkpoint(folder, [*texts, _DATA.system_prompt], seed=config.seed)
        return {}

    run_stage("random", At(random, config.overwrite), settings, inputs, make)
    say("── base: teach a tiny random model to answer questions about other people")
    tune = TuneConfig(epochs=8, learning_rate=3e-3, batch_size=8)
    return _workspace(config, random, tune, others).tuned("base", "full", tune, "base")
