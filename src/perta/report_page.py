"""What the page says, section by section, ready for the template.

Each function makes one section from the collected runs. What is missing is left out, and a
sentence says so; nothing is filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perta.report_inputs import Collection, Record, Run
from perta.report_metrics import Reading, measure_of, truth_ratios
from perta.report_svg import (
    Axis,
    Cell,
    Curve,
    Point,
    Style,
    ecdf,
    fitted_axis,
    heat_map,
    log_axis,
    scatter,
    unit_axis,
)
from perta.report_verdict import Check, Statement, Verdict, number, reference_quality

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("forget_probability", "retain_probability", "Answer probability"),
    ("forget_rouge", "retain_rouge", "ROUGE-L"),
    ("forget_strength", "retain_strength", "Extraction strength"),
    ("forget_verbmem", "retain_knowmem", "Verbatim and knowledge"),
    ("forget_knowmem", "retain_knowmem", "Knowledge"),
    ("forget_quality", "model_utility", "Forget quality and utility"),
)
MOST_CURVES = 9
MOST_MAPS = 8

METHODS: Mapping[str, str] = {
    "tv": "Every weight was moved back along what learning the removed examples alone does to "
    "it, all weights by the same factor α (task vector negation).",
    "perta-grad": "Every weight was moved back along what learning the removed examples alone "
    "does to it, in proportion to how much it matters for them rather than for the examples to "
    "keep. How much a weight matters is the mean absolute gradient over examples.",
    "perta-fisher": "Every weight was moved back along what learning the removed examples alone "
    "does to it, in proportion to how much it matters for them rather than for the examples to "
    "keep. How much a weight matters is the mean squared gradient over examples (diagonal "
    "Fisher information).",
}
_OTHER_METHOD = (
    "Weights were moved back along what learning the removed examples alone does to them, by "
    "shares that the method {method} sets."
)
_SHORT_NAMES: Mapping[str, str] = {
    "input_layernorm": "norm 1",
    "post_attention_layernorm": "norm 2",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_INPUT_NAMES: Mapping[str, str] = {
    "full": "model before the edit",
    "base": "base model",
    "forget_checkpoint": "model tuned on the forget set alone",
    "forget_importance": "importance, forget set",
    "retain_importance": "importance, retain set",
    "checkpoint": "evaluated model",
    "forget": "forget set",
    "retain": "retain set",
    "holdout": "held-out set",
    "content": "edited model",
}
_SHOWN_SETTINGS = {
    "method": "method",
    "scaling_coef": "strength α",
    "order": "order p",
    "rho": "retain weight ρ",
    "granularity": "granularity",
    "include": "only tensors",
    "exclude": "not tensors",
}


@dataclass(frozen=True)
class Pin:
    """A value on the verdict's scale."""

    role: str
    text: str
    percent: float
    level: int
    side: str


@dataclass(frozen=True)
class Panel:
    """One figure among several of which a reader picks one."""

    label: str
    figure: str
    caption: str


@dataclass(frozen=True)
class Identity:
    """Something that took part, by name and content."""

    what: str
    name: str
    fingerprint: str
    more: str = ""


@dataclass(frozen=True)
class EditMap:
    """Where one edit happened.

    Attributes:
        label: the edited model.
        figures: the maps with their captions.
        outside: rows of (tensor, mean W, size of the change) for tensors of no layer.
        sentences: the same in words.
    """

    label: str
    figures: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str, str], ...]
    sentences: tuple[str, ...]


def scale(statement: Statement, reference: str) -> tuple[Pin, ...]:
    """The lead measure of a statement as pins on a line from 0 to 1."""
    status = statement.status
    check = next((c for c in statement.checks if c.core and c.status == status), statement.lead)
    if check is None or not 0 <= check.after <= 1:
        return ()
    values = [("before", "before", check.before), ("reference", reference, check.reference)]
    pins = [_pin("after", "after", check.after, 0)]
    taken: list[tuple[float, float]] = []
    for role, name, value in values:
        if value is None:
            continue
        pin = _pin(role, name, value, 0)
        # On a phone a label takes about a third of the line.
        level = int(any(abs(pin.percent - other) < 34 for other, _ in taken))
        pins.append(Pin(role, pin.text, pin.percent, level, pin.side))
        taken.append((pin.percent, level))
    return tuple(pins)


