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
        every = map(str, range(len(view.material.facts[name])))
        return self.read(view.results(name), name, list(every))

    def read(self, results: Results, name: str, places: Sequence[str]) -> Rows:
        """Scores of the rows at some places from results of the quick evaluation."""
        return Rows(self._column(results, name, places, self.key, self.score))

    def _column(
        self,
        results: Results,
        name: str,
        places: Sequence[str],
        key: str,
        score: Callable[[float], float] = float,
    ) -> list[float | None]:
        rows = rows_of(results, f"{name}_{self.measure}")
        found = (rows.get(place, {}).get(key) for place in places)
        return [None if value is None else score(value) for value in found]


class Fact(Reading):
    """Probability of the whole fact."""

    name = "fact"
    measure, key = "fact_probability", "prob"


class FactToken(Reading):
    """Geometric mean of the fact's token probabilities, for facts too long to be said whole."""

    name = "fact-token"
    guessable = True
    measure, key = "fact_probability", "loss"

    def score(self, value: float) -> float:
        """exp(-loss)."""
        return math.exp(-value)


class Drawn(Reading):
    """Probability that one of 64 answers says the fact where the answer has led up to it."""

    name = "fact-in-64"
    guessable = True
    measure, key = "fact_probability", "hit_64"


class Choice(Reading):
    """Probability of the right answer among right and wrong ones."""

    name = "choice"
    by_row = False  # of a few candidates the right one is often guessed
    needs = ("wrong answers",)
    measure, key = "fact_choice", "prob"

    def read(self, results: Results, name: str, places: Sequence[str]) -> Rows:
        """The same, and among how many candidates each is chosen."""
        rows = super().read(results, name, places)
        return replace(rows, more={_CANDIDATES: self._column(results, name, places, _CANDIDATES)})

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

    name = "first-choice"
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

    name = "answer"
    wording = True
    measure, key = "probability", "prob"


class Strength(Reading):
    """Share of the answer that follows from the rest of it."""

    name = "extraction"
    wording = True
    by_row = False
    measure = "extraction_strength"


class Memorised(Reading):
    """Share of the answer's tokens that the model predicts."""

    name = "memorised"
    wording = True
    by_row = False
    measure = "exact_memorization"


class Overlap(Reading):
    """ROUGE-L recall of the greedy answer, words of any script."""

    name = "overlap"
    wording = True
    by_row = False
    measure, key = "rougeL_recall", "rougeL_recall"
