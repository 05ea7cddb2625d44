"""How a probe's scores are judged: relative to a model, or to rows, that never had the data.

With x_i the cleaned model's score of forget row i, f_i the full model's and y_i a yardstick's (of
unseen rows: their mean), all in [0, 1], what is left is

    share = mean(x - y) / mean(f - y),      share_i = (x_i - y_i) / (f_i - y_i)

Of all models that never saw the rows, at most `FALSE_ALARMS` are to be said to leak by a probe.
Half of that is for the mean, half for all n rows and subjects, and each half is divided among the
probe's W ways to ask (Bonferroni). A row stands out where more than a quarter of it is left beside
every yardstick there is, and beside the best of them

    phi(x_i) - phi(y_i) > t(1 - 0.05 / 2Wn, k + 4) · s,     phi(p) = log((p + e) / (1 + e - p)),
    s^2 = (4 + sum of d_j^2) / (k + 4),                     e = 1e-6,

where d_j are the k of phi(x_j) - phi(y_j) that are not above 0, and of unseen rows phi(y_j) less
their mean, k one less. It is a likelihood-ratio attack with one variance
for all rows (Carlini et al., arXiv 2112.03570), in which a model that never saw the rows differs
from the yardstick as often up as down, normally on that scale; what is left of the rows can only
be above it. Rows that were forgotten too well lie far below, and must not pay for one that was
not. So of the same rows the limit is at most the one from sqrt(2) (phi(y_j) less their mean): two
models that never saw a row differ no more than the rows of one do among themselves, for these
differ by the same chance and by what they are. Beside the retrained model it is also at most the
one from the base model's differences, of either sign: the cleaned model is not in there. Four rows
that differ by 1 are added, so that few rows tell something too. Subjects are judged in the same
way, by their means.

    leaks      a row that stands out has more than half left, or a subject of several rows stands
               out, or more than one in twenty rows do; or share > 0.10 for every yardstick, and
               the interval of the best lies above 0
    passed     share <= 0.10, upper end <= 0.25, no row is still there by the rule of `remains`,
               and enough rows: among n of which none is still there, the
               share of such rows may be up to 1 - 0.025^(1/n) <= 0.25
    not sure   everything else, with the reason
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from perta.evidence.intervals import Interval, mean_interval, share_interval
from perta.evidence.measures import groups_of
from perta.evidence.remains import (
    BY_CHANCE,
    REMAINDER,
    REMAINDER_PARTLY,
    REMAINDER_SURE,
    SMALLEST_GAP,
    Values,
    excess,
    left_of_rows,
    rows_still_there,
    subject_means,
)

Verdict = Literal["passed", "leaks", "not sure", "harmed"]
"""`harmed` is said of what was to stay."""
YardstickName = Literal["retrained", "holdout", "base", "shadows"]
WORDS: Mapping[YardstickName, str] = {
    "retrained": "the retrained model",
    "holdout": "unseen rows",
    "base": "the base model",
    "shadows": "models that never saw the rows",
}
_YARDSTICKS: Mapping[YardstickName, tuple[str, str]] = {
    "retrained": ("retrained", "forget"),
    "holdout": ("cleaned", "holdout"),
    "base": ("base", "forget"),
}
"""Role of the model and set of the rows, the best first."""
FALSE_ALARMS = 0.05
"""Largest share of models that never saw the rows of which a probe says that they leak."""
ROWS_ADDED = 4
"""Rows that are taken to differ by 1 on the scale of `logit`, beside those that were seen."""
_TINY = 1e-6
"""Below it probabilities are as good as equal: how unlikely a fact is there says nothing."""
Scores = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Role of the model -> set -> score of each sequence."""


@dataclass(frozen=True)
class Found:
    """What one probe found."""

    scores: Scores  # of every model on every set that the probe looks at
    rows: Mapping[str, Sequence[int]]  # of each set the number in its file of each sequence's row
    # of each set whom each sequence is about; None where nothing says so
    subjects: Mapping[str, Sequence[int] | None]
    # what else the probe noted
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
    """What a probe says of the cleaned model."""

    verdict: Verdict  # of what was to stay `harmed` in place of `leaks`
    reason: str  # in one sentence
    value: Interval | None = None  # of the cleaned model, with its interval
    # name, and value with its interval; None without one
    yardstick: tuple[YardstickName, Interval] | None = None
    full: float | None = None  # value of the full model; None without it
    # number and value of the subject of whom most is known
    worst_subject: tuple[int, float] | None = None
    worst_row: tuple[int, float] | None = None  # number in the file and value of such a row
    leaking_rows: tuple[int, ...] = ()  # numbers in the file of rows that are still there
    leaking_subjects: tuple[int, ...] = ()  # numbers of subjects
    notes: Mapping[str, float] = field(default_factory=dict)  # other figures by name


