"""The page before it is text: what the template and the files beside it show, by section."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from perta.errors import DataError
from perta.progress import visible
from perta.report import _plots as plots
from perta.report import _tables as tabular
from perta.report._sections import Pin, scale
from perta.report._svg import Ecdf, Figure, Scatter, Style, swatch
from perta.report._texts import SampleSet, sample_sets
from perta.report.collect import Collection, Cost, Run, costs
from perta.report.settings import ReportConfig
from perta.report.verdict.judge import Verdict

if TYPE_CHECKING:
    from jinja2 import Template

_REFERENCE_NAMES = {"retrained": "retrained", "holdout": "unseen", "base": "base", None: ""}


@dataclass(frozen=True)
class Page:
    """One report; every section is made once, when it is first asked for."""

    config: ReportConfig
    collection: Collection
    verdicts: list[Verdict]

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.collection.runs

    @cached_property
    def edited(self) -> list[Run]:
        """Edited models, that which the page is about first, those not evaluated last."""
        judged = [verdict.run for verdict in self.verdicts]
        return [*judged, *(r for r in self.collection.by_role("edited") if r not in judged)]

    @property
    def subject(self) -> Run | None:
        """The model that the page is about."""
        return self.edited[0] if self.edited else None

    @cached_property
    def looks(self) -> dict[str, Style]:
        return tabular.styles(self.runs)

    @cached_property
    def swatches(self) -> dict[str, Markup]:
        return {name: Markup(swatch(look)) for name, look in self.looks.items()}

    # --- verdict --------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict | None:
        return self.verdicts[0] if self.verdicts else None

    @property
    def best(self) -> list[Verdict]:
        """The first verdict of every method."""
        best: dict[str | None, Verdict] = {}
        for verdict in self.verdicts:
            best.setdefault(verdict.run.method, verdict)
        return list(best.values())

    @property
    def scales(self) -> dict[str, tuple[Pin, ...]]:
        """Lines with the values behind the verdict."""
        if self.verdict is None:
            return {}
        name = _REFERENCE_NAMES[self.verdict.calibration]
        return {
            "forgetting": scale(self.verdict.forgetting, name),
            "retention": scale(self.verdict.retention, "retrained"),
        }

    @property
    def notices(self) -> list[str]:
        """What could not be used, or compared."""
        subject, found = self.subject, list(self.collection.notices)
        measured = [run for run in self.runs if subject and run.measures]
        other = [run.label for run in measured if subject and not run.same_set(subject, "forget")]
        if subject and other:
            found.append(
                f"Not measured on the same examples as {subject.label}, and so not compared with "
                f"it in the verdict: {', '.join(other)}."
            )
        return found

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
    def trade_offs(self) -> list[Scatter]:
        """Forgetting against keeping, for each pair of measures."""
        return plots.trade_offs(self.collection, self.looks)

    @cached_property
    def probability(self) -> Ecdf | None:
        return plots.probability_curves(self.runs, self.edited, self.looks)

    @cached_property
    def truth(self) -> tuple[Ecdf, list[tuple[str, int, str, str]]] | None:
        """Truth ratios: figure and table."""
        return plots.truth_ratio_curves(self.collection, self.edited, self.looks)

    @cached_property
    def maps(self) -> tuple[list[plots.EditMap], int]:
        """Where the edits happened, and how many more there are."""
        return plots.edit_maps(self.collection.by_role("edited"))

    @property
    def curves(self) -> list[Ecdf]:
        found = (self.probability, self.truth[0] if self.truth else None)
        return [figure for figure in found if figure is not None]

    @property
    def figures(self) -> list[Figure]:
        maps = [figure for edit in self.maps[0] for figure in edit.figures]
        return [*self.trade_offs, *self.curves, *maps]

    @property
    def drawn(self) -> list[Run]:
        """The models that have a curve."""
        labels = {curve.label for figure in self.curves for curve in figure.curves}
        return [run for run in self.runs if run.label in labels]

    # --- tables, answers, cost ------------------------------------------------------------------

    @cached_property
    def tables(self) -> list[tabular.Table]:
        seeds = tabular.seed_table(self.runs)
        measured = tabular.metric_tables(self.runs, fold=seeds is not None)
        return [*([seeds] if seeds else []), *measured]

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
        return sample_sets(subject, others, config.samples, show=config.show_texts)

    @cached_property
    def costs(self) -> tuple[list[Cost], float | None]:
        return costs(self.collection)

    @property
    def longest(self) -> float:
        """Seconds of the longest bar."""
        found, retraining = self.costs
        return max([cost.took.total for cost in found] + [retraining or 0.0]) or 1.0

    @property
    def files(self) -> dict[str, list[list[Any]]]:
        """Name and lines of each CSV file beside the page."""
        found = {t.name: tabular.table_lines(t) for t in tabular.metric_tables(self.runs)}
        for run in self.collection.by_role("edited"):
            if run.edit.get("tensors"):
                found[f"edit_{tabular.file_name(run.label)}"] = tabular.edit_lines(run)
        return {**found, "costs": tabular.cost_lines(*self.costs)} if self.costs[0] else found


def filled(template: str, **values: Any) -> str:
    """A page from its template; what is filled in is escaped, and holds no control characters."""
    return f"{visible(_compiled(template).render(values))}\n"


@cache
def _compiled(template: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(asset(template))


def asset(name: str) -> str:
    """A file of the page that comes with the package."""
    try:
        return files("perta").joinpath("report", "assets", name).read_text("utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"The installation of perta lacks assets/{name}; install it again."
        ) from error
