"""What the figures show: runs in, marks and axes out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from perta.evidence.measures import PAIRS, Reading, measure_of, truth_ratios
from perta.report._svg import (
    SMALLEST,
    Axis,
    Cell,
    Curve,
    Ecdf,
    HeatMap,
    Point,
    Scatter,
    Style,
    fitted_axis,
    log_axis,
    unit_axis,
)
from perta.report._tables import file_name
from perta.report.collect import Collection, Run
from perta.report.verdict.judge import reference_quality
from perta.report.verdict.words import number
from perta.store.provenance import Record

_MOST_CURVES = 9
_MOST_MAPS = 8

_SHORT_NAMES = {
    "input_layernorm": "norm 1",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "norm 2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
"""Modules in the order of a layer, and what stands over their columns."""


@dataclass(frozen=True)
class EditMap:
    """Where one edit happened; `outside` has (tensor, mean W, size of the change)."""

    label: str
    figures: tuple[HeatMap, ...]
    outside: tuple[tuple[str, str, str], ...]
    sentences: tuple[str, ...]


def trade_offs(collection: Collection, looks: Mapping[str, Style]) -> list[Scatter]:
    """Forgetting against retention for every pair of measures that was taken."""
    panels = []
    for forget, retain, label in PAIRS:
        runs = [
            run
            for run in collection.runs
            if forget in run.measures and retain in run.measures and run.role != "forget checkpoint"
        ]
        edited = [run for run in runs if run.role == "edited"]
        if not edited:
            continue
        points = tuple(_point(run, forget, retain, looks, edited) for run in runs)
        crosses = [p for p, run in zip(points, runs, strict=True) if run.role == "retrained"]
        panels.append(
            Scatter(
                name=f"trade_off_{forget}_{retain}",
                label=label,
                title=f"{label} of every model: removed examples against examples to keep",
                caption=(
                    "Right is more like the retrained model, up is more useful. The horizontal "
                    "axis is the base-10 logarithm of a p-value."
                    if forget == "forget_quality"
                    else "Left is more forgotten, up is more kept. Bars are 95% intervals over "
                    "examples."
                ),
                points=points,
                x=_axis(forget, runs),
                y=_axis(retain, runs),
                cross=crosses[0] if len(crosses) == 1 else None,
            )
        )
    return panels


def _axis(key: str, runs: Sequence[Run]) -> Axis:
    measure = measure_of(key)
    if key == "forget_quality":
        values = [_coordinate(key, run.measures[key].value) for run in runs]
        return fitted_axis("forget quality, log10 p", [*values, 0.0], measure.better)
    where = {"forget": "removed examples", "retain": "examples to keep"}.get(measure.group)
    return unit_axis(f"{measure.axis}, {where}" if where else measure.axis, measure.better)


def _coordinate(key: str, value: float) -> float:
    return math.log10(max(value, 1e-30)) if key == "forget_quality" else value


def _point(
    run: Run, forget: str, retain: str, looks: Mapping[str, Style], edited: Sequence[Run]
) -> Point:
    x, y = run.measures[forget], run.measures[retain]
    many = len(edited) > 12
    first = next((other for other in edited if other.method == run.method), run)
    same_seed = [o for o in edited if o.method == run.method and o.seed == run.seed]
    return Point(
        _coordinate(forget, x.value),
        y.value,
        run.label if not many or run.role != "edited" else run.method or run.label,
        "\n".join([_full_name(run), _tip(forget, x), _tip(retain, y)]),
        looks[run.label],
        None if forget == "forget_quality" else _range(x),
        _range(y),
        f"{run.method}/{run.seed}" if run.role == "edited" and len(same_seed) > 1 else "",
        not many or run.role != "edited" or run is first,
        f"α {run.alpha:g}" if many and run.seed == first.seed and run.alpha is not None else "",
    )


def _full_name(run: Run) -> str:
    parts = [run.label]
    if run.alpha is not None and "α" not in run.label:
        parts.append(f"α {run.alpha:g}")
    if run.seed is not None and "seed" not in run.label and run.role == "edited":
        parts.append(f"seed {run.seed}")
    return ", ".join(parts)


def _tip(key: str, reading: Reading) -> str:
    measure = measure_of(key)
    where = {"forget": "removed: ", "retain": "kept: "}.get(measure.group, "")
    text = f"{where}{measure.label} {number(reading.value, 3)}"
    if reading.interval:
        text += f" ({number(reading.interval.low, 3)} to {number(reading.interval.high, 3)})"
    return text


def _range(reading: Reading) -> tuple[float, float] | None:
    return (reading.interval.low, reading.interval.high) if reading.interval else None


def _curve_runs(
    runs: Sequence[Run], ranked: Sequence[Run], values: Callable[[Run], Sequence[float]]
) -> list[Run]:
    """The models to draw: references, then edited ones by rank, the best of each method if many."""
    usable = [
        run for run in runs if values(run) and (not ranked or run.same_set(ranked[0], "forget"))
    ]
    edited = [run for run in ranked if run in usable]
    references = [run for run in usable if run.role in ("base", "full", "retrained")]
    if len(references) + len(edited) > _MOST_CURVES:
        first: dict[str | None, Run] = {}
        for run in edited:
            first.setdefault(run.method, run)
        edited = list(first.values())
    return [*references[: _MOST_CURVES - 2], *edited][:_MOST_CURVES]


def probability_curves(
    runs: Sequence[Run], ranked: Sequence[Run], looks: Mapping[str, Style]
) -> Ecdf | None:
    """Every removed example's answer probability, one curve per model; None without values."""

    def values(run: Run) -> tuple[float, ...]:
        reading = run.measures.get("forget_probability")
        return tuple(reading.examples.values()) if reading else ()

    curves = [
        Curve(
            values(run),
            run.label,
            f"{_full_name(run)}\nn = {len(values(run))}, median {number(median(values(run)))}, "
            f"highest {number(max(values(run)))}",
            looks[run.label],
        )
        for run in _curve_runs(runs, ranked, values)
    ]
    axis = unit_axis("answer probability of a removed example")
    title = "Distribution of answer probability on the removed examples"
    return Ecdf("answer_probability", title, tuple(curves), axis) if curves else None


