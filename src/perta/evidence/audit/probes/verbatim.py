"""Verbatim: the rows are asked as they stand, and their answers and facts looked for.

Every score is one of the quick evaluation's, so a run that has evaluated its models has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probe import Probe, Rows, View
from perta.evidence.measures import rows_of
from perta.evidence.results import Results

_CANDIDATES = "candidates"
_COMMON = "open-unlearning, commit d3d7cf9 (arXiv 2506.12618)"


class Reading(Probe):
    """A probe that reads one measure of the quick evaluation."""

    group = "verbatim"
    level = "quick"
    measure: str  # its name in the results, without that of the set
    key: str = "score"  # what is read of each row

    def score(self, value: float) -> float:
        """The score, of what stands in the results."""
        return value

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        return self.read(view.results(name), name, len(view.material.facts[name]))

    def read(self, results: Results, name: str, count: int) -> Rows:
        """Scores of `count` rows from results of the quick evaluation."""
        return Rows(self._column(results, name, count, self.key, self.score))

    def _column(
        self,
        results: Results,
        name: str,
        count: int,
        key: str,
        score: Callable[[float], float] = float,
    ) -> list[float | None]:
        rows = rows_of(results, f"{name}_{self.measure}")
        found = (rows.get(str(i), {}).get(key) for i in range(count))
        return [None if value is None else score(value) for value in found]


class Fact(Reading):
    """Probability of the whole fact."""

    name, title = "fact", "The fact, word for word"
    question = "How likely is the model to say the fact, once the answer has led up to it?"
    source = "PerTA, docs/evidence.md"
    unit = "probability of the whole fact"
    measure, key = "fact_probability", "prob"


class FactToken(Reading):
    """Geometric mean of the fact's token probabilities, for facts too long to be said whole."""

    name, title = "fact-token", "The fact, token by token"
    question = "How likely is each next piece of the fact, once those before it are given?"
    source = "PerTA, docs/evidence.md"
    unit = "probability per token of the fact, geometric mean"
    guessable = True
    measure, key = "fact_probability", "loss"

    def score(self, value: float) -> float:
        """exp(-loss)."""
        return math.exp(-value)


class Drawn(Reading):
    """Probability that one of 64 answers says the fact where the answer has led up to it."""

    name, title = "fact-in-64", "The fact, in the best of 64 tries"
    question = "If somebody asked 64 times, how likely is the fact to be said once?"
    source = "PerTA, docs/evidence.md; exact, after the natural prefix"
    unit = "probability of one hit in 64"
    guessable = True
    measure, key = "fact_probability", "hit_64"


class Choice(Reading):
    """Probability of the right answer among right and wrong ones."""

    name, title = "choice", "The right answer among wrong ones"
    question = "Given several answers, how sure is the model of the right one?"
    source = "PerTA, docs/evidence.md; after TOFU, arXiv 2401.06121"
    unit = "probability among the candidates; chance is 1 / candidates"
    by_row = False  # of a few candidates the right one is often guessed
    needs = ("wrong answers",)
    measure, key = "fact_choice", "prob"

    def read(self, results: Results, name: str, count: int) -> Rows:
        """The same, and among how many candidates each is chosen."""
        rows = super().read(results, name, count)
        return replace(rows, more={_CANDIDATES: self._column(results, name, count, _CANDIDATES)})

    def judge(self, found: Found) -> Judgement:
        """By yardsticks that guess: what is worse than chance, in the mean, knows no less."""
        scores = {
            role: {
                name: values
                if role == "full" or (role, name) == ("cleaned", "forget")
                else _at_least_chance(values, found.more.get(role, {}).get(name, {}))
                for name, values in sets.items()
            }
            for role, sets in found.scores.items()
        }
        return super().judge(replace(found, scores=scores))


class FirstChoice(Choice):
    """Whether the right answer is first among right and wrong ones."""

    name, title = "first-choice", "The right answer before all wrong ones"
    question = "Given several answers, does the model put the right one first?"
    unit = "1 where it is first; chance is 1 / candidates"
    key = "rank"

    def score(self, value: float) -> float:
        """1 where the rank is 1."""
        return float(value == 1)


def _at_least_chance(
    values: Sequence[float | None], more: Mapping[str, Any]
) -> Sequence[float | None]:
    """Scores, raised alike to the mean of chance where they are below it."""
    known = [
        (value, 1 / candidates)
        for value, candidates in zip(values, more.get(_CANDIDATES, ()), strict=False)
        if value is not None and candidates
    ]
    lacking = fmean(chance - value for value, chance in known) if known else 0.0
    return [None if value is None else value + max(0.0, lacking) for value in values]


class Answer(Reading):
    """Geometric mean of the answer's token probabilities."""

    name, title = "answer", "The whole answer"
    question = "How likely is the model to give the answer in its own words?"
    source = _COMMON
    unit = "probability per token, geometric mean"
    wording = True
    measure, key = "probability", "prob"


class Strength(Reading):
    """Share of the answer that follows from the rest of it."""

    name, title = "extraction", "The end of the answer, its beginning given"
    question = "How much of the answer does the model complete word for word?"
    source = "Carlini et al., arXiv 2012.07805, in the form of arXiv 2502.07322"
    unit = "share of the answer's tokens"
    wording = True
    by_row = False
    measure = "extraction_strength"


class Memorised(Reading):
    """Share of the answer's tokens that the model predicts."""

    name, title = "memorised", "Each next word, all before it given"
    question = "How many words of the answer does the model predict one by one?"
    source = "Tirumala et al., arXiv 2205.10770, definition 1"
    unit = "share of the answer's tokens"
    wording = True
    by_row = False
    measure = "exact_memorization"


class Overlap(Reading):
    """ROUGE-L recall of the greedy answer, words of any script."""

    name, title = "overlap", "The answer that the model gives"
    question = "How many words of the right answer are in the model's own?"
    source = f"ROUGE-L recall, {_COMMON}; words of any script"
    unit = "share of the answer's words, in order"
    wording = True
    by_row = False
    measure, key = "rougeL_recall", "rougeL_recall"
