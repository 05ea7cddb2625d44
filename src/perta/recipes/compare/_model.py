"""One model in memory, moved from one set of weights to another, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perta.data.batch import Encoded
from perta.data.examples import ExampleSet, load_examples
from perta.data.rows import write_jsonl
from perta.data.tokens import encode_examples
from perta.engine.train.refusals import with_refusals
from perta.engine.train.relearn import LEARNING_RATE, SHOWN, TEXT_TOKENS, general_texts, relearn
from perta.errors import DataError
from perta.evidence.metrics import mean
from perta.evidence.published.tofu import run_tofu
from perta.evidence.quick import quick_evaluation
from perta.evidence.results import Results
from perta.evidence.settings import AbilityConfig
from perta.methods.objectives import Training
from perta.models.facts import SAMPLES, FactScore, hit_probability, score_facts, share_beyond
from perta.models.load import (
    batch_of,
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    save_model,
)
from perta.models.loss import losses_of
from perta.options import DataConfig, ScoringConfig
from perta.recipes.compare._draw import Draw
from perta.recipes.compare.settings import CompareConfig
from perta.stages.bench import bench_ability
from perta.stages.evaluate import find_in_sets
from perta.store.atomic import scratch_folder
from perta.store.record import aggregates

SETS = ("forget", "retain", "protected")
MEASURES = ("probability", "extraction_strength")

_FACTS = 40


class Bench:
    """A float32 model of one draw; no method sees its `retain` set."""

    def __init__(self, config: CompareConfig, draw: Draw) -> None:
        self._config, self._draw = config, draw
        self._tokenizer = load_tokenizer(draw.base)
        self.pad, self.dtype = pad_id(self._tokenizer), config.compute.dtype
        self.model = load_model(draw.full, config.compute, dtype=torch.float32)
        sources = {name: draw.files[name] for name in ("forget", "protected")}
        sources["retain"] = draw.files["unseen"]
        self.sets = {
            name: load_examples(file, config.data_config) for name, file in sources.items()
        }
        if "facts" in draw.files:
            facts = load_examples(draw.files["facts"], config.data_config)
            self.sets["facts"] = replace(facts, examples=facts.examples[:_FACTS])
        self._forget = self.encode(self.sets["forget"])
        self._facts = find_in_sets(
            self.sets,
            self._tokenizer,
            config.data_config,
            config.compute,
            draw.base,
            longest_input(self.model),
        )
        # What the search asks for again and again: without the wrong answers.
        self._bare_facts = [replace(fact, wrong=()) for fact in self._facts["forget"]]
        plain = DataConfig(format="text", max_length=TEXT_TOKENS)
        texts = ({"text": text} for text in general_texts())
        file = write_jsonl(texts, draw.folder / "data" / "general.jsonl")
        self._general = self.encode(load_examples(file, plain), plain)

    def encode(
        self, examples: ExampleSet, data_config: DataConfig | None = None
    ) -> Sequence[Encoded]:
        """Token sequences of a set, by the comparison's settings unless others are given."""
        settings = data_config or self._config.data_config
        longest = longest_input(self.model)
        return encode_examples(examples, self._tokenizer, settings, longest=longest).encoded

    def with_refusals(
        self, method: Training, seed: int
    ) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
        """Forget examples and what the method takes as refusals to them, of the model as it is."""
        settings, words = self._config.data_config, self._tokenizer
        asked = self.sets["forget"]
        return with_refusals(method, asked, self._forget, self.model, words, settings, seed)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Give the model other weights, in the order of its parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), tensors, strict=True):
                parameter.copy_(value)

    def weights(self, checkpoint: Path) -> list[Tensor]:
        """A checkpoint's parameters in the order that `load` takes, on the model's device."""
        model = load_model(checkpoint, self._config.compute, dtype=torch.float32)
        return [parameter.detach() for parameter in model.parameters()]

    def known(self) -> float:
        """What is known of the forget set, in [0, 1], by which forgetting is made equal."""
        size, pad = self._batch, self.pad
        if self._config.equal_by == "answers":
            losses = losses_of(self.model, self._forget, batch_size=size, pad=pad)
            found = [math.exp(-loss) for loss in losses]
        else:
            scores = score_facts(self.model, self._bare_facts, batch_size=size, pad=pad)
            found = [hit_probability(score.log_probability, SAMPLES) for score in scores]
        # Not finite: nothing is left of the answers, or of the model.
        return mean(found) if all(map(math.isfinite, found)) else 0.0

    def measure(self, sets: Sequence[str] = SETS) -> Results:
        """Quick evaluation without generation on some of the sets."""
        return quick_evaluation(
            self.model,
            self._tokenizer,
            {name: self.sets[name] for name in sets},
            ScoringConfig(generate=False),
            self._config.data_config,
            facts=self._facts,
            batch_size=self._batch,
        )

    def elsewhere(self) -> dict[str, float]:
        """What the model knows that is in neither set: world facts, and general text."""
        found = means(self.measure(("facts",))) if "facts" in self.sets else {}
        losses = losses_of(self.model, self._general, batch_size=self._batch, pad=self.pad)
        return {**found, "general_loss": math.fsum(losses) / len(losses)}

    def relearned(self) -> Knowledge:
        """What is known of forget rows after others were shown again; these weights stay."""
        hidden = [i for i in range(len(self._forget)) if i % SHOWN]
        relearn(
            self.model,
            self._forget[::SHOWN],
            pad=self.pad,
            steps=self._config.relearn_steps,
            learning_rate=relearning_rate(self._config),
            seed=self._draw.seed,
            dtype=self.dtype,
        )
        rows = [self._forget[i] for i in hidden]
        facts = [self._facts["forget"][i] for i in hidden]
        losses = losses_of(self.model, rows, batch_size=self._batch, pad=self.pad)
        scores = score_facts(self.model, facts, batch_size=self._batch, pad=self.pad)
        return Knowledge.from_scores(losses, scores)

    def suite(self, reference: Results | None) -> Results:
        """The whole TOFU evaluation on this draw's rows."""
        return run_tofu(
            self.model,
            self._tokenizer,
            self._draw.suite,
            self._draw.split,
            reference=reference,
            limit=self._config.suite_limit,
            batch_size=self._batch,
        )

    def ability(self, tasks: Sequence[str]) -> dict[str, float]:
        """`TASK/METRIC` -> score of lm-evaluation-harness, which wants a checkpoint."""
        config = self._config
        with scratch_folder(self._draw.folder / "ability") as scratch:
            folder = scratch / "model"
            folder.mkdir()
            save_model(self.model, self._tokenizer, folder, self._draw.full)
            results = bench_ability(
                AbilityConfig(
                    checkpoint=str(folder),
                    output=scratch / "ability.json",
                    tasks=tuple(tasks),
                    compute=config.compute,
                )
            )
        return aggregates(results)

    @property
    def _batch(self) -> int:
        return batch_of(self._config.compute, 16)


