"""What one teacher-forced pass tells about an answer, from its tokens' log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perta.evidence import metrics

_CHUNK = 512  # rows of logits turned to log-probabilities at a time, to bound memory


@dataclass(frozen=True)
class Score:
    """What one teacher-forced pass tells about an answer."""

    tokens: int  # labelled tokens, the last (which ends the answer) included
    loss: float  # mean cross-entropy over them, nats
    exact_memorization: float | None  # see `metrics`; None where the last token is the only one
    extraction_strength: float | None  # likewise
    min_k: float | None  # likewise
    min_k_plus_plus: float | None  # likewise; None also where it was not asked for

    @property
    def probability(self) -> float:
        """Geometric mean over its tokens: exp(-loss)."""
        return math.exp(-self.loss)


def score_logits(logits: Tensor, targets: Tensor, moments: bool) -> Score:
    """Every score of one answer; `log_softmax` in float32, sums in float64.

    Row t of the `logits`, (n, V) of any float type, predicts the labelled token t of `targets`,
    (n,). `moments` asks for Min-K++ too.
    """
    log_probs, means, variances = token_statistics(logits, targets, moments)
    correct = (logits.argmax(-1).cpu() == targets.cpu()).tolist()
    return score_tokens(log_probs, correct, (means, variances) if moments else None)


def score_tokens(
    log_probs: Tensor, correct: Sequence[bool], moments: tuple[Tensor, Tensor] | None
) -> Score:
    """Scores of an answer from its n tokens' statistics, each (n,) on the CPU."""
    plus_plus = None
    if moments:
        plus_plus = metrics.min_k_plus_plus(log_probs[:-1], moments[0][:-1], moments[1][:-1])
    return Score(
        len(correct),
        -float(log_probs.double().mean()),
        metrics.exact_memorization(correct[:-1]),
        metrics.extraction_strength(correct[:-1]),
        metrics.min_k(log_probs[:-1]),
        plus_plus,
    )


def token_statistics(
    logits: Tensor, targets: Tensor, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, and mean and variance of them over the vocabulary."""
    targets = targets.to(logits.device)
    log_probs, means, variances = [], [], []
    for start in range(0, len(targets), _CHUNK):
        part = logits[start : start + _CHUNK].float().log_softmax(-1)
        log_probs.append(part.gather(1, targets[start : start + _CHUNK, None])[:, 0].cpu())
        if moments:
            weighted = part.exp() * part
            mean = weighted.sum(-1)
            means.append(mean.cpu())
            variances.append(((weighted * part).sum(-1) - mean.square()).cpu())
    empty = torch.zeros(0)
    return (
        torch.cat(log_probs),
        torch.cat(means) if moments else empty,
        torch.cat(variances) if moments else empty,
    )
