"""How a probe's scores are judged: relative to a model, or to rows, that never had the data.

With x_i the cleaned model's score of forget row i, f_i the full model's and y_i the yardstick's
(of unseen rows: their mean), all in [0, 1], what is left is

    share = mean(x - y) / mean(f - y),      share_i = (x_i - y_i) / (f_i - y_i)

The interval of the numerator holds its coverage at any number of rows (see `intervals`), over
subjects where they are known. Rows and subjects are still there by the rule of `remains`; scores
with steps, such as whether an answer comes first, say nothing of a single row.

    leaks      a row or a subject is still there, more rows stand out than of unseen ones, or
               share > 0.10 and its interval lies above 0
    passed     share <= 0.10, upper end <= 0.25, none of that, and enough rows: among n of which
               none is still there, the share of such rows may be up to 1 - 0.025^(1/n) <= 0.25
    not sure   everything else, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from perta.evidence.intervals import Interval, mean_interval, share_interval
from perta.evidence.measures import groups_of
from perta.evidence.remains import (
    BY_CHANCE,
    REMAINDER,
    REMAINDER_SURE,
    SMALLEST_GAP,
    Values,
    excess,
    left_of_rows,
    rows_still_there,
    subject_means,
    subjects_still_there,
)

Verdict = Literal["passed", "leaks", "not sure", "harmed"]
"""`harmed` is said of what was to stay."""
YardstickName = Literal["retrained", "holdout", "base"]
WORDS: Mapping[YardstickName, str] = {
    "retrained": "the retrained model",
    "holdout": "unseen rows",
    "base": "the base model",
}
_YARDSTICKS: Mapping[YardstickName, tuple[str, str]] = {
    "retrained": ("retrained", "forget"),
    "holdout": ("cleaned", "holdout"),
    "base": ("base", "forget"),
}
"""Role of the model and set of the rows, the best first."""
Scores = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Role of the model -> set -> score of each sequence."""


@dataclass(frozen=True)
class Found:
    """What one probe found.

    Attributes:
        scores: of every model on every set that the probe looks at.
        rows: of each set the number in its file of each sequence's row.
        subjects: of each set whom each sequence is about; None where nothing says so.
        more: role -> set -> what else the probe noted.
    """

    scores: Scores
    rows: Mapping[str, Sequence[int]]
    subjects: Mapping[str, Sequence[int] | None]
    more: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def values(self, role: str, name: str = "forget") -> dict[str, float]:
        """Scores by place, without rows that have none; empty where nothing was measured."""
        scores = self.scores.get(role, {}).get(name, ())
        return {str(i): value for i, value in enumerate(scores) if value is not None}

    def people(self, name: str = "forget") -> dict[str, int]:
        """Subject by place."""
        return {str(i): number for i, number in enumerate(self.subjects.get(name) or ())}

    def groups(self, name: str = "forget") -> dict[str, int]:
        """By place whom a row is about; where nothing says so, the row that was cut up."""
        numbers = self.rows.get(name, ())
        cut = len(set(numbers)) < len(numbers)
        return self.people(name) or ({str(i): row for i, row in enumerate(numbers)} if cut else {})

    def count(self, values: Values, name: str = "forget") -> int:
        """How many rows values are of; several sequences of one row are one."""
        return len({self.rows[name][int(place)] for place in values})


@dataclass(frozen=True)
class Judgement:
    """What a probe says of the cleaned model.

    Attributes:
        verdict: `passed`, `leaks` or `not sure`; of what was to stay `harmed` in place of `leaks`.
        reason: in one sentence.
        value: of the cleaned model, with its interval.
        yardstick: name, and value with its interval; None without one.
        full: value of the full model; None without it.
        worst_subject: number and value of the subject of whom most is known.
        worst_row: number in the file and value of such a row.
        leaking_rows: numbers in the file of rows that are still there.
        leaking_subjects: numbers of subjects.
        notes: other figures by name.
    """

    verdict: Verdict
    reason: str
    value: Interval | None = None
    yardstick: tuple[YardstickName, Interval] | None = None
    full: float | None = None
    worst_subject: tuple[int, float] | None = None
    worst_row: tuple[int, float] | None = None
    leaking_rows: tuple[int, ...] = ()
    leaking_subjects: tuple[int, ...] = ()
    notes: Mapping[str, float] = field(default_factory=dict)


