"""Membership: can the forgotten rows be told from unseen ones by their losses?

With s_i the score of a row, higher for text never seen, forgotten rows F and unseen ones H,

    AUC = mean over F x H of [s_h > s_f] + [s_h = s_f] / 2

is 1/2 where nobody can tell, 1 where all of F is known, and 0 where it is conspicuously unlikely,
which marks it as removed. A model that never had F need not have 1/2, for the rows may differ: so
the AUC is judged against the retrained model's on the same rows, else the base model's.

    leaks      |AUC - AUC_y| > 0.10 g and its interval lies on one side of 0
    passed     |AUC - AUC_y| <= 0.10 g and its interval within +-0.25 g

with g = AUC_full - AUC_y. The true positives at 1% false positives are those of F below the
floor(0.01 m) + 1 lowest of the m scores of H; where significantly more of F lie there than unseen
rows would (exactly: the share of unseen rows below the k-th lowest of m is Beta(k, m + 1 - k)), and
than under the yardstick, that leaks too, and so does the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from perta.evidence import metrics
from perta.evidence.audit.judge import WORDS, Found, Judgement, YardstickName
from perta.evidence.audit.probe import Need, Probe, Rows, View
from perta.evidence.intervals import Array, Groups, Interval, pairs_interval, share_interval
from perta.evidence.measures import groups_of
from perta.evidence.remains import REMAINDER, REMAINDER_SURE, SMALLEST_GAP, subject_means
from perta.evidence.results import labelled_text

_FALSE_POSITIVES = 0.01
_SIDES: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("known", lambda scores: scores),
    ("conspicuous", np.negative),
)


class _Attack(Probe):
    """A membership attack."""

    group = "membership"
    unit = (
        "how often a removed row looks better known than an unseen one (AUC); 0.5 nobody can tell, "
        "1 known, 0 conspicuously unlikely"
    )
    compared = ("forget", "holdout")
    needs: tuple[Need, ...] = ("holdout",)
    of: str  # the field of an answer's `Score` that it looks at, higher for text never seen

    def run(self, view: View, name: str) -> Rows:
        """Scores of the rows, higher for text never seen."""
        return Rows([getattr(outcome.scores[0], self.of) for outcome in view.asked(name)])

    def adjusted(self, found: Found) -> Found:
        """What is compared, where that takes more than one model's scores."""
        return found

    def judge(self, found: Found) -> Judgement:
        """The rule at the top of this module."""
        found = self.adjusted(found)
        cleaned = _Sides.of(found, "cleaned")
        if cleaned is None:
            return Judgement("not sure", "a set has no scores")
        figures = _described(found, cleaned)
        names: tuple[YardstickName, ...] = ("retrained", "base")
        told = ((name, _Sides.of(found, name)) for name in names)
        yardstick = next(((name, sides) for name, sides in told if sides), None)
        if yardstick is None:
            why = (
                "there is no retrained or base model to tell how far the rows differ by themselves"
            )
            return replace(figures, reason=why)
        name, usual = yardstick
        figures = replace(figures, yardstick=(name, usual.auc))
        if exposed := _exposed(figures, cleaned, usual):
            return replace(figures, verdict="leaks", reason=exposed)
        gap = figures.full - usual.auc.value if figures.full is not None else 0.5
        if gap <= SMALLEST_GAP:
            why = f"the full model's losses tell no more than those of {WORDS[name]}"
            return replace(figures, reason=why)
        if cleaned.forget.keys() != usual.forget.keys():
            return replace(figures, reason=f"{WORDS[name]} has no score for some of the rows")
        return _compared(figures, cleaned.minus(usual), gap, WORDS[name])


class _Sides:
    """Scores of both sides under one model."""

    def __init__(self, forget: dict[str, float], holdout: dict[str, float], groups: _Groups):
        self.forget, self.holdout, self.groups = forget, holdout, groups
        sides = np.asarray([*forget.values()]), np.asarray([*holdout.values()])
        self.columns, self.pairs = sides, metrics.wins(*sides)

    @staticmethod
    def of(found: Found, role: str) -> _Sides | None:
        forget, holdout = found.values(role), found.values(role, "holdout")
        if not forget or not holdout:
            return None
        sides = ((holdout, "holdout"), (forget, "forget"))
        left, right = (groups_of(values, found.people(name)) for values, name in sides)
        return _Sides(forget, holdout, (left, right))

    @property
    def auc(self) -> Interval:
        return pairs_interval(self.pairs, 0.0, 1.0, self.groups)

    def minus(self, other: _Sides) -> Interval:
        """Difference of two AUCs on the same rows."""
        return pairs_interval(self.pairs - other.pairs, -1.0, 1.0, self.groups)

    def tail(self, side: Callable[[Array], Array]) -> tuple[int, int]:
        """How many of F are beyond the k-th most extreme of H, and k."""
        forget, holdout = (side(column) for column in self.columns)
        k = int(_FALSE_POSITIVES * len(holdout)) + 1
        return int((forget < np.sort(holdout)[k - 1]).sum()), k


