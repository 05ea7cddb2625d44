"""Moments kept as matrices and as factors: the same moment, in every operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perta.store.measured.second_moment import (
    added,
    divided,
    factor,
    few,
    is_factor,
    matrix,
    mean_diagonal,
    times,
)

WIDTH = 8


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def test_the_factor_holds_the_moment_and_not_the_rows() -> None:
    x = rows(3, seed=0)
    found = factor(x)
    torch.testing.assert_close(matrix(found), x.T @ x)
    assert torch.equal(found, found.triu())
    shuffled = factor(x[[2, 0, 1]])
    torch.testing.assert_close(shuffled.abs(), found.abs())  # R is known but for signs
    assert torch.equal(matrix(factor(rows(0, seed=0))), torch.zeros(WIDTH, WIDTH).double())


def test_a_square_factor_would_be_taken_for_the_moment() -> None:
    with pytest.raises(ValueError, match="have no factor"):
        factor(rows(WIDTH, seed=0))


def test_operations_agree_with_the_matrix() -> None:
    x, left = rows(3, seed=0), rows(2, seed=1)
    r, c = factor(x), x.T @ x
    assert is_factor(r)
    assert not is_factor(c)
    assert matrix(c) is c
    torch.testing.assert_close(matrix(divided(r, 5)), c / 5)
    torch.testing.assert_close(divided(c, 5), c / 5)
    torch.testing.assert_close(times(left, r), left @ c)
    torch.testing.assert_close(times(left, c), left @ c)
    assert mean_diagonal(r) == pytest.approx(mean_diagonal(c))
    assert mean_diagonal(c) == pytest.approx(float(c.trace()) / WIDTH)


@pytest.mark.parametrize(("one", "other"), [(2, 2), (2, 3), (3, 9), (9, 2), (9, 9)])
def test_sums_stay_factors_while_that_is_worth_it(one: int, other: int) -> None:
    parts = rows(one, seed=0), rows(other, seed=1)
    moments = [factor(x) if len(x) < WIDTH else x.T @ x for x in parts]
    kept = [moment.clone() for moment in moments]
    total = added(moments)
    assert is_factor(total) == few(one + other, WIDTH) == (one + other <= WIDTH / 2)
    assert not is_factor(total) or torch.equal(total, total.triu())
    torch.testing.assert_close(matrix(total), sum(x.T @ x for x in parts))
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