def yardstick_of(found: Found) -> tuple[YardstickName, dict[str, float], dict[str, int]] | None:
    """The best there is, its values and subjects: retrained, else unseen rows, else base."""
    for name, (role, rows) in _YARDSTICKS.items():
        if values := found.values(role, rows):
            return name, values, found.people(rows)
    return None


def judge_remains(found: Found, *, wording: bool = False, by_row: bool = True) -> Judgement:
    """The verdict on scores in [0, 1] of what is left; the rule is at the top of this module.

    Args:
        found: scores of all models.
        wording: the scores count the words around the facts, which the base model never saw: by
            it alone nothing passes and nothing leaks.
        by_row: single rows are judged too.
    """
    values, known = found.values("cleaned"), found.values("full")
    figures = described(found)
    if figures.value is None:
        return Judgement("not sure", "no row of the forget set has a score")
    yardstick = yardstick_of(found)
    if yardstick is None:
        return _told(figures, "not sure", "there is no yardstick")
    name, usual, people = yardstick
    if wording and name == "base":
        why = "the base model has never seen the words around the facts; give --retrained"
        return _told(figures, "not sure", why)
    gap = fmean(known.values()) - fmean(usual.values()) if known else 1.0
    if gap <= SMALLEST_GAP:
        why = f"the full model knew no more than {WORDS[name]} by this probe"
        return _told(figures, "not sure", why)
    paired = name != "holdout"
    subjects = found.people()
    groups = (found.groups(), found.groups(_YARDSTICKS[name][1]))
    difference = excess(values, usual, known, groups, paired=paired)
    if by_row:
        left = left_of_rows(values, known, usual, paired=paired)
        there, standing = rows_still_there(left, values, usual)
        persons = subjects_still_there(values, known, usual, (subjects, people), paired=paired)
        rows = dict.fromkeys(found.rows["forget"][int(place)] for place in there)
        figures = replace(figures, leaking_rows=tuple(rows), leaking_subjects=persons)
        if said := _standing(figures, standing, len(values)):
            return _told(figures, "leaks", said)
    return _in_the_mean(figures, difference, gap, found.count(values), WORDS[name])


def _standing(figures: Judgement, standing: int, n: int) -> str | None:
    """What single rows and subjects say, where they say that it leaks."""
    counts = [(len(figures.leaking_rows), "row"), (len(figures.leaking_subjects), "subject")]
    said = [f"{c} {word}{'s' if c > 1 else ''}" for c, word in counts if c]
    if said:
        return f"still there: {' and '.join(said)}"
    if share_interval(standing, n).low > BY_CHANCE:
        return f"{standing} of {n} rows stand out, more than of unseen ones"
    return None


def _in_the_mean(
    figures: Judgement, difference: Interval | None, gap: float, n: int, name: str
) -> Judgement:
    if difference is None:
        return _told(figures, "not sure", f"no row has a score from {name} too")
    share, low, high = (v / gap for v in (difference.value, difference.low, difference.high))
    if share > REMAINDER and low > 0:
        why = f"{100 * share:.0f}% of what the full model knew beyond {name} is left"
        return _told(figures, "leaks", why)
    if share_interval(0, n).high > REMAINDER_SURE:
        return _told(figures, "not sure", f"{n} rows are too few to tell")
    if share <= REMAINDER and high <= REMAINDER_SURE:
        return _told(figures, "passed", f"no more than {name}")
    why = f"up to {100 * high:.0f}% of what the full model knew beyond {name} may be left"
    return _told(figures, "not sure", why)


def described(found: Found) -> Judgement:
    """The figures of a judgement, without a verdict."""
    values, known, yardstick = found.values("cleaned"), found.values("full"), yardstick_of(found)
    if not values:
        return Judgement("not sure", "")
    people = found.people()
    means = subject_means(values, people)
    row = max(values, key=lambda i: values[i])
    return Judgement(
        "not sure",
        "",
        _mean(values, found.groups()),
        yardstick and (yardstick[0], _mean(yardstick[1], yardstick[2])),
        fmean(known.values()) if known else None,
        max(means.items(), key=lambda pair: pair[1]) if means else None,
        (found.rows["forget"][int(row)], values[row]),
    )


def _mean(values: Values, people: Mapping[str, int]) -> Interval:
    return mean_interval(list(values.values()), groups=groups_of(values, people))


def _told(figures: Judgement, verdict: Verdict, reason: str) -> Judgement:
    return replace(figures, verdict=verdict, reason=reason)
