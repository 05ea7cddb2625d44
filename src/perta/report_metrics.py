"""What each measure means to a reader, and how sure its value is.

Results files hold an aggregate and the value of every example. The names of the quick
evaluation and those of published benchmark logs lead to the same measures here, so that one
report can hold both. Pure numbers: no files, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Better = Literal["low", "high", "none"]
Group = Literal["forget", "retain", "holdout", "utility", "membership", "other"]

RESAMPLES = 2000
CONFIDENCE = 0.95
EPSILON = 1e-10
"""Added to denominators by the published definition of the truth ratio."""

_CHUNK = 1 << 20
_AGREEMENT = 1e-6


@dataclass(frozen=True)
class Measure:
    """How one measure is named and read.

    Attributes:
        key: our name; several names in results files may lead to it.
        label: column heading.
        group: which table it belongs to.
        better: which direction is wanted of an unlearned model.
        meaning: one plain sentence.
        names: its names in results files.
        upper: largest possible value, for axes; None where there is none.
    """

    key: str
    label: str
    group: Group
    better: Better
    meaning: str
    names: tuple[str, ...]
    upper: float | None = 1.0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval over n examples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Reading:
    """One measure of one model.

    Attributes:
        value: aggregate as the results file gives it.
        interval: its interval; None where the file lacks what it needs.
        examples: per-example values by index, in the form whose mean is `value`.
    """

    value: float
    interval: Interval | None
    examples: Mapping[str, float]


_PROBABILITY = (
    "How likely the model finds the reference answer: the geometric mean over its tokens, "
    "from 0 to 1."
)
_ROUGE = "Share of the reference answer's words, in order, that the model's own answer holds."
_STRENGTH = "Share of an answer that the model continues word for word once given its beginning."
_EXACT = "Share of an answer's tokens that the model predicts, given those before them."
_LOSS = "Mean negative log-likelihood of an answer token, in nats."
_TRUTH = "How likely wrong answers are against the right one; 1 means the model cannot tell."


def _per_set(group: Group, better: Better, short: str) -> tuple[Measure, ...]:
    """The measures that exist for every set of examples."""
    plain = short == "forget"  # published logs leave the set out of these names
    opposite: Better = {"low": "high", "high": "low"}.get(better, "none")  # type: ignore[assignment]

    def names(ours: str, *published: str) -> tuple[str, ...]:
        return (f"{short}_{ours}", *published)

    strength = names("extraction_strength", *(["extraction_strength"] if plain else []))
    exact = names("exact_memorization", *(["exact_memorization"] if plain else []))
    probability = names("probability", f"{short}_Q_A_Prob")
    rouge = names("rougeL_recall", f"{short}_Q_A_ROUGE")
    return (
        Measure(f"{short}_probability", "Answer prob.", group, better, _PROBABILITY, probability),
        Measure(f"{short}_rouge", "ROUGE-L", group, better, _ROUGE, rouge),
        Measure(f"{short}_strength", "Extraction", group, better, _STRENGTH, strength),
        Measure(f"{short}_exact", "Exact mem.", group, better, _EXACT, exact),
        Measure(
            f"{short}_knowmem",
            "Knowledge",
            group,
            better,
            "ROUGE-L F1 of short answers to questions about the texts.",
            names("knowmem_ROUGE"),
        ),
        Measure(
            f"{short}_verbmem",
            "Verbatim",
            group,
            better,
            "ROUGE-L F1 of the model's continuation of a passage against the passage itself.",
            names("verbmem_ROUGE"),
        ),
        Measure(f"{short}_loss", "Loss", group, opposite, _LOSS, names("loss"), None),
    )


def _utility(short: str, title: str) -> tuple[Measure, ...]:
    return (
        Measure(
            f"{short}_probability",
            f"{title}: prob.",
            "utility",
            "high",
            "Share of the right answer's probability among right and wrong ones.",
            (f"{short}_Q_A_Prob_normalised",),
        ),
        Measure(
            f"{short}_rouge",
            f"{title}: ROUGE-L",
            "utility",
            "high",
            _ROUGE,
            (f"{short}_Q_A_ROUGE",),
        ),
        Measure(
            f"{short}_truth",
            f"{title}: truth",
            "utility",
            "high",
            "Mean of max(0, 1 − truth ratio).",
            (f"{short}_Truth_Ratio",),
        ),
    )


def _attack(name: str, label: str) -> Measure:
    return Measure(
        f"mia_{name}",
        label,
        "membership",
        "none",
        "Membership-inference attack: how well it tells removed examples from unseen ones. "
        "0.5 is chance, 1 means strongly memorised.",
        (f"mia_{name}",),
    )


MEASURES: tuple[Measure, ...] = (
    *_per_set("forget", "low", "forget"),
    Measure(
        "forget_quality",
        "Forget quality",
        "forget",
        "high",
        "p-value of a Kolmogorov–Smirnov test that the truth ratios are distributed as in the "
        "retrained model; small means they can be told apart.",
        ("forget_quality",),
    ),
    Measure("forget_truth", "Truth ratio", "forget", "none", _TRUTH, ("forget_truth_ratio",)),
    *_per_set("retain", "high", "retain"),
    Measure(
        "retain_truth",
        "Truth ratio",
        "retain",
        "high",
        "Mean of max(0, 1 − truth ratio).",
        ("retain_Truth_Ratio",),
    ),
    *_per_set("holdout", "none", "holdout"),
    Measure(
        "model_utility",
        "Model utility",
        "utility",
        "high",
        "Harmonic mean of probability, ROUGE-L recall and truth ratio on the retain set, real "
        "authors and world facts.",
        ("model_utility",),
    ),
    *_utility("ra", "Real authors"),
    *_utility("wf", "World facts"),
    Measure(
        "privleak",
        "PrivLeak %",
        "membership",
        "none",
        "Min-K attack against that of the retrained model, in percent: 0 is like retrained, "
        "below 0 still memorised, above 0 conspicuously absent.",
        ("privleak",),
        None,
    ),
    _attack("loss", "Loss attack"),
    _attack("zlib", "zlib attack"),
    _attack("min_k", "Min-K"),
    _attack("min_k_plus_plus", "Min-K++"),
    _attack("gradnorm", "Grad. norm"),
    _attack("reference", "Reference"),
)
BY_KEY: Mapping[str, Measure] = {measure.key: measure for measure in MEASURES}
_BY_NAME: Mapping[str, Measure] = {name: m for m in MEASURES for name in m.names}

_UTILITY_PARTS = (
    "retain_probability",
    "retain_rouge",
    "retain_truth",
    *(f"{short}_{part}" for short in ("ra", "wf") for part in ("probability", "rouge", "truth")),
)


def read_measures(results: Mapping[str, Any]) -> dict[str, Reading]:
    """Every measure in a results file, under our names; unknown ones keep their own.

    Args:
        results: as evaluations write them and published logs hold them.

    Returns:
        Measure key -> reading; measures without a value are left out.
    """
    readings: dict[str, Reading] = {}
    for name, entry in results.items():
        if name == "perta" or not isinstance(entry, Mapping):
            continue
        value = _number(entry.get("agg_value"))
        if value is not None:
            key = _BY_NAME[name].key if name in _BY_NAME else name
            readings[key] = _reading(value, entry)
    if "model_utility" in readings:
        readings["model_utility"] = _utility_reading(readings)
    return readings


def measure_of(key: str) -> Measure:
    """The description of a measure; an unknown one is named by its key and left unjudged."""
    return BY_KEY.get(key) or Measure(key, key, "other", "none", "", (key,), None)


def truth_ratios(results: Mapping[str, Any]) -> list[float]:
    """Raw truth ratios of the forget set, the sample behind forget quality."""
    entry = results.get("forget_truth_ratio")
    rows = entry.get("value_by_index", {}) if isinstance(entry, Mapping) else {}
    values = (_number(row.get("score")) for row in rows.values() if isinstance(row, Mapping))
    return [value for value in values if value is not None]


def ks_test(sample: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Largest distance of two empirical distributions, and its two-sided p-value."""
    import warnings

    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        # With large samples scipy may turn to the asymptotic p-value and say so.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ks_2samp(list(sample), list(reference))
    return float(result.statistic), float(result.pvalue)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with its percentile bootstrap interval, examples drawn with replacement.

    Args:
        values: one number per example, at least one.
        seed: seed of the draws; equal seeds pair the draws of equally many examples.
    """
    means = bootstrap_means(np.asarray(values, dtype=np.float64), seed)
    return _interval(float(np.mean(values)), means, len(values))


def difference_interval(
    values: Mapping[str, float], reference: Mapping[str, float], seed: int = 0
) -> Interval | None:
    """Mean difference of two models on the same examples, with its interval.

    Differences are taken example by example, so that how hard an example is cancels out.

    Args:
        values: index -> value of one model.
        reference: index -> value of the other.
        seed: seed of the draws.

    Returns:
        None if they share no example.
    """
    shared = [index for index in values if index in reference]
    if not shared:
        return None
    return mean_interval([values[i] - reference[i] for i in shared], seed)


def unpaired_interval(
    values: Sequence[float], reference: Sequence[float], seed: int = 0
) -> Interval:
    """Difference of the means of two sets of examples, with its interval."""
    left = bootstrap_means(np.asarray(values, dtype=np.float64), seed)
    right = bootstrap_means(np.asarray(reference, dtype=np.float64), seed + 1)
    value = float(np.mean(values)) - float(np.mean(reference))
    return _interval(value, left - right, min(len(values), len(reference)))


def bootstrap_means(values: Array, seed: int) -> Array:
    """Means of `RESAMPLES` samples drawn with replacement, shape (RESAMPLES,)."""
    n = len(values)
    if n * RESAMPLES <= _CHUNK:
        means: Array = _draws(n, seed) @ values / n
        return means
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    parts = [
        values[generator.integers(0, n, (min(rows, RESAMPLES - done), n))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(parts)


def auc(forget: Array, holdout: Array) -> float:
    """Probability that an unseen example scores above a removed one, ties counting half."""
    above = (holdout[:, None] > forget[None, :]).mean() + (
        0.5 * (holdout[:, None] == forget[None, :]).mean()
    )
    return float(above)


@lru_cache(maxsize=16)
def _draws(n: int, seed: int) -> Array:
    """How often each of n examples is drawn in each resample, (RESAMPLES, n)."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts.astype(np.float64)


