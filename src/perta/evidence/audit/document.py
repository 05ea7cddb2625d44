"""What audit.json holds, from scores; its form is in docs/evidence.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perta.errors import ConfigError
from perta.evidence.audit.judge import Found, Judgement, Verdict
from perta.evidence.audit.probe import SHADOW, Probe, Role, Rows
from perta.evidence.audit.probes.verbatim import Reading
from perta.evidence.audit.registry import PROBES
from perta.evidence.intervals import Interval
from perta.evidence.measures import read_subjects, row_number, rows_of
from perta.evidence.results import Results
from perta.evidence.settings import Level

AUDIT, SCHEMA = "audit.json", "perta-audit/1"
"""Name of the file, and of its form."""
_VERDICTS: tuple[Verdict, ...] = ("passed", "leaks", "not sure")


@dataclass(frozen=True)
class Looked:
    """The rows that were looked at."""

    rows: Mapping[str, Sequence[int]]  # of each set the number in its file of each sequence's row
    # of each set whom each is about; None where nothing says so
    subjects: Mapping[str, Sequence[int] | None]
    facts: Mapping[str, int]  # how the forget set's facts were found -> how many
    # of each set the rows not judged, for the tokenizer lacks their words
    unknown: Mapping[str, Sequence[int]] = field(default_factory=dict)
    built_in: Sequence[str] = ()  # sets that come with the package


def document_of(
    level: Level,
    inputs: Mapping[str, str],
    looked: Looked,
    entries: Sequence[Mapping[str, Any]],
    lacking: Sequence[tuple[str, str]],
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it: entries of the probes that ran, of the others name and why, and the costs."""
    names = ("checkpoint", "merged")
    counts = dict.fromkeys(("forget", "retain", "holdout"), 0)
    counts |= {name: len(numbers) for name, numbers in looked.rows.items()}
    yardsticks = {name: inputs.get(name) for name in ("retrained", "base", "full")}
    shadows = [mark for name, mark in inputs.items() if name.startswith(SHADOW)]
    return {
        "schema": SCHEMA,
        "level": level,
        "model": {name: inputs[name] for name in names if name in inputs},
        "yardsticks": {**yardsticks, "shadows": shadows, "holdout rows": counts["holdout"]},
        "rows": counts,
        "built_in": list(looked.built_in),
        "subjects": len(set(looked.subjects["forget"] or ())) or None,
        "facts": dict(looked.facts),
        "not_judged": {name: list(rows) for name, rows in looked.unknown.items() if rows},
        "row_numbers": {name: list(numbers) for name, numbers in looked.rows.items()},
        "subject_numbers": {name: list(found or ()) for name, found in looked.subjects.items()},
        "probes": list(entries),
        "not_checked": [{"name": name, "why": why} for name, why in lacking],
        "costs": dict(costs),
    }


def entry_of(
    probe: Probe, found: Mapping[Role, Mapping[str, Rows]], looked: Looked
) -> dict[str, Any]:
    """One probe's part, from its scores by model and set."""
    scores: dict[str, dict[str, Sequence[float | None]]] = {}
    more: dict[str, dict[str, Mapping[str, Any]]] = {}
    for role, by_set in found.items():
        scores[role] = {name: list(rows.scores) for name, rows in by_set.items()}
        if any(rows.more for rows in by_set.values()):
            more[role] = {name: rows.more for name, rows in by_set.items() if rows.more}
    judgement = probe.judge(Found(scores, looked.rows, looked.subjects, more))
    if not isinstance(judgement, Judgement) or judgement.verdict not in (*_VERDICTS, "harmed"):
        raise ConfigError(
            f"The probe {probe.name} has to judge with a `Judgement`, whose verdict is one of "
            f"{', '.join(_VERDICTS)} and harmed."
        )
    parts = ("name", "group", "title", "question", "source", "unit", "level")
    names = sorted({name for by_set in scores.values() for name in by_set})
    by_name = {
        name: {role: by_set[name] for role, by_set in scores.items() if name in by_set}
        for name in names
    }
    return {
        **{part: getattr(probe, part) for part in parts},
        **_as_plain(judgement),
        "scores": by_name.pop("forget", {}),
        "other_scores": by_name,
        "more": more,
    }


