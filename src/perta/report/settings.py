"""Options of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from perta.options import Flat, Paths, Repeated, require_day, require_least, require_unicode

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
        require_least(self, samples=0)


@Flat
@dataclass(frozen=True, kw_only=True)
class AuditPageConfig(Paths):
    """The page of `perta audit`."""

    request: str | None = None
    """Number of the request, for the page."""
    received: str | None = None
    """Day on which it came, such as 2026-03-31, for the page."""
    operator: str | None = None
    """Who ran the audit, for the page."""
    bundle: Path | None = None
    """Zip file with the page, `audit.json`, the models' records and hashes for `sha256sum -c`; it
    holds no text of any row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_unicode(self)
        require_day("received", self.received or None, "2026-03-31")
