"""Inline SVG for the report: drawn here so that the page is complete without scripts.

Colours come from the page's style sheet by class, so light, dark and print need one drawing.
Every mark carries its numbers in a `<title>` and in `data-tip`, which the script turns into a
tooltip that also follows the keyboard.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

_TEXT_WIDTH = 6.5  # mean width of a character of a label, for placing labels without measuring them
SMALLEST = 1e-12
"""Values below are drawn here on logarithmic axes."""
_LONG_LABEL = 40  # characters from which a name stands below a figure that is a file
_LINE = 18
_LINE_LENGTH = 110


@dataclass(frozen=True)
class Style:
    """How a model looks: colour, form of its mark, and the class that shows and hides it."""

    css: str
    shape: str
    toggle: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: its label, range and ticks, and which end is wanted."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    better: str = "none"

    def place(self, value: float, start: float, end: float) -> float:
        """Position of a value, clipped to the axis."""
        share = (value - self.low) / (self.high - self.low)
        return start + min(1.0, max(0.0, share)) * (end - start)


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot, with the intervals of both coordinates where known."""

    x: float
    y: float
    label: str
    tip: str
    style: Style
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    path: str = ""
    named: bool = True
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One empirical distribution, values in any order."""

    values: tuple[float, ...]
    label: str
    tip: str
    style: Style


@dataclass(frozen=True)
class Cell:
    """One cell of a map."""

    row: int
    column: int
    value: float
    tip: str


@dataclass(frozen=True)
class Scatter:
    """Models as points; those of one method and seed are joined in order of strength."""

    name: str  # stem of its files
    label: str
    title: str  # what it shows, for readers who cannot see it
    caption: str
    points: tuple[Point, ...]
    x: Axis
    y: Axis
    cross: Point | None = None  # marked with lines across the plot: the retrained reference


@dataclass(frozen=True)
class Ecdf:
    """Empirical distribution functions: share of examples at or below each value, or its log10."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    x: Axis
    log: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A map of one hue: the stronger, the larger the value; places without a cell stay empty."""

    name: str
    title: str
    caption: str
    cells: tuple[Cell, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    css: str
    legend: str


Figure = Scatter | Ecdf | HeatMap


@dataclass(frozen=True)
class _Frame:
    """Size of a figure, and the corners of its plot."""

    width: int
    height: int
    x0: int
    x1: int
    y0: int
    y1: int


_WIDE, _NARROW = _Frame(800, 450, 58, 784, 30, 400), _Frame(360, 370, 48, 350, 30, 320)
_ECDF_WIDE, _ECDF_NARROW = _Frame(800, 410, 58, 784, 14, 360), _Frame(360, 330, 48, 350, 14, 280)


def unit_axis(label: str, better: str = "none") -> Axis:
    """An axis from 0 to 1."""
    return Axis(label, 0.0, 1.0, tuple((i / 5, f"{i / 5:g}") for i in range(6)), better)


def fitted_axis(label: str, values: Sequence[float], better: str = "none") -> Axis:
    """An axis that holds the values, with round ticks."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    start, end = math.floor(low / step - 1e-9) * step, math.ceil(high / step + 1e-9) * step
    if start == end:
        end += step
    count = round((end - start) / step)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((start + i * step, f"{start + i * step:.{digits}f}") for i in range(count + 1))
    return Axis(label, start, end, ticks, better)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis of base-10 logarithms with ticks at powers of ten, and at 3 between few."""
    first, last = math.floor(min(values)), math.ceil(max(values))
    factors = (1, 3) if last - first <= 3 else (1,)
    marks = [(k, f) for k in range(first, last + 1) for f in factors]
    places = [k + math.log10(f) for k, f in marks]
    low = max((p for p in places if p <= min(values)), default=first)
    high = min((p for p in places if p >= max(values)), default=last)
    if low == high:
        high += 1
    stride = max(1, math.ceil((last - first) / 8)) if factors == (1,) else 1
    ticks = tuple(
        (place, f"{factor * 10.0**power:g}")
        for i, (place, (power, factor)) in enumerate(zip(places, marks, strict=True))
        if low <= place <= high and i % stride == 0
    )
    return Axis(label, low, high, ticks)


def on_page(figure: Figure) -> str:
    """A figure as SVG, in two sizes; a map fits a phone as it is."""
    if isinstance(figure, HeatMap):
        return _heat_map(figure)
    if isinstance(figure, Ecdf):
        wide, narrow = _ecdf(figure, _ECDF_WIDE), _ecdf(figure, _ECDF_NARROW)
    else:
        wide, narrow = _scatter(figure, _WIDE), _scatter(figure, _NARROW)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def drawing(figure: Figure) -> str:
    """A figure in one size, with the names below it that the page has beside it."""
    if isinstance(figure, HeatMap):
        return _heat_map(figure)
    if isinstance(figure, Ecdf):
        return _ecdf(figure, _ECDF_WIDE, [(c.style, c.label) for c in figure.curves])
    long = [p for p in figure.points if p.named and len(p.label) > _LONG_LABEL]
    points = tuple(replace(p, named=p.named and p not in long) for p in figure.points)
    return _scatter(replace(figure, points=points), _WIDE, [(p.style, p.label) for p in long])


def _heat_map(data: HeatMap) -> str:
    values = [cell.value for cell in data.cells]
    low, high = min(values), max(values)
    height = max(6.0, min(24.0, 560 / len(data.rows)))
    width = max(18.0, min(44.0, 330 / len(data.columns)))
    left, top = 40.0, 46.0
    bottom = top + height * len(data.rows)
    full_width = max(left + width * len(data.columns) + 6, 250)
    parts = [_open(full_width, bottom + 46, data.title, f"map {data.css}", grid=True)]
    every = max(1, math.ceil(11 / height))
    for i, name in enumerate(data.rows):
        if i % every == 0:
            parts.append(_text(left - 7, top + (i + 0.5) * height + 4, name, "tick", "end"))
    for j, name in enumerate(data.columns):
        x = left + (j + 0.5) * width
        turn = f' transform="rotate(-40 {x:.1f} {top - 8})"'
        parts.append(_text(x, top - 8, name, "tick", "start", turn))
    gap = 1 if height > 8 else 0.5
    for cell in data.cells:
        share = (cell.value - low) / (high - low) if high > low else 0.5
        x, y = left + cell.column * width, top + cell.row * height
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
            f'height="{height - gap:.1f}" fill-opacity="{_opacity(share):.3f}" '
            f'data-row="{cell.row}" data-col="{cell.column}"{_tip(cell.tip)}</rect>'
        )
    parts.append(_ramp(left, bottom + 14, _short(low), _short(high), data.legend))
    return "".join([*parts, "</svg>"])


def _opacity(share: float) -> float:
    """Strength of a map's hue for a value's place between smallest and largest."""
    return 0.07 + 0.93 * share


def swatch(style: Style) -> str:
    """A model's mark on its own, for legends and tables."""
    return (
        '<svg class="swatch" width="16" height="16" viewBox="0 0 16 16" '
        f'aria-hidden="true">{_mark(8, 8, style, 5)}</svg>'
    )