def _pin(role: str, name: str, value: float, level: int) -> Pin:
    percent = 100 * min(1.0, max(0.0, value))
    side = "left" if percent < 18 else "right" if percent > 82 else "middle"
    return Pin(role, f"{name} {number(value)}", percent, level, side)


def share_text(check: Check, *, kept: bool) -> str:
    """What remains or is kept, as a percentage with its interval."""
    if check.share is None:
        return "–"
    text = f"{check.share:.0%}".replace("-", "−")
    if check.share_low is not None and check.share_high is not None:
        low, high = f"{check.share_low:.0%}", f"{check.share_high:.0%}"
        text += f" ({low} to {high})".replace("-", "−")
    return text + (" kept" if kept else " left")


def trade_offs(collection: Collection, looks: Mapping[str, Style]) -> list[Panel]:
    """Forgetting against retention for every pair of measures that was taken."""
    panels = []
    for forget, retain, label in PAIRS:
        runs = [
            run
            for run in collection.runs
            if forget in run.measures and retain in run.measures and run.role != "forget checkpoint"
        ]
        if not any(run.role == "edited" for run in runs):
            continue
        if forget == "forget_knowmem" and any(panel.label.startswith("Verb") for panel in panels):
            continue
        x, y = _axis(forget, runs), _axis(retain, runs)
        edited = [run for run in runs if run.role == "edited"]
        points = [_point(run, forget, retain, looks, edited) for run in runs]
        cross = next(
            (p for p, run in zip(points, runs, strict=True) if run.role == "retrained"), None
        )
        if sum(run.role == "retrained" for run in runs) > 1:
            cross = None
        title = f"{measure_of(forget).label} and {measure_of(retain).label} of every model"
        panels.append(Panel(label, scatter(points, x, y, title, cross=cross), _pair_note(forget)))
    return panels


def _pair_note(forget: str) -> str:
    if forget == "forget_quality":
        return (
            "Right is more like the retrained model, up is more useful. The horizontal axis is "
            "the base-10 logarithm of a p-value."
        )
    return "Left is more forgotten, up is more kept. Bars are 95 % intervals over examples."


def _axis(key: str, runs: Sequence[Run]) -> Axis:
    measure = measure_of(key)
    where = {"forget": "removed examples", "retain": "examples to keep"}.get(measure.group, "")
    names = {
        "probability": "answer probability",
        "rouge": "ROUGE-L recall",
        "strength": "extraction strength",
        "knowmem": "knowledge, ROUGE-L F1",
        "verbmem": "verbatim recall, ROUGE-L F1",
    }
    if key == "forget_quality":
        values = [_coordinate(key, run.measures[key].value) for run in runs]
        return fitted_axis("forget quality, log10 p", [*values, 0.0], measure.better)
    name = names.get(key.partition("_")[2], measure.label.lower())
    return unit_axis(f"{name}, {where}" if where else name, measure.better)


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


def curve_runs(runs: Sequence[Run], subject: Run | None) -> list[Run]:
    """The models to draw as curves: references, then one per method, the subject first."""
    edited = [run for run in runs if run.role == "edited"]
    if subject in edited:
        edited.sort(key=lambda run: run is not subject)
    references = [run for run in runs if run.role in ("base", "full", "retrained")]
    if len(references) + len(edited) > MOST_CURVES:
        seen: set[str | None] = set()
        edited = [r for r in edited if r.method not in seen and not seen.add(r.method)]  # type: ignore[func-returns-value]
    return [*references[: MOST_CURVES - 2], *edited][:MOST_CURVES]


def probability_curves(
    runs: Sequence[Run], subject: Run | None, looks: Mapping[str, Style]
) -> str | None:
    """Every removed example's answer probability, one curve per model; None without values."""
    usable = [
        run
        for run in runs
        if "forget_probability" in run.measures and run.measures["forget_probability"].examples
        if subject is None or run.same_set(subject, "forget")
    ]
    if not usable:
        return None
    curves = []
    for run in curve_runs(usable, subject):
        values = tuple(run.measures["forget_probability"].examples.values())
        tip = (
            f"{_full_name(run)}\nn = {len(values)}, median {number(_median(values))}, "
            f"highest {number(max(values))}"
        )
        curves.append(Curve(values, run.label, tip, looks[run.label]))
    axis = unit_axis("answer probability of a removed example")
    return ecdf(curves, axis, "Distribution of answer probability on the removed examples")


