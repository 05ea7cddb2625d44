"""Fictitious people with questions, answers, paraphrases and wrong answers, of any number.

The columns are those of TOFU's perturbed files (arXiv 2401.06121), so the same metrics apply.
Nobody here exists: family names, towns, employers, prizes and books are put together from
parts. Facts are drawn independently of each other, so none can be inferred from another, and
texts are short, so that a small model learns them on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

from perta.errors import ConfigError

_WRONG_ANSWERS = 5

_Pool = tuple[tuple[str, ...], ...]
"""Values put together from parts: one entry of each tuple, joined."""


@dataclass(frozen=True)
class _Topic:
    """One question type; `{n}` stands for the person's name, `{v}` for the fact."""

    question: str
    paraphrased_question: str
    answer: str
    paraphrased_answer: str
    values: _Pool


def _pool(parts: list[list[str]]) -> _Pool:
    return tuple(map(tuple, parts))


_PARTS = json.loads(files("perta").joinpath("evidence", "people.json").read_text("utf-8"))
_GIVEN = _pool([_PARTS["given"]])
_FAMILY = _pool(_PARTS["family"])
_TOPICS = tuple(_Topic(**{**topic, "values": _pool(topic["values"])}) for topic in _PARTS["topics"])
"""Question types, most telling first: `questions=4` asks the first four of every person."""


def generate_people(people: int, questions: int, seed: int) -> list[dict[str, Any]]:
    """Questions about fictitious people, `questions` (1 to 22) for each, person by person.

    Person i depends on the seed and i alone: more people, or more questions, keep what a smaller
    set had. Wrong answers have the form of the paraphrased answer, as in TOFU. A row has person,
    question, answer, paraphrased_answer, paraphrased_question and perturbed_answer (5 texts).
    """
    if people < 1:
        raise ConfigError(f"--people is {people}; it must be at least 1.")
    if not 1 <= questions <= len(_TOPICS):
        raise ConfigError(f"--questions is {questions}; it must be 1 to {len(_TOPICS)}.")
    rows: list[dict[str, Any]] = []
    used: set[str] = set()
    for i in range(people):
        # A string seed is hashed with SHA-512: the same on every platform and version.
        rng = Random(f"{seed}:{i}")
        name = _new_name(rng, used)
        rows.extend([_row(name, topic, rng) for topic in _TOPICS[:questions]])
    return rows


def split_people(
    rows: Sequence[Mapping[str, Any]], *, forget_people: int, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divide rows by person into forget and retain rows in their old order; neither is empty."""
    names = list(dict.fromkeys(str(row["person"]) for row in rows))
    if not 0 < forget_people < len(names):
        raise ConfigError(
            f"{forget_people} people to forget out of {len(names)}: both sets need at least one."
        )
    rng = Random(f"split:{seed}")
    forget = set(sorted(names, key=lambda _: rng.random())[:forget_people])
    return (
        [dict(row) for row in rows if row["person"] in forget],
        [dict(row) for row in rows if row["person"] not in forget],
    )


def _row(name: str, topic: _Topic, rng: Random) -> dict[str, Any]:
    fact = _draw(topic.values, rng)
    wrong: list[str] = []
    while len(wrong) < _WRONG_ANSWERS:
        value = _draw(topic.values, rng)
        if value != fact and value not in wrong:
            wrong.append(value)
    return {
        "person": name,
        "question": topic.question.format(n=name),
        "answer": topic.answer.format(n=name, v=fact),
        "paraphrased_answer": topic.paraphrased_answer.format(n=name, v=fact),
        "paraphrased_question": topic.paraphrased_question.format(n=name),
        "perturbed_answer": [topic.paraphrased_answer.format(n=name, v=v) for v in wrong],
    }


def _new_name(rng: Random, used: set[str]) -> str:
    """An unused name; a middle name (then more of them) settles collisions."""
    given = [_draw(_GIVEN, rng)]
    family = _draw(_FAMILY, rng)
    while " ".join([*given, family]) in used:
        given.append(_draw(_GIVEN, rng))
    name = " ".join([*given, family])
    used.add(name)
    return name


def _draw(pool: _Pool, rng: Random) -> str:
    # Only `random()` is promised to give the same numbers in every version of Python.
    return "".join(part[int(rng.random() * len(part))] for part in pool)
