"""The verdict in plain words, with the numbers it rests on.

Forgetting is judged against a model that never saw the examples: the retrained one where there
is one, else unseen examples, else the base model. Retention is judged against the model before
the edit. Thresholds are few, named here, and printed on the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from perta.report_inputs import Collection, Run
from perta.report_metrics import (
    BY_KEY,
    Interval,
    Reading,
    difference_interval,
    ks_test,
    truth_ratios,
    unpaired_interval,
)

Status = Literal["met", "unclear", "partly", "not", "unknown"]
Calibration = Literal["retrained", "holdout", "base"]

FORGET_CORE = (
    "forget_probability",
    "forget_strength",
    "forget_rouge",
    "forget_verbmem",
    "forget_knowmem",
)
"""Measures of being able to give the removed answers; the worst of them decides."""
RETAIN_CORE = ("retain_probability", "retain_rouge", "retain_knowmem", "model_utility")
"""Measures of being useful for everything else; the worst of them decides."""

REMAINDER = 0.10
"""Largest share of what the full model knew beyond the reference that counts as gone."""
REMAINDER_SURE = 0.25
"""Largest upper end of that share's interval that counts as sure."""
REMAINDER_PARTLY = 0.50
KEPT = 0.95
"""Smallest share of the value before the edit that counts as kept."""
KEPT_PARTLY = 0.80
SMALLEST_GAP = 0.05
"""Where full model and reference are closer than this, a measure cannot tell them apart."""
SIGNIFICANCE = 0.05

_RANK: Mapping[Status, int] = {"met": 0, "unclear": 1, "partly": 2, "not": 3, "unknown": 4}
_WORDS: Mapping[Status, str] = {
    "met": "met",
    "unclear": "not sure",
    "partly": "partly met",
    "not": "not met",
    "unknown": "cannot tell",
}


@dataclass(frozen=True)
class Check:
    """One measure of the verdict.

    Attributes:
        key: the measure.
        label: its name.
        before: value of the full model.
        after: value of the edited model.
        reference: what it is judged against; None where there is nothing.
        share: what remains (forgetting) or is kept (retention), as a share.
        share_low: lower end of its interval.
        share_high: upper end of its interval.
        n: examples behind it; 0 where only a mean is known.
        status: the outcome.
        core: whether it counts for the verdict.
    """

    key: str
    label: str
    before: float | None
    after: float
    reference: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    n: int
    status: Status
    core: bool

    @property
    def word(self) -> str:
        """The outcome in words."""
        return _WORDS[self.status]


@dataclass(frozen=True)
class Statement:
    """One sentence of the verdict with its outcome."""

    status: Status
    text: str
    numbers: str
    checks: tuple[Check, ...]

    @property
    def word(self) -> str:
        """The outcome in words."""
        return _WORDS[self.status]

    @property
    def lead(self) -> Check | None:
        """The check that the numbers come from."""
        return next((check for check in self.checks if check.core), None)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one edited model.

    Attributes:
        run: the model.
        headline: both outcomes in one short sentence.
        forgetting: on the removed examples.
        retention: on everything else.
        calibration: what forgetting is judged against.
        calibrated_on: the same in words.
        notes: what a careful reader has to know about the numbers.
    """

    run: Run
    headline: str
    forgetting: Statement
    retention: Statement
    calibration: Calibration | None
    calibrated_on: str
    notes: tuple[str, ...]


def judge(collection: Collection) -> list[Verdict]:
    """A verdict on every edited model that was evaluated, the best one first.

    Best is the one with the better outcome on forgetting and, among equals, the one that keeps
    more.
    """
    runs = [run for run in collection.by_role("edited") if run.measures]
    verdicts = [judge_run(run, collection) for run in runs]
    return sorted(verdicts, key=_preference)


def judge_run(run: Run, collection: Collection) -> Verdict:
    """The verdict on one edited model."""
    full = _partner(run, collection.by_role("full"))
    retrained = _partner(run, collection.by_role("retrained"))
    base = _partner(run, collection.by_role("base"))
    reference, calibration = _reference(run, retrained, base)
    forgetting = _forgetting(run, full, reference, calibration)
    retention = _retention(run, full, retrained)
    return Verdict(
        run=run,
        headline=_headline(forgetting.status, retention.status),
        forgetting=forgetting,
        retention=retention,
        calibration=calibration,
        calibrated_on=_calibrated_on(calibration),
        notes=tuple(_notes(run, full, reference, calibration, forgetting, retention)),
    )


def number(value: float | None, digits: int = 2) -> str:
    """A value for a sentence, small ones with as many digits as they need."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1g}" if abs(value) >= 1e-4 else f"{value:.0e}"
    return f"{value:.{digits}f}"


