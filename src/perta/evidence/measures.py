"""What each measure means to a reader, and how sure its value is.

Results files hold an aggregate and the value of every example. The names of the quick
evaluation and those of published benchmark logs lead to the same measures here, so that one
report can hold both. Pure numbers: no files, no torch.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from perta.evidence import metrics
from perta.evidence.intervals import (
    Groups,
    Interval,
    bounded_means,
    mean_interval,
    pairs_interval,
    quantile_interval,
    student_interval,
)

_Better = Literal["low", "high", "none"]
_Group = Literal["forget", "retain", "holdout", "utility", "membership", "other"]

_AGREEMENT = 1e-6


@dataclass(frozen=True)
class Measure:
    """How one measure is named and read."""

    key: str  # our name; several names in results files may lead to it
    label: str
    group: _Group
    better: _Better
    meaning: str
    names: tuple[str, ...]  # its names in results files
    title: str  # in a sentence
    axis: str  # at a figure
    upper: float | None = 1.0  # largest possible value; None where there is none


@dataclass(frozen=True)
class Reading:
    """One measure of one model."""

    value: float  # aggregate as the results file gives it
    # Its 95% interval, over subjects where they are known; None where the file lacks what it needs.
    interval: Interval | None
    examples: Mapping[str, float]  # per-example values by index, in the form whose mean is `value`


def _made(
    entry: Mapping[str, Any], key: str, group: _Group, better: _Better, names: Iterable[str]
) -> Measure:
    label = entry["label"]
    title, axis = entry.get("title", label), entry.get("axis", label.lower())
    upper = entry.get("upper", 1.0) or None
    return Measure(key, label, group, better, entry["meaning"], tuple(names), title, axis, upper)


def _of_set(entry: Mapping[str, Any], of: _Group, better: _Better) -> Measure:
    """A measure that exists for every set of examples."""
    if entry["key"] == "loss" and better != "none":
        better = "high" if better == "low" else "low"
    names = [f"{of}_{name[1:]}" for name in entry["names"]]
    alone = entry.get("alone", []) if of == "forget" else []
    return _made(entry, f"{of}_{entry['key']}", of, better, [*names, *alone])


_TOLD = tomllib.loads(files("perta").joinpath("evidence", "measures.toml").read_text("utf-8"))


def _read_measures() -> Iterator[Measure]:
    sets: Mapping[_Group, _Better] = {"forget": "low", "retain": "high", "holdout": "none"}
    groups: tuple[_Group, ...] = (*sets, "utility", "membership")
    for group in groups:
        yield from (_of_set(entry, group, sets[group]) for entry in _TOLD["each"] if group in sets)
        for entry in _TOLD["single"]:
            if entry["group"] == group:
                yield _made(entry, entry["key"], group, entry.get("better", "none"), entry["names"])
    for name, label in _TOLD["attacks"]["labels"].items():
        entry = {**_TOLD["attacks"], "label": label}
        yield _made(entry, f"mia_{name}", "membership", "none", [f"mia_{name}"])


MEASURES: tuple[Measure, ...] = tuple(_read_measures())
_BY_KEY: Mapping[str, Measure] = {measure.key: measure for measure in MEASURES}
_BY_NAME: Mapping[str, Measure] = {name: m for m in MEASURES for name in m.names}

_LISTS: Mapping[str, tuple[str, ...]] = {n: tuple(keys) for n, keys in _TOLD["lists"].items()}
FACTS, FORGET_CORE, RETAIN_CORE = (_LISTS[n] for n in ("facts", "forget_core", "retain_core"))
BY_ROW, SUMMARY, _UTILITY_PARTS = (_LISTS[n] for n in ("by_row", "summary", "utility_parts"))
PAIRS: tuple[tuple[str, str, str], ...] = tuple(map(tuple, _TOLD["pairs"]))
"""Forgetting against keeping: the two measures and what they have in common."""


def read_measures(results: Mapping[str, Any]) -> dict[str, Reading]:
    """Readings of every measure that has a value, under our names; unknown ones keep their own."""
    readings: dict[str, Reading] = {}
    for name, entry in results.items():
        if name == "perta" or not isinstance(entry, Mapping) or name.endswith("_subject"):
            continue
        value = _number(entry.get("agg_value"))
        if value is not None:
            key = _BY_NAME[name].key if name in _BY_NAME else name
            subjects = read_subjects(results, measure_of(key).group)
            readings[key] = _reading(value, results, name, measure_of(key).upper == 1, subjects)
    for group in ("forget", "retain", "holdout"):
        losses = numbers_of(results, f"{group}_fact_probability", "loss")
        if losses:
            tokens = {i: math.exp(-loss) for i, loss in losses.items()}
            mean = math.fsum(tokens.values()) / len(tokens)
            interval = _interval(tokens, True, read_subjects(results, group))
            readings[f"{group}_fact_token"] = Reading(mean, interval, tokens)
    if "model_utility" in readings:
        readings["model_utility"] = _utility_reading(readings)
    return readings


def read_subjects(results: Mapping[str, Any], name: str) -> dict[str, int]:
    """Of each row of a set the subject that it is about, by index; empty where none is given."""
    numbers = numbers_of(results, f"{name}_subject", "subject")
    return {index: int(number) for index, number in numbers.items()}


def read_repeats(results: Mapping[str, Any], name: str) -> dict[str, int]:
    """Of each row of a set a number that rows of equal texts and pieces of one row share, by index.

    Empty where no two rows share one.
    """
    texts = rows_of(results, f"{name}_rougeL_recall")
    numbers = rows_of(results, f"{name}_row")
    places: dict[Any, int] = {}
    found = {}
    for index in texts.keys() | numbers.keys():
        row = texts.get(index, {})
        said = row.get("input"), row.get("ground_truth")
        whole = said if all(isinstance(text, str) for text in said) else None
        found[index] = places.setdefault(whole or row_number(results, name, index), len(places))
    return found if len(places) < len(found) else {}


def row_number(results: Mapping[str, Any], name: str, index: str) -> str:
    """The row of a set's file, from 1, that has an index; the index where it is no number."""
    row = _number(rows_of(results, f"{name}_row").get(index, {}).get("row"))
    if row is not None:
        return str(int(row))
    return str(int(index) + 1) if index.isdigit() else index