def _open(width: float, height: float, title: str, css: str, *, grid: bool = False) -> str:
    role = ' data-grid=""' if grid else ""
    return (
        f'<svg class="figure {css}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}"{role}>'
    )


_Names = Sequence[tuple[Style, str]]


def _legend(names: _Names, top: float) -> tuple[str, float]:
    """Marks with their names, one below the other, and the height that they take."""
    parts, y = [], top
    for style, name in names:
        parts.append(_mark(20, y + 4, style, 5))
        # Settings of a method have no spaces to break at.
        spaced = re.sub(r"(?<=[:,])(?=\S)", " ", name)
        for line in textwrap.wrap(spaced, _LINE_LENGTH) or [""]:
            parts.append(_text(34, y + 8, line, "name"))
            y += _LINE
    return "".join(parts), y - top + 6 * bool(names)


def _scatter(data: Scatter, frame: _Frame, names: _Names = ()) -> str:
    points, x, y, cross = data.points, data.x, data.y, data.cross

    def at(px: float, py: float) -> tuple[float, float]:
        return x.place(px, frame.x0, frame.x1), y.place(py, frame.y1, frame.y0)

    legend, more = _legend(names, frame.height + 6)
    parts = [_open(frame.width, frame.height + more, data.title, "scatter"), _axes(x, y, frame)]
    if cross is not None:
        cx, cy = at(cross.x, cross.y)
        parts.append(_line(cx, frame.y0, cx, frame.y1, "cross"))
        parts.append(_line(frame.x0, cy, frame.x1, cy, "cross"))
    parts.append(_better(x, y, frame))
    for name in dict.fromkeys(point.path for point in points if point.path):
        group = [point for point in points if point.path == name]
        if len(group) > 1:
            line = " ".join("{:.1f},{:.1f}".format(*at(p.x, p.y)) for p in group)
            parts.append(f'<polyline class="path {_classes(group[0].style)}" points="{line}"/>')
    parts += [_bars(point, at) for point in points]
    placed = [at(point.x, point.y) for point in points]
    for point, (px, py) in zip(points, placed, strict=True):
        mark = _mark(px, py, point.style, 6)
        parts.append(
            f'<g class="mark {point.style.toggle}"{_tip(point.tip)}'
            f'<circle class="hit" cx="{px:.1f}" cy="{py:.1f}" r="13"/>{mark}</g>'
        )
    parts += _labels(points, placed, frame)
    return "".join([*parts, legend, "</svg>"])