def _partner(run: Run, candidates: Iterable[Run]) -> Run | None:
    """The reference measured on the same examples, of the same seed where there are several."""
    usable = [
        other
        for other in candidates
        if other.measures and run.same_set(other, "forget") and run.fits(other)
    ]
    usable.sort(key=lambda other: other.seed != run.seed)
    return usable[0] if usable else None


def _reference(
    run: Run, retrained: Run | None, base: Run | None
) -> tuple[Mapping[str, Reading] | None, Calibration | None]:
    """Readings that a model without the removed examples would have, under forget keys."""
    if retrained is not None:
        return retrained.measures, "retrained"
    unseen = {
        key.replace("holdout_", "forget_", 1): reading
        for key, reading in run.measures.items()
        if key.startswith("holdout_")
    }
    if unseen:
        return unseen, "holdout"
    if base is not None:
        return base.measures, "base"
    return None, None


def _forgetting(
    run: Run,
    full: Run | None,
    reference: Mapping[str, Reading] | None,
    calibration: Calibration | None,
) -> Statement:
    keys = [key for key in (*FORGET_CORE, "forget_exact") if key in run.measures]
    checks = [
        _forget_check(key, run.measures[key], full, (reference or {}).get(key), calibration)
        for key in keys
    ]
    checks += [check for check in [_quality_check(run, full, calibration)] if check is not None]
    status = _worst(check.status for check in checks if check.core)
    lead = next((check for check in checks if check.core), None)
    if lead is None:
        text = "The answers about the removed examples were not measured."
        return Statement("unknown", text, "", tuple(checks))
    worse = next((check for check in checks if check.core and check.status == status), lead)
    text = _forget_text(lead, worse, calibration)
    return Statement(status, text, _forget_numbers(worse, calibration), tuple(checks))


def _forget_check(
    key: str,
    after: Reading,
    full: Run | None,
    reference: Reading | None,
    calibration: Calibration | None,
) -> Check:
    before = full.measures[key].value if full and key in full.measures else None
    core = key in FORGET_CORE
    label = _label(key)
    n = len(after.examples)
    if reference is None:
        return Check(key, label, before, after.value, None, None, None, None, n, "unknown", core)
    difference = _difference(after, reference, paired=calibration != "holdout")
    value = after.value - reference.value
    # Without the full model a gap of one is assumed: the measure's whole range.
    gap = 1.0 if before is None else before - reference.value
    if gap <= SMALLEST_GAP:
        return Check(
            key, label, before, after.value, reference.value, None, None, None, n, "unknown", core
        )
    low = None if difference is None else difference.low / gap
    high = None if difference is None else difference.high / gap
    status = _forget_status(value / gap, high)
    return Check(
        key, label, before, after.value, reference.value, value / gap, low, high, n, status, core
    )


def _forget_status(share: float, high: float | None) -> Status:
    if share <= REMAINDER:
        return "met" if high is not None and high <= REMAINDER_SURE else "unclear"
    return "partly" if share <= REMAINDER_PARTLY else "not"


def _quality_check(run: Run, full: Run | None, calibration: Calibration | None) -> Check | None:
    """Forget quality: a test, so a p-value decides and there is no share."""
    reading = run.measures.get("forget_quality")
    if reading is None or calibration != "retrained":
        return None
    before = full.measures.get("forget_quality") if full else None
    status: Status = "met" if reading.value >= SIGNIFICANCE else "not"
    n = len(truth_ratios(run.results))
    return Check(
        "forget_quality",
        "Forget quality (p)",
        before.value if before else None,
        reading.value,
        1.0,
        None,
        None,
        None,
        n,
        status,
        core=False,
    )


def _difference(after: Reading, reference: Reading, *, paired: bool) -> Interval | None:
    if not after.examples or not reference.examples:
        return None
    if paired:
        return difference_interval(after.examples, reference.examples)
    return unpaired_interval(list(after.examples.values()), list(reference.examples.values()))


_NEVER_SAW: Mapping[Calibration, str] = {
    "retrained": "for a model that never saw them",
    "holdout": "answers that this model has never seen",
    "base": "for the base model, which never saw them",
}


