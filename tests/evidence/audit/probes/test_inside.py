"""Inside: the lens against plain passes, the depth score against an own exchange of states."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import log_probabilities, material, tiny_double, view
from transformers import PreTrainedModel

from helpers import tiny_llama
from perta.data.batch import IGNORE, Encoded
from perta.errors import ConfigError
from perta.evidence.audit.judge import Found
from perta.evidence.audit.probe import View
from perta.evidence.audit.probes.inside import Depth, Lens
from perta.evidence.metrics import depth_score


def test_the_score_by_hand() -> None:
    # Layers with gaps of 0.05 and less do not count; a fall, or more than all, is cut off.
    assert depth_score([0.05, 1.0, 2.0], [9.0, 0.5, 4.0]) == pytest.approx(2.5 / 3)
    assert depth_score([1.0, 1.0], [-1.0, 0.0]) == 0.0
    assert depth_score([0.5, 2.0], [0.5, 2.0]) == 1.0
    assert depth_score([0.05, -1.0], [1.0, 1.0]) is None


def test_the_lens_decodes_each_layer_with_norm_and_head(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    found = Lens().ways(view(made, model), "forget")
    assert list(found) == ["1", "2"]
    double = tiny_double(model)
    for i, fact in enumerate(made.facts["forget"]):
        # The last layer's states are what the model answers from.
        own = log_probabilities(model, fact.encoded)
        assert found["2"][i] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-3, abs=0)
        with torch.no_grad():
            states: Any = double(torch.tensor([fact.encoded.input_ids]), output_hidden_states=True)
            logits = double.lm_head(double.model.norm(states.hidden_states[1]))[0].log_softmax(-1)
        told = [
            float(logits[t - 1, label])
            for t, label in enumerate(fact.encoded.labels)
            if label != IGNORE
        ]
        assert found["1"][i] == pytest.approx(math.exp(sum(told) / len(told)), rel=1e-3, abs=0)


def given(*known: str, **models: PreTrainedModel) -> dict[Any, PreTrainedModel]:
    class Some(dict[Any, PreTrainedModel]):
        def __missing__(self, role: str) -> PreTrainedModel:
            raise ConfigError(f"no {role}")

    assert not known
    return Some(models)


def look(view: View, others: dict[Any, PreTrainedModel]) -> View:
    view.load = others.__getitem__
    return view


def exchanged(full: PreTrainedModel, other: PreTrainedModel, encoded: Encoded) -> list[float]:
    """Of each layer the mean loss of log p that other states make, one token after the other."""
    full, other = tiny_double(full), tiny_double(other)
    ids = torch.tensor([encoded.input_ids])
    places = [t - 1 for t, label in enumerate(encoded.labels) if label != IGNORE]
    found = []
    for layer in range(2):
        with torch.no_grad():
            states = _output(other, layer, ids)

            def put(
                _module: Any, _args: Any, output: Any, states: torch.Tensor = states
            ) -> torch.Tensor:
                changed: torch.Tensor = output.clone()
                for place in places:
                    changed[0, place] = states[0, place]
                return changed

            plain = full(ids).logits[0].log_softmax(-1)
            handle = full.model.layers[layer].register_forward_hook(put)
            changed = full(ids).logits[0].log_softmax(-1)
            handle.remove()
        drops = [
            float(plain[p, encoded.labels[p + 1]] - changed[p, encoded.labels[p + 1]])
            for p in places
        ]
        found.append(sum(drops) / len(drops))
    return found


def _output(model: PreTrainedModel, layer: int, ids: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _a, o: kept.append(o))
    model(ids)
    handle.remove()
    return kept[0]


def test_the_depth_is_that_of_an_own_exchange_of_states(tmp_path: Path) -> None:
    made = material(tmp_path)
    full, cleaned, retrained = (tiny_llama(seed=seed) for seed in range(3))
    probe = Depth()
    others = given(full=full, retrained=retrained, base=cleaned)
    rows = probe.run(look(view(made, cleaned), others), "forget")
    assert rows.more["reference"] == "retrained"
    for fact, score in zip(made.facts["forget"], rows.scores, strict=True):
        first = exchanged(full, retrained, fact.encoded)
        second = exchanged(full, cleaned, fact.encoded)
        depth = depth_score(first, second)
        assert score == (None if depth is None else pytest.approx(1 - depth, abs=1e-4))
    counted = [score for score in rows.scores if score is not None]
    assert len(set(counted)) > 1
    # The full model's own states carry all of it, and those that the yardstick is made of none.
    for model, expected in ((full, 1.0), (retrained, 0.0)):
        own = probe.run(look(view(made, model), others), "forget").scores
        assert [s for s in own if s is not None] == pytest.approx([expected] * len(counted))


def test_without_the_retrained_model_the_base_stands_for_it_and_without_both_nothing(
    tmp_path: Path,
) -> None:
    made, full, base = material(tmp_path), tiny_llama(), tiny_llama(seed=1)
    asked = look(view(made, full), given(full=full, base=base))
    assert Depth().run(asked, "forget").more["reference"] == "base"
    alone = look(view(made, full), given(full=full))
    assert set(Depth().run(alone, "forget").scores) == {None}


def test_facts_that_the_full_model_does_not_know_are_not_judged(tmp_path: Path) -> None:
    made, (full, base) = material(tmp_path), (tiny_llama(seed=seed) for seed in range(2))
    probe, others = Depth(), given(full=full, base=base)
    models = {"base": base, "full": full, "cleaned": full}
    rows = {}
    for role, model in models.items():
        seen = replace(look(view(made, model), others), role=role)
        rows[role] = probe.run(seen, "forget")
    known = rows["full"].more["known"]
    for fact, value in zip(made.facts["forget"], known, strict=True):
        own = log_probabilities(full, fact.encoded)
        assert math.log(value) == pytest.approx(sum(own) / len(own), rel=1e-3)
    scores = {role: {"forget": found.scores} for role, found in rows.items()}
    places = {"forget": range(1, len(known) + 1)}
    found = Found(scores, places, {}, {"full": {"forget": rows["full"].more}})
    judged = probe.judge(found)
    assert (judged.verdict, judged.reason) == ("not sure", "the full model does not know the facts")
    # A row that it knows is judged all the same: the cleaned model's states carry all of it.
    place = next(i for i, score in enumerate(rows["cleaned"].scores) if score is not None)
    one = [0.9 if i == place else value for i, value in enumerate(known)]
    judged = probe.judge(replace(found, more={"full": {"forget": {"known": one}}}))
    assert (judged.verdict, judged.leaking_rows) == ("leaks", (place + 1,))


def test_rows_that_the_full_model_does_not_know_count_for_nothing_beside_those_it_knows() -> None:
    kept = 14
    # The states of the cleaned model carry all of the rows that were never known, and of no other.
    known = [0.9] * kept + [0.05, 0.01]
    by_role = {
        "full": [1.0] * (kept + 2),
        "base": [0.0] * (kept + 2),
        "cleaned": [0.0] * kept + [1.0, 1.0],
    }
    scores = {role: {"forget": values} for role, values in by_role.items()}
    more = {"full": {"forget": {"known": known}}}
    found = Found(scores, {"forget": range(1, kept + 3)}, {}, more)
    judged = Depth().judge(found)
    assert (judged.verdict, judged.leaking_rows) == ("passed", ())
    assert (judged.value and judged.value.value, judged.value and judged.value.n) == (0.0, kept)
    known[-1] = 0.06
    judged = Depth().judge(found)
    assert (judged.verdict, judged.leaking_rows) == ("leaks", (kept + 2,))
