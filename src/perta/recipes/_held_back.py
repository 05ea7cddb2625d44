"""Retained rows that a run never uses, so that it can be judged on rows that gave it nothing.

Rows whose moments or importance are protected fare better than others of their kind. So a part of
the retain set, chosen by a fixed seed, takes no part in anything that makes the result, and
retention is judged on it. It is a tenth of the rows, at least 8 and at most 200, and only where
that leaves three quarters to protect (32 rows). Rows of one subject stay together where there are
at least 10 subjects, so that whole subjects are unseen, and equal rows always do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from perta.data.examples import Example, ExampleSet, rows_fingerprint
from perta.errors import ConfigError
from perta.models.facts import subjects
from perta.options import sample_count
from perta.store.atomic import write_text

SHARE, SMALLEST, LARGEST = 0.1, 8, 200
_MOST = 0.25
"""Largest share of the retain set that is held back by default."""
_SUBJECTS = 10
"""Subjects from which on they are held back whole."""
SEED = 0

PROTECTED, HELD_BACK = "retain_protected.jsonl", "retain_held_back.jsonl"


@dataclass(frozen=True)
class Split:
    """A retain set in two parts; `held_back` is None where all rows are used."""

    protected: ExampleSet
    held_back: ExampleSet | None = None
    by: Literal["subject", "row"] = "row"
    reason: str = ""

    def write(self, folder: Path) -> None:
        """Write both parts as JSONL that only this user can read."""
        if self.held_back is not None:
            write_rows(folder / PROTECTED, self.protected)
            write_rows(folder / HELD_BACK, self.held_back)

    def record(self) -> dict[str, Any]:
        """Numbers and fingerprints for the record of a run."""
        held = len(self.held_back) if self.held_back else 0
        found: dict[str, Any] = {"rows": held, "of": held + len(self.protected)}
        if self.held_back is None:
            return {**found, "reason": self.reason}
        return {
            **found,
            "by": self.by,
            "seed": SEED,
            "fingerprint": self.held_back.fingerprint,
            "protected": self.protected.fingerprint,
        }


def hold_back(examples: ExampleSet, wanted: str | None, subject_column: str | None) -> Split:
    """Keep a part of a retain set out of a run: a share or a count, or by default as said above.

    Raises:
        ConfigError: neither a share nor a count, or one that leaves nothing to protect.
    """
    n = len(examples)
    count = _count(n, wanted)
    if not count:
        asked = wanted is not None
        reason = "None was to be kept out." if asked else f"{n} are too few to keep some out."
        return Split(examples, reason=reason)
    numbers = subjects([example.fields for example in examples.examples], subject_column)
    by: Literal["subject", "row"] = "row"
    units: dict[object, list[int]] = {}
    if numbers is not None and len(set(numbers)) >= _SUBJECTS:
        by = "subject"
    for place, example in enumerate(examples.examples):
        unit = numbers[place] if by == "subject" and numbers else example.messages
        units.setdefault(unit, []).append(place)
    chosen = _choose(list(units.values()), count, max(count, int(_MOST * n)))
    if not chosen or len(chosen) == n:
        return Split(examples, reason="Its rows are too much alike to keep some out.")
    kept = [e for i, e in enumerate(examples.examples) if i not in chosen]
    held = [e for i, e in enumerate(examples.examples) if i in chosen]
    return Split(_part(examples, kept), _part(examples, held), by)


def _count(n: int, wanted: str | None) -> int:
    if wanted is None:
        count = max(SMALLEST, min(LARGEST, round(SHARE * n)))
        return count if count <= _MOST * n else 0
    if wanted.strip() == "0":
        return 0
    count = sample_count(wanted, "held-back", n)
    if count >= n:
        raise ConfigError(
            f"--held-back {wanted} leaves none of the {n} examples to keep for the edit to "
            "protect. Hold fewer back, or give a larger retain set."
        )
    return count


def _choose(units: list[list[int]], count: int, most: int) -> set[int]:
    """Whole units in a seeded order until there are `count` rows; none that would exceed `most`."""
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen: set[int] = set()
    for i in order:
        if len(chosen) >= count:
            break
        if len(chosen) + len(units[i]) <= most:
            chosen.update(units[i])
    return chosen


def _part(examples: ExampleSet, rows: list[Example]) -> ExampleSet:
    return replace(
        examples,
        examples=tuple(rows),
        fingerprint=rows_fingerprint([dict(example.fields) for example in rows]),
    )


def write_rows(file: Path, examples: ExampleSet) -> None:
    """Write the rows of a set as JSONL, column by column as they were read."""
    lines = (_line(example.fields) + "\n" for example in examples.examples)
    write_text(file, "".join(lines), private=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), default=str)