def _interval(value: float, draws: Array, n: int) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(value, float(low), float(high), n)


def _reading(value: float, entry: Mapping[str, Any]) -> Reading:
    attack = _attack_interval(value, entry)
    if attack is not None:
        return Reading(value, attack, {})
    rows = entry.get("value_by_index")
    examples = _examples(value, rows) if isinstance(rows, Mapping) else {}
    interval = mean_interval(list(examples.values())) if examples else None
    return Reading(value, interval, examples)


def _examples(value: float, rows: Mapping[str, Any]) -> dict[str, float]:
    """Per-example values, in the form whose mean is the file's aggregate.

    Aggregates of truth ratios are means of a function of the recorded value. The form is
    recognised by reproducing the aggregate, so that no interval is ever put around a number
    that it does not belong to.
    """
    for field in ("prob", "rougeL_recall", "rougeL_f1", "score", "rouge1_recall"):
        column = {
            str(i): number
            for i, row in rows.items()
            if isinstance(row, Mapping) and (number := _number(row.get(field))) is not None
        }
        for form in (_same, _symmetric, _margin) if column else ():
            examples = {i: form(number) for i, number in column.items()}
            if abs(math.fsum(examples.values()) / len(examples) - value) <= _AGREEMENT:
                return examples
    return {}


