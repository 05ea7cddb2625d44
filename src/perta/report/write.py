"""`perta report`: results as one page that an engineer can hand to a privacy officer.

    results files, checkpoint records ── collect ── judge ── one HTML page
                                                       └──── PNG, SVG and CSV beside it

The page loads nothing: style, script and figures are in it, and its content security policy
allows no request. It is complete without scripts; they add tooltips, sorting and toggles.
Equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from perta.errors import ConfigError, DataError, OutputExistsError
from perta.report.collect import Collection, Run, collect
from perta.report.plots import edit_maps, probability_curves, trade_offs, truth_ratio_curves
from perta.report.sections import (
    SMALLEST_SET,
    asked,
    done,
    limits,
    newest,
    not_measured,
    provenance,
    scale,
    share_text,
)
from perta.report.settings import ReportConfig
from perta.report.svg import Style, ecdf, heat_map, scatter, swatch
from perta.report.tables import (
    cost_table,
    costs,
    edit_tables,
    metric_tables,
    seed_table,
    styles,
    write_csv,
)
from perta.report.texts import sample_sets
from perta.report.verdict.checks import (
    KEPT,
    KEPT_PARTLY,
    REMAINDER,
    REMAINDER_PARTLY,
    REMAINDER_SURE,
)
from perta.report.verdict.judge import Verdict, as_record, judge
from perta.report.verdict.sentences import number
from perta.store.costs import duration
from perta.version import __version__

GENERATOR = "perta report"
ABOUT = "about.txt"
VERDICT = "verdict.json"
_REFERENCE_NAMES = {"retrained": "retrained", "holdout": "unseen", "base": "base", None: ""}


def write_report(config: ReportConfig) -> Path:
    """Write the report and the files beside it (`perta report`).

    Args:
        config: results, output and what to show.

    Returns:
        The page.

    Raises:
        PertaError: there is nothing to report, or the output is something else.
    """
    if not config.results:
        raise ConfigError("Nothing to report on: name at least one results file or folder.")
    _refuse_foreign(config)
    collection = collect(config.results)
    verdicts = _ordered(judge(collection), config.subject)
    page = build_report(config, collection, verdicts)
    folder = companion_folder(config.output)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    _write_companions(folder, config, collection, verdicts)
    _replace(config.output, page)
    return config.output


def judged(config: ReportConfig) -> list[Verdict]:
    """The verdicts of a report, that on the model it is about first.

    Args:
        config: results and subject.
    """
    return _ordered(judge(collect(config.results)), config.subject)


def build_report(
    config: ReportConfig, collection: Collection, verdicts: list[Verdict] | None = None
) -> str:
    """The page as text.

    Args:
        config: title and what to show.
        collection: what it is made of.
        verdicts: the subject's first; judged here if not given.

    Returns:
        HTML with everything in it.
    """
    from jinja2 import Environment, StrictUndefined

    if verdicts is None:
        verdicts = _ordered(judge(collection), config.subject)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_asset("report.html.jinja"))
    return template.render(_context(config, collection, verdicts)) + "\n"


def companion_folder(output: Path) -> Path:
    """Folder of the plots and tables beside a page."""
    return output.with_name(f"{output.stem}_files")


def _context(
    config: ReportConfig, collection: Collection, verdicts: list[Verdict]
) -> dict[str, Any]:
    from markupsafe import Markup

    runs = list(collection.runs)
    looks = styles(runs)
    verdict = verdicts[0] if verdicts else None
    edited = collection.by_role("edited")
    subject = _subject(collection, verdicts)
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    maps, more_maps = edit_maps(edited)
    cost, retraining = costs(collection)
    samples = _samples(config, subject, collection)
    ranked = _ranked(collection, verdicts)
    truth = truth_ratio_curves(collection, ranked, looks)
    curves = probability_curves(runs, ranked, looks)
    drawn = {c.label for ecdf_ in (curves, truth and truth[0]) if ecdf_ for c in ecdf_.curves}
    seeds = seed_table(runs)
    return {
        "config": config,
        "version": __version__,
        "generator": GENERATOR,
        "css": Markup(_asset("report.css")),
        "script": Markup(script),
        "script_hash": digest,
        "verdict": verdict,
        "verdicts": verdicts,
        "best": _best_of_each(verdicts),
        "drawn": [run for run in runs if run.label in drawn],
        "scales": _scales(verdict),
        "subject": subject,
        "runs": runs,
        "looks": looks,
        "swatches": {name: Markup(swatch(look)) for name, look in looks.items()},
        "methods": _methods(runs, looks),
        "newest": newest(runs),
        "asked": asked(subject, collection) if subject else [],
        "done": done(subject) if subject else ("", "", [], [], ""),
        "trade_offs": [
            (data.label, Markup(scatter(data)), data.caption)
            for data in trade_offs(collection, looks)
        ],
        "probability": Markup(ecdf(curves)) if curves else None,
        "truth": (Markup(ecdf(truth[0])), truth[1]) if truth else None,
        "maps": [
            (m, [(Markup(heat_map(figure)), figure.caption) for figure in m.figures]) for m in maps
        ],
        "more_maps": more_maps,
        "tables": [*([seeds] if seeds else []), *metric_tables(runs, fold=seeds is not None)],
        "samples": samples,
        "costs": cost,
        "retraining": retraining,
        "longest": max([c.total for c in cost] + [retraining or 0.0]) or 1.0,
        "provenance": provenance(runs),
        "not_measured": not_measured(subject) if subject else [],
        "limits": limits(verdicts, collection),
        "notices": [*collection.notices, *_set_notices(subject, runs)],
        "thresholds": {
            "remainder": REMAINDER,
            "sure": REMAINDER_SURE,
            "remainder_partly": REMAINDER_PARTLY,
            "kept": KEPT,
            "kept_partly": KEPT_PARTLY,
        },
        "smallest_set": SMALLEST_SET,
        "companions": companion_folder(config.output).name,
        "number": number,
        "duration": duration,
        "share_text": share_text,
    }


def _ranked(collection: Collection, verdicts: list[Verdict]) -> list[Run]:
    """Edited models, the one that the page is about first, those not evaluated last."""
    judged = [verdict.run for verdict in verdicts]
    return [*judged, *(run for run in collection.by_role("edited") if run not in judged)]


def _best_of_each(verdicts: list[Verdict]) -> list[Verdict]:
    """The first verdict of every method."""
    best: dict[str | None, Verdict] = {}
    for verdict in verdicts:
        best.setdefault(verdict.run.method, verdict)
    return list(best.values())


def _subject(collection: Collection, verdicts: list[Verdict]) -> Run | None:
    """The model that the page is about."""
    edited = collection.by_role("edited")
    return verdicts[0].run if verdicts else edited[0] if edited else None


def _ordered(verdicts: list[Verdict], subject: str | None) -> list[Verdict]:
    """The verdict on the wanted model first, else on outputs that were named themselves."""
    if subject is None:
        return sorted(verdicts, key=lambda verdict: not verdict.run.given)
    wanted = [verdict for verdict in verdicts if verdict.run.label == subject]
    if not wanted:
        names = ", ".join(verdict.run.label for verdict in verdicts) or "none"
        raise ConfigError(f"--subject {subject} is not an edited model of this report: {names}.")
    return [*wanted, *(verdict for verdict in verdicts if verdict not in wanted)]


def _samples(config: ReportConfig, subject: Run | None, collection: Collection) -> list[Any]:
    if subject is None:
        return []
    others = [
        group[0]
        for role in ("full", "retrained")
        if (group := [r for r in collection.by_role(role) if r.same_set(subject, "forget")])
    ]
    return list(sample_sets(subject, others, config.samples, show=config.show_texts))


def _scales(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {}
    name = _REFERENCE_NAMES[verdict.calibration]
    return {
        "forgetting": scale(verdict.forgetting, name),
        "retention": scale(verdict.retention, "retrained"),
    }


def _methods(runs: list[Run], looks: Mapping[str, Style]) -> list[tuple[str, str, str]]:
    """Toggle class, method and an example of its look, in the order of the page."""
    found: dict[str, tuple[str, str, str]] = {}
    for run in runs:
        if run.role == "edited":
            look = looks[run.label]
            found.setdefault(look.toggle, (look.toggle, run.method or run.label, run.label))
    return list(found.values())


def _set_notices(subject: Run | None, runs: list[Run]) -> list[str]:
    if subject is None:
        return []
    other = [run.label for run in runs if run.measures and not run.same_set(subject, "forget")]
    if not other:
        return []
    return [
        f"Not measured on the same examples as {subject.label}, and so not compared with it in "
        f"the verdict: {', '.join(other)}."
    ]


def _write_companions(
    folder: Path, config: ReportConfig, collection: Collection, verdicts: list[Verdict]
) -> None:
    """Tables and plots, in a new folder that replaces the old one when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o755)
        runs = collection.runs
        cost, retraining = costs(collection)
        tables = [*metric_tables(runs), *edit_tables(collection.by_role("edited"))]
        if cost:
            tables.append(cost_table(cost, retraining))
        (partial / ABOUT).write_text(
            f"Plots and tables of {config.output.name}, written and replaced by {GENERATOR}.\n",
            "utf-8",
        )
        write_csv(tables, partial)
        if verdicts:
            record = json.dumps(
                as_record(verdicts[0]), indent=1, ensure_ascii=False, allow_nan=False
            )
            (partial / VERDICT).write_text(record + "\n", "utf-8")
        if config.figures:
            from perta.report.figures import write_figures

            write_figures(collection, _ranked(collection, verdicts), styles(runs), partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(output: Path, text: str) -> None:
    """Write a file in one step, so that no half of it is ever seen."""
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        partial.chmod(0o644)
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _refuse_foreign(config: ReportConfig) -> None:
    output = config.output
    folder = companion_folder(output)
    # Never replaced, not even on request: there may be anything in it.
    if folder.exists() and not (folder / ABOUT).is_file():
        raise OutputExistsError(
            f"{folder} exists and was not made by {GENERATOR}, which keeps plots and tables "
            "there. Move it away or choose another --output."
        )
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file such as report.html.")
    if config.overwrite or not output.exists():
        return
    try:
        start = output.read_text("utf-8")[:2000]
    except (OSError, UnicodeDecodeError):
        start = ""
    if f'content="{GENERATOR}' not in start:
        raise OutputExistsError(
            f"{output} exists and is not a report. Choose another --output, or pass --overwrite "
            "to replace it."
        )


def _asset(name: str) -> str:
    try:
        return files("perta").joinpath("report", "assets", name).read_text("utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"The installation of perta lacks assets/{name}; install it again."
        ) from error
