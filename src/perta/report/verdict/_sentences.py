"""The verdict in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perta.report.verdict.words import RANK, Calibration, Check, Status, number, told, ways

_LISTED = 5  # most rows or subjects that a sentence names


def forget_text(lead: Check, worst: Check, calibration: Calibration | None) -> str:
    """What became of the removed answers, by the first decisive measure and the deciding one."""
    if calibration is None:
        less = lead.before is not None and lead.after < lead.before
        return told("forgetting", "less" if less else "alone")
    if worst.rows or worst.subjects:
        return _still_there(worst)
    never_saw = told(calibration, "never_saw")
    if worst.doubt:
        text = told("forgetting", "doubtful", never_saw=never_saw, other=worst.label)
        return text + _in_doubt(worst)
    # Within the threshold and yet surely above the reference: then "as" would say too much.
    above = lead.share_low is not None and lead.share_low > 0
    like = f"{'nearly as' if above else 'as'} improbable as {never_saw}"
    name: str = worst.status
    if lead.status in ("met", "unclear") and RANK[worst.status] > RANK["unclear"]:
        name = lead.status if worst.status == "unknown" else f"other_{worst.status}"
    return told("forgetting", name, like=like, never_saw=never_saw, other=worst.label)


def _still_there(check: Check) -> str:
    """Rows and subjects that a mean would hide."""
    found = []
    if check.rows:
        verb = "is" if len(check.rows) == 1 else "are"
        found.append(
            f"{len(check.rows)} of the {check.n} removed answers {verb} still there "
            f"({_row_list(check.rows)})"
        )
    if check.subjects:
        found.append(f"much of {_count(check.subjects)} is left over all rows")
    text = ", and ".join(found)
    return f"{text[0].upper()}{text[1:]}, whatever became of the others.{_in_doubt(check, ' too')}"


def _in_doubt(check: Check, too: str = "") -> str:
    """Rows and subjects of which much is left, as chance could have it."""
    parts = [_row_list(check.doubtful_rows)] if check.doubtful_rows else []
    parts += [_count(check.doubtful_subjects)] if check.doubtful_subjects else []
    return f" Much may be left of {' and '.join(parts)}{too}." if parts else ""


def _count(subjects: Sequence[int]) -> str:
    return "one subject" if len(subjects) == 1 else f"{len(subjects)} subjects"


def _row_list(rows: Sequence[str]) -> str:
    """Rows by number, the first few of them; windows of one text share theirs."""
    numbers = list(dict.fromkeys(rows))
    more = ", …" if len(numbers) > _LISTED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_LISTED])}{more}"


def forget_numbers(check: Check, calibration: Calibration | None) -> str:
    """The figures behind it."""
    text = f"{check.label}: {number(check.after)}"
    if check.reference is not None and calibration is not None:
        text += f" against {number(check.reference)} {told(calibration, 'against')}"
    if check.before is not None:
        text += f"; before the edit it was {number(check.before)}"
    return text + _of(check)


def _of(check: Check) -> str:
    return f" (n\u00a0=\u00a0{check.n})." if check.n else "."


def trace_text(check: Check | None, calibration: Calibration | None) -> str:
    """Whether the removed answers stand out by their absence."""
    if check is None or calibration is None:
        return told("trace", "unmeasured")
    count = len(check.rows)
    return told(
        "trace",
        "rows" if check.rows and check.status == "unclear" else check.status,
        count=count,
        n=check.n,
        than=told(calibration, "than"),
        of_them="" if calibration == "holdout" else " of them",
        answers="answer is" if count == 1 else "answers are",
    )


def trace_numbers(check: Check | None) -> str:
    """The figures behind it."""
    if check is None:
        return ""
    where = f" ({_row_list(check.rows)})" if check.rows else ""
    return (
        f"Mean loss {number(check.after)} nats per token against {number(check.reference)}; "
        f"{len(check.rows)} of {check.n} beyond the yardstick{where}."
    )


def retain_text(status: Status, check: Check) -> str:
    """What became of everything else."""
    name = "subjects" if check.subjects else status
    return told("retention", name, subjects=_count(check.subjects))


def retain_numbers(check: Check) -> str:
    """The figures behind it."""
    text = f"{check.label}: {number(check.after)} against {number(check.before)} before the edit"
    if check.reference is not None:
        text += f"; the retrained model has {number(check.reference)}"
    return text + _of(check)


def headline(
    forgetting: Status, retention: Status, trace: Status = "unknown", *, doubt: bool = False
) -> str:
    """All outcomes in one short sentence; what was removed is named where it stands out."""
    good = "good" if forgetting in ("met", "unclear") else "bad"
    first = told("headline", "doubt" if doubt else forgetting)
    first += told(f"headline_after_{good}", retention)
    return f"{first}{told('headline', 'trace') if trace == 'not' else ''}."


def facts_text(sources: Mapping[str, int], *, decisive: bool) -> str:
    """How facts were found, and whether the yardstick has them too, so that they decide."""
    if not sources or not decisive:
        return told("facts", "none")
    listed = [
        f"{ways().get(way, way)} ({count} row{'s' if count > 1 else ''})"
        for way, count in sources.items()
    ]
    return told("facts", "found", ways="; ".join(listed))


def exposed_text(highest: float, other: float | None, calibration: Calibration | None) -> str:
    """The most exposed row: a mean can hide one that is still there."""
    text = told("notes", "exposed", highest=number(highest))
    if other is not None and calibration is not None:
        text += f"; {told(calibration, 'highest')} is {number(other)}"
    return text + "."
