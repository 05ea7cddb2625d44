"""What a model knows of rows, as the columns of the comparison's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perta.evidence.metrics import mean
from perta.models.facts import SAMPLES, FactScore, hit_probability, share_beyond


@dataclass(frozen=True)
class Knowledge:
    """What a model knows of some rows; `choice` and `first` of those with wrong answers alone.

    Attributes:
        answer: probability of each answer, the geometric mean over its tokens.
        fact: probability of each whole fact.
        hit: probability of each fact in at least one of `SAMPLES` samples.
        choice: probability of each right answer among right and wrong ones.
        first: whether it is the first choice.
    """

    answer: Sequence[float]
    fact: Sequence[float]
    hit: Sequence[float]
    choice: Sequence[float]
    first: Sequence[bool]

    @staticmethod
    def from_results(results: Mapping[str, Any], name: str) -> Knowledge:
        """From results of the quick evaluation of a set."""

        def rows(measure: str) -> list[Mapping[str, Any]]:
            found = results.get(f"{name}_{measure}", {}).get("value_by_index", {})
            return [row for row in found.values() if row is not None]

        known, choices = rows("fact_probability"), rows("fact_choice")
        return Knowledge(
            [row["prob"] for row in rows("probability")],
            [row["prob"] for row in known],
            [row[f"hit_{SAMPLES}"] for row in known],
            [row["prob"] for row in choices],
            [row["rank"] == 1 for row in choices],
        )

    @staticmethod
    def from_scores(losses: Sequence[float], scores: Sequence[FactScore]) -> Knowledge:
        """From losses of the answers, nats per token, and scores of their facts."""
        return Knowledge(
            [math.exp(-loss) for loss in losses],
            [score.probability for score in scores],
            [hit_probability(score.log_probability, SAMPLES) for score in scores],
            [score.choice for score in scores if score.choice is not None],
            [score.rank == 1 for score in scores if score.rank is not None],
        )

    def columns(
        self, name: str, yardstick: Sequence[float] | None = None, *, kept: bool = False
    ) -> dict[str, float]:
        """Columns of the tables that have a value.

        Args:
            yardstick: probabilities of facts that look unseen; above their 95th percentile counts.
            kept: the rows are to be kept: the worst is the least probable one.
        """
        worst = min if kept else max
        found = {
            "fact_probability": mean(self.fact),
            f"hit_{SAMPLES}": mean(self.hit),
            "worst_answer": worst(self.answer),
            "worst_fact": worst(self.fact),
        }
        if self.choice:
            found["choice_accuracy"] = mean(self.first)
            found["choice_probability"] = mean(self.choice)
        if yardstick:
            found["beyond"] = share_beyond(self.fact, yardstick)
        return {f"{name}_{column}": value for column, value in found.items()}
