"""What a probe of the audit is, what it is given, and what comes of it.

    for every model: View ─ Probe.run(view, set) ─> Rows      one score a row, 1 all is known
    all models:      Found ─ Probe.judge(found)  ─> Judgement passed, leaks or not sure

A probe is one subclass of `Probe`. `perta audit --probe FILE.py` runs one of a user's own:

    class Short(Probe):
        name, group, title = "short", "own", "The first token of the answer"
        question = "Does the model begin the answer?"
        source, unit, level = "own", "share", "quick"

        def run(self, view, name):
            return Rows([outcome.scores[0].exact_memorization for outcome in view.asked(name)])

Probes that read what `View.asked` has share its one pass: teacher-forced scores of the answer
and of its fact's sequences, and the greedy answer.
"""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import Encoded
from perta.data.examples import Example, ExampleSet
from perta.evidence.audit.judge import Found, Judgement, judge_remains
from perta.evidence.benchmark import Journal, run_with_journal
from perta.evidence.quick import fact_items, scoring_options, summarise
from perta.evidence.results import Results
from perta.evidence.scoring.answers import Score
from perta.evidence.scoring.items import Item, Outcome
from perta.evidence.settings import Level
from perta.models.facts import Fact
from perta.options import DataConfig

Role = str
"""Which model of an audit: cleaned, full, retrained or base; or `SHADOW` with a number from 1."""
SHADOW = "shadow-"
"""What the roles of models begin with that never saw the rows, beside the retrained one."""
Need = Literal[
    "base",
    "full",
    "retrained",
    "shadow models",
    "retain",
    "holdout",
    "world",
    "general",
    "wrong answers",
    "paraphrases",
]

_Plain = TypeVar("_Plain")


@dataclass(frozen=True)
class Rows:
    """Scores of one model on one set."""

    # one per sequence (see `Material.facts`), in [0, 1] for the usual judge, larger where more is
    # known; None where a row has none
    scores: Sequence[float | None]
    # other numbers worth keeping, such as a curve; plain values, never a text
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    level: Level = "standard"  # which probes run
    samples: int = 64  # answers drawn to a question
    seed: int = 0  # of all that is drawn
    batch_size: int = 16  # rows per forward pass
    max_new_tokens: int = 200  # longest generated answer


@dataclass(frozen=True)
class Material:
    """The rows, the same for all models."""

    # `forget`, and `retain`, `holdout`, `world` and `general` where there are any
    sets: Mapping[str, ExampleSet] = field(repr=False)
    # of each set one a sequence; a row of plain text has several, every other one
    facts: Mapping[str, tuple[Fact, ...]] = field(repr=False)
    data_config: DataConfig  # how rows become tokens
    # of each set whom each sequence is about; None where nothing says so
    subjects: Mapping[str, Sequence[int] | None] = field(repr=False)

    def rows(self, name: str) -> list[int]:
        """The number in its file of each sequence's row."""
        return [fact.row for fact in self.facts[name]]

    def examples(self, name: str) -> list[Example]:
        """The row of each sequence."""
        by_row = {example.row: example for example in self.sets[name].examples}
        return [by_row[row] for row in self.rows(name)]


@dataclass(frozen=True)
class Relearning:
    """How a model is shown rows again; whoever makes the view knows how to train."""

    # trains a float32 model on rows, and calls a function with each step from 1
    run: Callable[[PreTrainedModel, Sequence[Encoded], Callable[[int], None]], None]
    shown: int  # one in so many rows of a set is shown
    texts: Sequence[str] = field(repr=False)  # English that has nothing to do with any set
    published: Callable[[PreTrainedModel, Sequence[Encoded]], None]  # the same as OpenUnlearning