def relearning_rate(config: CompareConfig) -> float:
    """Learning rate at which a model is shown some forget rows again."""
    rate = config.relearn_learning_rate
    if rate is None:
        rate = LEARNING_RATE if config.tune.tunes_adapter else config.tune.learning_rate
    return rate


def means(results: Mapping[str, Any]) -> dict[str, float]:
    """SET_MEASURE -> mean, for the measures that the comparison reports."""
    found = aggregates(results)
    return {name: value for name, value in found.items() if name.partition("_")[2] in MEASURES}


@dataclass(frozen=True)
class Knowledge:
    """What a model knows of some rows; `choice` and `first` of those with wrong answers alone."""

    answer: Sequence[float]  # probability of each answer, the geometric mean over its tokens
    fact: Sequence[float]  # probability of each whole fact
    hit: Sequence[float]  # probability of each fact in at least one of `SAMPLES` samples
    choice: Sequence[float]  # probability of each right answer among right and wrong ones
    first: Sequence[bool]  # whether it is the first choice

    @staticmethod
    def from_results(results: Mapping[str, Any], name: str) -> Knowledge:
        """From results of the quick evaluation of a set; DataError where no fact can be said."""

        def rows(measure: str) -> list[Mapping[str, Any]]:
            found = results.get(f"{name}_{measure}", {}).get("value_by_index", {})
            return [row for row in found.values() if row is not None]

        known, choices = rows("fact_probability"), rows("fact_choice")
        if not known:
            raise DataError(
                f"The tokenizer has no words for any fact of the {name} set, so models cannot be "
                "compared by facts. Give rows in its words, or another base model."
            )
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
        """Columns of the tables that have a value; the `yardstick` is of facts that look unseen."""
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
