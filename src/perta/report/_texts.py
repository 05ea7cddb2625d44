"""Texts of examples and answers, withheld unless they may be shown.

A report on an erasure must not become another copy of what was erased, nor of what others told:
texts of all sets, questions included, and what models answer to them appear as their row and
length. No part of them is shown and no hash of them, because whoever guesses a short text, such
as an account number, could check the guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perta.data.words import common_prefix
from perta.evidence.measures import row_number, rows_of
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
    """Samples of one set: the `first` ones, and the most exposed one if it is not among them."""

    name: str
    samples: tuple[_Sample, ...]
    first: int
    total: int
    measure: str
    withheld: bool  # whether its texts are


def quote(text: str, *, show: bool) -> Quote:
    """A text, or what may be said about it."""
    plain = text.strip()
    shown = plain if len(plain) <= _LONGEST else plain[:_LONGEST] + " …"
    return Quote(shown if show else None, len(plain))


def sample_sets(subject: Run, others: Sequence[Run], count: int, *, show: bool) -> list[SampleSet]:
    """Answers of several models to the first examples of each set that has any.

    The first ones, so that nobody chose them; and of the forget set the one that the subject still
    answers with the highest probability, because the first ones may look better than the worst.
    """
    sets = []
    for name, keys in _TEXT_KEYS.items() if count else ():
        key = next((key for key in keys if _rows_of(subject, key)), None)
        if key is None:
            continue
        rows = _rows_of(subject, key)
        same = [run for run in others if run.same_set(subject, name)]
        models = [(run, _rows_of(run, key)) for run in (*same, subject)]
        indices = list(rows)[:count]
        exposed = _most_exposed(subject, rows) if name == "forget" else None
        if exposed is not None and exposed not in indices:
            indices.append(exposed)
        ends = _shared_ends([_text(row, "input") for row in rows.values()])
        scored, measure = "rougeL_recall", "ROUGE-L recall"
        if key.endswith("mem_ROUGE"):
            scored, measure = "rougeL_f1", "ROUGE-L F1"
        samples = [
            _Sample(
                row_number(subject.results, name, i),
                quote(
                    _text(rows[i], "input").removeprefix(ends[0]).removesuffix(ends[1]), show=show
                ),
                quote(_text(rows[i], "ground_truth"), show=show),
                tuple(
                    _answer(run, found[i], rows[i], scored, show=show)
                    for run, found in models
                    if i in found
                ),
                i == exposed,
            )
            for i in indices
        ]
        first = min(count, len(rows))
        sets.append(SampleSet(name, tuple(samples), first, len(rows), measure, not show))
    return sets


def _rows_of(run: Run, key: str) -> Mapping[str, Any]:
    rows = rows_of(run.results, key)
    return {i: row for i, row in rows.items() if isinstance(row.get("generation"), str)}


def _answer(
    run: Run, row: Mapping[str, Any], asked: Mapping[str, Any], scored: str, *, show: bool
) -> Answer:
    text, score = _text(row, "generation"), row.get(scored)
    same = _plain(text) == _plain(_text(asked, "ground_truth"))
    known = float(score) if isinstance(score, int | float) else None
    return Answer(run.label, quote(text, show=show), known, same)


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
    prefix = texts[0][: common_prefix(*texts)]
    prefix = prefix[: max(prefix.rfind(c) for c in "\n ") + 1]
    # Questions that all begin alike ("Who is …") keep their beginning.
    sentence = max(prefix.rfind(c) for c in "\n.:")
    prefix = prefix[: sentence + 1]
    suffix = texts[0][len(texts[0]) - common_prefix(*(text[::-1] for text in texts)) :]
    turn = re.search(r"(assistant|model|answer)\W*$", suffix, re.IGNORECASE)
    return prefix, turn[0] if turn else suffix[len(suffix.rstrip()) :]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""
