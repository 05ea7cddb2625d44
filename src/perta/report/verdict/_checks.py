"""One measure at a time: what is left of what was learned, what is kept, what stands out.

A yardstick says what a model without the removed examples makes of them: the retrained model
or the base model on the same rows (paired), or this model on unseen rows (not paired). With a_i
the value of row i after the edit, b_i before it and y_i the yardstick's for that row (not paired:
its mean), what is left is

    share = mean(a − y) / mean(b − y),        share_i = (a_i − y_i) / (b_i − y_i)

Worst case decides: low rows pay for no high one. That something is left is said as the audit says
it (`evidence.audit.judge`): of models that never saw the examples at most 5% are said to have any,
by all decisive measures together. What `remains` finds beyond that may be chance, and is no proof
that all is gone. Few rows are none either: among n rows none of which is still there, the share of
such rows may be up to 1 − 0.025^(1/n) (exact binomial), and that has to be small as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from perta.evidence.audit.judge import FALSE_ALARMS, standing_out
from perta.evidence.audit.judge import Yardstick as Usual
from perta.evidence.intervals import Interval, share_interval, upper_end
from perta.evidence.measures import (
    BY_ROW,
    FACTS,
    FORGET_CORE,
    RETAIN_CORE,
    Reading,
    measure_of,
    numbers_of,
    read_repeats,
    read_subjects,
    row_number,
    truth_ratios,
)
from perta.evidence.remains import (
    BY_CHANCE,
    KEPT,
    KEPT_PARTLY,
    REMAINDER,
    REMAINDER_PARTLY,
    REMAINDER_SURE,
    SMALLEST_GAP,
    Values,
    excess,
    kept,
    left_of_rows,
    lost_subjects,
    rows_still_there,
    subjects_still_there,
)
from perta.report.collect import Run
from perta.report.verdict.words import RANK, Calibration, Check, Status

_WHOLE = 0.5  # mean probability of whole facts from which those are judged, not their tokens

_SIGNIFICANCE = 0.05
_KS_DISTANCE = 1 / 3
"""Distance of truth ratios that a test has to be able to find before its silence means anything."""
_TRACE = math.log(2)
"""Nats per token beyond the yardstick's least probable rows at which an answer is conspicuous."""


@dataclass(frozen=True)
class Yardstick:
    """What a model without the removed examples makes of them."""

    calibration: Calibration  # where that is known from
    run: Run  # the model

    @property
    def paired(self) -> bool:
        """Whether its rows are the removed ones."""
        return self.calibration != "holdout"

    @property
    def rows(self) -> str:
        """The set whose rows stand for the removed ones."""
        return "forget" if self.paired else "holdout"

    @property
    def measures(self) -> Mapping[str, Reading]:
        """Readings under the keys of the forget set."""
        prefix = f"{self.rows}_"
        return {
            key.replace(prefix, "forget_", 1): reading
            for key, reading in self.run.measures.items()
            if self.paired or key.startswith(prefix)
        }


def find_yardstick(run: Run, retrained: Run | None, base: Run | None) -> Yardstick | None:
    """The best yardstick there is: retrained model, else unseen examples, else base model."""
    if retrained is not None:
        return Yardstick("retrained", retrained)
    if any(key.startswith("holdout_") for key in run.measures):
        return Yardstick("holdout", run)
    return Yardstick("base", base) if base is not None else None


def _row_losses(run: Run, name: str) -> Values:
    """Loss of each row's fact, or of its answer where no facts were measured."""
    facts = numbers_of(run.results, f"{name}_fact_probability", "loss")
    if facts:
        return facts
    reading = run.measures.get(f"{name}_probability")
    examples = reading.examples if reading else {}
    # The probability of an answer is exp(−loss); float64 ends near 745 nats.
    return {i: -math.log(max(value, 1e-300)) for i, value in examples.items()}


def _is_decisive(key: str, run: Run, yardstick: Yardstick | None) -> bool:
    """Whether a forget measure counts for the verdict.

    A model that saw other rows of the same form knows the sentences around the facts. Beside the
    retrained model that cancels out; beside the base model or other rows it does not, so there
    facts alone decide where they were measured, and overlap with the reference's words never does.
    """
    if key in FACTS or yardstick is None or yardstick.calibration == "retrained":
        return key in FORGET_CORE
    if "forget_fact" in run.measures and "forget_fact" in yardstick.measures:
        return False
    return key in FORGET_CORE and (yardstick.calibration == "holdout" or key != "forget_rouge")


def forget_checks(run: Run, full: Run | None, yardstick: Yardstick | None) -> list[Check]:
    """Every forget measure against the yardstick, facts first."""
    left_out = _other_fact("forget", full)
    keys = [k for k in (*FORGET_CORE, "forget_exact") if k in run.measures and k != left_out]
    ways = max(1, sum(_is_decisive(key, run, yardstick) for key in keys))
    checks = [
        _forget_check(key, run, full.measures.get(key) if full else None, yardstick, ways)
        for key in keys
    ]
    quality = _quality_check(run, full, yardstick)
    return [*checks, *([quality] if quality else [])]


