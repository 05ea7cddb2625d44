"""Losses: tensors in, tensors out.

The loss of an example is the mean negative log-likelihood of its answer tokens, in nats per
token. The output head runs only where a label asks for it: with a vocabulary of 49,152 and a
few answer tokens per example, logits of all positions would cost more than they tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch, Encoded, bucketed
from perta.parallel import portion, share, summed


@dataclass(frozen=True)
class AnswerLogits:
    """Predictions of the N labelled tokens of a batch, in row-major order.

    `logits` are (N, V) float32, `targets` (N,) int64 token ids, and `example` (N,) int64, which row
    of the batch each token belongs to.
    """

    logits: Tensor
    targets: Tensor
    example: Tensor


@contextmanager
def head_at(model: nn.Module, example: Tensor, position: Tensor) -> Iterator[None]:
    """Show a model's output head N places alone, (N,) both: its logits are (1, N, V) then."""

    def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][example, position].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def answer_logits(model: nn.Module, batch: Batch) -> AnswerLogits:
    """Forward pass whose output head sees only the positions that predict a labelled token."""
    # The token at t is predicted at t - 1; a label at position 0 has no prediction.
    wanted = batch.labels[:, 1:] != IGNORE
    example, position = wanted.nonzero(as_tuple=True)
    with head_at(model, example, position):
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    targets = batch.labels[:, 1:][wanted]
    return AnswerLogits(output.logits[0].float(), targets, example)


def token_losses(answers: AnswerLogits) -> Tensor:
    """Cross-entropy of every labelled token, (N,) in nats."""
    return F.cross_entropy(answers.logits, answers.targets, reduction="none")


def mean_by_example(values: Tensor, example: Tensor, examples: int) -> Tensor:
    """Mean of token values within each example: (N,), (N,) -> (B,)."""
    sums = torch.zeros(examples, dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, example, values)
    counts = torch.bincount(example, minlength=examples)
    return sums / counts


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each example's answer tokens, (B,) in nats per token."""
    answers = answer_logits(model, batch)
    return mean_by_example(token_losses(answers), answers.example, len(batch))


def weighted_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Losses of a batch, each times its example's weight, (B,): what gradients are taken of."""
    return example_losses(model, batch) * batch.weights


@torch.no_grad()
def losses_of(
    model: nn.Module, examples: Sequence[Encoded], *, batch_size: int, pad: int
) -> list[float]:
    """Loss of every example in nats per token, in the order given."""
    device = next(model.parameters()).device
    losses = torch.zeros(len(examples))
    for batch in share(bucketed(examples, portion(batch_size, len(examples)), pad)):
        losses[batch.index] = example_losses(model, batch.to(device)).float().cpu()
    return summed(losses).tolist()
