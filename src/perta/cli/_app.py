"""The program that commands belong to, what they share, and how they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from perta.options import MAIN
from perta.progress import PlainConsole
from perta.report.settings import Wanted
from perta.version import __version__

app = App(
    name="perta",
    help="Remove fine-tuning data from a language model by one edit of its weights.",
    version=__version__,
    help_on_error=False,
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False
app.register_install_completion_command()
app.meta.group_parameters = cyclopts.Group("Session", sort_key=0)

DryRun = Annotated[
    bool,
    Parameter(
        negative="",
        group=MAIN,
        help="print what would be done, what is reused, and about what it takes, and end.",
    ),
]
AsJson = Annotated[
    bool,
    Parameter(negative="", group=MAIN, help="Print results as one JSON object in place of tables."),
]


def tell(json: bool, message: str, **found: Any) -> None:
    """Tell of what was made: as one JSON object, or in a message."""
    from perta.terminal import print_json

    if json:
        print_json(found)
    else:
        note(message)


def tell_edit(json: bool, what: str, output: Path, direction: Path | None) -> None:
    """Tell of an edited checkpoint and where what was removed is still known."""
    message = f"{what} checkpoint: {output}"
    if direction is not None:
        message += f"\nDirection: {direction} (holds what was removed; delete it when you are done)"
    tell(json, message, output=output, direction=direction)


def tell_verdict(
    json: bool, message: list[str], found: dict[str, Any], wanted: Wanted | None
) -> None:
    """Tell of a result, first of `found`, and its verdict, which is an error below `wanted`."""
    from perta.report.verdict.judge import as_record, require_verdict

    verdict = found["verdict"]
    told = {**found, "verdict": as_record(verdict) if verdict else None}
    tell(json, "\n".join([*message, *([f"Verdict: {verdict.line}"] if verdict else [])]), **told)
    require_verdict(wanted, verdict, next(iter(found.values())))


def note(message: str) -> None:
    """Print a message as it is."""
    PlainConsole().print(message, markup=False, soft_wrap=True)
