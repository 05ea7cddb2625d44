"""Unlearning metrics, the one home of statistics: numbers and small tensors in, numbers out.

The definitions are those of the TOFU and MUSE communities' common evaluation (open-unlearning,
commit d3d7cf9), so that figures can be put beside published ones. Losses and log-probabilities
are in nats; a token sequence is an answer's labelled tokens in order, and "without the last"
leaves out the token that ends the answer. Importing this loads no torch: the report uses it too.
"""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perta.data.words import stems
from perta.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-10  # added to denominators by the published definitions; kept for equal numbers
_DEPTH_GAP = 0.05  # nats by which a layer's states have to matter, to count in the depth score
_MIN_K_SHARE = 0.4  # share of the least likely tokens that Min-K and Min-K++ average


def normalised_probability(correct: float, wrong: Sequence[float]) -> float:
    """Share of the right answer among the right and the wrong ones: p / (p + sum p_k + eps)."""
    return correct / (correct + math.fsum(wrong) + _EPSILON)


def truth_ratio(correct_losses: Sequence[float], wrong_losses: Sequence[float]) -> float:
    """How likely wrong answers are against right ones: exp(-mean l_k) / (exp(-mean l) + eps).

    Losses are averaged before the exponential, so this is a ratio of geometric means.

    Source: TOFU, arXiv 2401.06121, section 2.2.2, with the losses per token.
    """
    return math.exp(-mean(wrong_losses)) / (math.exp(-mean(correct_losses)) + _EPSILON)


def symmetric(ratio: float) -> float:
    """min(t, 1/t) of a truth ratio: 1 when right and wrong answers are equally likely."""
    return min(ratio, 1 / (ratio + _EPSILON))


def margin(ratio: float) -> float:
    """max(0, 1 - t) of a truth ratio: 1 when wrong answers are never likely."""
    return max(0.0, 1 - ratio)


def rouge(reference: str, generation: str, *, any_script: bool = False) -> dict[str, float]:
    """ROUGE-1 recall, ROUGE-L F1 and ROUGE-L recall, words stemmed (Porter), as logs name them.

    With `any_script` words are those of `data.words.stems`, by which English scores as published;
    the published tokenizer keeps a to z and 0 to 9, and scores other scripts 0.
    """
    scores = _rouge_scorer(any_script).score(reference, generation)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rougeL_recall": scores["rougeL"].recall,
    }


def exact_memorization(correct: Sequence[bool]) -> float | None:
    """Matches / m of m flags, whether the teacher-forced argmax is the token, without the last.

    None where m = 0. Source: Tirumala et al., arXiv 2205.10770, definition 1.
    """
    return sum(correct) / len(correct) if len(correct) else None


def extraction_strength(correct: Sequence[bool]) -> float | None:
    """Share of an answer that follows from the rest of it: 1 - k/m, in [1/m, 1]; None where m = 0.

    k is the first index from which every remaining token is predicted; with none it is m - 1.
    Source: Carlini et al., arXiv 2012.07805, in the form of arXiv 2502.07322.
    """
    m = len(correct)
    if m == 0:
        return None
    misses = [i for i, right in enumerate(correct) if not right]
    k = min(misses[-1] + 1, m - 1) if misses else 0
    return 1 - k / m


def min_k(log_probs: Tensor) -> float | None:
    """Min-K score: minus the mean of the lowest max(1, floor(0.4 n)) of (n,) log-probabilities.

    They are the tokens' without the last. It is higher for text never seen, None where n = 0.
    Source: Shi et al., arXiv 2310.16789, equation 1.
    """
    n = log_probs.numel()
    if n == 0:
        return None
    return -float(log_probs.double().sort().values[: max(1, int(_MIN_K_SHARE * n))].mean())


def min_k_plus_plus(log_probs: Tensor, means: Tensor, variances: Tensor) -> float | None:
    """Min-K over log-probabilities lp standardised by the vocabulary's distribution, all (n,).

    `means` are mu = sum over the vocabulary of p lp, `variances` sum of p lp^2, minus mu^2. Source:
    Zhang et al., arXiv 2404.02936, equation 3; the floor of 1e-6 is the common code's.
    """
    return min_k((log_probs - means) / variances.clamp_min(1e-6).sqrt())


