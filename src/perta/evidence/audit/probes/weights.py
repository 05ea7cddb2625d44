"""Changed weights: what is known after rounding, and after a few steps of training on other rows.

Of each row the probability of its whole fact counts, under the changed weights; the yardstick's
weights are changed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean

from transformers import PreTrainedModel

from perta.data.batch import Encoded, seeded_sample
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probe import Relearning, Rows, View
from perta.evidence.audit.probes._variants import Variants, Ways
from perta.evidence.metrics import likeness, relearning_robustness, rounding_robustness
from perta.models.facts import score_facts
from perta.models.formats.rounding import SCHEMES, rounded
from perta.models.load import longest_input, pad_id
from perta.options import DataConfig

_STEPS = 6
OWN, RETAINED, UNRELATED = "other rows of the set", "retained rows", "unrelated text"


class Rounding(Variants):
    """Probability of the whole fact under rounded weights, by scheme."""

    name, group, way = "rounding", "weights", "scheme"
    passes = len(SCHEMES) + 1

    def run(self, view: View, name: str) -> Rows:
        """Of each row the highest probability; beside it those of each scheme, and before."""
        rows = super().run(view, name)
        return replace(rows, more={**rows.more, "before": _facts(view, name, "facts")})

    def ways(self, view: View, name: str) -> Ways:
        """Scores of the rows of one set under one model, by scheme."""
        found = {}
        for scheme in SCHEMES:
            with rounded(view.model, scheme):
                found[scheme] = _facts(view, name, f"rounding, {scheme}")
        return found

    def judge(self, found: Found) -> Judgement:
        """As of all ways, with OpenUnlearning's Q, and its symmetric form, of the worst scheme."""
        more = found.more.get("cleaned", {}).get("forget", {})
        before = _mean(more.get("before", ()))
        notes: dict[str, float] = {}
        for scheme, scores in more.get("ways", {}).items():
            after = _mean(scores)
            notes[f"Q {scheme}"] = rounding_robustness(before, after)
            notes[f"Q {scheme}, symmetric"] = likeness(before, after)
        return replace(super().judge(found), notes=notes)


class Relearned(Variants):
    """Probability of the whole fact after a few steps of training on other rows."""

    name, group, way = "relearning", "weights", "training"
    level = "full"
    # Of each kind of training one before, and at each step one and a quarter's training; as
    # published one before, one behind, and all rows once.
    passes = 3 * (1 + _STEPS * 1.75) + 5

    def run(self, view: View, name: str) -> Rows:
        """Of each row the highest probability; beside it the mean after every step."""
        rows = super().run(view, name)
        curves = {
            way: [_mean(scores) for scores in steps] for way, steps in self._taken(view, name)
        }
        more = {**rows.more, "curves": curves}
        if view.relearning is not None:
            train = partial(_as_published, view, name, view.relearning)
            more["published"] = view.kept(f"{self.name}/{name}/published", train)
        return replace(rows, more=more)

    def ways(self, view: View, name: str) -> Ways:
        """Scores of the rows that were not shown, after the last step, by what was shown."""
        return {way: steps[-1] for way, steps in self._taken(view, name)}

    def judge(self, found: Found) -> Judgement:
        """As of all ways, with OpenUnlearning's R of each kind of training, and of its own."""
        curves = {
            role: {**sets["forget"]["curves"], "as published": sets["forget"].get("published")}
            for role, sets in found.more.items()
            if "forget" in sets
        }
        notes: dict[str, float] = {}
        for way, curve in curves.get("cleaned", {}).items():
            if curve and (other := curves.get("retrained", {}).get(way)):
                rises = (other[-1] - other[0], curve[-1] - curve[0])
                notes[f"R {way}"] = relearning_robustness(*rises)
                notes[f"R {way}, symmetric"] = likeness(*rises)
        return replace(super().judge(found), notes=notes)

    def _taken(self, view: View, name: str) -> Iterator[tuple[str, list[list[float | None]]]]:
        """Kind of training -> scores of each sequence, before the first step and after each."""
        relearning = view.relearning
        if relearning is None:
            return
        for way, rows in _shown(view, name, relearning.shown, relearning.texts).items():
            # Rows that were shown have no score.
            every = relearning.shown if way == OWN else 0
            train = partial(_trained, view, name, relearning, rows, every)
            yield way, view.kept(f"{self.name}/{name}/{way}", train)


def _shown(view: View, name: str, every: int, texts: Sequence[str]) -> dict[str, Sequence[Encoded]]:
    """What is shown to a model, by kind."""
    own = _encoded(view, name)[::every]
    shown: dict[str, Sequence[Encoded]] = {OWN: own}
    if "retain" in view.material.sets and name != "retain":
        retained = _encoded(view, "retain")
        shown[RETAINED] = seeded_sample(retained, min(len(own), len(retained)), view.effort.seed)
    plain = DataConfig(format="text", max_length=max(len(s.input_ids) for s in own))
    given = load_examples([{"text": text} for text in texts], plain)
    general = encode_examples(given, view.tokenizer, plain, longest=longest_input(view.model))
    shown[UNRELATED] = general.encoded[: len(own)]
    return shown


def _encoded(view: View, name: str) -> list[Encoded]:
    made = view.material
    longest = longest_input(view.model)
    found = encode_examples(made.sets[name], view.tokenizer, made.data_config, longest=longest)
    return list(found.encoded)


def _trained(
    view: View, name: str, relearning: Relearning, shown: Sequence[Encoded], every: int
) -> list[list[float | None]]:
    """Scores of each sequence before the first step and after each; the model comes back."""
    facts = [replace(fact, wrong=(), right=None) for fact in view.material.facts[name]]
    places = [i for i in range(len(facts)) if not every or i % every]
    asked = [facts[i] for i in places]
    found: list[list[float | None]] = []

    def score(_step: int = 0) -> None:
        pad, size = pad_id(view.tokenizer), view.effort.batch_size
        scores = score_facts(view.model, asked, batch_size=size, pad=pad) if asked else []
        found.append([None] * len(facts))
        for i, one in zip(places, scores, strict=True):
            found[-1][i] = one.probability

    with _float32(view.model):
        score()
        relearning.run(view.model, shown, score)
    return found


def _as_published(view: View, name: str, relearning: Relearning) -> list[float]:
    """Mean score of all rows before OpenUnlearning's training on all of them, and after it."""
    facts = [replace(fact, wrong=(), right=None) for fact in view.material.facts[name]]
    pad, size = pad_id(view.tokenizer), view.effort.batch_size

    def score() -> float:
        scores = score_facts(view.model, facts, batch_size=size, pad=pad)
        return fmean(one.probability for one in scores)

    with _float32(view.model):
        before = score()
        relearning.published(view.model, _encoded(view, name))
        return [before, score()]


@contextmanager
def _float32(model: PreTrainedModel) -> Iterator[None]:
    """The model in float32 for a while; whatever happens to its weights is undone."""
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: part.detach().clone() for name, part in parts.items()}
    model.float()
    try:
        yield
    finally:
        for name, part in parts.items():
            part.data = kept[name]


def _facts(view: View, name: str, what: str) -> list[float | None]:
    """Probability of the whole fact of each sequence, under the model as it is now."""
    return [math.exp(-score.loss * score.tokens) for score in view.facts(name, what)]


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return fmean(known) if known else 0.0