@dataclass
class View:
    """One model as probes see it."""

    role: Role  # which model of the audit it is
    model: PreTrainedModel  # in evaluation mode; a probe that changes weights puts them back
    tokenizer: PreTrainedTokenizerBase  # the same for all models
    material: Material  # the rows
    effort: Effort  # how much is done
    journal: Journal  # keeps outcomes, so that a run that was killed goes on
    # another model of the audit, by its role; its caller lets it go
    load: Callable[[Role], PreTrainedModel]
    relearning: Relearning | None = None  # how it is shown rows again; None where it cannot be
    _asked: dict[str, list[Outcome]] = field(default_factory=dict)

    def asked(self, name: str) -> list[Outcome]:
        """Of each sequence the scores of answer, then of fact, and the greedy answer."""
        if name not in self._asked:
            items = self.items(name)
            found = self.outcomes("asked", {f"{name}:{i}": item for i, item in enumerate(items)})
            self._asked[name] = list(found.values())
        return self._asked[name]

    def results(self, name: str) -> Results:
        """The same as the quick evaluation tells it; it holds texts."""
        made = self.material
        sets, column = {name: made.sets[name]}, made.data_config.subject_column
        asked, answered = {name: self.items(name)}, {name: self.asked(name)}
        return summarise(sets, asked, answered, made.facts, self.tokenizer, column)

    def items(self, name: str) -> list[Item]:
        """What is asked of each sequence of a set."""
        made = self.material
        sets = {name: made.sets[name]}
        items = fact_items(
            self.model, self.tokenizer, sets, made.facts, made.data_config, generate=True
        )
        # Min-K++ looks at the whole vocabulary, once for all.
        return [replace(item, moments=True) for item in items[name]]

    def facts(self, name: str, what: str = "facts") -> list[Score]:
        """Scores of a set's facts under the model as it is now, kept under a name of that state."""
        facts = self.material.facts[name]
        items = {f"{name}:{i}": Item((fact.encoded,)) for i, fact in enumerate(facts)}
        return [outcome.scores[0] for outcome in self.outcomes(what, items).values()]

    def outcomes(self, what: str, items: Mapping[str, Item]) -> dict[str, Outcome]:
        """Scores and greedy answers of items, each once in all runs; `what` may be the probe."""
        most, size = self.effort.max_new_tokens, self.effort.batch_size
        options = scoring_options(self.model, self.tokenizer, list(items.values()), size, most)
        named = {f"{self.role}/{what}/{name}": item for name, item in items.items()}
        found = run_with_journal(None, self.model, named, options, self.journal)
        return dict(zip(items, found.values(), strict=True))

    def kept(self, what: str, make: Callable[[], _Plain]) -> _Plain:
        """A plain value that is made once in all runs, under a name of its own."""
        return self.journal.kept(f"{self.role}/{what}", make)


@cache
def _told() -> dict[str, dict[str, str]]:
    return tomllib.loads(files("perta").joinpath("evidence", "probes.toml").read_text("utf-8"))


class Probe(ABC):
    """One question about what is left of the forget set.

    Attributes:
        name: short, in lower case with dashes; `--probe` takes it.
        group: whose it is, such as `verbatim`; `--probe` takes it too.
        title: what it is, in plain words.
        question: what it asks, in one sentence for someone who knows no statistics.
        source: where the definition is from.
        unit: of a score.
        level: the least level that runs it.
        sets: those of which it wants `run` under the cleaned model; one that was not given is left
            out.
        compared: the same under the others.
        needs: without which it cannot be run at all.
        wording: it counts the words around the fact too, which the base model has never seen.
        by_row: single rows are judged too; for scores without steps, such as probabilities.
        guessable: who guesses right may score high without the facts; without the retrained model
            single rows are not judged then.
        thrifty: beside the retrained model it is run with no other yardstick, for it takes long.
        shadowed: it is run with the shadow models too.
        passes: how often about it reads the sequences beyond the pass that all probes share.
    """

    name: str
    group: str
    title: str
    question: str
    source: str
    unit: str = "share"
    level: Level = "standard"
    sets: tuple[str, ...] = ("forget", "holdout")
    compared: tuple[str, ...] = ("forget",)
    needs: tuple[Need, ...] = ()
    wording: bool = False
    by_row: bool = True
    guessable: bool = False
    thrifty: bool = False
    shadowed: bool = False
    passes: float = 0.0

    def __init_subclass__(cls) -> None:
        """What ours ask is told in `evidence/probes.toml`, by their names."""
        super().__init_subclass__()
        for part, text in _told().get(str(vars(cls).get("name")), {}).items():
            if part not in vars(cls):
                setattr(cls, part, text)

    @abstractmethod
    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set, `view.material.facts[name]`, under one model."""

    def judge(self, found: Found) -> Judgement:
        """What the scores of all models say."""
        return self.judge_way(found)

    def judge_way(self, found: Found, ways: int = 1, *, guessable: bool = False) -> Judgement:
        """The same of one of several ways in which it asks."""
        return judge_remains(
            found,
            wording=self.wording,
            by_row=self.by_row,
            guessable=self.guessable or guessable,
            ways=ways,
        )

    def tokens(self, sequences: Sequence[Encoded], effort: Effort) -> float:
        """About how many tokens go through each model beyond the pass that all probes share."""
        del effort
        return self.passes * sum(len(s.input_ids) for s in sequences)
