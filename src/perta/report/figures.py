"""The report's figures as PNG and SVG files, for documents and slides."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perta.report.collect import Collection, Run
from perta.report.plots import edit_maps, probability_curves, trade_offs, truth_ratio_curves
from perta.report.svg import SMALLEST, Axis, Ecdf, HeatMap, Scatter, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
_LABEL_WIDTH = 28
# The page's light palette, by class.
COLOURS: Mapping[str, str] = {
    "s0": "#0065a8",
    "s1": "#b5430a",
    "s2": "#00775c",
    "s3": "#a2307a",
    "s4": "#75600a",
    "s5": "#5a4ab2",
    "s6": "#44677a",
    "s7": "#8c3b46",
    "r-base": "#59626b",
    "r-full": "#59626b",
    "r-other": "#59626b",
    "r-retrained": "#1b1f24",
    "hue-w": "#0b4f8a",
    "hue-d": "#8a2c5a",
}
MARKERS: Mapping[str, str] = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "plus": "P",
    "down": "v",
    "cross": "X",
    "hexagon": "h",
    "star": "*",
}
_SETTINGS: Mapping[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#565e67",
    "axes.labelcolor": "#1b1f24",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ebed",
    "xtick.color": "#565e67",
    "ytick.color": "#565e67",
    "legend.frameon": False,
    "svg.hashsalt": "perta",  # equal figures, equal bytes
    "figure.constrained_layout.use": True,
}


def write_figures(
    collection: Collection, ranked: Sequence[Run], looks: Mapping[str, Style], folder: Path
) -> list[Path]:
    """Write every figure of the report as PNG and SVG.

    Args:
        collection: what the report is made of.
        ranked: edited models, the one that the report is about first.
        looks: label -> look of each model.
        folder: existing folder for the files.

    Returns:
        The files.
    """
    files: list[Path] = []
    with _settings():
        for scatter in trade_offs(collection, looks):
            files += _save(_draw_scatter(scatter), scatter.name, folder)
        curves = probability_curves(collection.runs, ranked, looks)
        truth = truth_ratio_curves(collection, ranked, looks)
        for ecdf in (curves, truth[0] if truth else None):
            if ecdf is not None:
                files += _save(_draw_ecdf(ecdf), ecdf.name, folder)
        for edit in edit_maps(collection.by_role("edited"))[0]:
            for heat_map in edit.figures:
                files += _save(_draw_map(heat_map), heat_map.name, folder)
    return files


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib as mpl

    settings: Any = dict(_SETTINGS)  # the stubs know every key, in some versions
    with mpl.rc_context(settings):
        yield


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot: no window system, and no state shared with the caller's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, name: str, folder: Path) -> list[Path]:
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def _axis(axes: Axes, x: Axis, y: Axis) -> None:
    axes.set_xlim(x.low, x.high)
    axes.set_ylim(y.low, y.high)
    axes.set_xticks([value for value, _ in x.ticks], [name for _, name in x.ticks])
    axes.set_yticks([value for value, _ in y.ticks], [name for _, name in y.ticks])
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)


def _draw_scatter(data: Scatter) -> Figure:
    figure, axes = _figure(6.4, 4.4)
    _axis(axes, data.x, data.y)
    if data.cross is not None:
        for draw, value in ((axes.axvline, data.cross.x), (axes.axhline, data.cross.y)):
            draw(value, color="#59626b", linewidth=0.8, linestyle=(0, (3, 4)))
    for path in dict.fromkeys(point.path for point in data.points if point.path):
        group = [point for point in data.points if point.path == path]
        colour = COLOURS[group[0].style.css]
        axes.plot([p.x for p in group], [p.y for p in group], color=colour, linewidth=1)
    for point in data.points:
        colour = COLOURS[point.style.css]
        if point.x_range:
            axes.plot(point.x_range, (point.y, point.y), color=colour, linewidth=0.9, alpha=0.6)
        if point.y_range:
            axes.plot((point.x, point.x), point.y_range, color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(
            [point.x],
            [point.y],
            linestyle="none",
            markersize=10 if point.style.shape == "star" else 7,
            label=_wrapped(point.label) if point.named else None,
            clip_on=False,
            **_marker(point.style),
        )
    figure.legend(loc="outside right upper")
    return figure


def _draw_ecdf(data: Ecdf) -> Figure:
    figure, axes = _figure(6.4, 4.0)
    axes.set_xlim(data.x.low, data.x.high)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([value for value, _ in data.x.ticks], [name for _, name in data.x.ticks])
    axes.set_xlabel(data.x.label)
    axes.set_ylabel("share of the removed examples")
    dashes = {"r-base": (0, (1, 1.5)), "r-full": (0, (5, 2.5))}
    for curve in data.curves:
        values = sorted(math.log10(max(v, SMALLEST)) if data.log else v for v in curve.values)
        n = len(values)
        axes.step(
            [values[0], *values],
            [0.0, *((i + 1) / n for i in range(n))],
            where="post",
            color=COLOURS[curve.style.css],
            linewidth=1.6,
            linestyle=dashes.get(curve.style.css, "-"),
            label=_wrapped(curve.label),
        )
    figure.legend(loc="outside right upper")
    return figure


def _draw_map(data: HeatMap) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = len(data.rows), len(data.columns)
    figure, axes = _figure(max(3.0, 1.6 + 0.36 * columns), max(2.2, 1.1 + 0.17 * rows))
    grid = [[math.nan] * columns for _ in range(rows)]
    for cell in data.cells:
        grid[cell.row][cell.column] = cell.value
    hue = LinearSegmentedColormap.from_list(data.css, ["#f6f7f8", COLOURS[data.css]])
    image = axes.imshow(grid, aspect="auto", cmap=hue, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks(range(columns), list(data.columns), rotation=40, ha="right")
    step = max(1, math.ceil(rows / 24))
    axes.set_yticks(range(0, rows, step), list(data.rows[::step]))
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=data.legend.split(",")[0])
    return figure


def _wrapped(label: str) -> str:
    """A label in short lines: a long one would leave the figure no room."""
    return textwrap.fill(re.sub(r"(?<=[:,])(?=\S)", " ", label), _LABEL_WIDTH)


def _marker(style: Style) -> dict[str, Any]:
    colour = COLOURS[style.css]
    hollow = style.css == "r-base"
    return {
        "marker": MARKERS[style.shape],
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "markeredgewidth": 1.4 if hollow else 0.6,
    }