def _forget_text(lead: Check, worst: Check, calibration: Calibration | None) -> str:
    subject = "The answers about the removed examples"
    if calibration is None:
        if lead.before is not None and lead.after < lead.before:
            return (
                f"{subject} became less probable, but there is no model that never saw them to "
                "say whether that is enough."
            )
        return f"{subject} cannot be judged: there is nothing to compare them with."
    never_saw = _NEVER_SAW[calibration]
    # Within the threshold and yet surely above the reference: then "as" would say too much.
    above = lead.share_low is not None and lead.share_low > 0
    like = f"{'nearly as' if above else 'as'} improbable as {never_saw}"
    by_status: Mapping[Status, str] = {
        "met": f"{subject} are now {like}.",
        "unclear": (f"{subject} look {like}, but there are too few examples to be sure."),
        "partly": f"{subject} are much less probable than before, but more so than {never_saw}.",
        "not": f"{subject} are still there: they are far more probable than {never_saw}.",
        "unknown": (
            f"{subject} cannot be judged: the model before the edit hardly knew them better "
            "than the reference."
        ),
    }
    if worst is lead or _RANK[worst.status] <= _RANK["unclear"]:
        return by_status[lead.status if worst is lead else worst.status]
    if lead.status in ("met", "unclear"):
        verb = "is not all gone" if worst.status == "partly" else "is still there"
        if worst.status == "unknown":
            return by_status[lead.status]
        return (
            f"{subject} are now {like}, but by another measure, "
            f"{worst.label}, what was learned {verb}."
        )
    return by_status[worst.status]


def _forget_numbers(check: Check, calibration: Calibration | None) -> str:
    parts = [f"{check.label}: {number(check.after)}"]
    if check.reference is not None and calibration is not None:
        against = {
            "retrained": "for the retrained model",
            "holdout": "on unseen examples",
            "base": "for the base model",
        }[calibration]
        parts.append(f"against {number(check.reference)} {against}")
    text = " ".join(parts)
    if check.before is not None:
        text += f"; before the edit it was {number(check.before)}"
    if check.n:
        text += f" (n\u00a0=\u00a0{check.n})"
    return text + "."


def _retention(run: Run, full: Run | None, retrained: Run | None) -> Statement:
    keys = [key for key in (*RETAIN_CORE, "retain_strength") if key in run.measures]
    checks = [_retain_check(key, run.measures[key], full, retrained) for key in keys]
    lead = next((check for check in checks if check.core), None)
    if lead is None:
        text = "How much of everything else was kept was not measured."
        return Statement("unknown", text, "", tuple(checks))
    if lead.before is None:
        text = (
            "How much of everything else was kept cannot be judged: the model before the edit "
            "was not evaluated."
        )
        return Statement("unknown", text, f"{lead.label}: {number(lead.after)}.", tuple(checks))
    status = _worst(check.status for check in checks if check.core)
    worst = next((check for check in checks if check.core and check.status == status), lead)
    by_status: Mapping[Status, str] = {
        "met": "The answers about everything else are kept.",
        "unclear": (
            "The answers about everything else seem to be kept, but there are too few examples "
            "to be sure."
        ),
        "partly": "Some of the answers about everything else are lost.",
        "not": "Much of what should have been kept is lost.",
        "unknown": "Whether everything else was kept cannot be judged.",
    }
    numbers = f"{worst.label}: {number(worst.after)} against {number(worst.before)} before the edit"
    if worst.reference is not None:
        numbers += f"; the retrained model has {number(worst.reference)}"
    numbers += f" (n\u00a0=\u00a0{worst.n})." if worst.n else "."
    return Statement(status, by_status[status], numbers, tuple(checks))


def _retain_check(key: str, after: Reading, full: Run | None, retrained: Run | None) -> Check:
    before = full.measures.get(key) if full else None
    reference = retrained.measures[key].value if retrained and key in retrained.measures else None
    core = key in RETAIN_CORE
    n = len(after.examples)
    label = _label(key)
    if before is None or before.value <= SMALLEST_GAP:
        value = None if before is None else before.value
        return Check(
            key, label, value, after.value, reference, None, None, None, n, "unknown", core
        )
    difference = _difference(after, before, paired=True)
    share = after.value / before.value
    low = None if difference is None else 1 + difference.low / before.value
    high = None if difference is None else 1 + difference.high / before.value
    status = _retain_status(share, low)
    if key == "model_utility" and status == "unclear":
        status = "met"  # an interval of it alone would be that of many sets at once
    return Check(
        key, label, before.value, after.value, reference, share, low, high, n, status, core
    )


def _retain_status(share: float, low: float | None) -> Status:
    if share >= KEPT:
        return "met" if low is not None and low >= KEPT_PARTLY else "unclear"
    return "partly" if share >= KEPT_PARTLY else "not"


def _label(key: str) -> str:
    labels = {
        "probability": "Answer probability",
        "rouge": "ROUGE-L recall",
        "strength": "Extraction strength",
        "exact": "Exact memorization",
        "knowmem": "Knowledge (ROUGE-L F1)",
        "verbmem": "Verbatim recall (ROUGE-L F1)",
    }
    return labels.get(key.partition("_")[2]) or BY_KEY[key].label