def truth_ratio_curves(
    collection: Collection, subject: Run | None, looks: Mapping[str, Style]
) -> tuple[str, list[tuple[str, int, str, str]]] | None:
    """Truth ratios behind forget quality, and each model's distance from the retrained one.

    Returns:
        The figure and rows of (model, n, KS distance, p-value); None without truth ratios.
    """
    usable = [
        run
        for run in collection.runs
        if truth_ratios(run.results) and run.role != "forget checkpoint"
        if subject is None or run is subject or run.same_set(subject, "forget")
    ]
    if not usable:
        return None
    curves, rows = [], []
    for run in curve_runs(usable, subject):
        values = tuple(truth_ratios(run.results))
        test = reference_quality(run, collection)
        distance = "–" if test is None else number(test[0], 3)
        p = "–" if test is None else number(test[1], 3)
        tip = f"{_full_name(run)}\nn = {len(values)}, median {number(_median(values))}"
        if test is not None:
            tip += f"\nKS distance {distance}, p = {p}"
        curves.append(Curve(values, run.label, tip, looks[run.label]))
        rows.append((run.label, len(values), distance, p))
    logs = [math.log10(max(value, 1e-12)) for curve in curves for value in curve.values]
    axis = log_axis("truth ratio (wrong answers against the right one)", logs)
    title = "Distribution of truth ratios on the removed examples"
    return ecdf(curves, axis, title, log=True), rows


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


# --- where the edit happened -----------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """One cell of the map, experts of a layer taken together."""

    elements: int
    weighting: float
    change: float
    task_vector: float
    norm: float | None


def edit_maps(runs: Sequence[Run]) -> tuple[list[EditMap], int]:
    """Maps of the first edits, and how many more there are."""
    edited = [run for run in runs if run.edit.get("tensors")]
    first: dict[tuple[str | None, float | None], Run] = {}
    for run in edited:
        first.setdefault((run.method, run.alpha), run)
    shown = list(first.values())[:MOST_MAPS]
    return [edit_map(run) for run in shown], len(edited) - len(shown)


