"""What a model is to the others, from records alone: what made it, from what, on which rows.

Names of files and folders, and where they lie, say nothing here. Models and sets are known by
their fingerprints, which records carry: an output's own (`content`), and those of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from perta.errors import DataError
from perta.store.record import read_manifest

Role = Literal["base", "full", "retrained", "edited", "forget checkpoint", "shadow", "other"]
Record = Mapping[str, Any]
Records = Mapping[str, Record]

STATED: tuple[Role, ...] = ("base", "full", "retrained")
"""Roles that a user may state, as in `retrained=results.json`."""
FORGET_CHECKPOINT = "forget_checkpoint"


@dataclass(frozen=True)
class Request:
    """One unlearning by its record: fingerprints of its output and of what took part."""

    output: str
    base: frozenset[str]  # models before the data was seen
    full: frozenset[str]  # models before the unlearning
    tuned: frozenset[str]  # on the forget set alone
    forget: frozenset[str]
    retain: frozenset[str]


def is_unlearned(record: Record) -> bool:
    """Whether a record is of the output of an unlearning, by an edit or by training."""
    if record.get("stage") == "train":
        return method_of(record) != "retrain"
    return record.get("stage") == "edit" or "edit" in record


def method_of(record: Record) -> str | None:
    """Name of the method that made an output."""
    name = record.get("settings", {}).get("method")
    return str(name) if name else None


def requests_of(records: Records, evaluations: Iterable[Record] = ()) -> list[Request]:
    """Every unlearning among some records, by output; sets that it does not name by evaluations."""
    evaluated = list(evaluations)
    return [
        _request(content, record, records, evaluated)
        for content, record in records.items()
        if is_unlearned(record)
    ]


def _request(
    content: str, record: Record, records: Records, evaluated: Iterable[Record]
) -> Request:
    whole = record.get("unlearn", {})
    tuned = {n: fp for n, fp in _inputs(record).items() if n.startswith(FORGET_CHECKPOINT)}
    measured = {
        "forget": [*tuned, "forget_importance", "forget_moments"],
        "retain": ["retain_importance", "retain_moments"],
    }

    def named(name: str) -> frozenset[str]:
        return frozenset(
            str(made[name]) for made in (_inputs(record), _inputs(whole)) if made.get(name)
        )

    def rows(name: str) -> frozenset[str]:
        found = set(named(name))
        if not found:
            for part in measured[name]:
                found |= data_of(records.get(str(_inputs(record).get(part)), {}), records)
        if not found:
            mine = [e for e in evaluated if _inputs(e).get("checkpoint") == content]
            found = {str(_inputs(e)[name]) for e in mine if _inputs(e).get(name)}
        return frozenset(found)

    return Request(
        content,
        named("base"),
        named("full"),
        frozenset(map(str, tuned.values())),
        rows("forget"),
        rows("retain"),
    )


def data_of(record: Record, records: Records) -> set[str]:
    """Sets whose rows were measured; merged measurements have several."""
    inputs = _inputs(record)
    found = {str(inputs["data"])} if inputs.get("data") and "facts_by" not in inputs else set()
    for name, fingerprint in inputs.items():
        if name.startswith("moments_"):
            found |= data_of(records.get(str(fingerprint), {}), records)
    return found


def role_of(
    fingerprint: str | None, evaluated: str | None, records: Records, requests: Iterable[Request]
) -> Role:
    """The part that a model played in the unlearning that it was evaluated for; `other` if unknown.

    A model may be the output of one request and the full model of the next; `evaluated`, the
    fingerprint of the forget set on which it was evaluated, tells which is meant, and where that
    does not, the next one.
    """
    every = list(requests)
    for some in ([request for request in every if evaluated in request.forget], every):
        role = _part(fingerprint, some) or _as_retrained(fingerprint, records, some)
        if role:
            return role
    return "other"


def _part(fingerprint: str | None, requests: Iterable[Request]) -> Role | None:
    some = list(requests)
    parts: Mapping[Role, list[frozenset[str]]] = {
        "full": [request.full for request in some],
        "base": [request.base for request in some],
        "forget checkpoint": [request.tuned for request in some],
        "edited": [frozenset([request.output]) for request in some],
    }
    return next((r for r, found in parts.items() if any(fingerprint in f for f in found)), None)


def _as_retrained(
    fingerprint: str | None, records: Records, requests: Iterable[Request]
) -> Role | None:
    """Retrained: tuned from the base, on all rows of the retain set and on no others."""
    record = records.get(str(fingerprint), {})
    start, rows = _training_of(record)
    if record.get("settings", {}).get("samples"):
        return None
    for request in requests:
        is_clean = start in request.base and start not in request.full
        if is_clean and rows in request.retain and rows not in request.forget:
            return "retrained"
    return None


def _training_of(record: Record) -> tuple[str | None, str | None]:
    """Fingerprints of the model from which one was tuned, and of the rows it was tuned on."""
    inputs = _inputs(record)
    if record.get("stage") == "finetune":
        return inputs.get("base"), inputs.get("data")
    if record.get("stage") == "train" and method_of(record) == "retrain":
        return inputs.get("base"), inputs.get("retain")
    return None, None


def refuse_claim(
    claim: Role, fingerprint: str | None, where: str, records: Records, requests: Iterable[Request]
) -> None:
    """Stop where records contradict the role that a user states of a model."""
    some = list(requests)
    why = _contradiction(claim, fingerprint, records, some) if fingerprint else None
    if why:
        raise DataError(
            f"{claim}={where} contradicts the records: {why}. {_MEANING[claim]} Give that model"
            f"{', or leave the name out' if claim != 'full' else ''}."
        )


_MEANING: Mapping[str, str] = {
    "retrained": "A retrained model is tuned from the base model, on the retain set alone.",
    "full": "The full model is the one that was edited or trained further.",
    "base": "The base model is the one before it saw any of the data.",
    "shadow": "A shadow model was tuned on other rows than those to be removed.",
}


def full_models(record: Record) -> list[str]:
    """Full models of a removal and of those before it; none where the record is of none."""
    if not is_unlearned(record):
        return []
    return sorted(with_earlier(_request("", record, {}, ()), record).full)


def with_earlier(request: Request, record: Record) -> Request:
    """A request with the full models of removals before it too."""
    return replace(request, full=request.full.union(record.get("earlier_full", ())))


def _contradiction(
    claim: Role, fingerprint: str, records: Records, requests: list[Request]
) -> str | None:
    record = records.get(fingerprint, {})
    if claim in ("full", "base"):
        known = [r.full if claim == "full" else r.base for r in requests]
        if any(known) and not any(fingerprint in found for found in known):
            others = " or ".join(sorted(f"{one[:8]}…" for found in known for one in found))
            this = f"{others}, and this one is {fingerprint[:8]}…"
            return f"the unlearned model was made from another {claim} model, {this}"
        return None
    part = _part(fingerprint, requests)
    if part is not None and (claim, part) != ("shadow", "base"):
        return f"it is a model of another part there: {part}"
    if is_unlearned(record):
        return f"it was made by `{method_of(record) or record.get('stage')}`"
    start, rows = _training_of(record)
    if any(start in request.full for request in requests):
        return "it was tuned from the full model, which has seen what was to be removed"
    elsewhere = claim == "retrained" and start  # a shadow may be of another base
    if elsewhere and any(r.base for r in requests) and not any(start in r.base for r in requests):
        return "it was tuned from another model than the base"
    seen = {_training_of(records.get(full, {}))[1] for r in requests for full in r.full}
    if rows and (rows in seen or any(rows in request.forget for request in requests)):
        return "it was tuned on rows that were to be removed"
    return None


def check_reference(evaluation: Record, reference: Record, where: str) -> bool:
    """Whether a benchmark's reference is of a retrained model by its record, not by word alone.

    `evaluation` is the record of what uses it, `reference` that of its own evaluation, or empty.
    DataError where records say that it is of another split or model.
    """
    if not reference:
        return False
    for name in ("forget_split", "corpus", "limit"):
        mine, theirs = evaluation.get("settings", {}), reference.get("settings", {})
        if name in mine and name in theirs and mine[name] != theirs[name]:
            raise DataError(
                f"--reference {where} was measured with another {name} than this one, so the "
                "two cannot be compared. Evaluate the retrained model with the same options."
            )
    records = {**_record_beside(evaluation), **_record_beside(reference)}
    requests, model = requests_of(records), _inputs(reference).get("checkpoint")
    known = role_of(model, None, records, requests)
    if known != "retrained":
        refuse_claim("retrained", model, where, records, requests)
    return known == "retrained"


def _record_beside(evaluation: Record) -> Records:
    """The record of an evaluated model, by its fingerprint, where it lies where it lay."""
    place = Path(str(evaluation.get("settings", {}).get("checkpoint", "")))
    found = read_manifest(place) if place.is_dir() else None
    content = (found or {}).get("content")
    is_it = found is not None and content == _inputs(evaluation).get("checkpoint")
    return {str(content): found} if found is not None and is_it else {}


def _inputs(record: Record) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.get("inputs", {})
    return found