def _bars(point: Point, at: Callable[[float, float], tuple[float, float]]) -> str:
    lines = []
    if point.x_range:
        lines.append(_line(*at(point.x_range[0], point.y), *at(point.x_range[1], point.y)))
    if point.y_range:
        lines.append(_line(*at(point.x, point.y_range[0]), *at(point.x, point.y_range[1])))
    return f'<g class="bar {_classes(point.style)}">{"".join(lines)}</g>' if lines else ""


_BESIDE = (
    (11, 4, "start"),
    (-11, 4, "end"),
    (0, -13, "middle"),
    (0, 22, "middle"),
    (11, -10, "start"),
    (11, 18, "start"),
    (-11, -10, "end"),
    (-11, 18, "end"),
    (11, -24, "start"),
    (11, 32, "start"),
)
"""Places of a name from its mark, the best first."""


def _labels(
    points: Sequence[Point], placed: Sequence[tuple[float, float]], frame: _Frame
) -> list[str]:
    """Names beside the marks, each where it collides least with what is there already."""
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in placed]
    parts = []
    for point, (px, py) in zip(points, placed, strict=True):
        if not point.named:
            continue
        options = [(px + dx, py + dy, anchor) for dx, dy, anchor in _BESIDE]
        boxes = [_box(option, point.label) for option in options]
        costs = [_cost(box, taken, frame) + 0.01 * i for i, box in enumerate(boxes)]
        best = costs.index(min(costs))
        tx, ty, anchor = options[best]
        taken.append(boxes[best])
        css = f"label {point.style.css} {point.style.toggle}"
        parts.append(_text(tx, ty, point.label, css, anchor))
    for point, (px, py) in zip(points, placed, strict=True):
        # Strengths are written only where there is room: the tooltip has them all.
        for ty in (py + 20, py - 11) if point.note else ():
            box = _box((px, ty, "middle"), point.note)
            if _cost(box, taken, frame) == 0:
                taken.append(box)
                parts.append(_text(px, ty, point.note, f"hint {point.style.toggle}", "middle"))
                break
    return parts


_Box = tuple[float, float, float, float]


def _box(option: tuple[float, float, str], text: str) -> _Box:
    x, y, anchor = option
    width = _TEXT_WIDTH * len(text)
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    return left, y - 11, left + width, y + 4


def _cost(box: _Box, taken: Iterable[_Box], frame: _Frame) -> float:
    outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.width)
    outside += max(0.0, frame.y0 - 12 - box[1]) + max(0.0, box[3] - frame.y1)
    overlap = 0.0
    for other in taken:
        across = min(box[2], other[2]) - max(box[0], other[0])
        down = min(box[3], other[3]) - max(box[1], other[1])
        if across > 0 and down > 0:
            overlap += across * down
    return overlap + 40 * outside


def _better(x: Axis, y: Axis, frame: _Frame) -> str:
    """An arrow into the corner where a perfect model would be."""
    if "none" in (x.better, y.better):
        return ""
    left, up = x.better == "low", y.better == "high"
    # In the margin, because the best models crowd the corner itself.
    if left:
        return _text(frame.x0, frame.y0 - 14, f"{'↖' if up else '↙'} better", "hint", "start")
    return _text(frame.x1, frame.y0 - 14, f"better {'↗' if up else '↘'}", "hint", "end")


