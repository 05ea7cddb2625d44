"""`perta demo`: the whole method on a real model, with nothing but the installed package.

    fictitious people ─ full model, retrained reference (without the forget people)
                      └ forget checkpoint, importance, one edit per method, evaluation of all

Everything goes through the public stages, so a second run reuses what is finished.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from perta.data.examples import load_examples
from perta.methods.registry import get_method
from perta.models.demo.smollm import obtain_smollm
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.resolve import resolve_checkpoint
from perta.options import DataConfig, ScoringConfig, TuneConfig, WeightingConfig
from perta.progress import say, telling_once
from perta.recipes._plan import Asked, Sizes
from perta.recipes._workspace import Workspace
from perta.recipes.settings import DemoConfig
from perta.report.collect import collect, costs
from perta.report.settings import ReportConfig
from perta.report.write import check_report_folder, write_report
from perta.stages.bench import write_people
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import PeopleConfig
from perta.stages.stage import At, run_stage
from perta.store.costs import Plan
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
    if config.tiny and config.compute.threads is None:
        # With tensors this small, threads would mostly wait for each other.
        config = replace(config, compute=replace(config.compute, threads=1))
    page = check_report_folder(config.output)
    results = _Demo(config, config.output).results()
    shown = (str(config.output),)
    report = write_report(ReportConfig(results=shown, output=page, title="Demo of unlearning"))
    if shows:
        print_comparison(results)
        print_costs(*costs(collect([str(config.output)])))
        console().print(
            f"{_FORGET_PEOPLE / _PEOPLE:.0%} of the people are forgotten here; the cost falls with "
            "that share."
        )
        names = ("full", "retrained", "perta-project")
        print_samples({name: results[name] for name in names}, 1)
        minutes = (time.perf_counter() - started) / 60
        console().print(
            f"Report: {report}\nEverything is in {config.output}; this run took {minutes:.1f} "
            "minutes.",
            markup=False,
        )
    return results


def plan_demo(config: DemoConfig) -> Plan:
    """What `run_demo` would do; nothing is written but to the cache."""
    check_report_folder(config.output)
    with TemporaryDirectory() as scratch:
        demo = _Demo(config, Path(scratch), asks=True)
        demo.results()
        return cast(Asked, demo.asked).plan(config.output, config.output)


class _Demo:
    """One demo, whose rows and random model lie in `rows`: its own folder, or none that stays."""

    def __init__(self, config: DemoConfig, rows: Path, *, asks: bool = False) -> None:
        self._config, self._rows = config, rows
        self._data = self._people("data", _PEOPLE, _FORGET_PEOPLE, config.seed)
        self._is_random = config.tiny and not config.model
        self._start = self._random() if self._is_random else _given(config)
        self.asked = Asked(Sizes(self._start, self._start, _DATA)) if asks else None

    def results(self) -> dict[str, dict[str, Any]]:
        """Make every model and evaluate it: name -> results."""
        tune, strengths = _TUNE, _STRENGTHS
        if self._config.tiny:
            tune = replace(tune, epochs=40, learning_rate=3e-3)
            strengths = {**strengths, "perta-project": 4.0}
        base = self._tiny_base() if self._is_random else self._start
        work = self._workspace(base, replace(tune, seed=self._config.seed), self._data)
        self._say(
            f"{_PEOPLE} fictitious people, {_QUESTIONS} questions each; the answers about "
            f"{_FORGET_PEOPLE} of them are to be forgotten"
        )
        models = {"base": base}
        for name, part in (("full", "full"), ("retrained", "retain")):
            self._say(f"── {name}: tune the base model on the {part} set")
            models[name] = work.tuned(name, part, work.tune, name)
        self._say("── forget_checkpoint: tune the base model on the forget set")
        for method, strength in strengths.items():
            models[method] = self._edited(work, models["full"], method, strength)
        scoring = ScoringConfig(max_new_tokens=32)
        sets = {part: work.sets[part] for part in ("forget", "retain")}
        folder = self._config.output / "results"
        return {
            name: work.evaluate(name, place, folder / f"{name}.json", scoring, **sets)
            for name, place in models.items()
        }

    def _say(self, line: str) -> None:
        if self.asked is None:
            say(line)

    def _workspace(self, base: Path, tune: TuneConfig, data: Path) -> Workspace:
        """Everything in the demo's folder, about the people of one folder of data."""
        return Workspace(
            folder=self._config.output,
            base=base,
            measured=base,
            sets={part: str(data / f"{part}.jsonl") for part in ("full", "forget", "retain")},
            tune=tune,
            data_config=_DATA,
            compute=self._config.compute,
            overwrite=self._config.overwrite,
            asked=self.asked,
        )

    def _edited(self, work: Workspace, full: Path, method: str, strength: float) -> Path:
        """The full model edited by one method, with what it needs made before."""
        # One pass measures both orders of importance, for both methods that use one.
        given = work.make(get_method(method), orders=(1.0, 2.0))
        output = self._config.output
        weighting = WeightingConfig(method=method, scaling_coef=strength)
        edit = work.edit_config(
            full=str(full),
            output=output / method,
            direction=output / f"{method}_direction",
            weighting=weighting,
            overwrite=self._config.overwrite,
            **given,
        )
        return work.once(
            f"edit_{method}", edit_checkpoint, edit, lambda sizes: sizes.edit(weighting)
        )

    def _people(self, name: str, people: int, forget: int, seed: int) -> Path:
        folder = self._rows / name
        write_people(
            PeopleConfig(
                output=folder,
                people=people,
                questions=_QUESTIONS,
                forget_people=forget,
                people_seed=seed,
                overwrite=self._config.overwrite,
            )
        )
        return folder

    def _random(self) -> Path:
        """A tiny random model, and rows of people who are in no other set to teach it."""
        seed = self._config.seed
        others = self._people("others", 40, 2, seed + 1000)
        texts = [
            text
            for file in (self._data / "full.jsonl", others / "full.jsonl")
            for example in load_examples(file, _DATA).examples
            for text in (example.prompt, example.answer)
        ]
        random = self._rows / "random"
        inputs = {part.name: fingerprint(part / "full.jsonl") for part in (self._data, others)}

        def make(folder: Path) -> dict[str, Any]:
            write_tiny_checkpoint(folder, [*texts, _DATA.system_prompt], seed=seed)
            return {}

        run_stage("random", At(random, self._config.overwrite), {"seed": seed}, inputs, make)
        return random

    def _tiny_base(self) -> Path:
        """The tiny model, once it knows how to answer."""
        self._say("── base: teach a tiny random model to answer questions about other people")
        tune = TuneConfig(epochs=8, learning_rate=3e-3, batch_size=8)
        work = self._workspace(self._start, tune, self._rows / "others")
        return work.tuned("base", "full", work.tune, "base")


def _given(config: DemoConfig) -> Path:
    return resolve_checkpoint(config.model) if config.model else obtain_smollm()


_DATA = DataConfig(format="qa")