def truth_ratio_curves(
    collection: Collection, ranked: Sequence[Run], looks: Mapping[str, Style]
) -> tuple[Ecdf, list[tuple[str, int, str, str]]] | None:
    """Truth ratios behind forget quality, and rows of (model, n, KS distance, p-value)."""
    curves, rows = [], []
    for run in _curve_runs(collection.runs, ranked, lambda run: truth_ratios(run.results)):
        values = tuple(truth_ratios(run.results))
        test = reference_quality(run, collection)
        distance, p = ("–", "–") if test is None else (number(value, 3) for value in test)
        tip = f"{_full_name(run)}\nn = {len(values)}, median {number(median(values))}"
        if test is not None:
            tip += f"\nKS distance {distance}, p = {p}"
        curves.append(Curve(values, run.label, tip, looks[run.label]))
        rows.append((run.label, len(values), distance, p))
    if not curves:
        return None
    logs = [math.log10(max(value, SMALLEST)) for curve in curves for value in curve.values]
    axis = log_axis("truth ratio (wrong answers against the right one)", logs)
    title = "Distribution of truth ratios on the removed examples"
    return Ecdf("truth_ratio", title, tuple(curves), axis, log=True), rows


# --- where the edit happened -----------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """One cell of the map, experts of a layer taken together."""

    elements: int
    weighting: float | None
    change: float
    norm: float | None


def edit_maps(runs: Sequence[Run]) -> tuple[list[EditMap], int]:
    """Maps of the first edits, and how many more there are."""
    edited = [run for run in runs if run.edit.get("tensors")]
    first: dict[tuple[str | None, float | None], Run] = {}
    for run in edited:
        first.setdefault((run.method, run.alpha), run)
    shown = list(first.values())[:_MOST_MAPS]
    return [edit_map(run) for run in shown], len(edited) - len(shown)


def edit_map(run: Run) -> EditMap:
    """Per-layer and per-module map of W and of the size of the change."""
    tensors: list[Record] = list(run.edit["tensors"])
    layers, outside = split_layers(tensors)
    total = _norm(tensors) or 1.0
    known = [place.weighting for place in layers.values()]
    relative = bool(layers) and all(place.norm for place in layers.values())
    figures = [_heat_map("change", run.label, layers, total, relative)] if layers else []
    # Where W is the same everywhere a sentence says it better.
    if None not in known and len({round(value or 0.0, 6) for value in known}) > 1:
        figures.insert(0, _heat_map("weighting", run.label, layers, total, relative))
    rows = [
        (name, number(place.weighting), f"{_value(place, 'change', relative):.2g}")
        for name, place in outside.items()
    ]
    return EditMap(run.label, tuple(figures), tuple(rows), tuple(_map_sentences(tensors, total)))