def _ecdf(data: Ecdf, frame: _Frame, names: _Names = ()) -> str:
    x, y = data.x, unit_axis("share of the removed examples")
    legend, more = _legend(names, frame.height + 6)
    parts = [_open(frame.width, frame.height + more, data.title, "ecdf"), _axes(x, y, frame)]
    for curve in data.curves:
        values = sorted(math.log10(max(v, SMALLEST)) if data.log else v for v in curve.values)
        n = len(values)
        places = [
            (x.place(value, frame.x0, frame.x1), y.place((i + 1) / n, frame.y1, frame.y0))
            for i, value in enumerate(values)
        ]
        steps = "".join(f"H{px:.1f}V{py:.1f}" for px, py in places)
        line = f"M{places[0][0]:.1f} {frame.y1:.1f}{steps}"
        # A few of the model's marks, so that curves differ in more than colour.
        beads = sorted({min(n - 1, int(n * share)) for share in (0.2, 0.5, 0.8)})
        parts.append(
            f'<g class="mark {curve.style.toggle}"{_tip(curve.tip)}'
            f'<path class="hit-line" d="{line}"/>'
            f'<path class="step {curve.style.css}" d="{line}"/>'
            f"{''.join(_mark(*places[i], curve.style, 4.5) for i in beads)}</g>"
        )
    return "".join([*parts, legend, "</svg>"])


def _axes(x: Axis, y: Axis, frame: _Frame) -> str:
    parts = ['<g class="axes" aria-hidden="true">']
    for value, name in y.ticks:
        py = y.place(value, frame.y1, frame.y0)
        parts.append(_line(frame.x0, py, frame.x1, py, "grid"))
        parts.append(_text(frame.x0 - 8, py + 4, name, "tick", "end"))
    for value, name in x.ticks:
        px = x.place(value, frame.x0, frame.x1)
        parts.append(_line(px, frame.y1, px, frame.y1 + 5, "tickline"))
        parts.append(_text(px, frame.y1 + 19, name, "tick", "middle"))
    parts.append(_line(frame.x0, frame.y1, frame.x1, frame.y1, "axis"))
    middle = (frame.x0 + frame.x1) / 2
    parts.append(_text(middle, frame.height - 8, x.label, "name", "middle"))
    side = (frame.y0 + frame.y1) / 2
    turn = f' transform="rotate(-90 14 {side:.1f})"'
    parts.append(_text(14, side, y.label, "name", "middle", turn))
    return "".join([*parts, "</g>"])


def _ramp(x: float, y: float, low: str, high: str, legend: str) -> str:
    steps, width = 24, 120.0
    parts = [
        f'<rect class="cell" x="{x + i * width / steps:.1f}" y="{y:.1f}" '
        f'width="{width / steps + 0.3:.1f}" height="8" '
        f'fill-opacity="{_opacity(i / (steps - 1)):.3f}"/>'
        for i in range(steps)
    ]
    parts.append(_text(x + width + 8, y + 8, f"{low} to {high}", "tick"))
    parts.append(_text(x, y + 24, legend, "tick"))
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _mark(x: float, y: float, style: Style, r: float) -> str:
    """One mark; every shape has about the area of a circle of radius r."""
    css = f'class="shape {style.css}"'
    if style.shape == "circle":
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    return f'<path {css} d="{_outline(style.shape, x, y, r)}"/>'


def _outline(shape: str, x: float, y: float, r: float) -> str:
    if shape == "square":
        a = 0.89 * r
        return _closed([(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)])
    if shape == "star":
        corners = [(r * (1.5 if i % 2 == 0 else 0.62), math.pi * (i / 5 - 0.5)) for i in range(10)]
        return _closed([(x + a * math.cos(t), y + a * math.sin(t)) for a, t in corners])
    if shape in ("plus", "cross"):
        a, b = 1.25 * r, 0.42 * r
        plus = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        plus += [(b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        if shape == "cross":
            c = math.sqrt(0.5)
            plus = [(c * (p - q), c * (p + q)) for p, q in plus]
        return _closed([(x + p, y + q) for p, q in plus])
    sides, size, start = {
        "triangle": (3, 1.4, -0.5),
        "down": (3, 1.4, 0.5),
        "diamond": (4, 1.3, 0.0),
        "hexagon": (6, 1.12, 0.0),
    }[shape]
    angles = [math.pi * (start + 2 * i / sides) for i in range(sides)]
    return _closed([(x + size * r * math.cos(t), y + size * r * math.sin(t)) for t in angles])


def _closed(corners: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in corners) + "Z"


def _text(x: float, y: float, text: str, css: str, anchor: str = "start", more: str = "") -> str:
    return (
        f'<text class="{css.strip()}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str = "") -> str:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}.items()
    ends = " ".join(f'{n}="{v if isinstance(v, int) else f"{v:.1f}"}"' for n, v in places)
    return f'<line class="{css}" {ends}/>' if css else f"<line {ends}/>"


def _tip(text: str) -> str:
    """Attribute, end of the tag and title of a mark."""
    return f' data-tip="{escape(text)}"><title>{escape(text)}</title>'


def _classes(style: Style) -> str:
    return f"{style.css} {style.toggle}".strip()


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e+")