def edit_map(run: Run) -> EditMap:
    """Per-layer and per-module map of W and of the size of the change."""
    tensors: list[Record] = list(run.edit["tensors"])
    layers, outside = split_layers(tensors)
    rows = sorted({layer for layer, _ in layers})
    columns = _module_order({module for _, module in layers})
    relative = all(place.norm for place in layers.values()) and bool(layers)
    total = math.sqrt(math.fsum(float(t["delta_norm"]) ** 2 for t in tensors)) or 1.0
    figures = []
    if layers:
        row_names = [str(row) for row in rows]
        short = [_SHORT_NAMES.get(column, _shorten(column)) for column in columns]

        def cells(what: str) -> list[Cell]:
            return [
                Cell(
                    rows.index(layer),
                    columns.index(module),
                    _value(place, what, relative),
                    _cell_tip(layer, module, place, total, relative),
                )
                for (layer, module), place in sorted(layers.items())
            ]

        if len({round(place.weighting, 6) for place in layers.values()}) > 1:
            title = f"Mean weighting of {run.label} by layer and module"
            figures.append(
                (
                    heat_map(
                        cells("weighting"), row_names, short, title, "hue-w", "mean W, by layer ↓"
                    ),
                    "Share of each weight that belongs to forgetting, 0 to 1.",
                )
            )
        title = f"Size of the change by {run.label}, by layer and module"
        legend = "‖ΔW‖ / ‖W‖, by layer ↓" if relative else "RMS change per weight, by layer ↓"
        caption = (
            "Norm of the change relative to the norm of the weights."
            if relative
            else "Root mean square of the change of a weight."
        )
        figures.append((heat_map(cells("change"), row_names, short, title, "hue-d", legend), caption))
    return EditMap(
        run.label,
        tuple(figures),
        tuple(
            (name, number(place.weighting), f"{_value(place, 'change', relative):.2g}")
            for name, place in outside.items()
        ),
        tuple(_map_sentences(tensors, total, uniform=len(figures) == 1)),
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
            module = re.sub(r"\.(weight|bias)$", "", match[2])
            if match[2].endswith(".bias"):
                module += " bias"
            module = re.sub(r"\.\d+\.", ".*.", module)
            layers.setdefault((int(match[1]), module), []).append(tensor)
        else:
            outside.setdefault(name, []).append(tensor)
    return (
        {key: _merge(group) for key, group in layers.items()},
        {key: _merge(group) for key, group in outside.items()},
    )


def _merge(tensors: Sequence[Record]) -> _Place:
    elements = sum(int(t["elements"]) for t in tensors)
    weighting = math.fsum(float(t["mean_weighting"]) * int(t["elements"]) for t in tensors)
    norms = [t.get("full_norm") for t in tensors]
    known = [float(norm) for norm in norms if norm]
    return _Place(
        elements,
        weighting / elements if elements else 0.0,
        math.sqrt(math.fsum(float(t["delta_norm"]) ** 2 for t in tensors)),
        math.sqrt(math.fsum(float(t["task_vector_norm"]) ** 2 for t in tensors)),
        math.sqrt(math.fsum(n * n for n in known)) if len(known) == len(norms) else None,
    )


def _value(place: _Place, what: str, relative: bool) -> float:
    if what == "weighting":
        return place.weighting
    if relative and place.norm:
        return place.change / place.norm
    return place.change / math.sqrt(place.elements or 1)


def _cell_tip(layer: int, module: str, place: _Place, total: float, relative: bool) -> str:
    size = _value(place, "change", relative)
    unit = "‖ΔW‖ / ‖W‖" if relative else "RMS change"
    return (
        f"layer {layer}, {module}\nmean W {place.weighting:.3f}\n{unit} {size:.2g}\n"
        f"{(place.change / total) ** 2:.1%} of the whole edit"
    )


def _module_order(modules: set[str]) -> list[str]:
    wanted = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    return [m for m in wanted if m in modules] + sorted(modules - set(wanted))


def _shorten(module: str) -> str:
    name = re.sub(r"^(self_attn|attn|attention|mlp|self_attention)\.", "", module)
    return re.sub(r"(_proj|\.\*)", "", name)


def _map_sentences(tensors: Sequence[Record], total: float, *, uniform: bool) -> list[str]:
    elements = sum(int(t["elements"]) for t in tensors)
    mean = math.fsum(float(t["mean_weighting"]) * int(t["elements"]) for t in tensors) / elements
    sentences = []
    if uniform:
        sentences.append(f"The weighting is the same for every weight: W = {number(mean)}.")
    else:
        sentences.append(
            f"On average {mean:.0%} of what learning the removed examples does to a weight was "
            "counted as belonging to them (mean W), before the strength α."
        )
    shares = sorted(
        ((float(t["delta_norm"]) / total) ** 2, str(t["name"])) for t in tensors
    )[::-1][:3]
    largest = "; ".join(f"{name} {share:.0%}" for share, name in shares)
    sentences.append(f"Largest parts of the edit, by squared norm: {largest}.")
    return sentences


# --- what was asked and done -----------------------------------------------------------------


def asked(subject: Run, collection: Collection) -> list[Identity]:
    """What was to be removed, what kept, and from which model."""
    items = []
    inputs = _evaluated_on(subject)
    made = subject.record.get("unlearn", {})
    sources: dict[str, str] = {
        **{name: str(value) for name, value in _settings(subject).items()},
        **{name: str(value) for name, value in made.get("sources", {}).items()},
    }
    for name, what in (("forget", "to be removed"), ("retain", "to be kept"), ("holdout", "held out")):
        size = subject.set_size(name)
        fingerprint = inputs.get(name) or made.get("inputs", {}).get(name, "")
        if fingerprint or size:
            more = f"{size} examples" if size else ""
            items.append(Identity(what, _file(sources.get(name)), str(fingerprint), more))
    full = subject.record.get("inputs", {}).get("full")
    if full:
        record = collection.records.get(str(full), {})
        count = record.get("examples")
        more = f"tuned on {count} examples" if count else ""
        name = _file(subject.record.get("settings", {}).get("full"))
        items.append(Identity("from the model", name, str(full), more))
    return items


def done(subject: Run) -> tuple[str, list[tuple[str, str]], list[Identity], str]:
    """How it was done: a sentence, the settings, the inputs and the versions."""
    record = subject.record
    if not record:
        return "", [], [], ""
    method = subject.method or ""
    sentence = METHODS.get(method) or _OTHER_METHOD.format(method=method)
    settings = [
        (title, _plain(record["settings"][name]))
        for name, title in _SHOWN_SETTINGS.items()
        if record.get("settings", {}).get(name) not in (None, [], ())
    ]
    inputs = [
        Identity(
            _INPUT_NAMES.get(name, name),
            _file(record.get("settings", {}).get(name)),
            str(fingerprint),
        )
        for name, fingerprint in record.get("inputs", {}).items()
    ]
    if record.get("content"):
        inputs.append(Identity(_INPUT_NAMES["content"], subject.label, str(record["content"])))
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    created = record.get("created")
    return sentence, settings, inputs, f"Made {created} with {versions}." if created else versions


def provenance(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything recorded about every model, paths cut to their last part."""
    found = []
    for run in runs:
        lines: list[tuple[str, str]] = []
        for title, record in (("checkpoint", run.record), ("evaluation", run.results.get("perta", {}))):
            for name, value in record.get("settings", {}).items():
                if value not in (None, [], ""):
                    lines.append((f"{title}: {name}", _plain(value)))
            for name, value in record.get("inputs", {}).items():
                lines.append((f"{title}: fingerprint of {name}", str(value)))
            for name, value in record.get("versions", {}).items():
                lines.append((f"{title}: version of {name}", str(value)))
            if record.get("content"):
                lines.append((f"{title}: fingerprint", str(record["content"])))
            if record.get("created"):
                lines.append((f"{title}: made", str(record["created"])))
        if lines:
            found.append((run.label, lines))
    return found


def newest(runs: Sequence[Run]) -> str | None:
    """When the newest of the results was made."""
    times = [
        str(record["created"])
        for run in runs
        for record in (run.record, run.results.get("perta", {}))
        if record.get("created")
    ]
    return max(times) if times else None


def limits(verdicts: Sequence[Verdict], collection: Collection, samples_shown: bool) -> list[str]:
    """What this report does not show, the general before the particular."""
    sentences = [
        "An edit of the weights is not a proof of erasure. The report shows what was measured "
        "on the named examples, no more; other questions about the same facts may be answered.",
        "Nothing here speaks about copies of the data elsewhere: training files, backups, logs, "
        "earlier checkpoints, and the intermediate model tuned on the forget set.",
    ]
    keys = {key for run in collection.runs for key in run.measures}
    if not any("relearn" in key for key in keys):
        sentences.append(
            "Whether a short fine-tuning brings the removed answers back was not measured."
        )
    if not any(key.startswith("mia_") or key == "privleak" for key in keys):
        sentences.append("Membership-inference attacks were not run.")
    if not any(key in keys for key in ("model_utility", "ra_rouge", "wf_rouge")):
        sentences.append("General ability outside the retain set was not measured.")
    sentences.append(
        "Intervals come from resampling examples as if they were independent. Questions about "
        "the same person are not, so the true uncertainty is larger."
    )
    edited = [verdict.run for verdict in verdicts]
    if len(edited) > 1:
        sentences.append(
            "Several edited models were compared on the same examples and the best is named "
            "first; its figures are therefore slightly flattering."
        )
    if len({run.seed for run in edited if run.seed is not None}) <= 1:
        sentences.append("All models come from one seed of tuning, so chance in it is not shown.")
    if samples_shown:
        sentences.append(
            "The short hashes of withheld texts cannot be turned back, but whoever guesses a "
            "short text can check the guess."
        )
    return sentences


def _evaluated_on(run: Run) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run.results.get("perta", {}).get("inputs", {})
    return found


def _settings(run: Run) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run.results.get("perta", {}).get("settings", {})
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _file(path: Any) -> str:
    """Last part of a path: enough to recognise it, and no one's folders are disclosed."""
    return Path(str(path)).name if path else ""


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return _file(text) if text.startswith(("/", "./", "../", "~")) else text