def zlib_score(loss: float, text: str) -> float:
    """Loss over the length in bytes of the zlib-compressed UTF-8 text."""
    return loss / len(zlib.compress(text.encode("utf-8")))


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """Unweighted mean over tensors of the L2 norm of each tensor's gradient."""
    return mean([float(gradient.float().norm()) for gradient in gradients])


def membership_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Probability that a held-out example scores above a forgotten one, ties counting half."""
    return float(wins(np.asarray(forget), np.asarray(holdout)).mean())


def wins(forget: NDArray[np.float64], holdout: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each pair (holdout, forget) 1 where the held-out one scores above, 1/2 for a tie."""
    above: NDArray[np.float64] = (holdout[:, None] > forget) + 0.5 * (holdout[:, None] == forget)
    return above


def privleak(auc: float, retain_auc: float | None = None) -> float:
    """Privacy leakage in percent: 0 like the retrained model, below 0 still memorised.

        ((1 - AUC) - (1 - AUC_ret)) / ((1 - AUC_ret) + eps) * 100

    Source: MUSE, arXiv 2407.06460, equation 3, with the AUC's label turned round.
    """
    chance = 1 - (0.5 if retain_auc is None else retain_auc)
    return ((1 - auc) - chance) / (chance + _EPSILON) * 100


def forget_quality(ratios: Sequence[float], reference_ratios: Sequence[float]) -> float:
    """p-value that both samples of raw truth ratios on the forget set are of one distribution.

    That of the two-sided two-sample Kolmogorov-Smirnov test; papers often give log10. DataError
    where a sample is empty.
    """
    if not ratios or not reference_ratios:
        raise DataError("Forget quality compares two samples of truth ratios, and one is empty.")
    return ks_test(ratios, reference_ratios)[1]


def ks_test(sample: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Largest distance of two empirical distributions, and its two-sided p-value."""
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        # With large samples scipy may turn to the asymptotic p-value and say so.
        warnings.filterwarnings("ignore", category=RuntimeWarning, message="ks_2samp")
        result = ks_2samp(list(sample), list(reference))
    return float(result.statistic), float(result.pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of the means on three sets of three measures; 0 as soon as one of them is 0."""
    if any(value <= 0 for value in values):
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def rounding_robustness(before: float, after: float) -> float:
    """Q = min(before / after, 1) of what a model knows, before and after its weights are rounded.

    It is below 1 where more is known afterwards. Source: Dorna et al., arXiv 2506.12618, section 5.
    """
    return 1.0 if after <= before else before / after


def relearning_robustness(retrained: float, unlearned: float) -> float:
    """R = min(rise of the retrained model / rise of the unlearned one, 1), both by relearning.

    It is 1 where the unlearned model's value does not rise, and 0 where only that one rises.
    Source: as `rounding_robustness`.
    """
    if unlearned <= max(retrained, 0.0):
        return 1.0
    return max(retrained, 0.0) / unlearned


def likeness(one: float, other: float) -> float:
    """1 - |one - other| / (|one| + |other|): the symmetric form of both, which minds a fall too.

    Source: Lee et al., arXiv 2605.24614, section 4.1.
    """
    return 1.0 - abs(one - other) / (abs(one) + abs(other) + _EPSILON)


def depth_score(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Unlearning depth score of one example: 0 all is there, 1 nothing is; None if no layer counts.

        sum_l d1_l clip(d2_l / d1_l, 0, 1) / sum_l d1_l     over layers l with d1_l > 0.05

    `first`, d1, is how much less likely the full model finds the fact, mean over its tokens in
    nats, where the states of a layer are those of a model that never saw it; `second`, d2, the same
    with the states of the model that is judged. Source: Lee et al., arXiv 2605.24614, sections 3.2
    and 3.3.
    """
    counted = [(one, two) for one, two in zip(first, second, strict=True) if one > _DEPTH_GAP]
    if not counted:
        return None
    return sum(min(max(two, 0.0), one) for one, two in counted) / sum(one for one, _ in counted)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value; DataError without any."""
    if not len(values):
        raise DataError("There is no value to average.")
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return float(array.mean())


class _AnyScript:
    """Tokenizer in the form that `rouge_score` takes."""

    def tokenize(self, text: str) -> list[str]:
        return stems(text)


@functools.cache
def _rouge_scorer(any_script: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _AnyScript() if any_script else None
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=tokenizer)
