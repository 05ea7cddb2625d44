"""Batches of encoded examples."""

from __future__ import annotations

import torch

from perta.data.batch import Encoded, bucketed, rows_per_pass


def of_length(tokens: int, row: int) -> Encoded:
    return Encoded((3,) * tokens, (3,) * tokens, row)


def test_a_pass_has_no_more_tokens_than_fit_and_every_row_once() -> None:
    lengths = [5000, 100, 1400, 40, 1400, 100, 4096, 60, 1400]
    examples = [of_length(n, row) for row, n in enumerate(lengths, 1)]
    batches = bucketed(examples, 4, 0)
    # By length: 40, 60, 100 and 100 are four; three of 1,400 are over 4,096 tokens.
    sizes = [[lengths[i] for i in batch.index.tolist()] for batch in batches]
    assert sizes == [[40, 60, 100, 100], [1400, 1400], [1400], [4096], [5000]]


def test_batches_of_training_are_of_the_size_asked_for_however_long() -> None:
    examples = [of_length(3000, row) for row in range(1, 6)]
    batches = bucketed(examples, 2, 0, torch.Generator().manual_seed(0))
    assert sorted(len(batch) for batch in batches) == [1, 2, 2]


def test_a_gpu_takes_more_rows_at_once() -> None:
    assert rows_per_pass(16, torch.device("cpu")) == 16
    assert rows_per_pass(16, torch.device("cuda", 0)) == 128
