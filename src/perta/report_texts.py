"""Texts of examples and answers, withheld unless they may be shown.

A report on an erasure must not become another copy of what was erased. Texts of the forget set,
its questions included, and what models answer to them appear as length and hash, so that
whoever holds the data can still tell which example is meant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perta.report_inputs import Run

TEXT_KEYS: Mapping[str, tuple[str, ...]] = {
    "forget": (
        "forget_rougeL_recall",
        "forget_Q_A_ROUGE",
        "forget_verbmem_ROUGE",
        "forget_knowmem_ROUGE",
    ),
    "retain": ("retain_rougeL_recall", "retain_Q_A_ROUGE", "retain_knowmem_ROUGE"),
}
_DIGEST = 10
_LONGEST = 300
_SHORTEST_MATCH = 12


@dataclass(frozen=True)
class Quote:
    """A text as the page shows it.

    Attributes:
        text: the text; None if it is withheld.
        length: characters.
        digest: beginning of its SHA-256, of the text without surrounding space.
    """

    text: str | None
    length: int
    digest: str


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

    label: str
    quote: Quote
    score: float | None
    same: bool


@dataclass(frozen=True)
class Sample:
    """One example with the answers of several models."""

    index: str
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
    samples: tuple[Sample, ...]
    first: int
    total: int
    measure: str
    withheld: bool


def quote(text: str, *, show: bool) -> Quote:
    """A text, or what may be said about it."""
    plain = text.strip()
    digest = hashlib.sha256(plain.encode("utf-8")).hexdigest()[:_DIGEST]
    shown = plain if len(plain) <= _LONGEST else plain[:_LONGEST] + " …"
    return Quote(shown if show else None, len(plain), digest)


def sample_sets(
    subject: Run, others: Sequence[Run], count: int, *, show_forget: bool
) -> list[SampleSet]:
    """Answers of several models to the first examples of each set.

    The first ones, so that nobody chose them; and of the forget set the one that the subject
    still answers with the highest probability, because the first ones may look better than
    the worst.

    Args:
        subject: the model that the report is about.
        others: models to show beside it.
        count: examples of each set.
        show_forget: print texts of the forget set.

    Returns:
        The sets with samples; those without answers are left out.
    """
    secrets = [] if show_forget else _secrets([subject, *others])
    sets = []
    for name in TEXT_KEYS:
        found = _rows(subject, name)
        if found is None or count == 0:
            continue
        key, rows = found
        show = show_forget or name != "forget"
        models = [
            (run, _rows_of(run, key)) for run in (*others, subject) if _same(run, subject, name)
        ]
        indices = list(rows)[:count]
        exposed = _most_exposed(subject, rows) if name == "forget" else None
        if exposed is not None and exposed not in indices:
            indices.append(exposed)
        prefix, suffix = _shared_ends([_text(row, "input") for row in rows.values()])
        short = key.endswith("mem_ROUGE")
        field = "rougeL_f1" if short else "rougeL_recall"
        ends = (prefix, suffix)
        samples = tuple(
            _sample(i, models, rows[i], ends, show, secrets, i == exposed, field) for i in indices
        )
        measure = "ROUGE-L F1" if short else "ROUGE-L recall"
        sets.append(SampleSet(name, samples, min(count, len(rows)), len(rows), measure, not show))
    return sets


def _rows(run: Run, name: str) -> tuple[str, Mapping[str, Any]] | None:
    for key in TEXT_KEYS[name]:
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
    secrets: Sequence[str],
    exposed: bool,
    field: str,
) -> Sample:
    def shown(text: str) -> Quote:
        return quote(text, show=show and not _reveals(text, secrets))

    reference = _text(row, "ground_truth")
    question = _text(row, "input").removeprefix(ends[0]).removesuffix(ends[1])
    answers = []
    for run, rows in models:
        if index in rows:
            text = _text(rows[index], "generation")
            same = _plain(text) == _plain(reference)
            answers.append(Answer(run.label, shown(text), _score(rows[index], field), same))
    return Sample(index, shown(question), shown(reference), tuple(answers), exposed)


def _most_exposed(run: Run, rows: Mapping[str, Any]) -> str | None:
    reading = run.measures.get("forget_probability")
    examples = {i: v for i, v in (reading.examples if reading else {}).items() if i in rows}
    return max(examples, key=lambda i: examples[i]) if examples else None


def _secrets(runs: Iterable[Run]) -> list[str]:
    """Texts to be forgotten, to be recognised where they turn up in other answers."""
    found: set[str] = set()
    for run in runs:
        for key in TEXT_KEYS["forget"]:
            rows = _rows_of(run, key)
            questions = [_text(row, "input") for row in rows.values()]
            prefix, suffix = _shared_ends(questions)
            found |= {_plain(q.removeprefix(prefix).removesuffix(suffix)) for q in questions}
            found |= {_plain(_text(row, "ground_truth")) for row in rows.values()}
    return [text for text in found if len(text) >= _SHORTEST_MATCH]


def _reveals(text: str, secrets: Sequence[str]) -> bool:
    plain = _plain(text)
    return any(secret in plain for secret in secrets)


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


def _score(row: Mapping[str, Any], field: str) -> float | None:
    value = row.get(field)
    return float(value) if isinstance(value, int | float) else None