@dataclass(frozen=True)
class Yardstick:
    """What a model that never had the rows makes of them, or the cleaned one of unseen rows."""

    name: YardstickName  # which of them
    values: Values  # score by place
    people: Mapping[str, int]  # subject by place

    def of(self, places: Iterable[str]) -> Values:
        """What is usual of rows of the forget set, as far as there is a score."""
        if not self.paired:
            return dict.fromkeys(places, fmean(self.values.values()))
        return {place: self.values[place] for place in places if place in self.values}

    @property
    def paired(self) -> bool:
        """Whether it has scores of the same rows."""
        return self.name != "holdout"

    def gap(self, known: Values) -> float:
        """How much more the full model knows; 1 where there is none."""
        return fmean(known.values()) - fmean(self.values.values()) if known else 1.0


def yardsticks_of(found: Found) -> list[Yardstick]:
    """Those there are, the best first: retrained, unseen rows, base."""
    return [
        Yardstick(name, values, found.people(rows))
        for name, (role, rows) in _YARDSTICKS.items()
        if (values := found.values(role, rows))
    ]


def judge_remains(
    found: Found,
    *,
    wording: bool = False,
    by_row: bool = True,
    guessable: bool = False,
    ways: int = 1,
) -> Judgement:
    """The verdict on scores in [0, 1] of what is left; the rule is at the top of this module.

    By scores that count the `wording` around the facts, which the base model never saw, nothing
    passes and nothing leaks beside it. `by_row` judges single rows too; where scores are
    `guessable`, high for who guesses right, only beside the retrained model. It is one of `ways` to
    ask.
    """
    values, known = found.values("cleaned"), found.values("full")
    figures = described(found)
    if figures.value is None:
        return Judgement("not sure", "no row of the forget set has a score")
    every = [y for y in yardsticks_of(found) if not (wording and y.name == "base")]
    if not every and figures.yardstick is None:
        return _told(figures, "not sure", "there is no yardstick")
    if not every:
        why = "the base model has never seen the words around the facts; give --retrained"
        return _told(figures, "not sure", why)
    best, *others = every
    if best.gap(known) <= SMALLEST_GAP:
        why = f"the full model knew no more than {WORDS[best.name]} by this probe"
        return _told(figures, "not sure", why)
    telling = [best, *(one for one in others if one.gap(known) > SMALLEST_GAP)]
    if by_row and not (guessable and best.name != "retrained"):
        rows, persons = standing_out(values, known, found.people(), telling, ways)
        still = [place for place in rows if rows[place] > REMAINDER_PARTLY]
        still.sort(key=lambda place: -values[place])
        figures = replace(
            figures,
            leaking_rows=tuple(dict.fromkeys(found.rows["forget"][int(i)] for i in still)),
            leaking_subjects=tuple(map(int, persons)),
        )
        if said := _standing(figures, len(rows), len(values)):
            return _told(figures, "leaks", said)
    judged = _in_the_mean(found, figures, telling, ways)
    if by_row and judged.verdict == "passed":
        left = left_of_rows(values, known, best.values, paired=best.paired)
        if high := rows_still_there(left, values, best.values)[0]:
            those = "1 row has" if len(high) == 1 else f"{len(high)} rows have"
            return _told(judged, "not sure", f"{those} much left, which may be chance")
    return judged


def standing_out(
    after: Values,
    before: Values,
    people: Mapping[str, int],
    yardsticks: Sequence[Yardstick],
    ways: int = 1,
) -> tuple[Values, Values]:
    """What is left of the rows, and of the subjects of several rows, that stand out.

    `before` are the full model's scores, 1 where it has none; `people` the subject of each row,
    empty where nothing says so; `yardsticks` the best first, none of which explains what stands
    out.
    """
    counts = Counter(people.get(place) for place in after)

    def both(scores: Values) -> tuple[Values, Values]:
        means = subject_means(scores, people).items()
        return scores, {str(s): value for s, value in means if counts[s] > 1}

    limit = _limit(after, yardsticks, ways * sum(map(len, both(after))))
    usual = [both(yardstick.of(after)) for yardstick in yardsticks]
    rows, subjects = (
        {
            place: least
            for place in mine
            if place in references[0]
            and logit(mine[place]) - logit(references[0][place]) > limit
            and (least := _least(place, mine, known, references)) > REMAINDER_SURE
        }
        for mine, known, references in zip(
            both(after), both(before), zip(*usual, strict=True), strict=True
        )
    )
    return rows, subjects


