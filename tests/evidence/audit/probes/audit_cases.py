"""Views of tiny models, and float64 passes to check what they find."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import load_examples, subjects
from perta.data.rows import write_jsonl
from perta.evidence.audit.probe import Effort, Material, Role, View
from perta.evidence.benchmark import Journal
from perta.evidence.people import generate_people
from perta.models.facts import find_facts
from perta.options import DataConfig


def material(folder: Path, people: int = 3, questions: int = 2, **seeds: int) -> Material:
    """Fictitious people in every set: by default seed 0 to forget, 1 to keep and 2 unseen."""
    config = DataConfig()
    sets = {}
    for name, seed in {"forget": 0, "retain": 1, "holdout": 2, **seeds}.items():
        rows = generate_people(people=people, questions=questions, seed=seed)
        sets[name] = load_examples(write_jsonl(rows, folder / f"{name}.jsonl"), config)
    facts = {name: find_facts(found, tiny_tokenizer(), config) for name, found in sets.items()}
    numbers = {name: subjects([e.fields for e in s.examples]) for name, s in sets.items()}
    return Material(sets, facts, config, numbers)


def view(
    made: Material,
    model: PreTrainedModel | None = None,
    *,
    role: Role = "cleaned",
    journal: Journal | None = None,
    effort: Effort | None = None,
    others: Mapping[Role, PreTrainedModel] | None = None,
) -> View:
    """A view of a tiny model; new answers end after 8 tokens."""
    return View(
        role,
        model or tiny_llama(),
        tiny_tokenizer(),
        made,
        effort or Effort(max_new_tokens=8),
        journal or Journal(None, ""),
        dict(others or {}).__getitem__,
    )


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, encoded: Encoded) -> list[float]:
    """Log-probability of each labelled token, from one plain pass in float64."""
    logits = tiny_double(model)(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    return [
        float(logits[place - 1, label])
        for place, label in enumerate(encoded.labels)
        if place and label != IGNORE
    ]


def tiny_double(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64; it is left as it is."""
    double: PreTrainedModel = type(model)(model.config).double().eval()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return double
