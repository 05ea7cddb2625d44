"""The verdict on an edited model: its parts, what it rests on, and what may have gone wrong.

Forgetting is judged against a model that never saw the examples: the retrained one where there
is one, else unseen examples, else the base model. Retention is judged against the model before
the edit, on the same rows. Both need enough rows: see `_checks`. It is computed here alone,
from records and results; page, terminal and `verdict.json` repeat it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from perta.engine.edit.stored import WELL_STORED
from perta.errors import VerdictError
from perta.evidence.measures import Reading, rows_of, truth_ratios
from perta.evidence.metrics import ks_test
from perta.options import LEARNED_LOSS
from perta.report.collect import Collection, Run
from perta.report.settings import Wanted
from perta.report.verdict._checks import (
    Yardstick,
    find_yardstick,
    forget_checks,
    retain_checks,
    trace_check,
    worst,
)
from perta.report.verdict._sentences import (
    exposed_text,
    facts_text,
    forget_numbers,
    forget_text,
    headline,
    retain_numbers,
    retain_text,
    trace_numbers,
    trace_text,
)
from perta.report.verdict.words import RANK, Calibration, Check, Status, number, told
from perta.store.provenance import Record, Role, data_of

_SCHEMA = 1  # version of `verdict.json`; it rises when a key changes its meaning


@dataclass(frozen=True)
class Statement:
    """One sentence of the verdict with its outcome."""

    status: Status
    text: str
    numbers: str
    checks: tuple[Check, ...]

    @property
    def lead(self) -> Check | None:
        """The check that the numbers come from."""
        return next((check for check in self.checks if check.core), None)

    @property
    def decisive(self) -> Check | None:
        """The check that decides."""
        deciding = [check for check in self.checks if check.core and check.status == self.status]
        return next((c for c in deciding if c.doubt), deciding[0] if deciding else self.lead)

    @property
    def doubt(self) -> bool:
        """Whether it is not sure for what was found, and not only for want of rows."""
        return self.decisive is not None and self.decisive.doubt


@dataclass(frozen=True, repr=False)
class Verdict:
    """The verdict on one edited model."""

    run: Run
    headline: str  # all outcomes in one short sentence
    forgetting: Statement  # on the removed examples
    retention: Statement  # on everything else
    trace: Statement  # whether the removed examples stand out by their absence
    calibration: Calibration | None  # what forgetting is judged against
    facts: str  # how the facts were found that are judged
    causes: tuple[str, ...]  # likely reasons for what is not met, with their cure
    notes: tuple[str, ...]  # what a careful reader has to know about the numbers

    @property
    def calibrated_on(self) -> str:
        """What forgetting is judged against, in words."""
        return told(self.calibration or "nothing", "what")

    @property
    def status(self) -> Status:
        """The worse of forgetting and retention; what cannot be told is the worst."""
        return max(self.forgetting.status, self.retention.status, key=lambda s: RANK[s])

    def __repr__(self) -> str:
        """The headline alone; the rest is pages."""
        return f"{type(self).__name__}({self.headline!r})"

    @property
    def line(self) -> str:
        """The verdict in one line, with the likely cause where there is one."""
        parts = [self.headline, self.forgetting.numbers, *self.causes[:1]]
        return " ".join(part for part in parts if part)

    def fulfils(self, wanted: Wanted) -> bool:
        """Whether forgetting and retention are at least what is wanted."""
        return RANK[self.status] <= RANK[wanted]


def judge(collection: Collection) -> list[Verdict]:
    """A verdict on every edited model that was evaluated, by forgetting and then by keeping."""
    runs = [run for run in collection.by_role("edited") if run.measures]
    verdicts = [_judge_run(run, collection) for run in runs]
    return sorted(verdicts, key=_preference)


def _judge_run(run: Run, collection: Collection) -> Verdict:
    full = _partner(run, collection, "full")
    retrained, base = (_partner(run, collection, role) for role in ("retrained", "base"))
    yardstick = find_yardstick(run, retrained, base)
    calibration = yardstick.calibration if yardstick else None
    forgetting = _forgetting(run, full, yardstick)
    retention, rows = _retention(run, collection)
    found = trace_check(run, yardstick)
    trace = Statement(
        found.status if found else "unknown",
        trace_text(found, calibration),
        trace_numbers(found),
        (found,) if found else (),
    )
    decisive = yardstick is None or "forget_fact" in yardstick.measures
    return Verdict(
        run=run,
        headline=headline(
            forgetting.status, retention.status, trace.status, doubt=forgetting.doubt
        ),
        forgetting=forgetting,
        retention=retention,
        trace=trace,
        calibration=calibration,
        facts=facts_text(_fact_sources(run), decisive=decisive),
        causes=tuple(_likely_causes(run, collection, forgetting)),
        notes=(*rows, *_notes(run, full, yardstick, forgetting, retention)),
    )


def require_verdict(wanted: Wanted | None, verdict: Verdict | None, output: object) -> None:
    """Stop a script whose result is worse than it asked for; the output stays."""
    if wanted is None or (verdict is not None and verdict.fulfils(wanted)):
        return
    what = verdict.headline if verdict else "There is no verdict."
    raise VerdictError(f"--fail-unless {wanted}: {what} {output} stays.")


def as_record(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain values for `verdict.json`: numbers and our own sentences, no texts."""
    run = verdict.run

    def part(statement: Statement) -> dict[str, Any]:
        return {**vars(statement), "checks": [_check_record(check) for check in statement.checks]}

    return {
        "schema": _SCHEMA,
        "status": verdict.status,
        "headline": verdict.headline,
        "model": {
            "label": run.label,
            "fingerprint": run.fingerprint,
            "method": run.method,
            "scaling_coef": run.alpha,
        },
        "yardstick": verdict.calibration,
        "facts": {"text": verdict.facts, "sources": dict(_fact_sources(run))},
        "forgetting": part(verdict.forgetting),
        "retention": part(verdict.retention),
        "over_forgetting": part(verdict.trace),
        "causes": list(verdict.causes),
        "notes": list(verdict.notes),
    }


