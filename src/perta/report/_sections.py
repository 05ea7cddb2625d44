"""What the page says, section by section, ready for the template.

Each function makes one section from the collected runs. What is missing is left out, and a
sentence says so; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perta.evidence.measures import MEASURES
from perta.report.collect import Collection, Run
from perta.report.verdict.judge import Statement, Verdict
from perta.report.verdict.words import number, told

_INPUT_NAMES: Mapping[str, str] = {
    "full": "model before the edit",
    "base": "base model",
    "forget_checkpoint": "model tuned on the forget set alone",
    "forget_importance": "importance, forget set",
    "retain_importance": "importance, retain set",
    "checkpoint": "evaluated model",
    "forget": "forget set",
    "retain": "retain set",
    "holdout": "held-out set",
    "content": "edited model",
}
_MEASURE_NAMES: Mapping[str, str] = {
    name: f"{measure.label} ({name})" for measure in MEASURES for name in measure.names
}
_SHOWN_SETTINGS = {
    "method": "method",
    "scaling_coef": "strength α",
    "granularity": "granularity",
    "include": "only tensors",
    "exclude": "not tensors",
    "unlearn_epochs": "epochs",
    "unlearn_learning_rate": "learning rate",
}


SMALLEST_SET = 10
"""Rows from which the fingerprint of a set is shown: all of a small one could be guessed."""
_SETS = ("forget", "retain", "holdout", "general", "data")


@dataclass(frozen=True)
class Pin:
    """A value on the verdict's scale."""

    role: str
    text: str
    percent: float
    level: int
    side: str


@dataclass(frozen=True)
class Identity:
    """Something that took part, by name and content."""

    what: str
    name: str
    fingerprint: str
    more: str = ""


def scale(statement: Statement, reference: str) -> tuple[Pin, ...]:
    """The lead measure of a statement as pins on a line from 0 to 1."""
    check = statement.decisive
    if check is None or not 0 <= check.after <= 1:
        return ()
    values = [("before", "before", check.before), ("reference", reference, check.reference)]
    pins = [_pin("after", "after", check.after)]
    taken: list[float] = []
    for role, name, value in values:
        if value is not None:
            pin = _pin(role, name, value)
            # On a phone a label takes about two fifths of the line.
            start = pin.percent - {"left": 0, "middle": 20, "right": 40}[pin.side]
            level = int(any(abs(start - other) < 40 for other in taken))
            pins.append(replace(pin, level=level))
            taken.append(start)
    return tuple(pins)


def _pin(role: str, name: str, value: float) -> Pin:
    percent = 100 * min(1.0, max(0.0, value))
    side = "left" if percent < 18 else "right" if percent > 82 else "middle"
    return Pin(role, f"{name} {number(value)}", percent, 0, side)


def asked(subject: Run | None, collection: Collection) -> list[Identity]:
    """What was to be removed, what kept, and from which model."""
    if subject is None:
        return []
    items = []
    evaluated = subject.made.get("inputs", {})
    names = {k: v for k, v in subject.made.get("settings", {}).items() if isinstance(v, str)}
    whole = subject.record.get("unlearn", {})
    wanted, sources = whole.get("inputs", {}), whole.get("sources", {})
    benchmark = names.get("forget_split") or names.get("corpus")
    parts = {"forget": "to be removed", "retain": "to be kept", "holdout": "held out"}
    for name, what in parts.items():
        # A name and a fingerprint from one record, or they may be of different sets.
        fingerprint = wanted.get(name) or evaluated.get(name) or ""
        source = (sources if name in wanted else names).get(name)
        size = subject.set_size(name) if evaluated.get(name, fingerprint) == fingerprint else None
        if benchmark and not fingerprint:
            fingerprint = evaluated.get("data", "")
            source = source or (benchmark if name == "forget" else None)
        if fingerprint or size:
            more = f"{size} examples" if size else ""
            items.append(Identity(what, _file(source), _shown(name, fingerprint, size), more))
    full = subject.record.get("inputs", {}).get("full")
    if full:
        count = collection.records.get(str(full), {}).get("examples")
        more = f"tuned on {count} examples" if count else ""
        name = _file(subject.record.get("settings", {}).get("full"))
        items.append(Identity("from the model", name, str(full), more))
    return items


