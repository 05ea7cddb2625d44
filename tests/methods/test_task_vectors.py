"""Combining task vectors, by hand-worked values and published random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from perta.methods.diagonal import dampened, saliency
from perta.methods.method import mean
from perta.methods.task_vectors import agreement, dare, ties, uniform


def test_mean_of_one_is_that_one() -> None:
    vector = torch.tensor([1.0, -3.0])
    assert mean([vector]) is vector
    assert mean([vector, torch.tensor([3.0, -1.0])]).tolist() == [2.0, -2.0]


def test_ties_by_hand() -> None:
    one = torch.tensor([3.0, 2.0, -4.0, 0.5, 2.0])
    two = torch.tensor([-1.0, 4.0, -2.0, 5.0, -2.0])
    three = torch.tensor([-1.5, 0.1, 6.0, 0.0, 0.0])
    # Trimmed: (3, 2, -4, 0, 2), (0, 4, -2, 5, -2), (-1.5, 0, 6, 0, 0); sums 1.5, 6, 0, 5, 0.
    found = ties([one, two, three], [2.0, 2.0, 1.5])
    assert found.tolist() == [3.0, 3.0, 0.0, 5.0, 0.0]
    alone = ties([torch.tensor([1.0, -2.0, 0.5])], [1.0])
    assert alone.tolist() == [1.0, -2.0, 0.0]


def test_agreement_by_hand() -> None:
    one, two = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([3.0, -2.0, -2.0, 5.0])
    assert agreement([one.clone(), two.clone()]).tolist() == [2.0, -1.5, 0.0, 0.0]
    three = torch.tensor([2.0, 3.0, 1.0, 1.0])
    assert agreement([one, two, three]).tolist() == [2.0, 0.0, 0.0, 0.0]


def test_what_is_not_finite_stays_so() -> None:
    for combine in (
        mean,
        agreement,
        lambda vectors: ties(vectors, [1.0, 1.0]),
        lambda vectors: dare(vectors, 0.9, [1, 2], 0),
    ):
        vectors = [torch.full((64,), math.nan), torch.ones(64)]
        assert not torch.isfinite(combine(vectors)).any()


def test_random_numbers_are_those_of_splitmix64() -> None:
    # First outputs of the published generator for seed 0.
    known = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    np.testing.assert_array_equal(uniform(0, 0, 3), (known >> np.uint64(11)) * 2.0**-53)


@pytest.mark.parametrize("cut", [0, 1, 500, 1000])
def test_random_numbers_depend_on_their_place_alone(cut: int) -> None:
    whole = uniform(5, 0, 1000)
    assert np.array_equal(whole, np.concatenate([uniform(5, 0, cut), uniform(5, cut, 1000 - cut)]))
    assert not np.array_equal(whole, uniform(6, 0, 1000))


def test_dare_keeps_the_mean() -> None:
    vector = torch.ones(100_000)
    found = dare([vector], 0.9, [3], 17)
    assert found.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert float((found == 0).float().mean()) == pytest.approx(0.9, abs=0.003)
    # Two vectors draw apart: 1% of the weights are kept of both.
    both = dare([torch.ones(100_000), torch.ones(100_000)], 0.9, [3, 4], 17)
    assert float((both > 9).float().mean()) == pytest.approx(0.01, abs=0.001)


def test_saliency_is_a_magnitude() -> None:
    found = saliency(torch.tensor([2.0, 3.0]), torch.tensor([-1.5, 0.5]))
    assert found.tolist() == [3.0, 1.5]


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 1e-20, 1.0, 1e38])
def test_dampening_depends_on_proportions_alone(scale: float) -> None:
    # I / I_f is 1/4, infinite, 1 and 5/8; only the first is below 1/2.
    forget = torch.tensor([3.0, 0.0, 1.0, 2.0]) * scale
    retain = torch.tensor([0.0, 1.0, 1.0, 1.0]) * scale
    found = dampened(forget, retain, 0.25, 2.0, 1.0)
    assert found.tolist() == pytest.approx([0.75, 0.0, 0.0, 0.0])
    assert float(dampened(torch.zeros(1), torch.zeros(1), 0.25, 2.0, 1.0)) == 0
