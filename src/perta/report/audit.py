"""The page of an audit, for the person who signs it, and a bundle of all that it rests on.

    audit.json, record of the cleaned model ── two printed pages ── FILE.zip with hashes

The page holds numbers and names of files, no text of any row. Equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from perta.errors import ConfigError, DataError
from perta.evidence.audit.document import AUDIT, SCHEMA
from perta.evidence.audit.probes.answers import Whose
from perta.evidence.audit.probes.frames import FRAMES, Frames
from perta.evidence.audit.registry import PROBES, SETS
from perta.options import ComputeConfig, DataConfig
from perta.report._page import filled
from perta.report.settings import AuditPageConfig
from perta.store.atomic import atomic_file, check_writable, write_text
from perta.store.parse import fits, read_json
from perta.store.record import MANIFEST, check_output, read_manifest, refuse_changed
from perta.version import __version__

PAGE, SUMS = "audit.html", "SHA256SUMS"
_OWN = (AUDIT, PAGE, "audit.journal")
_FORM = {
    "probes": list,
    "perta": {
        "settings": dict.fromkeys(("checkpoint", "full", "forget"), str),
        "inputs": {str: str},
        **dict.fromkeys(("content", "created"), str),
    },
}
_NEEDS = {
    "base": "the base model",
    "full": "the full model",
    "retrained": "a retrained model",
    "forget": "rows that were removed",
    "retain": "rows that were to stay",
    "holdout": "rows that no model has seen",
    "world": "facts of the world",
    "general": "general text",
    "shadow models": "other models that never had the rows",
    "wrong answers": "wrong answers beside the right ones",
    "paraphrases": "the questions in other words",
}
"""What `Need` and sets are called on the page."""
_NUMBERS = ("samples", "retain_rows", "max_new_tokens", "seed")
_MODELS = ("full", "base", "retrained", "shadow")
_OPTIONS = (*_MODELS, *SETS, "level", "probes", *_NUMBERS, "output")
"""Settings of an audit of its own; those of data and computing have names of their own."""
_WORST = ("leaks", "harmed", "not sure", "passed")
"""Order of the table: what has to be decided on first."""
_MARK = b'<meta name="generator" content="perta audit">'
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_audit_page(folder: Path, config: AuditPageConfig | None = None) -> Path:
    """Write the page of a finished audit beside its `audit.json`; DataError where that is none."""
    config, audit = config or AuditPageConfig(), _read(folder)
    refuse_foreign(folder, config, audit["perta"]["settings"])
    page = folder / PAGE
    write_text(page, _render(folder, audit, config), private=True)
    if config.bundle:
        _write_bundle(folder, config.bundle)
    return page


def refuse_foreign(folder: Path, config: AuditPageConfig, settings: Mapping[str, Any]) -> None:
    """Stop before an audit whose bundle is a part of what is read, or replaces something else."""
    check_output(folder / PAGE, overwrite=True, ours=_is_page)
    if config.bundle is None:
        return
    place, own = config.bundle.resolve(), [(folder / name).resolve() for name in _OWN]
    if any(place.is_relative_to(part) or part.is_relative_to(place) for part in own):
        raise ConfigError(
            f"--bundle {config.bundle} takes the place of {folder} or of a file that it will hold. "
            f"Give a file of its own, such as {folder}.zip."
        )
    check_writable(config.bundle)
    reads = [str(settings[name]) for name in SETS if settings.get(name)]
    reads += _models(settings).values()
    check_output(config.bundle, reads, overwrite=True, ours=_is_bundle)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / AUDIT
    audit: Any = read_json(file, DataError)
    if not fits(audit, _FORM) or audit.get("schema") != SCHEMA:
        raise DataError(f"{file} is no audit of the form {SCHEMA}. Run `perta audit` again.")
    refuse_changed(audit, file)
    return dict(audit)


def _render(folder: Path, audit: Mapping[str, Any], config: AuditPageConfig) -> str:
    record, probes = audit["perta"], audit["probes"]
    settings = record["settings"]
    cleaned = read_manifest(Path(str(settings["checkpoint"]))) or {}
    return filled(
        "audit.html.jinja",
        config=config,
        audit=audit,
        record=record,
        checks=sorted(probes, key=lambda probe: _WORST.index(probe["verdict"])),
        parts=[_part(audit, probe) for probe in probes],
        done=cleaned.get("done"),
        not_checked=_not_checked(audit),
        named={name: Path(str(settings[name])).name for name in ("full", "forget")},
        models=[
            (role, Path(place).name, record["inputs"].get(role))
            for role, place in _models(settings).items()
        ],
        digest=_digest((folder / AUDIT).read_bytes()),
        command=[shlex.quote(part) for part in _command(settings, config)],
        version=__version__,
    )


def _models(settings: Mapping[str, Any]) -> dict[str, str]:
    """Role -> place of the models that were looked at."""
    roles = ("checkpoint", "full", "retrained", "base")
    shadows = {f"shadow-{i}": place for i, place in enumerate(settings.get("shadow", ()), 1)}
    given = {role: settings.get(role) for role in roles} | shadows
    return {role: str(place) for role, place in given.items() if place}


def _part(audit: Mapping[str, Any], probe: Mapping[str, Any]) -> dict[str, Any]:
    """All that is told of one probe: facts, and the mean of each subject under each model."""
    row, subject = probe["worst_row"], probe["worst_subject"]
    facts: dict[str, Any] = {
        "name": f"{probe['name']} ({probe['group']}, level {probe['level']})",
        "source": probe["source"],
        "unit": probe["unit"],
        "outcome": f"{probe['verdict']}: {probe['reason']}",
        "mean of the full model": None if probe["full"] is None else _figure(probe["full"]),
        "worst row": row and f"{row['row']} ({_figure(row['value'])})",
        "worst subject": subject and f"{subject['subject']} ({_figure(subject['value'])})",
        "rows still there": _ranges(probe["leaking_rows"]),
        "subjects still there": _ranges(probe["leaking_subjects"]),
        "whose facts they are": _owners(audit, probe),
        **{name: _figure(value) for name, value in probe["notes"].items()},
    }
    scores = {"forget": probe["scores"], **probe["other_scores"]}
    roles = list(dict.fromkeys(role for by_role in scores.values() for role in by_role))
    lines = []
    for name, by_role in scores.items():
        people = audit["subject_numbers"][name] or [None] * len(audit["row_numbers"][name])
        for one in dict.fromkeys(people):
            places = [i for i, person in enumerate(people) if person == one]
            means = (_mean(by_role[r], places) if r in by_role else "–" for r in roles)
            lines.append((name, "all" if one is None else one, *means))
    told = [(what, value) for what, value in facts.items() if value]
    return {**probe, "facts": told, "roles": roles, "lines": lines}


def _owners(audit: Mapping[str, Any], probe: Mapping[str, Any]) -> str:
    """Of whom the answers say facts, by number: who asked to be forgotten, and who stays."""
    if probe["name"] != Whose.name:
        return ""
    found: dict[str, set[int]] = {}
    for _, name, row in probe["more"].get("cleaned", {}).get("forget", {}).get("told", ()):
        found.setdefault(name, set()).add(row)
    parts = []
    for name, rows in found.items():
        people = zip(audit["row_numbers"][name], audit["subject_numbers"][name], strict=False)
        whose = {person for row, person in people if row in rows}
        subjects = f", subjects {_ranges([*whose])}" if whose else ""
        parts.append(f"{name}: rows {_ranges([*rows])}{subjects}")
    return "; ".join(parts)


def _mean(scores: Sequence[float | None], places: Sequence[int]) -> str:
    known = [score for i in places if (score := scores[i]) is not None]
    return _figure(fmean(known)) if known else "–"


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _not_checked(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Reason -> titles of the probes that did not run, or the rows that were not judged, for it."""
    titles = {probe.name: probe.title for probe in PROBES}
    found: dict[str, list[str]] = {}
    for entry in audit["not_checked"]:
        start, needs, names = entry["why"].partition("it needs ")
        told = " and ".join(_NEEDS.get(name, name) for name in names.split(" and "))
        title = titles.get(entry["name"], entry["name"])
        found.setdefault(f"{start}{needs}{told}", []).append(title)
    for name, rows in audit.get("not_judged", {}).items():
        why = "the model has no words for the facts"
        found.setdefault(why, []).append(f"{_NEEDS[name]}: rows {_ranges(rows)}")
    for probe in audit["probes"]:
        asked = probe["more"].get("cleaned", {}).get("forget", {}).get("ways", ())
        if probe["name"] == Frames.name and (lacks := [one for one in FRAMES if one not in asked]):
            found["no row could be asked so"] = [f"{probe['title']}: {', '.join(lacks)}"]
    if "world" in audit.get("built_in", ()):
        found["only the questions that come with perta were asked"] = ["other facts of the world"]
    return [(why, "; ".join(names)) for why, names in found.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _command(settings: Mapping[str, Any], config: AuditPageConfig) -> list[str]:
    """The command that makes the same audit and page, in its folder of the same working folder."""
    usual = {f.name: f.default for kind in (DataConfig, ComputeConfig) for f in fields(kind)}
    told = {name: settings.get(name) for name in (*_OPTIONS, *usual)}
    told |= {name: getattr(config, name) for name in ("request", "received", "operator")}
    given = [
        option
        for name, value in told.items()
        if value is not None and (name not in usual or value != usual[name])
        for one in (value if isinstance(value, list | tuple) else [value])
        for option in _option(name, one)
    ]
    return ["perta", "audit", str(settings["checkpoint"]), *given]


def _option(name: str, value: object) -> list[str]:
    flag = name.removesuffix("s" if name == "probes" else "").replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = str(value)
    # Behind a space these would be taken for another option, or for none.
    return [f"--{flag}={text}"] if not text or text.startswith("-") else [f"--{flag}", text]


# --- the bundle -------------------------------------------------------------------------------


def _write_bundle(folder: Path, file: Path) -> None:
    """Page, audit, records of the models and hashes that `sha256sum -c` checks, in one file."""
    settings = _read(folder)["perta"]["settings"]
    parts = {name: (folder / name).read_bytes() for name in (AUDIT, PAGE)}
    for role, place in _models(settings).items():
        if (record := Path(place) / MANIFEST).is_file():
            parts[f"records/{role}.json"] = record.read_bytes()
    sums = "".join(f"{_digest(data)}  {name}\n" for name, data in sorted(parts.items()))
    parts[SUMS] = sums.encode()
    with (
        atomic_file(file, overwrite=True, private=True) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, data in sorted(parts.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o600 << 16
            archive.writestr(entry, data)


def _is_page(path: Path) -> bool:
    """Whether a file that is there is the page of an audit, or empty."""
    return path.is_file() and (not path.stat().st_size or _MARK in path.read_bytes())


def _is_bundle(path: Path) -> bool:
    """Whether a file that is there is a bundle, or empty."""
    if not path.is_file():
        return False
    if not path.stat().st_size:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return {AUDIT, PAGE, SUMS} <= set(archive.namelist())
    except zipfile.BadZipFile:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