def done(subject: Run | None) -> dict[str, Any]:
    """How it was done: sentence, equation, settings, inputs and versions; empty if not recorded."""
    record = subject.record if subject else {}
    if not subject or not record:
        return {}
    given = record.get("settings", {})
    settings = [
        (title, _plain(given[name]))
        for name, title in _SHOWN_SETTINGS.items()
        if given.get(name) not in (None, [], ())
    ]
    settings += [(name, _plain(value)) for name, value in given.get("method_settings", {}).items()]
    inputs = [
        Identity(
            _INPUT_NAMES.get(name, name),
            _file(record.get("settings", {}).get(name)),
            _shown(name, fingerprint, subject.set_size(name)),
        )
        for name, fingerprint in record.get("inputs", {}).items()
    ]
    if record.get("content"):
        inputs.append(Identity(_INPUT_NAMES["content"], subject.label, str(record["content"])))
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    created = record.get("created")
    made = f"Made {created} with {versions}." if created else versions
    return {
        "sentence": record.get("done") or f"The record names the method {subject.method} alone.",
        "equation": record.get("equation", ""),
        "settings": settings,
        "inputs": inputs,
        "made": made,
    }


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything recorded about every model, paths cut to their last part."""
    found = []
    for run in runs:
        lines = [
            (f"{title}: {name}", value)
            for title, record in (("checkpoint", run.record), ("evaluation", run.made))
            for name, value in _recorded(run, record)
            if value
        ]
        if lines:
            found.append((run.label, lines))
    return found


def _recorded(run: Run, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in record.get("settings", {}).items():
        if value not in (None, []):
            yield name, _plain(value)
    for name, value in record.get("inputs", {}).items():
        size = record.get("examples", run.set_size(name))
        yield f"fingerprint of {name}", _shown(name, value, size)
    for name, value in record.get("versions", {}).items():
        yield f"version of {name}", str(value)
    yield "fingerprint", record.get("content", "")
    yield "made", record.get("created", "")


def _shown(name: str, fingerprint: Any, rows: int | None) -> str:
    """A fingerprint, unless it is that of a set which may be small enough to guess."""
    is_small = name in _SETS and (rows is None or rows < SMALLEST_SET)
    return "" if is_small else str(fingerprint)


def newest(runs: Sequence[Run]) -> str | None:
    """When the newest of the results was made."""
    records = [record for run in runs for record in (run.record, run.made)]
    return max((str(r["created"]) for r in records if r.get("created")), default=None)


def not_measured(run: Run | None) -> list[tuple[str, str]]:
    """Measures that an evaluation left out, with the reason that it gives."""
    return [
        (_MEASURE_NAMES.get(name, name), str(entry["missing"]))
        for name, entry in (run.results if run else {}).items()
        if isinstance(entry, Mapping) and entry.get("missing") and entry.get("agg_value") is None
    ]


def limits(verdicts: Sequence[Verdict], collection: Collection) -> list[str]:
    """What this report does not show, the general before the particular."""
    keys = {key for run in collection.runs for key in run.measures}
    edited = [verdict.run for verdict in verdicts]
    back = [share for run in edited if (share := _comes_back(run.record)) is not None]
    told_again = len(back) == len(edited) > 0
    applies = {
        "proof": True,
        "copies": True,
        "relearned": told_again,
        "relearning": not told_again and not any("relearn" in key for key in keys),
        "membership": not any(key.startswith("mia_") or key == "privleak" for key in keys),
        "ability": not keys & {"model_utility", "ra_rouge", "wf_rouge"},
        "intervals": True,
        "several": len(edited) > 1,
        "seed": len({run.seed for run in edited if run.seed is not None}) <= 1,
    }
    found = {"relearned": {"share": max(back, default=0.0)}}
    return [told("limits", name, **found.get(name, {})) for name, does in applies.items() if does]


def _comes_back(record: Mapping[str, Any]) -> float | None:
    """What the last of the rounds found to come back, where the edit is as strong as they were."""
    made = record.get("unlearn", {})
    if made.get("strength", {}).get("scaling_coef") != 1:
        return None
    share: float | None = (made.get("rounds") or [{}])[-1].get("comes_back")
    return share


def _file(path: Any) -> str:
    """Last part of a path: enough to recognise it, and no one's folders are disclosed."""
    return Path(str(path)).name if path else ""


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return _file(text) if text.startswith(("/", "./", "../", "~")) else text