def _heat_map(
    what: str, label: str, layers: Mapping[tuple[int, str], _Place], total: float, relative: bool
) -> HeatMap:
    rows = sorted({layer for layer, _ in layers})
    modules = {module for _, module in layers}
    columns = [m for m in _SHORT_NAMES if m in modules] + sorted(modules - _SHORT_NAMES.keys())
    cells = [
        Cell(
            rows.index(layer),
            columns.index(module),
            _value(place, what, relative),
            _cell_tip(layer, module, place, total, relative),
        )
        for (layer, module), place in layers.items()
    ]
    title = f"Size of the change by {label}, by layer and module"
    css, caption = "hue-d", "Root mean square of the change of a weight."
    legend = "RMS change per weight, by layer ↓"
    if relative:
        caption = "Norm of the change relative to the norm of the weights."
        legend = "‖ΔW‖ / ‖W‖, by layer ↓"
    if what == "weighting":
        title = f"Mean weighting of {label} by layer and module"
        css, caption = "hue-w", "Share of each weight that belongs to forgetting, from 0 to 1."
        legend = "mean W, by layer ↓"
    return HeatMap(
        f"{what}_{file_name(label)}",
        title,
        caption,
        tuple(sorted(cells, key=lambda cell: (cell.row, cell.column))),
        tuple(map(str, rows)),
        tuple(_SHORT_NAMES.get(column, _shorten(column)) for column in columns),
        css,
        legend,
    )


def split_layers(
    tensors: Sequence[Record],
) -> tuple[dict[tuple[int, str], _Place], dict[str, _Place]]:
    """Tensors by (layer, module), and those of no layer by name."""
    layers: dict[tuple[int, str], list[Record]] = {}
    outside: dict[str, list[Record]] = {}
    for tensor in tensors:
        name = str(tensor["name"])
        match = re.search(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.(.+)$", name)
        if match:
            module = re.sub(r"\.weight$", "", re.sub(r"\.bias$", " bias", match[2]))
            place = int(match[1]), re.sub(r"\.\d+\.", ".*.", module)
            layers.setdefault(place, []).append(tensor)
        else:
            outside.setdefault(name, []).append(tensor)
    merged = {key: _merge(group) for key, group in layers.items()}
    return merged, {key: _merge(group) for key, group in outside.items()}


def _merge(tensors: Sequence[Record]) -> _Place:
    known = [float(norm) for t in tensors if (norm := t.get("full_norm"))]
    return _Place(
        sum(int(t["elements"]) for t in tensors),
        _mean_weighting(tensors),
        _norm(tensors),
        math.hypot(*known) if len(known) == len(tensors) else None,
    )


def _norm(tensors: Sequence[Record]) -> float:
    """Norm of the whole change of some tensors."""
    return math.sqrt(math.fsum(float(t["delta_norm"]) ** 2 for t in tensors))


def _mean_weighting(tensors: Sequence[Record]) -> float | None:
    """Mean of W over all weights; None for methods that do not weight single weights."""
    values = [t.get("mean_weighting") for t in tensors]
    elements = sum(int(t["elements"]) for t in tensors)
    if not elements or any(value is None or not math.isfinite(value) for value in values):
        return None
    return math.fsum(float(t["mean_weighting"]) * int(t["elements"]) for t in tensors) / elements


def _value(place: _Place, what: str, relative: bool) -> float:
    if what == "weighting":
        return place.weighting or 0.0
    if relative and place.norm:
        return place.change / place.norm
    return place.change / math.sqrt(place.elements or 1)


def _cell_tip(layer: int, module: str, place: _Place, total: float, relative: bool) -> str:
    size = _value(place, "change", relative)
    unit = "‖ΔW‖ / ‖W‖" if relative else "RMS change"
    weighting = "" if place.weighting is None else f"mean W {place.weighting:.3f}\n"
    return (
        f"layer {layer}, {module}\n{weighting}{unit} {size:.2g}\n"
        f"{(place.change / total) ** 2:.1%} of the whole edit"
    )


def _shorten(module: str) -> str:
    name = re.sub(r"^(self_attn|attn|attention|mlp|self_attention)\.", "", module)
    return re.sub(r"(_proj|\.\*)", "", name)


def _map_sentences(tensors: Sequence[Record], total: float) -> list[str]:
    mean = _mean_weighting(tensors)
    sentences = []
    if mean is None:
        sentences.append(
            "The method weights directions rather than single weights, so there is no map of W."
        )
    elif len({round(float(t["mean_weighting"]), 6) for t in tensors}) == 1:
        sentences.append(f"The weighting is the same for every weight: W = {number(mean)}.")
    else:
        sentences.append(
            f"On average {mean:.0%} of what learning the removed examples does to a weight was "
            "counted as belonging to them (mean W), before the strength α."
        )
    shares = sorted(((float(t["delta_norm"]) / total) ** 2, str(t["name"])) for t in tensors)
    largest = "; ".join(f"{name} {share:.0%}" for share, name in shares[:-4:-1])
    sentences.append(f"Largest parts of the edit, by squared norm: {largest}.")
    return sentences
