"""Every method on every seed: `perta bench compare`.

    seeds ─ draw ─ base, full, retrained measured once
                 └ every method: search the strength of equal forgetting, then measure there,
                   at the method's default strength, and at equal resistance to relearning

A finished run is one JSON file; a killed comparison goes on with the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor

from perta.data.examples import general_config, load_examples
from perta.engine.train.refusals import check_questions
from perta.engine.train.relearn import SHOWN
from perta.errors import CheckpointError, CheckpointMismatchError, ConfigError, DataError
from perta.evidence.metrics import mean
from perta.evidence.results import Results, read_results, results_json
from perta.models.facts import SAMPLES
from perta.models.load import picked
from perta.models.resolve import resolve_checkpoint
from perta.progress import say, telling_once
from perta.recipes._plan import Asked, Load, Sizes
from perta.recipes.compare._draw import Draw, make_draw
from perta.recipes.compare._edits import WeightEdit, ask_edit, forget_loss, prepare_edit
from perta.recipes.compare._model import Bench, Knowledge, means
from perta.recipes.compare._paths import RATE_TRIES, TrainingPath, prepare_path
from perta.recipes.compare._search import nearest
from perta.recipes.compare._spec import (
    EditSpec,
    GivenSpec,
    TrainingSpec,
    parse_checkpoint,
    parse_spec,
)
from perta.recipes.compare._summary import seed_rows, summary_files, write_summary
from perta.recipes.compare.settings import CompareConfig
from perta.report.settings import ReportConfig
from perta.report.write import check_report_folder, write_report
from perta.store.atomic import write_text
from perta.store.costs import BACKWARD, FORWARD, Plan, passes_of, seconds_of
from perta.store.fingerprint import fingerprint
from perta.store.parse import read_json
from perta.store.provenance import Record
from perta.store.record import (
    aggregates,
    check_output,
    check_separate,
    content_of_results,
    make_manifest,
    read_manifest,
    settings_of,
    stage_key,
)

_REFERENCES = ("base", "full", "retrained")
_IN_KEY = (
    "tries",
    "equal_by",
    "equal_tolerance",
    "fixed",
    "relearn_steps",
    "relearn_learning_rate",
    "relearn_tries",
)

_EQUAL_BY = {"facts": f"hit_{SAMPLES}", "answers": "probability"}
"""Column of what `--equal-by` names."""

_MARGIN = 0.05  # distance from the retrained model's relearned probability that counts as resistant
_FACTOR = 1.2  # factor by which the strength grows until a method resists
_SUITE = 5
"""About how often the TOFU evaluation reads a row: with paraphrases, wrong answers and its own."""

_AnySpec = EditSpec | TrainingSpec | GivenSpec
_Contender = WeightEdit | TrainingPath


class Compared(list[Record]):
    """One record per reference or method and seed."""

    def __repr__(self) -> str:
        """Who was compared; the records are pages."""
        names = dict.fromkeys(str(record["method"]) for record in self)
        return f"{type(self).__name__}({', '.join(names)}: {len(self)} runs)"

    def rows(self, view: str = "equal") -> list[dict[str, Any]]:
        """`equal`, `fixed` or `resistant`: `pandas.DataFrame(compared.rows("fixed"))`."""
        return seed_rows(self, view)


@telling_once()
def bench_compare(config: CompareConfig, *, shows: bool = True) -> Compared:
    """Compare methods at fixed settings, at equal forgetting and at equal resistance.

    Returns the records of `OUTPUT/runs`, with `rows`. PertaError at input that cannot be used;
    finished runs stay.
    """
    specs, base = _checked(config)
    records = Compared()
    for seed in config.seeds:
        records += _Seed(config, make_draw(config, base, seed)).run(specs)
        write_summary(records, config.output, shows=shows)
    # These runs alone: the folder may hold others that were not asked for this time.
    files = [
        config.output / "results" / f"{name}_seed-{seed}.json"
        for seed in config.seeds
        for name in (*_REFERENCES, *(spec.slug for spec in specs))
    ]
    write_report(
        ReportConfig(
            results=tuple(map(str, files)), output=config.output / "report.html", title=config.title
        )
    )
    return records


def plan_compare(config: CompareConfig) -> Plan:
    """What `bench_compare` would do; nothing is written but to the cache."""
    specs, base = _checked(config)
    asked = Asked(Sizes(base, base, config.data_config))
    with TemporaryDirectory() as scratch:
        for seed in config.seeds:
            asked.part = f" (seed {seed})"
            draw = make_draw(config, base, seed, asked=asked, scratch=Path(scratch))
            _Seed(config, draw).ask(specs, asked)
    return asked.plan(config.output, config.output)


def _checked(config: CompareConfig) -> tuple[list[_AnySpec], Path]:
    """Who is compared and the base model, after every check that needs no long step."""
    specs: list[_AnySpec] = [parse_spec(text, config.tune.batch_size) for text in config.methods]
    given = [parse_checkpoint(text, len(config.seeds)) for text in config.checkpoint]
    specs += given
    slugs = [spec.slug for spec in specs]
    for slug in slugs:
        if slugs.count(slug) > 1 or slug in _REFERENCES:
            raise ConfigError(
                f"--methods or --checkpoint names {slug} twice, or one like a reference model."
            )
    users = [spec.name for spec in specs if _uses_general(spec)]
    if users and config.general is None:
        raise ConfigError(f"`{users[0]}` needs a file of general text: give --general.")
    if config.general is not None:
        if not users:
            raise ConfigError("--general is for methods with general=true, and there is none.")
        # Raises now what would stop it later.
        load_examples(config.general, general_config(config.general, config.data_config))
    if config.forget is not None:
        rows = load_examples(config.forget, config.data_config)
        for spec in specs:
            if isinstance(spec, TrainingSpec):
                check_questions(spec.method, rows)
    base = resolve_checkpoint(config.base)
    sets = (config.forget, config.retain, config.general, config.tofu)
    theirs = [resolve_checkpoint(one.at(seed)) for one in given for seed in config.seeds]
    reads = [base, config.base, *theirs, *(file for file in sets if file)]
    for seed in config.seeds:
        check_separate(config.output / f"seed-{seed}", reads)
    check_output(config.output, overwrite=True, ours=_is_comparison)
    check_report_folder(config.output)
    return specs, base


def _is_comparison(folder: Path) -> bool:
    """Whether a comparison may be written to a folder: none of its files are of anything else."""
    tables = any((folder / name).exists() for name in summary_files())
    return folder.is_dir() and (any(folder.glob("seed-*")) or not tables)


def _uses_general(spec: _AnySpec | None) -> bool:
    return isinstance(spec, EditSpec) and spec.general


class _Seed:
    """All runs of one seed; the model is loaded when the first of them is not finished."""

    def __init__(self, config: CompareConfig, draw: Draw) -> None:
        self._config, self._draw = config, draw
        self._bench: Bench | None = None
        self._full: list[Tensor] = []
        self._prepared: tuple[str, _Contender] | None = None
        self._references: dict[str, Record] = {}

    def run(self, specs: Sequence[_AnySpec]) -> list[Record]:
        # The retrained model first: it is what the others are measured against.
        references = self._references
        for name in ("retrained", "base", "full"):
            references[name] = self._finished(name) or self._reference(name)
        for name in references:
            references[name] = self._extended(name, None, references[name])
        records = [references[name] for name in _REFERENCES]
        for spec in specs:
            record = self._finished(spec.slug, spec)
            if record is None:
                record = self._given(spec) if isinstance(spec, GivenSpec) else self._contender(spec)
            records.append(self._extended(spec.slug, spec, record))
        return records

    def ask(self, specs: Sequence[_AnySpec], asked: Asked) -> None:
        """Note what `run` would do."""
        for name in ("retrained", "base", "full"):
            asked.note(f"measures of {name}", self._load(None, asked), reused=self._is_there(name))
        for spec in specs:
            is_there = self._is_there(spec.slug, spec)
            if isinstance(spec, EditSpec) and not is_there:
                ask_edit(self._config, self._draw, spec)
            asked.note(f"measures of {spec.name}", self._load(spec, asked), reused=is_there)

    def _is_there(self, name: str, spec: _AnySpec | None = None) -> bool:
        try:
            record = self._finished(name, spec)
            return record is not None and not self._lacking(name, record)
        except CheckpointError:
            return False  # a model that it stands on is not there

    def _load(self, spec: _AnySpec | None, asked: Asked) -> Load:
        """What measuring one contender takes, at most, general ability left out."""
        config, learn = self._config, FORWARD + BACKWARD
        forget, *others = (
            asked.sizes.tokens(load_examples(self._draw.files[name], config.data_config))
            for name in ("forget", "protected", "unseen")
        )
        measured = 2 * (forget + sum(others))  # answers and facts
        relearned = (learn * config.relearn_steps / SHOWN + 1) * forget
        passes = measured + relearned + config.suite * _SUITE * measured
        if isinstance(spec, EditSpec | TrainingSpec):
            passes += 2 * measured + config.tries * forget + config.relearn_tries * relearned
        if isinstance(spec, TrainingSpec):
            epochs = RATE_TRIES * (spec.training.epochs or spec.method.epochs)
            passes += epochs * (2 * learn + 1) * forget
        return Load(passes)

    def _open(self) -> Bench:
        if self._bench is None:
            self._bench = Bench(self._config, self._draw)
            self._full = self._bench.weights(self._draw.full)
        return self._bench

    def _reference(self, name: str) -> Record:
        self._open().load(self._open().weights(self._folder(name)))
        made = read_manifest(self._folder(name)) if name != "base" else None
        cost = {
            "seconds": {"finetune": seconds_of(made)} if made else {},
            "passes": {"finetune": passes_of(made)} if made else {},
        }
        measured, after = self._as_it_is(name, cost, role=name)
        rows = {"relearned_facts": list(after.fact)} if after else {}
        at = measured | (self._after(after) if after else {})
        return self._save(name, None, {"equal": at, "reached": True, **rows, **cost})

    def _given(self, spec: GivenSpec) -> Record:
        """A model as it is, which is at equal forgetting or not."""
        say(f"── {spec.name}, seed {self._draw.seed}")
        bench = self._open()
        bench.load(self._given_weights(spec))
        reached = abs(bench.known() - self._known()[1]) <= self._config.equal_tolerance
        measured, after = self._as_it_is(spec.slug, {}, role="edited", method=spec.name)
        at = measured | (self._after(after) if after else {})
        return self._save(spec.slug, spec, {"equal": at, "fixed": measured, "reached": reached})

    def _as_it_is(
        self, name: str, cost: Mapping[str, Any], **settings: Any
    ) -> tuple[dict[str, float], Knowledge | None]:
        """Columns of the loaded model, and what it knows once it was shown rows again."""
        bench = self._open()
        results = bench.measure()
        self._write_results(name, results, cost, **settings)
        measured = {**self._measures(results), **bench.elsewhere()}
        return measured, bench.relearned() if self._config.relearn_steps else None

    def _given_weights(self, spec: GivenSpec) -> list[Tensor]:
        folder = resolve_checkpoint(spec.at(self._draw.seed))
        weights = self._open().weights(folder)
        if [tensor.shape for tensor in weights] != [tensor.shape for tensor in self._full]:
            raise CheckpointMismatchError(
                f"--checkpoint {folder} has other tensors or shapes than {self._draw.full}, of "
                "which it must be made."
            )
        return weights

    def _contender(self, spec: EditSpec | TrainingSpec) -> Record:
        say(f"── {spec.name}, seed {self._draw.seed}")
        bench, config = self._open(), self._config
        start, target = self._known()
        contender = self._prepare(spec)

        def move(strength: float) -> None:
            contender.put(bench, self._full, strength)

        def known(strength: float) -> float:
            move(strength)
            return bench.known()

        started = time.perf_counter()
        tries = contender.search(config, known, start, target)
        contender.seconds["search"] = time.perf_counter() - started
        found = nearest(tries, target)
        move(found.strength)
        results = bench.measure()
        cost = {"seconds": contender.seconds, "passes": contender.cost(found.strength)}
        facts = {"role": "edited", "method": spec.name, "scaling_coef": found.strength}
        self._write_results(spec.slug, results, cost, **facts)
        equal = {"strength": found.strength, **self._measures(results), **bench.elsewhere()}
        record: dict[str, Any] = {
            "equal": equal,
            "reached": abs(found.known - target) <= config.equal_tolerance,
            "tries": [asdict(made) for made in tries],
            **contender.facts(),
        }
        if config.relearn_steps:
            record |= self._resistant(move, bench, equal, contender.largest)
        if config.fixed and not contender.fixed:
            move(contender.default)
            record["fixed"] = {"strength": contender.default, **self._measures(bench.measure())}
        elif config.fixed:
            record["fixed"] = dict(contender.fixed)
        return self._save(spec.slug, spec, {**record, **cost})

    def _resistant(
        self, move: Callable[[float], object], bench: Bench, equal: dict[str, float], largest: float
    ) -> dict[str, Any]:
        """Raise the strength until relearning brings back no more than in the retrained model.

        The weights are those of `equal` now, to which `relearned` is added. Returns every strength
        tried, and the measures at the first that resists, if one does.
        """
        limit = self._references["retrained"]["equal"]["relearned"] + _MARGIN
        strength = equal["strength"]
        equal |= self._after(bench.relearned())
        points = [{"strength": strength, "relearned": equal["relearned"]}]
        while points[-1]["relearned"] > limit and len(points) <= self._config.relearn_tries:
            strength *= _FACTOR
            if strength > largest:
                break
            move(strength)
            points.append({"strength": strength, "relearned": mean(bench.relearned().answer)})
        if points[-1]["relearned"] > limit:
            return {"relearning": points}
        move(points[-1]["strength"])
        return {
            "relearning": points,
            "resistant": {**points[-1], **self._measures(bench.measure())},
        }

    def _measures(self, results: Results) -> dict[str, float]:
        """Columns of a model by its results, against the retrained model's."""
        gold = read_results(self._results_file("results", "retrained"))
        yardstick = Knowledge.from_results(gold, "forget").fact
        return {
            **means(results),
            **Knowledge.from_results(results, "forget").columns("forget", yardstick),
            **Knowledge.from_results(results, "retain").columns("retain", kept=True),
        }

    def _after(self, relearned: Knowledge) -> dict[str, float]:
        """Columns of a relearned model, against the retrained model after the same."""
        gold = self._references.get("retrained", {}).get("relearned_facts", relearned.fact)
        return {"relearned": mean(relearned.answer), **relearned.columns("relearned", gold)}

    def _lacking(self, name: str, record: Record) -> dict[str, Any]:
        """What was asked for beyond the quick measures and is not there: how it is asked for."""
        config, reference = self._config, self._results_file("suite", "retrained")
        has_reference = name != "retrained" and reference.is_file()
        wanted: dict[str, Any] = {}
        if config.suite:  # the others' depend on the retrained model's
            read = fingerprint(reference) if has_reference else None
            wanted["suite_of"] = {"limit": config.suite_limit, "reference": read}
        if config.ability_tasks:
            wanted["ability_of"] = sorted(config.ability_tasks)
        return {of: asked for of, asked in wanted.items() if record.get(of) != asked}

    def _extended(self, name: str, spec: _AnySpec | None, record: Record) -> Record:
        """Add what was asked for beyond the quick measures, at equal forgetting, once."""
        lacking, more = self._lacking(name, record), dict[str, Any]()
        if not lacking:
            return record
        bench = self._open()
        if isinstance(spec, GivenSpec):
            bench.load(self._given_weights(spec))
        elif spec:
            self._prepare(spec).put(bench, self._full, record["equal"]["strength"])
        else:
            bench.load(bench.weights(self._folder(name)))
        for of, asked in lacking.items():
            if of == "suite_of":
                more |= {"suite": self._suite(name, bench), of: asked}
            else:
                more |= {"ability": bench.ability(self._config.ability_tasks), of: asked}
        return self._save(name, spec, {**record, **more})

    def _suite(self, name: str, bench: Bench) -> dict[str, float | None]:
        """Means of the whole TOFU evaluation; its results are kept as a file of their own."""
        say(f"── TOFU evaluation of {name}, seed {self._draw.seed}")
        reference = self._results_file("suite", "retrained")
        results = bench.suite(read_results(reference) if name != "retrained" else None)
        write_text(self._results_file("suite", name), results_json(results))
        return aggregates(results)

    def _prepare(self, spec: EditSpec | TrainingSpec) -> _Contender:
        """What a method needs to be at any strength; kept until another method's turn."""
        if self._prepared is None or self._prepared[0] != spec.name:
            self._prepared = None  # frees the one before
            bench = self._open()
            made: _Contender
            if isinstance(spec, TrainingSpec):
                made = prepare_path(self._draw, spec, bench, self._full, *self._known())
            else:
                made = prepare_edit(self._config, self._draw, spec)
            self._prepared = (spec.name, made)
        return self._prepared[1]

    def _known(self) -> tuple[float, float]:
        """What the full and the retrained model know of the forget set: see `Bench.known`."""
        column = f"forget_{_EQUAL_BY[self._config.equal_by]}"
        full, retrained = (self._references[m]["equal"][column] for m in ("full", "retrained"))
        return full, retrained

    def _folder(self, name: str) -> Path:
        draw = self._draw
        return {"base": draw.base, "full": draw.full, "retrained": draw.retrained}[name]

    def _write_results(
        self, name: str, results: Results, cost: Mapping[str, Any], **settings: Any
    ) -> None:
        """Results of one model and what it took, for the report."""
        made = make_manifest(
            "bench compare",
            {"seed": self._draw.seed, **settings},
            {"forget": self._rows("forget"), "retain": self._rows("unseen")},
            content=content_of_results(results),
            **cost,
        )
        write_text(self._results_file("results", name), results_json({**results, "perta": made}))

    def _rows(self, name: str) -> str:
        """Fingerprint of the rows in one of the draw's files."""
        return load_examples(self._draw.files[name], self._config.data_config).fingerprint

    def _results_file(self, folder: str, name: str) -> Path:
        return self._config.output / folder / f"{name}_seed-{self._draw.seed}.json"

    # --- finished runs ------------------------------------------------------------------------

    def _key(self, spec: _AnySpec | None) -> str:
        """Hash of all that decides a run: how it is measured, the models, and the rows."""
        config, draw = self._config, self._draw
        settings = {name: getattr(config, name) for name in _IN_KEY}
        settings |= settings_of(config.data_config) | picked(config.compute, draw.base)
        settings |= {"contender": spec.name if spec else None}
        if isinstance(spec, EditSpec | TrainingSpec):
            settings |= spec.method.code
        if isinstance(spec, EditSpec):
            settings |= {"loss_on": forget_loss(config, draw, spec)}
        inputs = {name: self._rows(name) for name in draw.files}
        models = (*_REFERENCES, "forget_checkpoint")
        inputs |= {name: fingerprint(getattr(draw, name)) for name in models}
        if isinstance(spec, GivenSpec):
            inputs["checkpoint"] = fingerprint(resolve_checkpoint(spec.at(draw.seed)))
        if _uses_general(spec):
            general = cast(str, config.general)
            rows = general_config(general, config.data_config)
            inputs["general"] = load_examples(general, rows).fingerprint
        return stage_key("bench compare", settings, inputs)

    def _finished(self, name: str, spec: _AnySpec | None = None) -> Record | None:
        try:
            record = read_json(self._run_file(name), DataError)
        except DataError:
            return None
        whole = record.pop("content", None) == content_of_results(record)
        return record if whole and record.get("key") == self._key(spec) else None

    def _save(self, name: str, spec: _AnySpec | None, record: Record) -> Record:
        whole = {
            "key": self._key(spec),
            "method": spec.name if spec else name,
            "seed": self._draw.seed,
            **record,
        }
        text = json.dumps({**whole, "content": content_of_results(whole)}, indent=1)
        write_text(self._run_file(name), text + "\n")
        return whole

    def _run_file(self, name: str) -> Path:
        return self._config.output / "runs" / f"{name}_seed-{self._draw.seed}.json"
