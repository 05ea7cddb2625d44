"""The verdict in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from perta.report.verdict.checks import RANK, Calibration, Check, Status

_LISTED = 5
"""Most rows or subjects that a sentence names."""


def number(value: float | None, digits: int = 2) -> str:
    """A value for a sentence, small ones with as many digits as they need."""
    if value is None:
        return "–"
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1g}" if abs(value) >= 1e-4 else f"{value:.0e}"
    return f"{value:.{digits}f}"


class _Yardstick(NamedTuple):
    """How what forgetting is judged against is called where."""

    never_saw: str
    against: str
    than: str
    highest: str
    what: str


_YARDSTICKS: Mapping[Calibration | None, _Yardstick] = {
    "retrained": _Yardstick(
        "for a model that never saw them",
        "for the retrained model",
        "the retrained model finds any",
        "the retrained model's highest",
        "Forgetting is judged against the retrained reference: a model tuned in the same way on "
        "everything but the removed examples.",
    ),
    "holdout": _Yardstick(
        "answers that this model has never seen",
        "on unseen examples",
        "this model finds unseen ones",
        "the highest on unseen examples",
        "There is no retrained reference. Forgetting is judged against held-out examples that the "
        "edited model has never seen, which is weaker: they may be easier or harder than the "
        "removed ones.",
    ),
    "base": _Yardstick(
        "for the base model, which never saw them",
        "for the base model",
        "the base model finds any",
        "the base model's highest",
        "There is no retrained reference and no held-out set. Forgetting is judged against the "
        "base model, which is weaker: it saw none of the data, so it lacks the tone and the form "
        "of the answers too, and a model retrained without the removed examples would commonly "
        "find them more probable.",
    ),
    None: _Yardstick(
        "",
        "",
        "",
        "",
        "There is neither a retrained reference nor a held-out set nor an evaluation of the base "
        "model, so this report can say what changed, not whether it is enough.",
    ),
}


def calibrated_on(calibration: Calibration | None) -> str:
    """What forgetting is judged against."""
    return _YARDSTICKS[calibration].what


def forget_text(lead: Check, worst: Check, calibration: Calibration | None) -> str:
    """What became of the removed answers, by the first decisive measure and the deciding one."""
    subject = "The answers about the removed examples"
    if calibration is None:
        if lead.before is not None and lead.after < lead.before:
            return (
                f"{subject} became less probable, but there is no model that never saw them to "
                "say whether that is enough."
            )
        return f"{subject} cannot be judged: there is nothing to compare them with."
    if worst.rows or worst.subjects:
        return _still_there(worst)
    never_saw = _YARDSTICKS[calibration].never_saw
    # Within the threshold and yet surely above the reference: then "as" would say too much.
    above = lead.share_low is not None and lead.share_low > 0
    like = f"{'nearly as' if above else 'as'} improbable as {never_saw}"
    by_status: Mapping[Status, str] = {
        "met": f"{subject} are now {like}.",
        "unclear": f"{subject} look {like}, but there are too few examples to be sure.",
        "partly": f"{subject} are much less probable than before, but more so than {never_saw}.",
        "not": f"{subject} are still there: they are far more probable than {never_saw}.",
        "unknown": (
            f"{subject} cannot be judged: the model before the edit hardly knew them better "
            "than the reference."
        ),
    }
    if lead.status not in ("met", "unclear") or RANK[worst.status] <= RANK["unclear"]:
        return by_status[worst.status]
    if worst.status == "unknown":
        return by_status[lead.status]
    verb = "is not all gone" if worst.status == "partly" else "is still there"
    return (
        f"{subject} are now {like}, but by another measure, {worst.label}, what was learned {verb}."
    )


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
        noun = "one subject" if len(check.subjects) == 1 else f"{len(check.subjects)} subjects"
        found.append(f"much of {noun} is left over all rows")
    text = ", and ".join(found)
    return f"{text[0].upper()}{text[1:]}, whatever became of the others."


def _row_list(rows: Sequence[str]) -> str:
    """Rows by number, the first few of them; windows of one text share theirs."""
    numbers = list(dict.fromkeys(rows))
    more = ", …" if len(numbers) > _LISTED else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_LISTED])}{more}"


def forget_numbers(check: Check, calibration: Calibration | None) -> str:
    """The figures behind it."""
    parts = [f"{check.label}: {number(check.after)}"]
    if check.reference is not None and calibration is not None:
        parts.append(f"against {number(check.reference)} {_YARDSTICKS[calibration].against}")
    text = " ".join(parts)
    if check.before is not None:
        text += f"; before the edit it was {number(check.before)}"
    if check.n:
        text += f" (n\u00a0=\u00a0{check.n})"
    return text + "."


def trace_text(check: Check | None, calibration: Calibration | None) -> str:
    """Whether the removed answers stand out by their absence."""
    if check is None or calibration is None:
        return "Whether the removed answers stand out by their absence was not measured."
    than = _YARDSTICKS[calibration].than
    if check.status == "not":
        return (
            f"{len(check.rows)} of the {check.n} removed answers are far less probable than {than}"
            " of them. What is conspicuously absent shows that something was removed."
        ).replace("unseen ones of them", "unseen ones")
    if check.status == "met":
        return f"No removed answer is far less probable than {than}."
    if check.rows:
        noun = "answer is" if len(check.rows) == 1 else "answers are"
        return (
            f"{len(check.rows)} removed {noun} far less probable than {than}; chance could do so."
        )
    return "No removed answer stands out by its absence, but there are too few to be sure."


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
    if check.subjects:
        noun = "one subject" if len(check.subjects) == 1 else f"{len(check.subjects)} subjects"
        return f"Of {noun} to be kept, less than half is left."
    return {
        "met": "The answers about everything else are kept.",
        "unclear": (
            "The answers about everything else seem to be kept, but there are too few examples "
            "to be sure."
        ),
        "partly": "Some of the answers about everything else are lost.",
        "not": "Much of what should have been kept is lost.",
        "unknown": "Whether everything else was kept cannot be judged.",
    }[status]


def retain_numbers(check: Check) -> str:
    """The figures behind it."""
    text = f"{check.label}: {number(check.after)} against {number(check.before)} before the edit"
    if check.reference is not None:
        text += f"; the retrained model has {number(check.reference)}"
    return text + (f" (n\u00a0=\u00a0{check.n})." if check.n else ".")


def headline(forgetting: Status, retention: Status, trace: Status = "unknown") -> str:
    """All outcomes in one short sentence; what was removed is named where it stands out."""
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
    third = "; what was removed stands out by its absence" if trace == "not" else ""
    return f"{first}{second}{third}."


def facts_text(sources: Mapping[str, int], *, decisive: bool) -> str:
    """How facts were found, and whether the yardstick has them too, so that they decide."""
    if not sources or not decisive:
        return (
            "The results hold no facts of the removed answers, so whole answers are judged. Most "
            "words of an answer are sentence around the fact, which other rows teach as well."
        )
    ways = {
        "fact column": "given with the rows",
        "wrong answers": "where the right answer differs from the wrong ones",
        "surprise": "what the base model does not expect",
        "answer": "the whole answer, for want of anything better",
    }
    found = [
        f"{ways.get(way, way)} ({count} row{'s' if count > 1 else ''})"
        for way, count in sources.items()
    ]
    return f"Facts are the words that the question does not give away: {'; '.join(found)}."


def quality_text(p: float, status: Status) -> str:
    """What a test of the truth ratios says, or that it cannot say anything."""
    outcome = {"met": "cannot be told apart", "not": "can be told apart"}.get(
        status, "are too few to be told apart by any but the coarsest difference"
    )
    whose = "edited and retrained model" if status in ("met", "not") else "the rows"
    return f"By their truth ratios, {whose} {outcome} (forget quality: p = {number(p, 3)})."


def exposed_text(highest: float, other: float | None, calibration: Calibration | None) -> str:
    """The most exposed row: a mean can hide one that is still there."""
    text = f"The most exposed removed example is answered with probability {number(highest)}"
    if other is not None and calibration is not None:
        text += f"; {_YARDSTICKS[calibration].highest} is {number(other)}"
    return text + "."