def _check_record(check: Check) -> dict[str, Any]:
    same = ("status", "before", "after", "reference", "share", "share_low", "share_high")
    return {
        "measure": check.key,
        "decisive": check.core,
        **{name: getattr(check, name) for name in same},
        "examples": check.n,
        "rows": _plain_rows(check.rows),
        "subjects": list(check.subjects),
        "doubtful_rows": _plain_rows(check.doubtful_rows),
        "doubtful_subjects": list(check.doubtful_subjects),
    }


def _plain_rows(numbers: Iterable[str]) -> list[int | str]:
    """Each once, as numbers where they are."""
    return [int(i) if i.isdigit() else i for i in dict.fromkeys(numbers)]


def _partner(run: Run, collection: Collection, role: Role, name: str = "forget") -> Run | None:
    """The reference measured on the same examples, of the same seed where there are several."""
    usable = [
        other
        for other in collection.by_role(role)
        if other.measures and run.same_set(other, name) and run.fits(other)
    ]
    return min(usable, key=lambda other: other.seed != run.seed, default=None)


def _forgetting(run: Run, full: Run | None, yardstick: Yardstick | None) -> Statement:
    checks = tuple(forget_checks(run, full, yardstick))
    found = Statement(worst(check.status for check in checks if check.core), "", "", checks)
    if found.lead is None or found.decisive is None:
        return Statement("unknown", told("forgetting", "unmeasured"), "", checks)
    calibration = yardstick.calibration if yardstick else None
    text = forget_text(found.lead, found.decisive, calibration)
    return replace(found, text=text, numbers=forget_numbers(found.decisive, calibration))


def _retention(run: Run, collection: Collection) -> tuple[Statement, list[str]]:
    """The statement on what was kept, and on which rows it rests."""
    full, retrained = (_partner(run, collection, role, "retain") for role in ("full", "retrained"))
    checks = tuple(retain_checks(run, full, retrained))
    found = Statement(worst(c.status for c in checks if c.core), "", "", checks)
    lead, decisive = found.lead, found.decisive
    if lead is None or decisive is None:
        return Statement("unknown", told("retention", "unmeasured"), "", checks), []
    if full is None or lead.before is None:
        text, numbers = told("retention", "no_before"), f"{lead.label}: {number(lead.after)}."
        return Statement("unknown", text, numbers, checks), []
    text = retain_text(found.status, decisive)
    seen, note = _retained_rows(run, collection)
    if seen and found.status == "met":
        found = replace(found, status="unclear")
        text = told("retention", "seen")
    return replace(found, text=text, numbers=retain_numbers(decisive)), [note] if note else []


def _retained_rows(run: Run, collection: Collection) -> tuple[bool, str]:
    """Whether the evaluated retain rows took part in the edit, and a sentence on them."""
    made: Record = run.record.get("unlearn", {})
    held: Mapping[str, Any] = made.get("held_back", {})
    evaluated = run.set_fingerprint("retain")
    seen = held.get("seen_by")
    if held.get("rows") and evaluated == held.get("fingerprint"):
        whole = ", all rows of some subjects," if held.get("by") == "subject" else ""
        note = told("notes", "held_back", rows=held["rows"], of=held["of"], whole=whole)
        return bool(seen), note + (f", unless they did in {seen}." if seen else ".")
    if held and not held.get("used") and evaluated == made.get("inputs", {}).get("retain"):
        return False, told("notes", "apart")
    used = held.get("used") or evaluated in _protected(run.record, collection)
    if not evaluated or not used:
        return False, ""
    where = f"They may be in {seen}." if seen else ""
    return True, " ".join(filter(None, (told("notes", "took_part"), held.get("reason", ""), where)))


