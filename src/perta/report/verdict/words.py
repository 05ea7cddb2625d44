"""Outcomes, checks and numbers of a verdict in words; `words.toml` holds the sentences."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Status = Literal["met", "unclear", "partly", "not", "unknown"]
Calibration = Literal["retrained", "holdout", "base"]

RANK: Mapping[Status, int] = {"met": 0, "unclear": 1, "partly": 2, "not": 3, "unknown": 4}
WORDS: Mapping[Status, str] = {
    "met": "met",
    "unclear": "not sure",
    "partly": "partly met",
    "not": "not met",
    "unknown": "cannot tell",
}


@dataclass(frozen=True)
class Check:
    """One measure of the verdict."""

    key: str
    label: str
    before: float | None  # value of the full model
    after: float  # value of the edited model
    reference: float | None  # what it is judged against; None where there is nothing
    n: int  # examples behind it; 0 where only a mean is known
    core: bool  # whether it counts for the verdict
    status: Status = "unknown"
    # What remains (forgetting) or is kept (retention), as a share, and the ends of its interval.
    share: float | None = None
    share_low: float | None = None
    share_high: float | None = None
    # Numbers in the file of rows that are still there (forgetting) or conspicuous.
    rows: tuple[str, ...] = ()
    subjects: tuple[int, ...] = ()
    # Much is left of these too, which may be chance.
    doubtful_rows: tuple[str, ...] = ()
    doubtful_subjects: tuple[int, ...] = ()
    doubt: bool = False  # not sure for what was found, and not only for want of rows


def number(value: float | None, digits: int = 2) -> str:
    """A value for a sentence, small ones with as many digits as they need."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1g}" if abs(value) >= 1e-4 else f"{value:.0e}"
    return f"{value:.{digits}f}"


def told(section: str, name: str, **values: Any) -> str:
    """One text of `words.toml`, its gaps filled with the values."""
    return _words()[section][name].format(**values)


def ways() -> Mapping[str, str]:
    """What the ways to find a fact are."""
    return _words()["ways"]


@cache
def _words() -> dict[str, dict[str, str]]:
    text = files("perta").joinpath("report", "verdict", "words.toml").read_text("utf-8")
    return tomllib.loads(text)