def _same(t: float) -> float:
    return t


def _symmetric(t: float) -> float:
    return min(t, 1 / (t + EPSILON))


def _margin(t: float) -> float:
    return max(0.0, 1 - t)


_Form = Callable[[float], float]


def _attack_interval(value: float, entry: Mapping[str, Any]) -> Interval | None:
    """Interval of an attack's AUC: removed and unseen examples are drawn separately."""
    sides = [entry.get(name) for name in ("forget", "holdout")]
    columns = [
        [
            number
            for row in side["value_by_index"].values()
            if isinstance(row, Mapping) and (number := _number(row.get("score"))) is not None
        ]
        for side in sides
        if isinstance(side, Mapping) and isinstance(side.get("value_by_index"), Mapping)
    ]
    if len(columns) != 2 or not all(columns):
        return None
    forget, holdout = (np.asarray(column) for column in columns)
    if abs(auc(forget, holdout) - value) > _AGREEMENT:
        return None
    wins = (holdout[:, None] > forget[None, :]) + 0.5 * (holdout[:, None] == forget[None, :])
    left = _draws(len(holdout), 0) / len(holdout)
    right = _draws(len(forget), 1) / len(forget)
    draws = np.einsum("bi,ij,bj->b", left, wins, right, optimize=True)
    return _interval(value, draws, min(len(forget), len(holdout)))


def _utility_reading(readings: Mapping[str, Reading]) -> Reading:
    """Model utility with the interval of a harmonic mean of nine means."""
    reading = readings["model_utility"]
    parts = [readings[key] for key in _UTILITY_PARTS if key in readings]
    if len(parts) != len(_UTILITY_PARTS) or not all(part.examples for part in parts):
        return reading
    means = np.stack(
        [
            bootstrap_means(np.asarray(list(part.examples.values())), seed)
            for seed, part in enumerate(parts)
        ]
    )
    values = np.asarray([part.value for part in parts])
    if min(values.min(), means.min()) <= 0:
        return reading
    value = len(values) / float(np.sum(1 / values))
    if abs(value - reading.value) > _AGREEMENT:
        return reading
    draws = len(values) / np.sum(1 / means, axis=0)
    n = min(len(part.examples) for part in parts)
    return Reading(reading.value, _interval(reading.value, draws, n), {})


def _number(value: Any) -> float | None:
    """A finite number, the mean of a list of them, or None."""
    if isinstance(value, list) and value:
        numbers = [_number(item) for item in value]
        known = [number for number in numbers if number is not None]
        return math.fsum(known) / len(known) if len(known) == len(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
