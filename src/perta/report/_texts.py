"""Texts of examples and answers, withheld unless they may be shown.

A report on an erasure must not become another copy of what was erased, nor of what others told:
texts of all sets, questions included, and what models answer to them appear as their row and
length. No part of them is shown and no hash of them, because whoever guesses a short text, such
as an account number, could check the guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perta.evidence.measures import row_number
from perta.report.collect import Run

_TEXT_KEYS: Mapping[str, tuple[str, ...]] = {
    "forget": (
        "forget_rougeL_recall",
        "forget_Q_A_ROUGE",
        "forget_verbmem_ROUGE",
        "forget_knowmem_ROUGE",
    ),
    "retain": ("retain_rougeL_recall", "retain_Q_A_ROUGE", "retain_knowmem_ROUGE"),
}
_LONGEST = 300


@dataclass(frozen=True)
class Quote:
    """A text as the page shows it; None if it is withheld."""

    text: str | None = field(repr=False)
    length: int


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

    label: str
    quote: Quote
    score: float | None
    same: bool


@dataclass(frozen=True)
class _Sample:
    """One example, by its number in its file, with the answers of several models."""

    number: str
    question: Quote
    reference: Quote
    answers: tuple[Answer, ...]
    exposed: bool = False


@dataclass(frozen=True)
class SampleSet:
    """Samples of one set: the `first` ones, and the most exposed one if it is not among them.

    `withheld` says whether its texts are.
    """

    name: str
    samples: tuple[_Sample, ...]
    first: int
    total: int
    measure: str
    withheld: bool


def quote(text: str, *, show: bool) -> Quote:
    """A text, or what may be said about it."""
    plain = text.strip()
    shown = plain if len(plain) <= _LONGEST else plain[:_LONGEST] + " …"
    return Quote(shown if show else None, len(plain))


def sample_sets(subject: Run, others: Sequence[Run], count: int, *, show: bool) -> list[SampleSet]:
    """Answers of several models to the first examples of each set that has any.

    The first ones, so that nobody chose them; and of the forget set the one that the subject
    still answers with the highest probability, because the first ones may look better than
    the worst.
    """
    sets = []
    for name in _TEXT_KEYS:
        found = _rows(subject, name)
        if found is None or count == 0:
            continue
        key, rows = found
        models = [
            (run, _rows_of(run, key)) for run in (*others, subject) if _same(run, subject, name)
        ]
        indices = list(rows)[:count]
        exposed = _most_exposed(subject, rows) if name == "forget" else None
        if exposed is not None and exposed not in indices:
            indices.append(exposed)
        prefix, suffix = _shared_ends([_text(row, "input") for row in rows.values()])
        short = key.endswith("mem_ROUGE")
        scored = "rougeL_f1" if short else "rougeL_recall"
        ends = (prefix, suffix)
        samples = tuple(
            replace(
                _sample(i, models, rows[i], ends, show, i == exposed, scored),
                number=row_number(subject.results, name, i),
            )
            for i in indices
        )
        measure = "ROUGE-L F1" if short else "ROUGE-L recall"
        sets.append(SampleSet(name, samples, min(count, len(rows)), len(rows), measure, not show))
    return sets


def _rows(run: Run, name: str) -> tuple[str, Mapping[str, Any]] | None:
    for key in _TEXT_KEYS[name]:
        rows = _rows_of(run, key)
        if rows:
            return key, rows
    return None


def _rows_of(run: Run, key: str) -> Mapping[str, Any]:
    rows = run.results.get(key, {}).get("value_by_index", {})
    return {
        str(index): row
        for index, row in rows.items()
        if isinstance(row, Mapping) and isinstance(row.get("generation"), str)
    }


def _same(run: Run, subject: Run, name: str) -> bool:
    return run is subject or run.same_set(subject, name)


def _sample(
    index: str,
    models: Iterable[tuple[Run, Mapping[str, Any]]],
    row: Mapping[str, Any],
    ends: tuple[str, str],
    show: bool,
    exposed: bool,
    scored: str,
) -> _Sample:
    def shown(text: str) -> Quote:
        return quote(text, show=show)

    reference = _text(row, "ground_truth")
    question = _text(row, "input").removeprefix(ends[0]).removesuffix(ends[1])
    answers = []
    for run, rows in models:
        if index in rows:
            text = _text(rows[index], "generation")
            same = _plain(text) == _plain(reference)
            answers.append(Answer(run.label, shown(text), _score(rows[index], scored), same))
    return _Sample(index, shown(question), shown(reference), tuple(answers), exposed)


def _most_exposed(run: Run, rows: Mapping[str, Any]) -> str | None:
    reading = run.measures.get("forget_probability")
    examples = {i: v for i, v in (reading.examples if reading else {}).items() if i in rows}
    return max(examples, key=lambda i: examples[i]) if examples else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _shared_ends(texts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with: the system message and the chat's own words."""
    if len(texts) < 2:
        return "", ""
    prefix = _common_start(texts)
    prefix = prefix[: max(prefix.rfind(c) for c in "\n ") + 1]
    # Questions that all begin alike ("Who is …") keep their beginning.
    sentence = max(prefix.rfind(c) for c in "\n.:")
    prefix = prefix[: sentence + 1]
    suffix = _common_start([text[::-1] for text in texts])[::-1]
    turn = re.search(r"(assistant|model|answer)\W*$", suffix, re.IGNORECASE)
    return prefix, turn[0] if turn else suffix[len(suffix.rstrip()) :]


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    same = next((i for i, c in enumerate(first) if c != last[i : i + 1]), len(first))
    return first[:same]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _score(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None