def rows_of(results: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """The rows of one metric by index; empty where the results lack them."""
    entry = results.get(name)
    rows = entry.get("value_by_index") if isinstance(entry, Mapping) else None
    if not isinstance(rows, Mapping):
        return {}
    return {str(index): row for index, row in rows.items() if isinstance(row, Mapping)}


def numbers_of(results: Mapping[str, Any], name: str, field: str) -> dict[str, float]:
    """One column of a metric's rows by index; rows without a finite number are left out."""
    return {
        index: number
        for index, row in rows_of(results, name).items()
        if (number := _number(row.get(field))) is not None
    }


def measure_of(key: str) -> Measure:
    """The description of a measure; an unknown one is named by its key and left unjudged."""
    return _BY_KEY.get(key) or Measure(key, key, "other", "none", "", (key,), key, key, None)


def truth_ratios(results: Mapping[str, Any]) -> list[float]:
    """Raw truth ratios of the forget set, the sample behind forget quality."""
    return list(numbers_of(results, "forget_truth_ratio", "score").values())


def _reading(
    value: float, results: Mapping[str, Any], name: str, is_share: bool, subjects: Mapping[str, int]
) -> Reading:
    attack = _attack_interval(value, results[name])
    if attack is not None:
        return Reading(value, attack, {})
    examples = _examples(value, results, name)
    return Reading(value, _interval(examples, is_share, subjects) if examples else None, examples)


def _interval(
    examples: Mapping[str, float], is_share: bool, subjects: Mapping[str, int]
) -> Interval | None:
    values, groups = list(examples.values()), groups_of(examples, subjects)
    if is_share and min(values) >= 0 and max(values) <= 1:
        return mean_interval(values, groups=groups)
    return student_interval(values, groups)


def groups_of(indices: Iterable[str], subjects: Mapping[str, int]) -> Groups:
    """The subject of every row; None unless all are known and there are several."""
    found = [subjects.get(index) for index in indices]
    return None if None in found or len(set(found)) < 2 else found


def _examples(value: float, results: Mapping[str, Any], name: str) -> dict[str, float]:
    """Per-example values in the form (of truth ratios) whose mean is the file's aggregate."""
    for field in ("prob", "rougeL_recall", "rougeL_f1", "score", "rouge1_recall"):
        column = numbers_of(results, name, field)
        for form in (float, metrics.symmetric, metrics.margin) if column else ():
            examples = {i: form(number) for i, number in column.items()}
            if abs(math.fsum(examples.values()) / len(examples) - value) <= _AGREEMENT:
                return examples
    return {}


def _attack_interval(value: float, entry: Mapping[str, Any]) -> Interval | None:
    """Interval of an attack's AUC: removed and unseen examples are drawn separately."""
    forget, holdout = (
        np.asarray(list(numbers_of(entry, side, "score").values()))
        for side in ("forget", "holdout")
    )
    if not len(forget) or not len(holdout):
        return None
    wins = metrics.wins(forget, holdout)
    return None if abs(wins.mean() - value) > _AGREEMENT else pairs_interval(wins, 0.0, 1.0)


def _utility_reading(readings: Mapping[str, Reading]) -> Reading:
    """Model utility with the interval of a harmonic mean of nine means."""
    reading = readings["model_utility"]
    parts = [readings[key] for key in _UTILITY_PARTS if key in readings]
    if len(parts) != len(_UTILITY_PARTS) or not all(part.examples for part in parts):
        return reading
    columns = [np.asarray(list(part.examples.values())) for part in parts]
    values = np.asarray([part.value for part in parts])
    if min(float(column.min()) for column in columns) < 0 or values.min() <= 0:
        return reading
    if abs(metrics.model_utility(values.tolist()) - reading.value) > _AGREEMENT:
        return reading
    ends = [bounded_means(column, 0.0, 1.0, seed) for seed, column in enumerate(columns)]
    low, high = (
        len(parts) / np.sum(1 / np.stack(side), axis=0) for side in zip(*ends, strict=True)
    )
    n = min(len(part.examples) for part in parts)
    return Reading(reading.value, quantile_interval(reading.value, low, high, n), {})


def _number(value: Any) -> float | None:
    """A finite number, the mean of a list of them, or None."""
    if isinstance(value, list) and value:
        numbers = [_number(item) for item in value]
        known = [number for number in numbers if number is not None]
        return math.fsum(known) / len(known) if len(known) == len(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
