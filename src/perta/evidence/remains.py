"""What is left of what the full model knew beyond a yardstick: in the mean, by row, by subject.

With a_i the value of row i after the edit, b_i before it and y_i the yardstick's for that row (not
paired: its mean), what is left of a row is (a_i - y_i) / (b_i - y_i). A row is *still there* if
more than half of it is left and its value lies beyond the yardstick's spread (`upper_end` of its
rows), or if nine tenths are left; a subject is, if more than a quarter of it is left over all its
rows and it lies beyond the spread of the yardstick's subjects. That may be chance: where there is
one, verdict and audit do not say that all is gone; that something is left they say by
`audit.judge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from perta.evidence.intervals import Interval, difference_interval, mean_interval, upper_end
from perta.evidence.measures import groups_of

Values = Mapping[str, float]
Subjects = tuple[Mapping[str, int], Mapping[str, int]]
"""Subject of each row judged, and of each row of the yardstick."""

REMAINDER = 0.10
"""Largest share of what the full model knew beyond the reference that counts as gone."""
REMAINDER_SURE = 0.25
"""Largest upper end of that share's interval, and of the share of rows that may still be there,
that counts as sure; above it, a row stands out."""
REMAINDER_PARTLY = 0.50
_INTACT = 0.90
"""Share of a row left at which it is still there whatever the yardstick's other rows are."""
BY_CHANCE = 0.05  # share of unseen rows that lie beyond their own spread
KEPT = 0.95  # smallest share of the value before the edit that counts as kept
KEPT_PARTLY = 0.80
SMALLEST_GAP = 0.05
"""Where full model and reference are closer than this, a measure cannot tell them apart."""


def excess(
    after: Values,
    reference: Values,
    known: Values,
    subjects: Subjects,
    *,
    paired: bool,
    confidence: float = 0.95,
) -> Interval | None:
    """Difference from the yardstick, at most the best known row's; None without shared rows."""
    highest = max(known.values(), default=1.0)
    if not paired:
        if not after or not reference:
            return None
        sides = (after, reference)
        groups = (groups_of(after, subjects[0]), groups_of(reference, subjects[1]))
        highest = max(highest, *(max(side.values()) for side in sides))
        return difference_interval(
            list(sides[0].values()), list(sides[1].values()), 0.0, highest, groups, confidence
        )
    shared = [i for i in after if i in reference]
    if not shared:
        return None
    differences = [after[i] - reference[i] for i in shared]
    most = max([known.get(i, highest) - reference[i] for i in shared] + differences)
    least = min([-reference[i] for i in shared] + differences)
    return mean_interval(differences, least, most, groups_of(shared, subjects[0]), confidence)


def kept(after: Values, before: Values, had: float, subjects: Mapping[str, int]) -> Interval:
    """Share that is kept of `had`, over the rows that have both; none loses more than it had."""
    shared = [i for i in after if i in before]
    differences = [after[i] - before[i] for i in shared]
    least = min([-before[i] for i in shared] + differences)
    most = max([1 - before[i] for i in shared] + differences)
    found = mean_interval(differences, least, most, groups_of(shared, subjects))
    share, low, high = (1 + end / had for end in (found.value, found.low, found.high))
    return Interval(share, low, high, found.n)


def left_of_rows(after: Values, before: Values, reference: Values, *, paired: bool) -> Values:
    """Share left of each row; rows that the full model hardly knew better are left out."""
    usual = fmean(reference.values()) if reference else 0.0
    shares = {}
    for i, value in after.items():
        low = reference.get(i, usual) if paired else usual
        gap = before.get(i, 1.0) - low
        if gap > SMALLEST_GAP:
            shares[i] = (value - low) / gap
    return shares


def rows_still_there(left: Values, after: Values, reference: Values) -> tuple[tuple[str, ...], int]:
    """Rows that are still there, the most exposed first, and how many rows stand out."""
    spread = upper_end(list(reference.values())) if reference else 0.0
    exposed = {i: share for i, share in left.items() if after[i] > spread or share > _INTACT}
    rows = [i for i, share in exposed.items() if share > REMAINDER_PARTLY]
    standing = sum(share > REMAINDER_SURE for share in exposed.values())
    return tuple(sorted(rows, key=lambda i: -after[i])), standing


def subjects_still_there(
    after: Values, before: Values, reference: Values, subjects: Subjects, *, paired: bool
) -> tuple[int, ...]:
    """Subjects of several rows of which much is left over all their rows."""
    own, usual = subject_means(after, subjects[0]), subject_means(reference, subjects[1])
    mine = {s: v for s, v in own.items() if sum(subjects[0].get(i) == s for i in after) > 1}
    left = left_of_rows(
        {str(s): v for s, v in mine.items()},
        {str(s): v for s, v in subject_means(before, subjects[0]).items()},
        {str(s): v for s, v in usual.items()} or {"": fmean(reference.values())},
        paired=paired,
    )
    spread = upper_end(list(usual.values())) if usual else 0.0
    return tuple(
        s
        for s, value in mine.items()
        if (share := left.get(str(s), 0.0)) > REMAINDER_SURE and (value > spread or share > _INTACT)
    )


def subject_means(values: Values, subjects: Mapping[str, int]) -> dict[int, float]:
    """Mean over the rows of every subject."""
    groups: dict[int, list[float]] = {}
    for i, value in values.items():
        if i in subjects:
            groups.setdefault(subjects[i], []).append(value)
    return {subject: fmean(group) for subject, group in groups.items()}


def lost_subjects(after: Values, before: Values, subjects: Mapping[str, int]) -> tuple[int, ...]:
    """Subjects of several rows that keep less than half of what they had."""
    had, has = subject_means(before, subjects), subject_means(after, subjects)
    return tuple(
        s
        for s, value in has.items()
        if value < REMAINDER_PARTLY * had.get(s, 0.0)
        and sum(subjects.get(i) == s for i in after) > 1
    )
