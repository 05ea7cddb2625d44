"""`perta report`: results as one page that an engineer can hand to a privacy officer.

    results files, checkpoint records ── collect ── judge ── one HTML page
                                                       └──── SVG and CSV beside it

The page loads nothing: style, script and figures are in it, and its content security policy
allows no request. It is complete without scripts; they add tooltips, sorting and toggles.
Equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from markupsafe import Markup

from perta.data.rows import csv_text
from perta.errors import ConfigError, OutputExistsError
from perta.evidence import remains
from perta.report import _sections
from perta.report._page import Page, asset, filled
from perta.report._svg import Figure, drawing, on_page
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.verdict.judge import Verdict, as_record, judge
from perta.report.verdict.words import WORDS, number
from perta.store.atomic import (
    atomic_folder,
    beside,
    check_place,
    check_writable,
    recover,
    write_text,
)
from perta.store.costs import duration, percent
from perta.store.record import check_output, check_separate
from perta.version import __version__

_GENERATOR = "perta report"
_ABOUT = "about.txt"
_VERDICT = "verdict.json"

_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_WANTED = re.compile(r"\.(figure|shape|step|s\d|r-|hue-)")
_FONTS = (
    '"Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", "Noto Sans", sans-serif'
)
_ZOOM = 2


def write_report(config: ReportConfig) -> Path:
    """Write the report and the files beside it (`perta report`); returns the page."""
    if not config.results:
        raise ConfigError("Nothing to report on: name at least one results file or folder.")
    refuse_foreign_page(config)
    page = _page_for(config)
    text = render(page)
    _write_companions(companion_folder(config.output), page)
    write_text(config.output, text)
    return config.output


def judged(config: ReportConfig) -> list[Verdict]:
    """The verdicts of a report, that on the model it is about first."""
    return _page_for(config).verdicts


def _page_for(config: ReportConfig) -> Page:
    """The page before it is text, of everything that the results tell."""
    collection = collect(config.results)
    return Page(config, collection, _ordered(judge(collection), config.subject))


def render(page: Page) -> str:
    """The page as text: HTML with everything in it."""
    script = asset("report.js")
    return filled(
        "report.html.jinja",
        page=page,
        generator=_GENERATOR,
        version=__version__,
        companions=companion_folder(page.config.output).name,
        sections=_sections,
        thresholds=remains,
        words=WORDS,
        draw=lambda figure: Markup(on_page(figure)),
        css=Markup(asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        number=number,
        duration=duration,
        percent=percent,
    )


def companion_folder(output: Path) -> Path:
    """Folder of the plots and tables beside a page."""
    return beside(output.parent / output.stem, "_files")


def _ordered(verdicts: list[Verdict], subject: str | None) -> list[Verdict]:
    """The verdict on the wanted model first, else on outputs that were named themselves."""
    if subject is None:
        return sorted(verdicts, key=lambda verdict: not verdict.run.given)
    wanted = [verdict for verdict in verdicts if verdict.run.label == subject]
    if not wanted:
        names = ", ".join(verdict.run.label for verdict in verdicts) or "none"
        raise ConfigError(f"--subject {subject} is not an edited model of this report: {names}.")
    return [*wanted, *(verdict for verdict in verdicts if verdict not in wanted)]


def _write_companions(folder: Path, page: Page) -> None:
    """Tables and plots, in a new folder that replaces the old one when it is complete."""
    with atomic_folder(folder, overwrite=True) as partial:
        (partial / _ABOUT).write_text(
            f"Plots and tables of {page.config.output.name}, written and replaced by "
            f"{_GENERATOR}.\n",
            "utf-8",
        )
        for name, lines in page.files.items():
            (partial / f"{name}.csv").write_text(csv_text(lines), "utf-8")
        if page.verdict:
            record = as_record(page.verdict)
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
            (partial / _VERDICT).write_text(text + "\n", "utf-8")
        if page.config.figures:
            _write_figures(page.figures, asset("report.css"), partial)


def refuse_foreign_page(config: ReportConfig) -> None:
    """Stop at an output that must not be written, or is no report and must not be replaced."""
    output, folder = config.output, companion_folder(config.output)
    for place in (output, folder):
        recover(place)
        check_separate(place, config.results, within=True)
        check_place(place)
    # Never replaced, not even on request: there may be anything in it.
    if folder.exists() and not (folder / _ABOUT).is_file():
        raise OutputExistsError(
            f"{folder} exists and was not made by {_GENERATOR}, which keeps plots and tables "
            "there. Move it away or choose another --output."
        )
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file such as report.html.")
    if not output.exists() or _is_page(output):
        return
    check_output(output, config.results, overwrite=config.overwrite, within=True)
    if not config.overwrite:
        raise OutputExistsError(
            f"{output} exists and is not a report. Choose another --output, or pass --overwrite "
            "to replace it if it is empty or made by perta."
        )


def check_report_folder(folder: Path) -> Path:
    """Where a folder's report goes, after a stop where either cannot or must not be written."""
    page = folder / "report.html"
    check_writable(page)
    refuse_foreign_page(ReportConfig(output=page))
    return page


def _is_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return f'content="{_GENERATOR}'.encode() in stream.read(2000)


# --- figures as files of their own, for documents and slides ---------------------------------


def _write_figures(figures: Iterable[Figure], css: str, folder: Path) -> None:
    """Write figures as SVG, and as PNG where that can be rendered."""
    style = _inline_style(css)
    for figure in figures:
        text = document(figure, style)
        (folder / f"{figure.name}.svg").write_text(text, "utf-8")
        image = _png(text)
        if image is not None:
            (folder / f"{figure.name}.png").write_bytes(image)


def document(figure: Figure, style: str) -> str:
    """A figure as a whole SVG file on white ground."""
    opening, _, rest = drawing(figure).partition(">")
    opening = opening.replace("<svg", f"<svg {_NAMESPACE}", 1)
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f"{opening}><style>{style}</style>{ground}{rest}\n"


def _inline_style(css: str) -> str:
    """The rules that figures need, in the light palette; its properties are filled in."""
    palette = dict(re.findall(r"--([\w-]+): ([^;]+);", css[: css.index("}")]))
    palette |= {"paper": "#ffffff", "sans": _FONTS}
    part = css[css.index("/* Figures */") : css.index("/* Answers */")]
    rules = [
        f"{selector.strip()} {{{body}}}"
        for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", part)
        if _WANTED.match(selector.strip())
    ]
    text = "\n".join(rules).replace("--c:", "color:").replace("var(--c)", "currentColor")
    return re.sub(r"var\(--([\w-]+)\)", lambda match: " ".join(palette[match[1]].split()), text)


def _png(text: str) -> bytes | None:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return None
    return bytes(svg_to_bytes(svg_string=text, zoom=_ZOOM))