def _numbered(indices: Iterable[str], run: Run) -> tuple[str, ...]:
    return tuple(row_number(run.results, "forget", index) for index in indices)


def _other_fact(name: str, full: Run | None) -> str:
    """The measure of facts that says less: of whole facts or of their tokens."""
    reading = full.measures.get(f"{name}_fact") if full else None
    whole = reading is None or reading.value >= _WHOLE
    return f"{name}_fact_token" if whole else f"{name}_fact"


def _unjudged(
    key: str, before: Reading | None, after: Reading, reference: Reading | None, core: bool
) -> Check:
    values = [reading.value if reading else None for reading in (before, reference)]
    label = measure_of(key).title
    return Check(key, label, values[0], after.value, values[1], len(after.examples), core)


def _forget_check(
    key: str, run: Run, before: Reading | None, yardstick: Yardstick | None, ways: int
) -> Check:
    after = run.measures[key]
    reference = yardstick.measures.get(key) if yardstick else None
    check = _unjudged(key, before, after, reference, _is_decisive(key, run, yardstick))
    if reference is None or yardstick is None:
        return check
    # Without the full model a gap of one is assumed: the measure's whole range.
    gap = 1.0 if before is None else before.value - reference.value
    if gap <= SMALLEST_GAP:
        return check
    known = before.examples if before else {}
    sides = ((run.results, "forget"), (yardstick.run.results, yardstick.rows))
    people = (read_subjects(*sides[0]), read_subjects(*sides[1]))
    repeats = read_repeats(*sides[0])
    groups = (people[0] or repeats, people[1] or read_repeats(*sides[1]))
    values, paired = (after.examples, reference.examples, known, groups), yardstick.paired
    difference = excess(*values, paired=paired)
    surely = excess(*values, paired=paired, confidence=1 - FALSE_ALARMS / ways)
    share = (after.value - reference.value) / gap
    high = None if difference is None else difference.high / gap
    status = _forget_status(share, high, surely is None or surely.low > 0)
    check = replace(
        check,
        status=status,
        share=share,
        share_low=None if difference is None else difference.low / gap,
        share_high=high,
        doubt=status == "unclear" and share > REMAINDER,
    )
    if key not in BY_ROW or not after.examples:
        return check
    # A mean without its rows stands for each of them.
    usual = reference.examples or {"": reference.value}
    name = yardstick.calibration if reference.examples else "holdout"
    return _with_rows(check, run, known, Usual(name, usual, people[1]), ways)


def _with_rows(check: Check, run: Run, known: Values, usual: Usual, ways: int) -> Check:
    """The check with what single rows and subjects say; one that is still there is enough."""
    after = run.measures[check.key].examples
    people, repeats = read_subjects(run.results, "forget"), read_repeats(run.results, "forget")
    left = left_of_rows(after, known, usual.values, paired=usual.paired)
    maybe, many = rows_still_there(left, after, usual.values)
    persons = (people, usual.people)
    doubtful = subjects_still_there(after, known, usual.values, persons, paired=usual.paired)
    beyond: Values = {}
    subjects: tuple[int, ...] = ()
    # In the other measures who guesses right has a high one; the audit's probes say the same.
    if check.key != "forget_choice" and (
        check.key != "forget_fact_token" or usual.name == "retrained"
    ):
        beyond, found = standing_out(after, known, people, [usual], ways)
        subjects = tuple(map(int, found))
    there = [i for i in sorted(beyond, key=lambda i: -after[i]) if beyond[i] > REMAINDER_PARTLY]
    n, standing = _distinct(after, repeats), _distinct(beyond, repeats)
    # Of unseen rows one in twenty lies beyond their own spread.
    unusual = [share_interval(min(count, n), n).low > BY_CHANCE for count in (standing, many)]
    by_row: Status = "met" if share_interval(0, n).high <= REMAINDER_SURE else "unclear"
    if _distinct(there, repeats) > REMAINDER_PARTLY * n:
        by_row = "not"
    elif there or subjects or unusual[0]:
        by_row = "partly"
    elif maybe or doubtful or unusual[1]:
        by_row = "unclear"
    status = worst([check.status, by_row])
    return replace(
        check,
        status=status,
        rows=_numbered(there, run),
        subjects=subjects,
        doubt=status == "unclear" and (check.doubt or bool(maybe or doubtful or unusual[1])),
        doubtful_rows=_numbered((i for i in maybe if i not in there), run),
        doubtful_subjects=tuple(s for s in doubtful if s not in subjects),
    )


