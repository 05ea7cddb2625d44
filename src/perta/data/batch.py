"""A padded batch of token sequences in which only answers carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Encoded:
    """One tokenised example."""

    input_ids: tuple[int, ...] = field(repr=False)  # tokens are text
    # the token itself where it carries loss, `IGNORE` elsewhere; predicted one place before
    labels: tuple[int, ...] = field(repr=False)
    row: int  # of the example in its file, from 1
    # in a mean over examples; windows of one text weigh by their labels, 1 in mean
    weight: float = 1.0

    @property
    def labelled(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """Right-padded examples."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on real tokens, from true lengths (pad may equal eos)
    labels: Tensor  # (B, T) int64, `IGNORE` where a position carries no loss; not shifted
    index: Tensor  # (B,) int64, place of each example in the list the batch was cut from
    weights: Tensor  # (B,) float32, weight of each example's loss

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, part.name).to(device) for part in fields(self)))

    def rows(self, chosen: slice) -> Batch:
        """Some of the examples, without the padding that only others need."""
        length = int(self.attention_mask[chosen].sum(1).max())
        padded = (self.input_ids, self.attention_mask, self.labels)
        ids, mask, labels = (part[chosen, :length] for part in padded)
        return Batch(ids, mask, labels, self.index[chosen], self.weights[chosen])

    def lengths(self) -> tuple[int, ...]:
        """Number of real tokens of each example."""
        return tuple(self.attention_mask.sum(1).tolist())

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def seeded_sample(
    examples: Sequence[Encoded], count: int, seed: int, *, from_end: bool = False
) -> list[Encoded]:
    """A random sample of `count`, at most all, in the order of the file.

    With one seed a sample from the end and one from the start meet only where there are too few.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    chosen = order.flip(0)[:count] if from_end else order[:count]
    return [examples[i] for i in chosen.sort().values.tolist()]


def collate(examples: Sequence[Encoded], pad_id: int, index: Sequence[int] | None = None) -> Batch:
    """Right-pad examples, with places `index` in their list [default: 0 …], by a masked token."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), length), dtype=torch.int64)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[i, :n] = torch.tensor(example.input_ids)
        labels[i, :n] = torch.tensor(example.labels)
        attention_mask[i, :n] = 1
    places = torch.tensor(range(len(examples)) if index is None else index, dtype=torch.int64)
    weights = torch.tensor([example.weight for example in examples], dtype=torch.float32)
    return Batch(input_ids, attention_mask, labels, places, weights)


_ON_GPU = 8
_MOST_TOKENS = 1 << 12
"""Tokens of one pass, padding included, unless a single row has more: activations of a model of 8B
take some 10 GB in a backward pass then."""


def rows_per_pass(usual: int, device: torch.device) -> int:
    """Rows of a pass in which nothing is trained; as few as a CPU wants leave a GPU idle."""
    return usual * _ON_GPU if device.type == "cuda" else usual


def bucketed(
    examples: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> list[Batch]:
    """Cut examples into batches of similar length, so that little is spent on padding.

    With a generator, examples of about one length meet in a random order and the batches come in a
    random order (training); without one the order is by length, and batches of long examples have
    fewer (evaluation).
    """
    order = list(range(len(examples)))
    if generator is not None:
        # Stable sort by a coarse length keeps the shuffle among examples of similar length.
        order = torch.randperm(len(order), generator=generator).tolist()
        order.sort(key=lambda i: len(examples[i].input_ids) // 8)
        groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    else:
        groups = []
        for i in sorted(order, key=lambda i: len(examples[i].input_ids)):
            rows = len(groups[-1]) if groups else batch_size
            if rows == batch_size or (rows + 1) * len(examples[i].input_ids) > _MOST_TOKENS:
                groups.append([])
            groups[-1].append(i)
    return [collate([examples[i] for i in group], pad_id, group) for group in groups]