def _worst(statuses: Iterable[Status]) -> Status:
    """The worst outcome among those that can tell anything."""
    found = list(statuses)
    telling = [status for status in found if status != "unknown"]
    return max(telling or found or ["unknown"], key=lambda status: _RANK[status])


def _headline(forgetting: Status, retention: Status) -> str:
    first = {
        "met": "Forgotten as far as measured",
        "unclear": "Probably forgotten",
        "partly": "Only partly forgotten",
        "not": "Not forgotten",
        "unknown": "Forgetting cannot be judged",
    }[forgetting]
    good = forgetting in ("met", "unclear")
    second = {
        "met": ", and the rest is kept" if good else "; the rest is kept",
        "unclear": ", and the rest seems kept" if good else "; the rest seems kept",
        "partly": ", at some cost to the rest",
        "not": ", but much else is lost with it" if good else ", and much else is lost",
        "unknown": "; what else was lost is not known",
    }[retention]
    return f"{first}{second}."


def _calibrated_on(calibration: Calibration | None) -> str:
    if calibration == "retrained":
        return (
            "Forgetting is judged against the retrained reference: a model tuned in the same "
            "way on everything but the removed examples."
        )
    if calibration == "holdout":
        return (
            "There is no retrained reference. Forgetting is judged against held-out examples "
            "that the edited model has never seen, which is weaker: they may be easier or "
            "harder than the removed ones."
        )
    if calibration == "base":
        return (
            "There is no retrained reference and no held-out set. Forgetting is judged against "
            "the base model, which is weaker: it saw none of the data, so it lacks the tone and "
            "the form of the answers too, and a model retrained without the removed examples "
            "would commonly find them more probable."
        )
    return (
        "There is neither a retrained reference nor a held-out set nor an evaluation of the base "
        "model, so this report can say what changed, not whether it is enough."
    )


def _notes(
    run: Run,
    full: Run | None,
    reference: Mapping[str, Reading] | None,
    calibration: Calibration | None,
    forgetting: Statement,
    retention: Statement,
) -> list[str]:
    notes = []
    if forgetting.status in ("met", "unclear") and retention.status == "not":
        notes.append(
            "A damaged model finds every answer improbable, so the low probability of the "
            "removed ones is weak evidence of selective forgetting here."
        )
    lead = forgetting.lead
    surely_below = lead is not None and lead.share_high is not None and lead.share_high < 0
    if lead and surely_below and lead.reference and lead.after < 0.5 * lead.reference:
        notes.append(
            "The removed answers are less probable than for the reference. An answer that is "
            "conspicuously absent can itself show that something was removed."
        )
    worst = _most_exposed(run, reference, calibration)
    if worst is not None:
        notes.append(worst)
    if calibration == "retrained" and "forget_quality" in run.measures:
        p = run.measures["forget_quality"].value
        outcome = "cannot be told apart" if p >= SIGNIFICANCE else "can be told apart"
        notes.append(
            f"By their truth ratios, edited and retrained model {outcome} "
            f"(forget quality: p = {number(p, 3)})."
        )
    if full is None:
        notes.append("The model before the edit was not evaluated on the same examples.")
    return notes


def _most_exposed(
    run: Run, reference: Mapping[str, Reading] | None, calibration: Calibration | None
) -> str | None:
    """A mean can hide one example that is still there."""
    reading = run.measures.get("forget_probability")
    if reading is None or not reading.examples:
        return None
    text = (
        "The most exposed removed example is answered with probability "
        f"{number(max(reading.examples.values()))}"
    )
    other = (reference or {}).get("forget_probability")
    if other is not None and other.examples and calibration is not None:
        whom = {
            "retrained": "the retrained model's highest",
            "holdout": "the highest on unseen examples",
            "base": "the base model's highest",
        }[calibration]
        text += f"; {whom} is {number(max(other.examples.values()))}"
    return text + "."


def reference_quality(run: Run, collection: Collection) -> tuple[float, float] | None:
    """KS distance and p-value of a run's truth ratios against the retrained model's."""
    retrained = _partner(run, collection.by_role("retrained"))
    if retrained is None or retrained is run:
        return None
    sample, other = truth_ratios(run.results), truth_ratios(retrained.results)
    return ks_test(sample, other) if sample and other else None


def _preference(verdict: Verdict) -> tuple[int, float]:
    kept = [check.after for check in verdict.retention.checks if check.core]
    return _RANK[verdict.forgetting.status], -(kept[0] if kept else 0.0)