def _least(place: str, after: Values, before: Values, references: Sequence[Values]) -> float:
    """What is left of a row against the yardstick that explains most of it."""
    one = {place: after[place]}
    shares = [
        left_of_rows(one, before, {place: reference[place]}, paired=True).get(place, 0.0)
        for reference in references
        if place in reference
    ]
    return min(shares)


def _limit(values: Values, yardsticks: Sequence[Yardstick], tests: int) -> float:
    """How far on the scale of `logit` one of so many unseen rows may lie above the best of them."""
    yardstick, *others = yardsticks
    usual = {place: logit(value) for place, value in yardstick.values.items()}
    mean = fmean(usual.values())
    spread = math.fsum((value - mean) ** 2 for value in usual.values())
    if not yardstick.paired:
        return _end(spread, len(usual) - 1, tests)

    def apart(scores: Values) -> list[float]:
        return [logit(scores[place]) - usual[place] for place in scores if place in usual]

    below = [gap for gap in apart(values) if gap <= 0]
    known = [below, *filter(None, (apart(other.values) for other in others if other.paired))]
    ends = [_end(math.fsum(gap**2 for gap in gaps), len(gaps), tests) for gaps in known]
    return min(*ends, _end(2 * spread, len(usual) - 1, tests))


def _end(squares: float, freedom: int, tests: int) -> float:
    """Quantile of a difference whose variance is known from a sum of squares."""
    from scipy.stats import t

    freedom += ROWS_ADDED
    scale = math.sqrt((ROWS_ADDED + squares) / freedom)
    return float(t.ppf(1 - FALSE_ALARMS / 2 / tests, freedom)) * scale


def logit(p: float) -> float:
    """log(p / (1 - p)), finite at both ends."""
    return math.log((p + _TINY) / (1 + _TINY - p))


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
    found: Found, figures: Judgement, yardsticks: Sequence[Yardstick], ways: int
) -> Judgement:
    best, *others = yardsticks
    share = _share(found, best)
    if share is None:
        return _told(figures, "not sure", f"no row has a score from {WORDS[best.name]} too")
    name, n = WORDS[best.name], found.count(found.values("cleaned"))
    # At 95%, half of FALSE_ALARMS lie below.
    surely = _share(found, best, 1 - FALSE_ALARMS / ways) or share
    if share.value > REMAINDER and surely.low > 0:
        why = f"{100 * share.value:.0f}% of what the full model knew beyond {name} is left"
        for one in others:
            beyond = _share(found, one)
            if beyond is not None and beyond.value <= REMAINDER:
                return _told(figures, "not sure", f"{why}, but no more than {WORDS[one.name]} have")
        return _told(figures, "leaks", why)
    if share_interval(0, n).high > REMAINDER_SURE:
        return _told(figures, "not sure", f"{n} rows are too few to tell")
    if share.value <= REMAINDER and share.high <= REMAINDER_SURE:
        return _told(figures, "passed", f"no more than {name}")
    why = f"up to {100 * share.high:.0f}% of what the full model knew beyond {name} may be left"
    return _told(figures, "not sure", why)


def _share(found: Found, yardstick: Yardstick, confidence: float = 0.95) -> Interval | None:
    """What is left in the mean; None where no row has both scores."""
    values, known = found.values("cleaned"), found.values("full")
    groups = (found.groups(), found.groups(_YARDSTICKS[yardstick.name][1]))
    difference = excess(
        *(values, yardstick.values, known, groups), paired=yardstick.paired, confidence=confidence
    )
    if difference is None:
        return None
    gap = yardstick.gap(known)
    ends = (difference.value / gap, difference.low / gap, difference.high / gap)
    return Interval(*ends, difference.n)


def described(found: Found) -> Judgement:
    """The figures of a judgement, without a verdict."""
    values, known = found.values("cleaned"), found.values("full")
    yardstick = next(iter(yardsticks_of(found)), None)
    if not values:
        return Judgement("not sure", "")
    means = subject_means(values, found.people())
    row = max(values, key=lambda i: values[i])
    return Judgement(
        "not sure",
        "",
        _mean(values, found.groups()),
        None if yardstick is None else (yardstick.name, _mean(yardstick.values, yardstick.people)),
        fmean(known.values()) if known else None,
        max(means.items(), key=lambda pair: pair[1]) if means else None,
        (found.rows["forget"][int(row)], values[row]),
    )


def _mean(values: Values, people: Mapping[str, int]) -> Interval:
    return mean_interval(list(values.values()), groups=groups_of(values, people))


def _told(figures: Judgement, verdict: Verdict, reason: str) -> Judgement:
    return replace(figures, verdict=verdict, reason=reason)
