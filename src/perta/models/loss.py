"""Losses: tensors in, tensors out.

The loss of an example is the mean negative log-likelihood of its answer tokens, in nats per
token. The output head runs only where a label asks for it: with a vocabulary of 49,152 and a
few answer tokens per example, logits of all positions would cost more than they tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch, Encoded, bucketed
from perta.parallel import in_step, portion, summed


@dataclass(frozen=True)
class AnswerLogits:
    """Predictions of the N labelled tokens of a batch, in row-major order."""

    logits: Tensor  # (N, V) in the type of the products
    targets: Tensor  # (N,) int64 token ids
    example: Tensor  # (N,) int64, which row of the batch each token belongs to

    @property
    def wide(self) -> Tensor:
        """The logits in float32 at least."""
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))


@contextmanager
def head_at(model: nn.Module, example: Tensor, position: Tensor) -> Iterator[None]:
    """Show a model's output head N places alone, (N,) both: its logits are (1, N, V) then."""

    def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][example, position].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(pick):
        yield


def answer_logits(model: nn.Module, batch: Batch) -> AnswerLogits:
    """Forward pass whose output head sees only the positions that predict a labelled token."""
    # The token at t is predicted at t - 1; a label at position 0 has no prediction.
    wanted = batch.labels[:, 1:] != IGNORE
    example, position = wanted.nonzero(as_tuple=True)
    with head_at(model, example, position):
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return AnswerLogits(output.logits[0], batch.labels[:, 1:][wanted], example)


def token_losses(answers: AnswerLogits) -> Tensor:
    """Cross-entropy of every labelled token, (N,) in nats."""
    losses = _CrossEntropy.apply(answers.logits, answers.targets)  # type: ignore[no-untyped-call]
    return cast(Tensor, losses)


_CHUNK, _CHUNK_ON_GPU = 1 << 20, 1 << 26
"""Logits that are looked at in float32 at a time: 4 MB, to stay in a CPU's cache; a GPU wants few
large operations."""


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32 of logits of any type; no float32 copy of all is made or kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        parts = [F.cross_entropy(x, t, reduction="none") for x, t in _in_chunks(logits, targets)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        weights = gradients[0].split(_rows_at_once(logits))
        parts = []
        for (x, t), weight in zip(_in_chunks(logits, targets), weights, strict=True):
            # Shares (N, V), less one at each row's target.
            less = x.softmax(-1).scatter_add(1, t.unsqueeze(1), -x.new_ones(len(t), 1))
            parts.append((less * weight.unsqueeze(1)).to(logits.dtype))
        return torch.cat(parts), None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, (_CHUNK_ON_GPU if logits.is_cuda else _CHUNK) // logits.shape[-1])


def _in_chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = _rows_at_once(logits)
    for some, those in zip(logits.split(rows), targets.split(rows), strict=True):
        yield some.to(wide), those


def mean_by_example(values: Tensor, example: Tensor, examples: int) -> Tensor:
    """Mean of token values within each example: (N,), (N,) -> (B,)."""
    sums = torch.zeros(examples, dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, example, values)
    return sums / torch.bincount(example, minlength=examples)


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
    for batch, is_own in in_step(bucketed(examples, portion(batch_size, len(examples)), pad)):
        found = example_losses(model, batch.to(device)).float().cpu()
        if is_own:
            losses[batch.index] = found
    return summed(losses).tolist()
