"""Audit a cleaned checkpoint: models + sets -> audit.json (`perta audit`).

    base, retrained, full, cleaned ── one after the other ── every probe ── judged ── audit.json

What is measured is kept in a journal as it comes, so that a run that was killed goes on.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from perta.data.batch import Encoded
from perta.data.examples import (
    PARAPHRASED,
    ExampleSet,
    check_apart,
    general_config,
    load_examples,
    subjects,
)
from perta.engine.train.relearn import PUBLISHED, SHOWN, general_texts, relearn
from perta.errors import CheckpointMismatchError, ConfigError, DivergenceError
from perta.evidence.audit.document import AUDIT, Looked, document_of, document_of_results, entry_of
from perta.evidence.audit.probe import SHADOW, Effort, Material, Probe, Relearning, Role, Rows, View
from perta.evidence.audit.registry import PROBES, choose_probes
from perta.evidence.benchmark import Journal, is_journal, open_journal
from perta.evidence.results import Results
from perta.models.facts import find_facts, is_told, require_sayable, unsayable
from perta.models.load import (
    batch_of,
    counting_tokens,
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    picked,
    plain_errors,
)
from perta.models.resolve import quantised_checkpoint, resolve_checkpoint
from perta.models.trust import LOCAL
from perta.options import ComputeConfig, DataConfig, at_home
from perta.progress import running, say, step, track, warn
from perta.stages.settings import AuditConfig
from perta.stages.stage import At, evaluated, run_file_stage
from perta.store.checkpoint import open_index
from perta.store.costs import duration, operations
from perta.store.fingerprint import fingerprint
from perta.store.own_code import code_of, is_ours
from perta.store.provenance import STATED, Request, refuse_claim, requests_of, with_earlier
from perta.store.record import check_output, check_separate, read_manifest, settings_of

_Row = TypeVar("_Row")

WORLD = str(files("perta").joinpath("evidence", "world.jsonl"))
"""Questions about the world that come with the package."""
_SAMPLES = {"quick": 64, "standard": 64, "full": 200}
_ROUNDING = 1e-6  # how far beyond 0 and 1 a score may lie
_TIMED_TOKENS = 128  # tokens of a pass that tells how fast a model is here


def audit_checkpoint(config: AuditConfig) -> dict[str, Any]:
    """Look through a cleaned checkpoint and write `audit.json` (`perta audit`), which is returned.

    PertaError at input that cannot be used, or a model that is not what it is given as.
    """
    probes = choose_probes(config.level, config.probes)
    given = _given(config)
    folders = {role: resolve_checkpoint(m, base=config.base) for role, m in given.items()}
    sets = _load_sets(config, probes)
    reads: list[str | Path] = [*folders.values(), *(examples.source for examples in sets.values())]
    check_separate(config.output, [*given.values(), *reads])
    settings = {**settings_of(config), **picked(config.compute, folders["cleaned"])}

    def look() -> dict[str, str]:
        found = {r: fingerprint(folder) for r, folder in folders.items() if r != "cleaned"}
        found |= evaluated(config.checkpoint, folders["cleaned"])
        found |= {name: examples.fingerprint for name, examples in sets.items()}
        own = {f"probe_{p.name}": code_of(type(p)) for p in probes if not is_ours(type(p))}
        return found | {name: value for name, value in own.items() if value}

    inputs = look()
    _refuse_same(folders, inputs)
    _refuse_other_parts(config, folders, inputs)
    _refuse_other_kinds(folders)
    output = config.output / AUDIT
    journal = output.with_name("audit.journal")
    check_output(journal, overwrite=True, ours=is_journal)

    def make() -> Mapping[str, Any]:
        return _Audit(config, folders, dict(sets), probes, inputs, settings).run(journal)

    results = run_file_stage(
        "audit", At(output, config.overwrite), settings, inputs, make, look=look, reads=reads
    )
    journal.unlink(missing_ok=True)
    return results


def _given(config: AuditConfig) -> dict[Role, str]:
    """The models, in the order in which they are loaded: the base finds the facts."""
    shadows = {f"{SHADOW}{i}": place for i, place in enumerate(config.shadow, 1)}
    others = {"base": config.base, "retrained": config.retrained, **shadows}
    given = {**others, "full": config.full, "cleaned": config.checkpoint}
    return {role: place for role, place in given.items() if place}


def _load_sets(config: AuditConfig, probes: Sequence[Probe]) -> dict[str, ExampleSet]:
    sources = {name: getattr(config, name) for name in ("forget", "retain", "holdout")}
    loaded = {name: load_examples(s, config.data_config) for name, s in sources.items() if s}
    asks_world = any("world" in probe.sets for probe in probes)
    others = {"world": config.world or (WORLD if asks_world else None), "general": config.general}
    for name, source in others.items():
        if source:
            loaded[name] = load_examples(source, general_config(source, config.data_config))
    check_apart(loaded)
    sets = {name: _each_once(name, examples) for name, examples in loaded.items()}
    if "holdout" in sets:
        sets["holdout"] = _unseen(sets["holdout"], [sets[n] for n in sets if n != "holdout"])
    for name in [name for name in ("retain", *others) if name in sets]:
        sets[name] = replace(sets[name], examples=_drawn(sets[name].examples, config))
    return sets


def _drawn(rows: Sequence[_Row], config: AuditConfig) -> tuple[_Row, ...]:
    """At most `retain_rows` of some rows, in their order."""
    count = min(config.retain_rows, len(rows))
    chosen = sorted(random.Random(config.seed).sample(range(len(rows)), count))
    return tuple(rows[i] for i in chosen)


def _each_once(name: str, examples: ExampleSet) -> ExampleSet:
    """Equal rows once: what is said twice is no more evidence."""
    first = {example.messages: example for example in reversed(examples.examples)}
    once = tuple(example for example in examples.examples if first[example.messages] is example)
    if left := len(examples) - len(once):
        say(f"{name}: {left} of {len(examples)} rows are equal to one before and looked at once")
    return replace(examples, examples=once)


def _unseen(holdout: ExampleSet, others: Sequence[ExampleSet]) -> ExampleSet:
    """The rows that stand in no other set: a yardstick that was seen hides what is left."""
    seen = {example.messages for examples in others for example in examples.examples}
    unseen = tuple(e for e in holdout.examples if e.messages not in seen)
    if left := len(holdout) - len(unseen):
        say(f"holdout: {left} of {len(holdout)} rows stand in other sets and are left out")
    if not unseen:
        raise ConfigError(
            f"--holdout {holdout.source}: all rows stand in the other sets too, so none is unseen. "
            "Give rows that no model was trained on."
        )
    return replace(holdout, examples=unseen)


def _refuse_same(folders: Mapping[Role, Path], inputs: Mapping[str, str]) -> None:
    """Stop with a ConfigError where two of the models are one and the same."""
    marks = {**inputs, "cleaned": inputs.get("merged", inputs["checkpoint"])}
    for one, other in combinations(folders, 2):
        if marks[one] == marks[other]:
            raise ConfigError(
                f"The {other} and the {one} checkpoint are the same model, {folders[other]} and "
                f"{folders[one]}. Nothing can be told by comparing it with itself: check which is "
                "which."
            )


def _refuse_other_parts(
    config: AuditConfig, folders: Mapping[Role, Path], inputs: Mapping[str, str]
) -> None:
    """Stop with a DataError where records know a model as something else than it is given as."""
    own = read_manifest(at_home(config.checkpoint))
    read = [own, *(read_manifest(folder) for folder in folders.values())]
    records = {str(record["content"]): record for record in read if record}
    mine = [r for r in requests_of(records) if r.output == inputs["checkpoint"]]
    if not mine:
        warn(
            f"{config.checkpoint} has no record of how it was cleaned, so that it was made from "
            f"{config.full} is your word alone."
        )
    given = _given(config)
    for request in mine:
        known = with_earlier(request, records[request.output])
        for role in [role for role in given if role in inputs]:
            if not (role == "full" and _is_full(config, inputs[role], known)):
                claim = next((stated for stated in STATED if stated == role), None)
                refuse_claim(claim or "shadow", inputs[role], given[role], records, [known])


def _is_full(config: AuditConfig, mark: str, known: Request) -> bool:
    """Whether a record names the full model; an edit reads adapters and FP8 in its own way."""
    if mark in known.full or not known.full:
        return True
    exact = resolve_checkpoint(config.full, base=config.base, exact=True)
    read = (exact, quantised_checkpoint(config.full))
    return any(place and fingerprint(place) in known.full for place in read)


def _refuse_other_kinds(folders: Mapping[Role, Path]) -> None:
    """Stop with a CheckpointMismatchError where shapes or tokenizers of the models differ."""
    words = load_tokenizer(folders["cleaned"]).get_vocab()
    shape = _shape(folders["cleaned"])
    for role, folder in folders.items():
        if _shape(folder) != shape:
            raise CheckpointMismatchError(
                f"The {role} checkpoint {folder} is of another shape than the cleaned one, "
                f"{folders['cleaned']}: (layers, width) {_shape(folder)} and {shape}. Give models "
                "of one family."
            )
        if load_tokenizer(folder).get_vocab() != words:
            raise CheckpointMismatchError(
                f"The tokenizer of the {role} checkpoint {folder} differs from that of the cleaned "
                f"one, {folders['cleaned']}, so their scores are of different tokens. Give models "
                "of one family."
            )


def _shape(folder: Path) -> tuple[Any, Any]:
    """Layers and width of the language model."""
    from transformers import AutoConfig

    with plain_errors(folder):
        config: Any = AutoConfig.from_pretrained(folder, **LOCAL).get_text_config()
    return getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)


class _Models:
    """The models of an audit; the last one that was asked for by `take` stays loaded."""

    def __init__(self, folders: Mapping[Role, Path], compute: ComputeConfig) -> None:
        self._folders, self._compute = folders, compute
        self._held: tuple[Role, PreTrainedModel] | None = None

    def load(self, role: Role) -> PreTrainedModel:
        """A model of its own for the caller."""
        if role not in self._folders:
            raise ConfigError(f"A probe asks for the {role} model, which was not given.")
        return load_model(self._folders[role], self._compute)

    def take(self, role: Role) -> PreTrainedModel:
        """The model, in place of the one before."""
        if self._held is None or self._held[0] != role:
            self._held = None  # the memory of one is enough
            self._held = (role, self.load(role))
        return self._held[1]


@dataclass
class _Audit:
    """One run: everything measured, then judged."""

    config: AuditConfig
    folders: Mapping[Role, Path]
    sets: dict[str, ExampleSet]
    probes: Sequence[Probe]
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    tokens: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, list[int]] = field(default_factory=dict)
    """Of each set the rows whose fact the tokenizer has no words for; they are not judged."""

    def run(self, place: Path) -> dict[str, Any]:
        """Measure all models, and judge."""
        config = self.config
        self.effort = Effort(
            config.level,
            config.samples or _SAMPLES[config.level],
            config.seed,
            batch_of(config.compute, 16),
            config.max_new_tokens,
        )
        self.tokenizer = load_tokenizer(self.folders["cleaned"])
        self.models = _Models(self.folders, config.compute)
        self.material = self._material()
        self.possible, lacking = self._possible()
        if not self.possible:
            asked = {probe.name for probe in self.probes}
            why = "; ".join(f"{name}: {why}" for name, why in lacking if name in asked)
            raise ConfigError(f"No probe can be run: {why}.")
        self._tell_cost()
        config.output.mkdir(mode=0o700, parents=True, exist_ok=True)
        where = {"device": self.settings["device"], "dtype": self.settings["dtype"]}
        depends_on = {"inputs": dict(self.inputs), "effort": asdict(self.effort), **where}
        depends_on |= {"data": asdict(config.data_config), "rows": self._numbers()}
        with open_journal(place, depends_on, {}) as journal:
            found = self._measure(journal)
        return self._record(found, lacking)

    def _material(self) -> Material:
        config, longest = self.config.data_config, longest_input(self.folders["cleaned"])
        asked = {name: found for name, found in self.sets.items() if name != "general"}
        told = all(is_told(examples, config) for examples in asked.values())
        base = self.models.take("base") if "base" in self.folders and not told else None
        facts = {}
        for name, examples in self.sets.items():
            columns = config if name in ("forget", "retain", "holdout") else _told(examples, config)
            finds = base if name in asked else None  # of general text all counts
            facts[name] = find_facts(examples, self.tokenizer, columns, base=finds, longest=longest)
        if "general" in facts:
            facts["general"] = _drawn(facts["general"], self.config)
        for name, found in facts.items():
            named = None if name in self._built_in else name
            self.unknown[name] = unsayable(found, self.tokenizer, named)
            facts[name] = tuple(f for f in found if f.row not in self.unknown[name])
            kept = [e for e in self.sets[name].examples if e.row not in self.unknown[name]]
            self.sets[name] = replace(self.sets[name], examples=tuple(kept))
        require_sayable(facts["forget"])
        for name in [name for name, examples in self.sets.items() if not examples.examples]:
            del self.sets[name]
        numbers = {}
        for name, examples in self.sets.items():
            fields = {example.row: example.fields for example in examples.examples}
            rows, column = [fields[fact.row] for fact in facts[name]], config.subject_column
            is_there = name == "forget" or any(row.get(str(column)) for row in rows)
            numbers[name] = subjects(rows, column if is_there else None)
        return Material(self.sets, facts, config, numbers)

    def _possible(self) -> tuple[list[Probe], list[tuple[str, str]]]:
        """Probes that have what they need, and of the others what they lack."""
        forget = self.material.facts["forget"]
        columns = [example.fields for example in self.sets["forget"].examples]
        there = {*self.folders, *self.sets}
        there |= {"shadow models"} if self.config.shadow else set()
        there |= {"wrong answers"} if any(fact.wrong for fact in forget) else set()
        there |= {"paraphrases"} if any(row.get(PARAPHRASED) for row in columns) else set()
        lacks = {p.name: [need for need in p.needs if need not in there] for p in self.probes}
        possible = [probe for probe in self.probes if not lacks[probe.name]]
        lacking = [(n, f"it needs {' and '.join(what)}") for n, what in lacks.items() if what]
        chosen = {probe.name for probe in self.probes}
        why = "not asked for" if self.config.probes else f"left out at level {self.config.level}"
        return possible, lacking + [(p.name, why) for p in PROBES if p.name not in chosen]

    def _measure(self, journal: Journal) -> dict[str, dict[Role, dict[str, Rows]]]:
        """Probe -> model -> set -> scores."""
        found: dict[str, dict[Role, dict[str, Rows]]] = {p.name: {} for p in self.possible}
        with running({role: self._expected_tokens(role) for role in self.folders}):
            for role in self.folders:
                wanted = self._wanted(role)
                if any(_entry(role, *one) not in journal.entries for one in wanted):
                    with step(role, f"{role} model"):
                        self._ask(role, wanted, journal)
                for probe, name in wanted:
                    rows = Rows(**journal.entries[_entry(role, probe, name)])
                    found[probe.name].setdefault(role, {})[name] = rows
        return found

    def _ask(self, role: Role, wanted: Sequence[tuple[Probe, str]], journal: Journal) -> None:
        """Put what the probes find of a model into the journal, where it has not got it."""
        model = self.models.take(role)
        view = View(
            *(role, model, self.tokenizer, self.material, self.effort, journal),
            self.models.load,
            self._relearning(),
        )
        with counting_tokens(model) as tokens, track(f"{role}: probes", len(wanted)) as advance:
            for probe, name in wanted:
                if _entry(role, probe, name) not in journal.entries:
                    journal.put(_entry(role, probe, name), asdict(_checked(probe, view, name)))
                advance(1, probe.name)
            self.tokens[role] = tokens()

    def _wanted(self, role: Role) -> list[tuple[Probe, str]]:
        """Which probes look at which sets under a model."""
        retrained = "retrained" in self.folders
        return [
            (probe, name)
            for probe in self.possible
            if probe.shadowed or not role.startswith(SHADOW)
            for name in (probe.sets if role == "cleaned" else probe.compared)
            if name in self.sets
            and not (retrained and probe.thrifty and (role == "base" or name == "holdout"))
        ]

    def _relearning(self) -> Relearning:
        """How probes show rows again; training is no part of evidence."""
        pad, seed = pad_id(self.tokenizer), self.effort.seed
        dtype = self.config.compute.dtype

        def run(
            model: PreTrainedModel,
            rows: Sequence[Encoded],
            after: Callable[[int], None] | None = None,
            **recipe: Any,
        ) -> None:
            # Steps of training vanish in bfloat16 weights.
            model = model.float()
            relearn(model, rows, pad=pad, seed=seed, dtype=dtype, after_step=after, **recipe)

        return Relearning(run, SHOWN, general_texts(), partial(run, **PUBLISHED))

    def _tell_cost(self) -> None:
        """Say what all that takes, about, before it begins."""
        total = sum(map(self._expected_tokens, self.folders))
        speed = _seconds_per_token(self.models.take(next(iter(self.folders))))
        say(
            f"Audit, level {self.config.level}: {len(self.possible)} probes on "
            f"{len(self.folders)} models, about {total / 1000:.0f} thousand tokens, "
            f"{operations(self._operations(total))}, {duration(total * speed)}"
        )

    def _expected_tokens(self, role: Role) -> float:
        """About how many tokens go through a model."""
        total, wanted = 0.0, self._wanted(role)
        for name in {name for _, name in wanted}:
            facts = self.material.facts[name]
            total += sum(len(fact.encoded.input_ids) for fact in facts)
            total += sum(s.labelled + 1 for fact in facts for s in fact.sequences)
        for probe, name in wanted:
            more = probe.tokens([fact.encoded for fact in self.material.facts[name]], self.effort)
            if not isinstance(more, int | float) or not 0 <= more < math.inf:
                why = f"The probe {probe.name} has to expect a number of tokens, 0 or more."
                raise ConfigError(f"{why} Correct its `passes` or `tokens`.")
            total += more
        return total

    def _operations(self, tokens: float) -> float:
        parameters = open_index(self.folders["cleaned"]).numel
        return 2.0 * parameters * tokens

    @property
    def _built_in(self) -> list[str]:
        return [n for n, examples in self.sets.items() if examples.source == WORLD]

    def _numbers(self) -> dict[str, list[int]]:
        return {name: self.material.rows(name) for name in self.sets}

    def _record(
        self,
        found: Mapping[str, Mapping[Role, Mapping[str, Rows]]],
        lacking: Sequence[tuple[str, str]],
    ) -> dict[str, Any]:
        """What audit.json holds."""
        sources = Counter(str(fact.source) for fact in self.material.facts["forget"])
        looked = Looked(
            self._numbers(), self.material.subjects, dict(sources), self.unknown, self._built_in
        )
        entries = [entry_of(probe, found[probe.name], looked) for probe in self.possible]
        took = self._operations(sum(self.tokens.values()))
        costs = {"tokens": self.tokens, "operations": took}
        return document_of(self.config.level, self.inputs, looked, entries, lacking, costs)


def quick_audit(results: Mapping[Role, Results], output: Path) -> dict[str, Any]:
    """The audit, of level quick, that results of evaluations pay for: no model is loaded."""
    records = {role: found["perta"] for role, found in results.items()}
    inputs = dict(records["cleaned"]["inputs"])
    inputs |= {r: made["inputs"]["checkpoint"] for r, made in records.items() if r != "cleaned"}
    results_of = {f"results_{role}": str(made["content"]) for role, made in records.items()}
    return run_file_stage(
        "audit",
        At(output, True),
        {"level": "quick", "output": str(output)},
        {**inputs, **results_of},
        lambda: document_of_results(results, inputs),
    )


def _entry(role: Role, probe: Probe, name: str) -> str:
    """Under what a journal holds the scores of a set."""
    return f"{role}/rows/{probe.name}/{name}"


def _told(examples: ExampleSet, config: DataConfig) -> DataConfig:
    """How a set's facts are told that may lack the column of the others."""
    has_column = all(str(config.fact_column) in example.fields for example in examples.examples)
    return config if has_column else replace(config, fact_column=None)


