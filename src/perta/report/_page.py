"""The page before it is text: what the template and the files beside it show, by section."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from perta.errors import DataError
from perta.report import _plots as plots
from perta.report import _sections as sections
from perta.report import tables as tabular
from perta.report._svg import Ecdf, Figure, HeatMap, Scatter, Style, ecdf, heat_map, scatter, swatch
from perta.report._texts import SampleSet, sample_sets
from perta.report.collect import Collection, Run
from perta.report.settings import ReportConfig
from perta.report.verdict import checks
from perta.report.verdict.judge import Verdict

_REFERENCE_NAMES = {"retrained": "retrained", "holdout": "unseen", "base": "base", None: ""}


@dataclass(frozen=True)
class Page:
    """One report; every section is made once, when it is first asked for."""

    config: ReportConfig
    collection: Collection
    verdicts: list[Verdict]

    thresholds = checks
    smallest_set = sections.SMALLEST_SET

    @property
    def runs(self) -> list[Run]:
        return list(self.collection.runs)

    @cached_property
    def looks(self) -> dict[str, Style]:
        return tabular.styles(self.runs)

    @cached_property
    def swatches(self) -> dict[str, Markup]:
        return {name: Markup(swatch(look)) for name, look in self.looks.items()}

    @cached_property
    def css(self) -> str:
        return Markup(asset("report.css"))

    @cached_property
    def script(self) -> str:
        return Markup(asset("report.js"))

    @property
    def script_hash(self) -> str:
        """What the content security policy knows the script by."""
        return base64.b64encode(hashlib.sha256(self.script.encode()).digest()).decode()

    # --- verdict --------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict | None:
        return self.verdicts[0] if self.verdicts else None

    @property
    def subject(self) -> Run | None:
        """The model that the page is about."""
        edited = self.collection.by_role("edited")
        return self.verdicts[0].run if self.verdicts else edited[0] if edited else None

    @property
    def best(self) -> list[Verdict]:
        """The first verdict of every method."""
        best: dict[str | None, Verdict] = {}
        for verdict in self.verdicts:
            best.setdefault(verdict.run.method, verdict)
        return list(best.values())

    @property
    def scales(self) -> dict[str, tuple[sections.Pin, ...]]:
        """Lines with the values behind the verdict."""
        if self.verdict is None:
            return {}
        name = _REFERENCE_NAMES[self.verdict.calibration]
        return {
            "forgetting": sections.scale(self.verdict.forgetting, name),
            "retention": sections.scale(self.verdict.retention, "retrained"),
        }

    @property
    def notices(self) -> list[str]:
        """What could not be used, or compared."""
        subject = self.subject
        other = [
            run.label
            for run in self.runs
            if subject and run.measures and not run.same_set(subject, "forget")
        ]
        if not subject or not other:
            return list(self.collection.notices)
        return [
            *self.collection.notices,
            f"Not measured on the same examples as {subject.label}, and so not compared with it "
            f"in the verdict: {', '.join(other)}.",
        ]

    # --- what was asked and done ----------------------------------------------------------------

    @property
    def newest(self) -> str | None:
        return sections.newest(self.runs)

    @property
    def asked(self) -> list[sections.Identity]:
        return sections.asked(self.subject, self.collection) if self.subject else []

    @cached_property
    def done(self) -> tuple[str, str, list[tuple[str, str]], list[sections.Identity], str]:
        return sections.done(self.subject) if self.subject else ("", "", [], [], "")

    # --- figures --------------------------------------------------------------------------------

    @property
    def methods(self) -> list[tuple[str, str, str]]:
        """Toggle class, method and an example of its look, in the order of the page."""
        found: dict[str, tuple[str, str, str]] = {}
        for run in self.collection.by_role("edited"):
            look = self.looks[run.label]
            found.setdefault(look.toggle, (look.toggle, run.method or run.label, run.label))
        return list(found.values())

    @cached_property
    def ranked(self) -> list[Run]:
        """Edited models, that which the page is about first, those not evaluated last."""
        judged = [verdict.run for verdict in self.verdicts]
        return [*judged, *(r for r in self.collection.by_role("edited") if r not in judged)]

    @cached_property
    def _scatters(self) -> list[Scatter]:
        return plots.trade_offs(self.collection, self.looks)

    @cached_property
    def _probability(self) -> Ecdf | None:
        return plots.probability_curves(self.runs, self.ranked, self.looks)

    @cached_property
    def _truth(self) -> tuple[Ecdf, list[tuple[str, int, str, str]]] | None:
        return plots.truth_ratio_curves(self.collection, self.ranked, self.looks)

    @cached_property
    def _maps(self) -> tuple[list[plots.EditMap], int]:
        return plots.edit_maps(self.collection.by_role("edited"))

    @property
    def figures(self) -> list[Figure]:
        curves = (self._probability, self._truth[0] if self._truth else None)
        maps: list[HeatMap] = [figure for edit in self._maps[0] for figure in edit.figures]
        return [*self._scatters, *(c for c in curves if c is not None), *maps]

    @property
    def trade_offs(self) -> list[tuple[str, Markup, str]]:
        """Forgetting against keeping: name, figure and caption of each pair of measures."""
        return [(data.label, Markup(scatter(data)), data.caption) for data in self._scatters]

    @property
    def drawn(self) -> list[Run]:
        """The models that have a curve."""
        labels = {c.label for f in self.figures if isinstance(f, Ecdf) for c in f.curves}
        return [run for run in self.runs if run.label in labels]

    @property
    def probability(self) -> Markup | None:
        return Markup(ecdf(self._probability)) if self._probability else None

    @property
    def truth(self) -> tuple[Markup, list[tuple[str, int, str, str]]] | None:
        """Truth ratios: figure and table."""
        return (Markup(ecdf(self._truth[0])), self._truth[1]) if self._truth else None

    @property
    def maps(self) -> list[tuple[plots.EditMap, list[tuple[Markup, str]]]]:
        return [
            (edit, [(Markup(heat_map(figure)), figure.caption) for figure in edit.figures])
            for edit in self._maps[0]
        ]

    @property
    def more_maps(self) -> int:
        return self._maps[1]

    # --- tables, answers, cost, record ----------------------------------------------------------

    @cached_property
    def tables(self) -> list[tabular.Table]:
        seeds = tabular.seed_table(self.runs)
        measured = tabular.metric_tables(self.runs, fold=seeds is not None)
        return [*([seeds] if seeds else []), *measured]

    @property
    def not_measured(self) -> list[tuple[str, str]]:
        """Measures that were left out, with the reason."""
        return sections.not_measured(self.subject) if self.subject else []

    @cached_property
    def samples(self) -> list[SampleSet]:
        subject, config = self.subject, self.config
        if subject is None:
            return []
        others = [
            group[0]
            for role in ("full", "retrained")
            if (group := [r for r in self.runs if r.role == role and r.same_set(subject, "forget")])
        ]
        return list(sample_sets(subject, others, config.samples, show=config.show_texts))

    @cached_property
    def _costs(self) -> tuple[list[tabular.Cost], float | None]:
        return tabular.costs(self.collection)

    @property
    def costs(self) -> list[tabular.Cost]:
        return self._costs[0]

    @property
    def retraining(self) -> float | None:
        return self._costs[1]

    @property
    def longest(self) -> float:
        """Seconds of the longest bar."""
        return max([c.took.total for c in self.costs] + [self.retraining or 0.0]) or 1.0

    @property
    def limits(self) -> list[str]:
        return sections.limits(self.verdicts, self.collection)

    @cached_property
    def provenance(self) -> list[tuple[str, list[tuple[str, str]]]]:
        return sections.provenance(self.runs)

    @property
    def files(self) -> dict[str, list[list[Any]]]:
        """Name and lines of each CSV file beside the page."""
        found = {t.name: tabular.table_lines(t) for t in tabular.metric_tables(self.runs)}
        for run in self.collection.by_role("edited"):
            if run.edit.get("tensors"):
                found[f"edit_{tabular.file_name(run.label)}"] = tabular.edit_lines(run)
        return {**found, "costs": tabular.cost_lines(*self._costs)} if self.costs else found


def asset(name: str) -> str:
    """A file of the page that comes with the package."""
    try:
        return files("perta").joinpath("report", "assets", name).read_text("utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"The installation of perta lacks assets/{name}; install it again."
        ) from error
