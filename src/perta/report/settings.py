"""Options of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from perta.options import Flat, Paths, Repeated, require

Wanted = Literal["met", "partly"]
"""The least that a verdict has to be."""


@Flat
@dataclass(frozen=True, kw_only=True)
class ReportConfig(Paths):
    """`perta report`."""

    results: Annotated[tuple[str, ...], Repeated] = ()
    """Results files, unlearned checkpoints, outputs of `perta unlearn`, or folders of results,
    each optionally named as in `full=results/full.json`."""
    output: Path = Path("report.html")
    """The page; plots and tables go into a folder beside it, such as `report_files`."""
    title: str = "Unlearning report"
    """Heading of the page."""
    subject: str | None = None
    """Name of the edited model that the verdict is about [default: the one that forgets and,
    among those, keeps most]."""
    samples: int = 3
    """Examples of each set to show with their answers; 0 quotes nothing."""
    show_texts: bool = False
    """Print the texts of examples and answers. By default only their row and length appear."""
    figures: bool = True
    """Write plots as SVG files as well, and as PNG where `perta[png]` is installed."""
    fail_unless: Wanted | None = None
    """Exit with status 1 unless forgetting and retention of the model that the page is about are
    met, or are at least partly; the page stays."""
    overwrite: bool = False
    """Replace an output that is not a report, if it is empty or made by perta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples >= 0, "samples", self.samples, "0 or more")