def _checked(probe: Probe, view: View, name: str) -> Rows:
    """A probe's scores, one for each sequence and each of them a number."""
    rows = probe.run(view, name)
    if not isinstance(rows, Rows) or not isinstance(rows.scores, list | tuple):
        raise ConfigError(f"The probe {probe.name} has to give `Rows` with a list of scores.")
    wanted = len(view.material.facts[name])
    if len(rows.scores) != wanted:
        raise ConfigError(
            f"The probe {probe.name} gave {len(rows.scores)} scores for the {wanted} rows of the "
            f"{name} set; it has to give one for each, None where there is none."
        )
    known = [s for s in rows.scores if s is not None]
    if odd := [s for s in known if not isinstance(s, int | float)]:
        raise ConfigError(
            f"The probe {probe.name} gave a score of type {type(odd[0]).__name__}; scores are "
            "plain numbers, None where there is none."
        )
    try:
        json.dumps({**rows.more}, allow_nan=False)
    except (TypeError, ValueError) as error:
        why = f"The probe {probe.name} notes in `more` what audit.json cannot hold: {error}."
        raise ConfigError(why) from error
    bad = [i for i, s in enumerate(rows.scores) if s is not None and not math.isfinite(s)]
    if bad:
        raise DivergenceError(
            f"The probe {probe.name} gave {rows.scores[bad[0]]} for row "
            f"{view.material.rows(name)[bad[0]]} of the {name} set under the {view.role} model: "
            "its weights are damaged, or the probe is."
        )
    usual = type(probe).judge is Probe.judge
    if usual and (beyond := [s for s in known if not -_ROUNDING <= s <= 1 + _ROUNDING]):
        raise ConfigError(
            f"The probe {probe.name} gave {beyond[0]}, and scores lie from 0 to 1: bring them "
            "there, or give the probe a `judge` of its own."
        )
    return rows


@torch.no_grad()
def _seconds_per_token(model: PreTrainedModel) -> float:
    """How long a token takes in a pass over a few of them, the second time."""
    count = min(_TIMED_TOKENS, longest_input(model) or _TIMED_TOKENS)
    ids = torch.zeros((1, count), dtype=torch.int64, device=model.device)
    for _ in range(2):
        started = time.perf_counter()
        float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])
        taken = time.perf_counter() - started
    return taken / count
