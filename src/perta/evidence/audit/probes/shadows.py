"""Membership row by row: how far is each fact's probability from that of models that never saw it?

With p the geometric mean of a fact's token probabilities and phi(p) = log(p / (1 - p)), K models
that never saw the rows have phi_ik of row i, with mean mu_i. The cleaned model's phi_i is

    z_i = (phi_i - mu_i) / (s_i sqrt(1 + 1 / K)),    s_i^2 = (4 s^2 + S_i) / (K + 3),
    S_i = sum over k of (phi_ik - mu_i)^2,           s^2 = (4 + sum over i of S_i) / (4 + n (K - 1))

from it, and Lambda_i = T(z_i), with Student's T of K + 3 degrees of freedom, is the offline attack
of Carlini et al., arXiv 2112.03570 (1 - Pr[Z > phi_i] of a normal Z) for few models: the variance
s^2 of all rows counts as much as four more models of each, and four rows that differ by 1 are
added to it, as by `judge`. Both ends tell: a fact that is conspicuously unlikely was removed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from perta.evidence.audit.judge import FALSE_ALARMS, ROWS_ADDED, Found, Judgement, described, logit
from perta.evidence.audit.probe import SHADOW, Probe, Rows, View
from perta.evidence.intervals import mean_interval, share_interval, student_interval
from perta.evidence.measures import groups_of
from perta.evidence.remains import (
    BY_CHANCE,
    REMAINDER,
    REMAINDER_PARTLY,
    REMAINDER_SURE,
    SMALLEST_GAP,
    Values,
    subject_means,
)

_LEAST = 3  # fewest models that never saw the rows, the retrained one among them
_MODELS_ADDED = 4  # as how many more models of a row the variance of all rows counts


class LikelihoodRatio(Probe):
    """Geometric mean of the fact's token probabilities, beside those of several unseeing models."""

    name, group = "likelihood-ratio", "membership"
    sets = ("forget",)
    needs = ("full", "shadow models")
    shadowed = True

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows of one set under one model."""
        return Rows([math.exp(-score.loss) for score in view.facts(name)])

    def judge(self, found: Found) -> Judgement:
        """The distances at the top of this module, by the rule of the other probes at both ends."""
        own, full = found.values("cleaned"), found.values("full")
        roles = [role for role in found.scores if role.startswith(SHADOW) or role == "retrained"]
        others = [found.values(role) for role in roles]
        figures = described(
            replace(found, scores={role: found.scores[role] for role in ("cleaned", "full")})
        )
        usual = [fmean(other.values()) for other in others]
        figures = replace(figures, yardstick=("shadows", mean_interval(usual)))
        if len(others) < _LEAST:
            why = f"too few models that never saw the rows ({len(others)}); give {_LEAST} or more"
            return replace(figures, reason=why)
        known = fmean(full.values()) - min(usual)
        if known <= SMALLEST_GAP:
            why = "the full model knew no more than models that never saw the rows"
            return replace(figures, reason=why)
        if max(usual) - min(usual) > REMAINDER_SURE * known:
            why = f"{roles[usual.index(max(usual))]} knows the rows better than the others do"
            return replace(figures, reason=f"{why}: has it seen them?")
        return _judged(found, figures, own, full, others)


def _judged(
    found: Found, figures: Judgement, own: Values, full: Values, others: Sequence[Values]
) -> Judgement:
    people = found.people()
    counts = Counter(people.get(place) for place in own)

    def of_rows(values: Values) -> dict[str, float]:
        return {place: logit(value) for place, value in values.items()}

    def of_subjects(values: Values) -> dict[str, float]:
        means = subject_means(of_rows(values), people).items()
        return {str(subject): mean for subject, mean in means if counts[subject] > 1}

    def of_all(values: Values) -> dict[str, float]:
        return {"all": fmean(of_rows(values).values())}

    def apart(units: Callable[[Values], Values], tests: int, least: float) -> dict[str, float]:
        told = units(own), units(full), [units(other) for other in others]
        found = _apart(*told, tests)
        return {unit: share for unit, share in found.items() if abs(share) > least}

    tests = len(own) + len(of_subjects(own))
    rows, subjects = (apart(units, tests, REMAINDER_SURE) for units in (of_rows, of_subjects))
    still = sorted(
        (place for place in rows if abs(rows[place]) > REMAINDER_PARTLY), key=lambda p: -rows[p]
    )
    numbers = found.rows["forget"]
    figures = replace(
        figures,
        leaking_rows=tuple(dict.fromkeys(numbers[int(place)] for place in still)),
        leaking_subjects=tuple(map(int, subjects)),
        notes={
            "known": sum(share > 0 for share in rows.values()),
            "conspicuously unlikely": sum(share < 0 for share in rows.values()),
            "models that never saw the rows": len(others),
        },
    )
    n, whole = len(own), apart(of_all, 1, REMAINDER)
    if still or subjects or whole or share_interval(len(rows), n).low > BY_CHANCE:
        shares = [*rows.values(), *subjects.values(), *whole.values()]
        ends = {"known": max(shares) > 0, "conspicuously unlikely": min(shares) < 0}
        what = " or ".join(end for end, there in ends.items() if there)
        counted = {"row": found.count(rows), "subject": len(subjects)}
        said = [f"{c} {unit}{'s' if c > 1 else ''}" for unit, c in counted.items() if c]
        who = " and ".join(said) or "all rows taken together"
        return replace(figures, verdict="leaks", reason=f"standing out as {what}: {who}")
    return _in_the_mean(found, figures, of_rows(own), of_rows(full), [*map(of_rows, others)])


def _in_the_mean(
    found: Found, figures: Judgement, own: Values, full: Values, others: Sequence[Values]
) -> Judgement:
    usual = {place: fmean(other[place] for other in others) for place in own}
    gap = fmean(full[place] - usual[place] for place in own)
    differences = [own[place] - usual[place] for place in own]
    interval = student_interval(differences, groups_of(own, found.groups()))
    if interval is None or share_interval(0, found.count(own)).high > REMAINDER_SURE:
        return replace(figures, reason=f"{found.count(own)} rows are too few to tell")
    share, low, high = (v / gap for v in (interval.value, interval.low, interval.high))
    if abs(share) <= REMAINDER and max(-low, high) <= REMAINDER_SURE:
        return replace(figures, verdict="passed", reason="no row differs from what is usual")
    why = f"the rows may lie {low:+.0%} to {high:+.0%} of the way to the full model from the usual"
    return replace(figures, reason=why)


def _apart(own: Values, full: Values, others: Sequence[Values], tests: int) -> dict[str, float]:
    """Units that stand out, at either end, -> share of the way from the usual to the full model.

    All values are on the scale of `logit`; a unit that the full model knew no better has no share.
    """
    from scipy.stats import t

    table = np.array([[other[unit] for unit in own] for other in others], dtype=np.float64)
    models, units = table.shape
    usual = table.mean(axis=0)
    squares = ((table - usual) ** 2).sum(axis=0)
    pooled = (ROWS_ADDED + squares.sum()) / (ROWS_ADDED + units * (models - 1))
    freedom = _MODELS_ADDED + models - 1
    scale = np.sqrt((_MODELS_ADDED * pooled + squares) / freedom * (1 + 1 / models))
    limit = float(t.ppf(1 - FALSE_ALARMS / 4 / tests, freedom)) * scale
    shares = {}
    for i, unit in enumerate(own):
        knew = 1 / (1 + math.exp(-full[unit])) - 1 / (1 + math.exp(-usual[i]))
        if knew > SMALLEST_GAP and abs(own[unit] - usual[i]) > limit[i]:
            shares[unit] = (own[unit] - float(usual[i])) / (full[unit] - float(usual[i]))
    return shares