def document_of_results(
    results: Mapping[Role, Results], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """The same from results of the quick evaluation, by the probes that read them."""
    cleaned = results["cleaned"]
    sets = [name for name in ("forget", "holdout") if f"{name}_loss" in cleaned]
    places, rows, unknown = dict[str, list[str]](), dict[str, list[int]](), dict[str, list[int]]()
    subjects = dict[str, list[int] | None]()
    for name in sets:
        every = rows_of(cleaned, f"{name}_loss")
        # Rows whose fact the tokenizer has no words for have none.
        known = rows_of(cleaned, f"{name}_fact_probability") or every
        places[name] = [place for place in every if place in known]
        rows[name] = [int(row_number(cleaned, name, place)) for place in places[name]]
        lost = [int(row_number(cleaned, name, place)) for place in every if place not in known]
        unknown[name] = list(dict.fromkeys(lost))
        people, seen = read_subjects(cleaned, name), dict[int, int]()
        about = [people[place] for place in places[name]] if people else None
        subjects[name] = about and [seen.setdefault(one, len(seen)) for one in about]
    facts = rows_of(cleaned, "forget_fact_probability").values()
    sources = Counter(str(row["source"]) for row in facts)
    looked = Looked(rows, subjects, dict(sources), unknown)
    entries, lacking = [], []
    for probe in (probe() for probe in PROBES):
        if not isinstance(probe, Reading):
            lacking.append((probe.name, "`perta audit` asks it"))
        elif f"forget_{probe.measure}" not in cleaned:
            lacking.append((probe.name, f"it needs {' and '.join(probe.needs) or 'answers'}"))
        else:
            entries.append(entry_of(probe, _read(probe, results, places), looked))
    return document_of("quick", inputs, looked, entries, lacking, {"tokens": {}, "operations": 0.0})


def _read(
    probe: Reading, results: Mapping[Role, Results], places: Mapping[str, Sequence[str]]
) -> dict[Role, dict[str, Rows]]:
    found: dict[Role, dict[str, Rows]] = {}
    for role, measured in results.items():
        names = places if role == "cleaned" else ["forget"]
        found[role] = {n: probe.read(measured, n, places[n]) for n in names}
    return found


def without_scores(results: Mapping[str, Any]) -> dict[str, Any]:
    """An audit without the values of single rows, which the file has."""
    rows = ("scores", "other_scores", "more")
    probes = [{k: v for k, v in p.items() if k not in rows} for p in results["probes"]]
    left_out = ("perta", "row_numbers", "subject_numbers")
    return {**{k: v for k, v in results.items() if k not in left_out}, "probes": probes}


def summary_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """An audit in short: level, hash of its content, and the probes of each verdict."""
    found: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for probe in results["probes"]:
        found.setdefault(probe["verdict"], []).append(probe["name"])  # `harmed` where one is
    return {"level": results["level"], "content": results["perta"]["content"], **found}


def told_in_short(audit: Mapping[str, Any]) -> str:
    """An audit, or what `summary_of` makes of it, in one line: how many probes say what."""
    short = summary_of(audit) if "probes" in audit else audit
    told = [verdict for verdict in (*_VERDICTS, "harmed") if verdict in short]
    counts = ", ".join(f"{len(short[verdict])} {verdict}" for verdict in told)
    return f"Audit, level {short['level']}: {counts}"


def _as_plain(judgement: Judgement) -> dict[str, Any]:
    subject, row, yardstick = judgement.worst_subject, judgement.worst_row, judgement.yardstick
    return {
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "value": judgement.value and {**_ends(judgement.value), "coverage": 0.95},
        "yardstick": yardstick and {"name": yardstick[0], **_ends(yardstick[1])},
        "full": judgement.full,
        "worst_subject": subject and {"subject": subject[0], "value": subject[1]},
        "worst_row": row and {"row": row[0], "value": row[1]},
        "leaking_rows": list(judgement.leaking_rows),
        "leaking_subjects": list(judgement.leaking_subjects),
        "notes": dict(judgement.notes),
    }


def _ends(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