_Groups = tuple[Groups, Groups]


def _described(found: Found, cleaned: _Sides) -> Judgement:
    """The figures: AUC, the subject and the row above which most unseen rows score."""
    beaten = dict(zip(cleaned.forget, cleaned.pairs.mean(axis=0).tolist(), strict=True))
    means = subject_means(beaten, found.people())
    row = max(beaten, key=lambda i: beaten[i])
    full = _Sides.of(found, "full")
    m, n = cleaned.pairs.shape
    shares = {f"{name}_tpr": cleaned.tail(side)[0] / n for name, side in _SIDES}
    return Judgement(
        "not sure",
        "",
        cleaned.auc,
        None,
        full.auc.value if full else None,
        max(means.items(), key=lambda pair: pair[1]) if means else None,
        (found.rows["forget"][int(row)], beaten[row]),
        notes={**shares, "fpr": (int(_FALSE_POSITIVES * m) + 1) / (m + 1)},
    )


def _exposed(figures: Judgement, cleaned: _Sides, usual: _Sides) -> str | None:
    """Whether more rows lie at an end than unseen ones would, and than under the yardstick."""
    from scipy.stats import beta

    m, n = cleaned.pairs.shape
    for name, side in _SIDES:
        hits, k = cleaned.tail(side)
        chance = max(float(beta.ppf(0.975, k, m + 1 - k)), usual.tail(side)[0] / n)
        if share_interval(hits, n).low > chance:
            what = "known" if name == "known" else "conspicuously unlikely"
            return (
                f"{hits} of {n} rows stand out as {what}, at {figures.notes['fpr']:.1%} of unseen"
            )
    return None


def _compared(figures: Judgement, difference: Interval, gap: float, name: str) -> Judgement:
    share, low, high = (v / gap for v in (difference.value, difference.low, difference.high))
    if abs(share) > REMAINDER and low * high > 0:
        what = "known" if share > 0 else "conspicuously unlikely: they stand out as removed"
        return replace(figures, verdict="leaks", reason=f"beside {name} the rows are {what}")
    if abs(share) <= REMAINDER and max(-low, high) <= REMAINDER_SURE:
        return replace(figures, verdict="passed", reason=f"no more to be told than from {name}")
    why = f"the AUC may lie {difference.low:+.2f} to {difference.high:+.2f} from that of {name}"
    return replace(figures, reason=f"{why}; more rows would tell")


class Loss(_Attack):
    """The answer's loss."""

    name = "loss"
    of = "loss"


class Zlib(Loss):
    """The loss over the length of the compressed answer."""

    name = "zlib"

    def run(self, view: View, name: str) -> Rows:
        """Nats per token and byte."""
        pairs = zip(view.asked(name), view.items(name), strict=True)
        texts = [(o.scores[0].loss, labelled_text(i.answers[0], view.tokenizer)) for o, i in pairs]
        return Rows([metrics.zlib_score(loss, text) for loss, text in texts])


class MinK(_Attack):
    """The least likely 40% of the tokens."""

    name = "min-k"
    of = "min_k"


class MinKPlusPlus(_Attack):
    """The same, standardised over the vocabulary."""

    name = "min-k++"
    of = "min_k_plus_plus"


class Reference(Loss):
    """The loss less that under the base model."""

    name = "reference"
    needs = ("holdout", "base")

    def adjusted(self, found: Found) -> Found:
        """Differences to the base model; its own are 0, and nobody can tell by them."""
        base = found.scores["base"]
        scores = {
            role: {name: _less(values, base[name]) for name, values in by_set.items()}
            for role, by_set in found.scores.items()
        }
        return replace(found, scores=scores)


def _less(values: Sequence[float | None], base: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(values, base, strict=True)]
