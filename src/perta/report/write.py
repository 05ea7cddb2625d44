"""`perta report`: results as one page that an engineer can hand to a privacy officer.

    results files, checkpoint records ── collect ── judge ── one HTML page
                                                       └──── SVG and CSV beside it

The page loads nothing: style, script and figures are in it, and its content security policy
allows no request. It is complete without scripts; they add tooltips, sorting and toggles.
Equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

from perta.errors import ConfigError, OutputExistsError
from perta.report._figures import write_figures
from perta.report._page import Page, asset
from perta.report._sections import share_text
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.tables import write_csv
from perta.report.verdict.judge import Verdict, as_record, judge
from perta.report.verdict.sentences import number
from perta.store.atomic import atomic_file, atomic_folder, check_place, recover
from perta.store.costs import duration, percent
from perta.store.record import check_output, check_separate
from perta.version import __version__

_GENERATOR = "perta report"
_ABOUT = "about.txt"
_VERDICT = "verdict.json"


def write_report(config: ReportConfig) -> Path:
    """Write the report and the files beside it (`perta report`); returns the page.

    Raises:
        PertaError: there is nothing to report, or the output is something else.
    """
    if not config.results:
        raise ConfigError("Nothing to report on: name at least one results file or folder.")
    refuse_foreign_page(config)
    page = page_for(config)
    text = render(page)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    _write_companions(companion_folder(config.output), page)
    with atomic_file(config.output, overwrite=True) as partial:
        partial.write_text(text, "utf-8")
    return config.output


def judged(config: ReportConfig) -> list[Verdict]:
    """The verdicts of a report, that on the model it is about first."""
    return page_for(config).verdicts


def page_for(config: ReportConfig) -> Page:
    """The page before it is text, of everything that the results tell."""
    collection = collect(config.results)
    return Page(config, collection, _ordered(judge(collection), config.subject))


def render(page: Page) -> str:
    """The page as text: HTML with everything in it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(asset("report.html.jinja")).render(
        page=page,
        generator=_GENERATOR,
        version=__version__,
        companions=companion_folder(page.config.output).name,
        number=number,
        duration=duration,
        percent=percent,
        share_text=share_text,
    )
    return f"{text}\n"


def companion_folder(output: Path) -> Path:
    """Folder of the plots and tables beside a page."""
    return output.with_name(f"{output.stem}_files")


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
        write_csv(page.files, partial)
        if page.verdict:
            record = as_record(page.verdict)
            text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
            (partial / _VERDICT).write_text(text + "\n", "utf-8")
        if page.config.figures:
            write_figures(page.figures, page.css, partial)


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


def _is_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return f'content="{_GENERATOR}'.encode() in stream.read(2000)
