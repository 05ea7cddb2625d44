"""Inside: what the states between the layers hold of the fact, whatever the model says.

Sources: logit lens, nostalgebraist 2020, after Patil et al., arXiv 2309.17410; unlearning depth
score, Lee et al., arXiv 2605.24614.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perta.data.batch import IGNORE, Batch, bucketed
from perta.errors import ConfigError
from perta.evidence.audit.judge import Found, Judgement
from perta.evidence.audit.probe import Probe, Role, Rows, View
from perta.evidence.audit.probes._variants import Variants, Ways
from perta.evidence.metrics import depth_score
from perta.evidence.remains import SMALLEST_GAP
from perta.models.load import pad_id
from perta.models.loss import answer_logits, token_losses
from perta.models.states import decoded, decoder_layers, exchanged, layer_states

_ROWS = 4  # most rows of a pass whose logits are needed at every place
_STAGES = ("taken by one that never saw it", "taken by this one")


class Lens(Variants):
    """Probability of the fact's tokens by what each layer's states would be decoded to."""

    name, group, way = "lens", "inside", "layer"
    level = "full"
    guessable = True
    passes = 3.0  # one for the states, and about two that decode them

    def ways(self, view: View, name: str) -> Ways:
        """Scores of the rows of one set under one model, by layer."""
        made: dict[str, list[float | None]] = view.kept(
            f"{self.name}/{name}", lambda: _by_layer(view, name)
        )
        return made


class Depth(Probe):
    """One minus the unlearning depth score: how little the model's states take from the full one.

    Every layer's states at the positions that predict the fact's tokens are put into the full
    model: once those of a model that never saw the fact (retrained, else base), once the judged
    one's.
    """

    name, group = "depth", "inside"
    level = "full"
    sets = ("forget",)
    needs = ("full",)
    passes = 1.0 + 32  # one for the states, and one per layer of a usual model

    def __init__(self) -> None:
        self._first: list[list[float]] = []
        self._reference: Role | None = None

    def run(self, view: View, name: str) -> Rows:
        """Of each row one minus its score; beside it what each layer takes away, in the mean."""
        count = len(view.material.facts[name])
        batches = _batches(view, name, view.effort.batch_size)
        own = _states(view.model, batches)
        theirs = None if self._first else self._unknowing(view, batches)
        if not self._first and theirs is None:
            return Rows([None] * count)
        full = view.load("full")
        if theirs is not None:
            self._first = _gaps(full, batches, theirs, count)
        mine = _gaps(full, batches, own, count)
        depths = [depth_score(one, two) for one, two in zip(self._first, mine, strict=True)]
        means = [[fmean(layer) for layer in zip(*by, strict=True)] for by in (self._first, mine)]
        more: dict[str, Any] = {
            "reference": self._reference,
            "layers": dict(zip(_STAGES, means, strict=True)),
        }
        if view.role == "full":
            more["known"] = _known(full, batches, count)
        return Rows([None if d is None else 1.0 - d for d in depths], more)

    def judge(self, found: Found) -> Judgement:
        """By the rows whose facts the full model knows; that model has 0 of itself."""
        noted = {role: by_set.get("forget", {}) for role, by_set in found.more.items()}
        known = noted.get("full", {}).get("known", ())
        if known and max(known) <= SMALLEST_GAP:
            return Judgement("not sure", "the full model does not know the facts")
        reference = noted.get("cleaned", {}).get("reference")
        scores = {
            role: {
                "forget": [
                    s if k > SMALLEST_GAP else None
                    for s, k in zip(by_set["forget"], known, strict=True)
                ]
            }
            for role, by_set in found.scores.items()
            if known and role != reference
        }
        judged = self.judge_way(replace(found, scores=scores or found.scores))
        if reference and judged.yardstick is None:
            why = "the scores are made with the only model that never saw the rows; give another"
            return replace(judged, verdict="not sure", reason=why)
        return judged

    def _unknowing(self, view: View, batches: Sequence[Batch]) -> list[Tensor] | None:
        """States of a model that never saw the facts; None where there is no such model."""
        roles: tuple[Role, ...] = ("retrained", "base")
        for role in roles:
            try:
                found = _states(view.load(role), batches)
            except ConfigError:  # it was not given
                continue
            self._reference = role
            return found
        return None


def _batches(view: View, name: str, size: int) -> list[Batch]:
    facts = [fact.encoded for fact in view.material.facts[name]]
    return bucketed(facts, size, pad_id(view.tokenizer))


def _by_layer(view: View, name: str) -> dict[str, list[float | None]]:
    """Layer, from 1 -> geometric mean of the probabilities of each fact's tokens."""
    found: list[list[float | None]] = [
        [None] * len(view.material.facts[name]) for _ in range(len(decoder_layers(view.model)))
    ]
    for batch in _batches(view, name, min(_ROWS, view.effort.batch_size)):
        here = batch.to(view.model.device)
        values = decoded(view.model, here, layer_states(view.model, here))
        for layer, row in enumerate(_by_row(values, batch)):
            for place, mean in row.items():
                found[layer][place] = math.exp(mean)
    return {str(layer): scores for layer, scores in enumerate(found, 1)}


def _by_row(values: Tensor, batch: Batch) -> list[dict[int, float]]:
    """Of each layer the mean of its values, (L, N), over the tokens of each row."""
    places = batch.index[(batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)[0]].tolist()
    found = []
    for layer in values.double().tolist():
        told: dict[int, list[float]] = {}
        for place, value in zip(places, layer, strict=True):
            told.setdefault(place, []).append(value)
        found.append({place: fmean(of_row) for place, of_row in told.items()})
    return found


def _states(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Of each batch the states of every layer, (L, N, D), on the CPU."""
    return [layer_states(model, batch.to(model.device)).cpu() for batch in batches]


def _known(full: PreTrainedModel, batches: Sequence[Batch], rows: int) -> list[float]:
    """Geometric mean of the probabilities that the full model gives each fact's tokens."""
    found = [0.0] * rows
    for batch in batches:
        (means,) = _by_row(_plain(full, batch.to(full.device))[None], batch)
        for place, mean in means.items():
            found[place] = math.exp(mean)
    return found


def _gaps(
    full: PreTrainedModel, batches: Sequence[Batch], states: Sequence[Tensor], rows: int
) -> list[list[float]]:
    """How much less likely other states make each fact in the full model: row -> layer, nats."""
    found: list[list[float]] = [[] for _ in range(rows)]
    for batch, given in zip(batches, states, strict=True):
        here = batch.to(full.device)
        plain = _plain(full, here)
        taken = [plain - exchanged(full, here, i, s.to(full.device)) for i, s in enumerate(given)]
        for layer in _by_row(torch.stack(taken), batch):
            for place, value in layer.items():
                found[place].append(value)
    return found


@torch.no_grad()
def _plain(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability of each label, (N,)."""
    return -token_losses(answer_logits(model, batch))
