"""Metrics against hand-worked values and against published per-example logs."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perta.errors import DataError
from perta.evidence import metrics

LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu_reference_logs"
MODELS = ("full_forget01", "full_forget10", "retain99", "retain90")
RETAIN_OF = {"full_forget01": "retain99", "full_forget10": "retain90"}
ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")
TOLERANCE = 1e-12

Log = dict[str, Any]


def load(name: str) -> Log:
    path = LOGS / f"llama-3.2-1b-instruct_{name}.json"
    if not path.is_file():
        pytest.skip(f"published logs are not at {LOGS}")
    log: Log = json.loads(path.read_text("utf-8"))
    return log


def column(entry: Log, key: str = "score") -> list[Any]:
    return [value[key] for value in entry["value_by_index"].values()]


def close(value: float, published: float) -> bool:
    return abs(value - published) <= TOLERANCE * max(1.0, abs(published))


# --- published logs -------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_golden_means(model: str) -> None:
    log = load(model)
    for key, entry in log.items():
        if key in ("exact_memorization", "extraction_strength"):
            assert close(metrics.mean(column(entry)), entry["agg_value"]), key
        elif key.endswith("ROUGE"):
            assert close(metrics.mean(column(entry, "rougeL_recall")), entry["agg_value"]), key
        elif key.endswith(("_Prob", "_normalised")):
            rows = [metrics.mean(np.atleast_1d(v).tolist()) for v in column(entry, "prob")]
            assert close(metrics.mean(rows), entry["agg_value"]), key


@pytest.mark.parametrize("model", MODELS)
def test_golden_normalised_probability(model: str) -> None:
    log = load(model)
    for group in ("ra", "wf"):
        right = column(log[f"{group}_Q_A_Prob"], "prob")
        wrong = column(log[f"{group}_Q_A_PERT_Prob"], "prob")
        published = column(log[f"{group}_Q_A_Prob_normalised"], "prob")
        for p, others, value in zip(right, wrong, published, strict=True):
            assert close(metrics.normalised_probability(p, others), value)


@pytest.mark.parametrize("model", MODELS)
def test_golden_truth_ratio(model: str) -> None:
    log = load(model)
    groups = {"forget": "forget_truth_ratio", "retain": "retain_Truth_Ratio"}
    groups |= {"ra": "ra_Truth_Ratio", "wf": "wf_Truth_Ratio"}
    for group, key in groups.items():
        right = f"{group}_Q_A_{'PARA_' if group in ('forget', 'retain') else ''}Prob"
        correct = column(log[right], "avg_loss")
        wrong = column(log[f"{group}_Q_A_PERT_Prob"], "avg_loss")
        ratios = [metrics.truth_ratio([a], b) for a, b in zip(correct, wrong, strict=True)]
        for ratio, published in zip(ratios, column(log[key]), strict=True):
            assert close(ratio, published)
        form = metrics.symmetric if group == "forget" else metrics.margin
        assert close(metrics.mean([form(t) for t in ratios]), log[key]["agg_value"])


@pytest.mark.parametrize("model", MODELS)
def test_golden_model_utility(model: str) -> None:
    log = load(model)
    keys = ["retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"]
    keys += [f"{g}_{m}" for g in ("retain", "ra", "wf") for m in ("Q_A_ROUGE", "Truth_Ratio")]
    value = metrics.model_utility([log[key]["agg_value"] for key in keys])
    assert close(value, log["model_utility"]["agg_value"])


@pytest.mark.parametrize("model", RETAIN_OF)
def test_golden_forget_quality(model: str) -> None:
    log, retain = load(model), load(RETAIN_OF[model])
    ratios = [column(entry["forget_truth_ratio"]) for entry in (log, retain)]
    published = log["forget_quality"]["agg_value"]
    assert metrics.forget_quality(*ratios) == pytest.approx(published, rel=TOLERANCE, abs=0)


@pytest.mark.parametrize("model", MODELS)
def test_golden_membership(model: str) -> None:
    log = load(model)
    for attack in ATTACKS:
        entry = log.get(f"mia_{attack}")
        if entry is None:
            assert attack == "reference"  # retain logs were made without a reference model
            continue
        auc = metrics.membership_auc(column(entry["forget"]), column(entry["holdout"]))
        assert close(auc, entry["agg_value"]), attack
    retain = RETAIN_OF.get(model)
    retain_auc = load(retain)["mia_min_k"]["agg_value"] if retain else None
    value = metrics.privleak(log["mia_min_k"]["agg_value"], retain_auc)
    assert close(value, log["privleak"]["agg_value"])


@pytest.mark.parametrize("model", MODELS)
def test_golden_rouge(model: str) -> None:
    """Published scores follow from the published texts."""
    log = load(model)
    for group in ("forget", "ra", "wf"):
        for row in log[f"{group}_Q_A_ROUGE"]["value_by_index"].values():
            scores = metrics.rouge(row["ground_truth"], row["generation"])
            for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall"):
                assert close(scores[key], row[key])


# --- hand-worked values ---------------------------------------------------------------------


def test_normalised_probability() -> None:
    assert metrics.normalised_probability(0.2, [0.1, 0.1]) == pytest.approx(0.5, abs=1e-9)


def test_truth_ratio_averages_losses_before_exp() -> None:
    # exp(-mean(ln 2, ln 8)) = 1/4, not the mean of 1/2 and 1/8.
    value = metrics.truth_ratio([math.log(2)], [math.log(2), math.log(8)])
    assert value == pytest.approx(0.5, abs=1e-9)


def test_truth_ratio_aggregates() -> None:
    assert [metrics.symmetric(t) for t in (0.5, 2.0, 1.0)] == pytest.approx([0.5, 0.5, 1.0])
    assert [metrics.margin(t) for t in (0.5, 2.0, 1.0)] == [0.5, 0.0, 0.0]


def test_rouge_recall_stems_and_follows_order() -> None:
    # Longest common subsequence "the cat sat": 3 of 4 reference words, 3 of 5 generated.
    scores = metrics.rouge("the cats sat down", "sat the cat sat there")
    assert scores["rougeL_recall"] == pytest.approx(3 / 4)
    assert scores["rougeL_f1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert scores["rouge1_recall"] == pytest.approx(3 / 4)
    assert metrics.rouge("word", "")["rougeL_recall"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "Боб живёт в Риме.",
        "安娜是厨师。",
        "آنا طباخة.",
        "हिंदी में उत्तर",
        "แอนนาเป็นพ่อครัว",
        "Ζει στην Ύδρα",
    ],
)
def test_rouge_of_any_script(text: str) -> None:
    same = {"rougeL_recall": 1, "rougeL_f1": 1, "rouge1_recall": 1}
    assert metrics.rouge(text, text, any_script=True) == same
    assert metrics.rouge(text, "somewhere else", any_script=True)["rougeL_recall"] == 0
    assert metrics.rouge(text, text)["rougeL_recall"] == 0  # the published tokenizer


def test_rouge_of_any_script_by_hand() -> None:
    # Three of four words in order; four of five characters.
    assert metrics.rouge("Боб живёт в Риме", "Боб в РИМЕ", any_script=True)["rougeL_recall"] == 0.75
    assert metrics.rouge("安娜是厨师", "安娜厨师", any_script=True)["rougeL_recall"] == 0.8
    # Where the published tokenizer knows every letter the two agree.
    texts = ("The bakers' 2 cats-and-dogs sat, running.", "A baker sat: 2 cats run and dogs")
    assert metrics.rouge(*texts, any_script=True) == metrics.rouge(*texts)


@pytest.mark.parametrize(
    ("flags", "memorization", "strength"),
    [
        ("1111", 1.0, 1.0),
        ("0111", 0.75, 0.75),
        ("1101", 0.75, 0.25),
        ("1110", 0.75, 0.25),  # no suffix is right: k = m - 1, the floor is 1/m
        ("0000", 0.0, 0.25),
        ("0", 0.0, 1.0),
        ("", None, None),
    ],
)
def test_memorization(flags: str, memorization: float | None, strength: float | None) -> None:
    correct = [flag == "1" for flag in flags]
    assert metrics.exact_memorization(correct) == memorization
    assert metrics.extraction_strength(correct) == strength


def test_min_k_takes_the_least_likely() -> None:
    log_probs = torch.tensor([-1.0, -5.0, -2.0, -3.0, -0.5])
    assert metrics.min_k(log_probs) == pytest.approx(4.0)  # floor(0.4 * 5) = 2
    assert metrics.min_k(log_probs[:4]) == pytest.approx(5.0)  # floor(1.6) = 1, not rounded
    assert metrics.min_k(log_probs[:2]) == pytest.approx(5.0)  # never fewer than one
    assert metrics.min_k(log_probs[:0]) is None


def test_min_k_plus_plus_standardises() -> None:
    log_probs = torch.tensor([-1.0, -4.0])
    value = metrics.min_k_plus_plus(log_probs, torch.tensor([-2.0, -2.0]), torch.tensor([4.0, 4.0]))
    assert value == pytest.approx(1.0)
    floor = metrics.min_k_plus_plus(log_probs[:1], torch.tensor([-1.5]), torch.tensor([0.0]))
    assert floor == pytest.approx(-500.0)


def test_zlib_and_gradient_norm() -> None:
    text = "Zoë " * 30
    assert metrics.zlib_score(3.0, text) == 3.0 / len(zlib.compress(text.encode()))
    # Norms 5 and 1; a large tensor weighs no more than a small one.
    assert metrics.gradient_norm([torch.tensor([3.0, 4.0]), torch.ones(1)]) == pytest.approx(3.0)


def test_membership_auc() -> None:
    assert metrics.membership_auc(forget=[0.1, 0.2], holdout=[0.3, 0.4]) == 1.0
    assert metrics.membership_auc(forget=[0.3, 0.4], holdout=[0.1, 0.2]) == 0.0
    # Pairs (holdout, forget): 1 > 0, 1 = 1 counts half, 2 > 0, 2 > 1.
    assert metrics.membership_auc(forget=[0.0, 1.0], holdout=[1.0, 2.0]) == 3.5 / 4


def test_privleak() -> None:
    assert metrics.privleak(0.5) == pytest.approx(0, abs=1e-6)
    assert metrics.privleak(1.0) == pytest.approx(-100, abs=1e-6)
    assert metrics.privleak(0.2, 0.6) == pytest.approx(100.0, abs=1e-5)


def test_forget_quality() -> None:
    # D = 1 with 3 against 3: 2 of the 20 interleavings are as extreme.
    assert metrics.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert metrics.forget_quality([1, 2, 3], [1, 2, 3]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="empty"):
        metrics.forget_quality([], [1.0])


def test_model_utility() -> None:
    assert metrics.model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert metrics.model_utility([0.5, 0.0]) == 0.0
    with pytest.raises(DataError, match="no value"):
        metrics.mean([])
