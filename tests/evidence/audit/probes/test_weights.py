"""Changed weights: rounding against plain passes over rounded models, relearning against a loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import log_probabilities, material, view
from transformers import PreTrainedModel

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import Encoded
from perta.data.tokens import encode_examples
from perta.evidence.audit.judge import Found
from perta.evidence.audit.probe import Relearning
from perta.evidence.audit.probes.weights import OWN, RETAINED, UNRELATED, Relearned, Rounding
from perta.evidence.metrics import likeness, relearning_robustness, rounding_robustness
from perta.models.formats.rounding import SCHEMES

TEXTS = ["Rivers run to the sea, and the sea is never full.", "An object has an identity."]


def test_facts_are_those_of_a_model_with_rounded_weights(tmp_path: Path) -> None:
    made, model = material(tmp_path), tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Rounding().run(view(made, model), "forget")
    for scheme, scores in rows.more["ways"].items():
        own = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if "proj" in name:
                    parameter.copy_(SCHEMES[scheme](parameter))
        for fact, score in zip(made.facts["forget"], scores, strict=True):
            expected = sum(log_probabilities(own, fact.encoded))
            assert math.log(score) == pytest.approx(expected, rel=1e-4)
    assert set(rows.more["ways"]) == set(SCHEMES)
    for fact, score in zip(made.facts["forget"], rows.more["before"], strict=True):
        expected = sum(log_probabilities(model, fact.encoded))
        assert math.log(score) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_robustness_by_hand() -> None:
    assert rounding_robustness(0.1, 0.4) == 0.25
    assert rounding_robustness(0.4, 0.1) == 1.0
    assert rounding_robustness(0.0, 0.0) == 1.0
    assert rounding_robustness(0.0, 0.1) == 0.0
    assert relearning_robustness(0.1, 0.4) == 0.25
    assert relearning_robustness(0.4, 0.1) == 1.0
    assert relearning_robustness(0.0, -0.1) == 1.0
    assert relearning_robustness(-0.1, 0.1) == 0.0
    # 1 - 0.3 / 0.5
    assert likeness(0.1, 0.4) == likeness(0.4, 0.1) == pytest.approx(0.4)
    assert likeness(0.0, 0.0) == 1.0


def test_the_worst_scheme_counts_and_q_is_noted() -> None:
    low, high = [0.1] * 20, [0.4] * 20
    ways = {"int8": low, "nf4": high}
    more: dict[str, Any] = {
        "cleaned": {"forget": {"ways": ways, "before": low}},
        "full": {"forget": {"ways": {"int8": [1.0] * 20, "nf4": [1.0] * 20}}},
        "retrained": {"forget": {"ways": {"int8": low, "nf4": low}}},
    }
    rows = {"forget": range(1, 21)}
    judgement = Rounding().judge(Found({"cleaned": {"forget": high}}, rows, {"forget": None}, more))
    assert judgement.verdict == "leaks"
    assert judgement.reason.startswith("scheme `nf4`: 20 of 20 rows stand out")
    expected = {"Q int8": 1.0, "Q nf4": 0.25, "Q int8, symmetric": 1.0, "Q nf4, symmetric": 0.4}
    assert judgement.notes == pytest.approx(expected)


def near(expected: Sequence[float]) -> Any:
    """Equal up to rounding, however small."""
    return pytest.approx(expected, rel=1e-3, abs=0)


def descend(model: PreTrainedModel, shown: Sequence[Encoded], after: Callable[[int], None]) -> None:
    """Two steps of plain gradient descent on the mean loss of all rows."""
    for step in (1, 2):
        model.zero_grad()
        for row in shown:
            ids = torch.tensor([row.input_ids])
            (model(ids, labels=torch.tensor([row.labels])).loss / len(shown)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-0.1)
        model.zero_grad()
        after(step)


def once(model: PreTrainedModel, shown: Sequence[Encoded]) -> None:
    descend(model, shown, lambda _step: None)


def test_facts_of_other_rows_are_asked_after_every_step(tmp_path: Path) -> None:
    made = material(tmp_path)
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = replace(view(made, model), relearning=Relearning(descend, 4, TEXTS, once))
    rows = Relearned().run(given, "forget")
    encoded = {n: encode_examples(s, tiny_tokenizer()).encoded for n, s in made.sets.items()}
    facts = made.facts["forget"]
    own = copy.deepcopy(model)
    curve = [[math.exp(sum(log_probabilities(own, f.encoded))) for f in facts]]

    def after(_step: int) -> None:
        curve.append([math.exp(sum(log_probabilities(own, f.encoded))) for f in facts])

    descend(own, [encoded["forget"][0], encoded["forget"][4]], after)
    hidden = [1, 2, 3, 5]
    scores = rows.more["ways"][OWN]
    assert [i for i, score in enumerate(scores) if score is not None] == hidden
    assert [scores[i] for i in hidden] == near([curve[-1][i] for i in hidden])
    means = [sum(step[i] for i in hidden) / 4 for step in curve]
    assert rows.more["curves"][OWN] == near(means)
    assert all(score is not None for score in rows.more["ways"][RETAINED])
    assert set(rows.more["ways"]) == {OWN, RETAINED, UNRELATED}
    # As published all rows are shown, and all are asked.
    taught = copy.deepcopy(model)
    once(taught, encoded["forget"])
    found = [
        sum(math.exp(sum(log_probabilities(m, f.encoded))) for f in facts) / len(facts)
        for m in (model, taught)
    ]
    assert rows.more["published"] == near(found)
    # The three trainings differ, and none of them stays.
    assert len({tuple(map(str, way)) for way in rows.more["ways"].values()}) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_half_precision_is_trained_in_single_and_comes_back(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def note(
        trained: PreTrainedModel, shown: Sequence[Encoded], after: Callable[[int], None]
    ) -> None:
        seen.append(trained.dtype)
        descend(trained, shown, after)

    made = material(tmp_path)
    Relearned().run(
        replace(view(made, model), relearning=Relearning(note, 4, TEXTS, once)), "forget"
    )
    assert set(seen) == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_r_is_the_rise_of_the_retrained_model_beside_the_cleaned_one() -> None:
    def one(*curve: float, **more: object) -> dict[str, dict[str, object]]:
        ways, curves = {OWN: [None, *[curve[-1]] * 20]}, {OWN: list(curve)}
        return {"forget": {"ways": ways, "curves": curves, **more}}

    more = {
        "cleaned": one(0.0, 0.4, published=[0.0, 0.2]),
        "full": one(1.0, 1.0),
        "retrained": one(0.1, 0.2, published=[0.1, 0.2]),
    }
    rows = {"forget": range(1, 22)}
    found = Found({"cleaned": {"forget": [None, *[0.4] * 20]}}, rows, {"forget": None}, more)
    judgement = Relearned().judge(found)
    own, theirs = f"R {OWN}", "R as published"
    expected = {own: 0.25, f"{own}, symmetric": 0.4, theirs: 0.5, f"{theirs}, symmetric": 2 / 3}
    assert judgement.notes == pytest.approx(expected)
    assert judgement.verdict == "leaks"


def test_without_training_nothing_is_said(tmp_path: Path) -> None:
    probe, given = Relearned(), view(material(tmp_path))
    rows = probe.run(given, "forget")
    assert rows.more == {"ways": {}, "curves": {}}
    found = Found({"cleaned": {"forget": rows.scores}}, {}, {}, {"cleaned": {"forget": rows.more}})
    assert probe.judge(found).verdict == "not sure"