def _distinct(indices: Iterable[str], repeats: Mapping[str, int]) -> int:
    """How many rows these are: what is said twice, or in pieces, is one."""
    return len({repeats.get(index, index) for index in indices})


def _forget_status(share: float, high: float | None, surely_more: bool) -> Status:
    if share <= REMAINDER:
        return "met" if high is not None and high <= REMAINDER_SURE else "unclear"
    if not surely_more:
        return "unclear"
    return "partly" if share <= REMAINDER_PARTLY else "not"


def _quality_check(run: Run, full: Run | None, yardstick: Yardstick | None) -> Check | None:
    """Forget quality: a test, so a p-value decides and there is no share.

    A test of few rows finds nothing, whatever is there, so its silence counts only where it could
    have found a distance of `_KS_DISTANCE`.
    """
    reading = run.measures.get("forget_quality")
    if reading is None or yardstick is None or yardstick.calibration != "retrained":
        return None
    n = len(truth_ratios(run.results))
    status: Status = "not" if reading.value < _SIGNIFICANCE else "unclear"
    # Asymptotic distance of two samples of n that is just significant.
    if status == "unclear" and n and math.sqrt(-math.log(_SIGNIFICANCE / 2) / n) <= _KS_DISTANCE:
        status = "met"
    before = full.measures.get("forget_quality") if full else None
    check = _unjudged("forget_quality", before, reading, None, core=False)
    return replace(check, label="Forget quality (p)", reference=1.0, n=n, status=status)


def trace_check(run: Run, yardstick: Yardstick | None) -> Check | None:
    """Whether removed answers are conspicuously improbable: an absence that marks the set."""
    mine = _row_losses(run, "forget")
    theirs = _row_losses(yardstick.run, yardstick.rows) if yardstick else {}
    if not mine or not theirs:
        return None
    spread = upper_end(list(theirs.values()))
    rows = tuple(i for i, loss in mine.items() if loss > spread + _TRACE)
    repeats = read_repeats(run.results, "forget")
    found = share_interval(_distinct(rows, repeats), _distinct(mine, repeats))
    status: Status = "unclear"
    if found.low > BY_CHANCE:
        status = "not"
    elif not rows and found.high <= REMAINDER_SURE:
        status = "met"
    return Check(
        "forget_trace",
        "Loss of the removed answers",
        before=None,
        after=fmean(mine.values()),
        reference=fmean(theirs.values()),
        n=found.n,
        core=True,
        status=status,
        share=found.value,
        share_low=found.low,
        share_high=found.high,
        rows=_numbered(rows, run),
    )


def retain_checks(run: Run, full: Run | None, retrained: Run | None) -> list[Check]:
    """Every retain measure against the model before the edit, on the same rows."""
    left_out = _other_fact("retain", full)
    keys = [k for k in (*RETAIN_CORE, "retain_strength") if k in run.measures and k != left_out]
    subjects = read_subjects(run.results, "retain") or read_repeats(run.results, "retain")
    return [_retain_check(key, run.measures[key], full, retrained, subjects) for key in keys]


def _retain_check(
    key: str, after: Reading, full: Run | None, retrained: Run | None, subjects: Mapping[str, int]
) -> Check:
    before = full.measures.get(key) if full else None
    reference = retrained.measures.get(key) if retrained else None
    check = _unjudged(key, before, after, reference, key in RETAIN_CORE)
    if before is None or before.value <= SMALLEST_GAP:
        return check
    share = after.value / before.value
    interval = _kept(after, before, subjects)
    people: tuple[int, ...] = ()
    if after.examples and key != "model_utility":
        people = lost_subjects(after.examples, before.examples, subjects)
    status = _retain_status(share, interval.low if interval else None)
    return replace(
        check,
        share=share,
        share_low=interval.low if interval else None,
        share_high=interval.high if interval else None,
        status=worst([status, "partly"]) if people else status,
        subjects=people,
    )


def _kept(after: Reading, before: Reading, subjects: Mapping[str, int]) -> Interval | None:
    """Share that is kept, with its interval."""
    if after.examples.keys().isdisjoint(before.examples):
        if after.interval is None:
            return None
        # A value of several sets: its own interval, the value before taken as it is.
        low, high = (end / before.value for end in (after.interval.low, after.interval.high))
        return Interval(after.value / before.value, low, high, after.interval.n)
    return kept(after.examples, before.examples, before.value, subjects)


def _retain_status(share: float, low: float | None) -> Status:
    if share >= KEPT:
        return "met" if low is not None and low >= KEPT_PARTLY else "unclear"
    return "partly" if share >= KEPT_PARTLY else "not"


def worst(statuses: Iterable[Status]) -> Status:
    """The worst outcome among those that can tell anything."""
    found = list(statuses)
    telling = [status for status in found if status != "unknown"]
    return max(telling or found or ["unknown"], key=lambda status: RANK[status])