def _protected(record: Record, collection: Collection) -> set[str]:
    """Fingerprints of the retain rows that an edit or a training used."""
    used = {str(record.get("inputs", {}).get("retain"))}
    for name in ("retain_importance", "retain_moments", "retain_checkpoint"):
        used |= data_of(collection.input_record(record, name), collection.records)
    return used - {"None"}


def _likely_causes(run: Run, collection: Collection, forgetting: Statement) -> list[str]:
    """Why a model has not forgotten, as far as the records tell, with the cure, likeliest first."""
    surely = forgetting.status in ("partly", "not")
    if not surely and not forgetting.doubt:
        return []
    record = run.record
    if record.get("stage") == "train":
        return [told("causes", "training")] if surely else []
    if not record:
        return []
    causes = []
    tuned = [
        made
        for name in record.get("inputs", {})
        if name.startswith("forget_checkpoint")
        and (made := collection.input_record(record, name)).get("final_loss") is not None
    ]
    # With a mean below it single rows may still be missing; where none is, the rest is depth.
    losses = [
        max([made["final_loss"], *(made.get("final_losses") or ())])
        for made in tuned
        if not made.get("learned", True)
    ]
    losses = [loss for loss in losses if loss > LEARNED_LOSS]
    if losses:
        causes.append(told("causes", "unlearned", loss=number(max(losses))))
    stored = record.get("edit", {}).get("stored", {}).get("stored_share")
    if isinstance(stored, int | float) and stored < WELL_STORED:
        causes.append(told("causes", "rounding", stored=stored))
    strength = record.get("unlearn", {}).get("strength", {})
    # What rounds left is not paid for where no strength reaches it; elsewhere the budget ends it.
    ended = strength.get("in_rounds") and strength.get("scaling_coef") == 1
    if strength.get("reached") is False and not ended:
        causes.append(told("causes", "budget", budget=number(strength.get("retain_budget"))))
    # What may be chance needs no more strength.
    return causes if causes or not surely else _too_small(run, strength)


def _too_small(run: Run, strength: Mapping[str, Any]) -> list[str]:
    """That the strength is, by how it was found."""
    if left := strength.get("standing_out"):
        return [told("causes", "rounds", rows=len(left), alpha=run.alpha)]
    if strength:
        rows = strength.get("calibrated_on")
        return [told("causes", "calibration", rows=rows, alpha=run.alpha)]
    return [] if run.alpha is None else [told("causes", "strength", alpha=run.alpha)]


def _fact_sources(run: Run) -> Counter[str]:
    rows = rows_of(run.results, "forget_fact_probability").values()
    return Counter(str(row["source"]) for row in rows if row.get("source"))


def _notes(
    run: Run,
    full: Run | None,
    yardstick: Yardstick | None,
    forgetting: Statement,
    retention: Statement,
) -> list[str]:
    notes = []
    if forgetting.status in ("met", "unclear") and retention.status == "not":
        notes.append(told("notes", "damaged"))
    keys = ("forget_fact", "forget_probability")
    exposed = [(key, value) for key in keys if (value := _highest(run.measures, key)) is not None]
    for key, value in exposed[:1]:
        other = _highest(yardstick.measures, key) if yardstick else None
        notes.append(exposed_text(value, other, yardstick.calibration if yardstick else None))
    notes += [
        told("quality", check.status, p=number(check.after, 3))
        for check in forgetting.checks
        if check.key == "forget_quality"
    ]
    if full is None:
        notes.append(told("notes", "no_before"))
    return notes


def _highest(measures: Mapping[str, Reading], key: str) -> float | None:
    return max(measures[key].examples.values(), default=None) if key in measures else None


def reference_quality(run: Run, collection: Collection) -> tuple[float, float] | None:
    """KS distance and p-value of a run's truth ratios against the retrained model's."""
    retrained = _partner(run, collection, "retrained")
    if retrained is None or retrained is run:
        return None
    sample, other = truth_ratios(run.results), truth_ratios(retrained.results)
    return ks_test(sample, other) if sample and other else None


def _preference(verdict: Verdict) -> tuple[int, float]:
    kept = [check.after for check in verdict.retention.checks if check.core]
    return RANK[verdict.forgetting.status], -(kept[0] if kept else 0.0)
