"""Combining task vectors, by hand-worked values and published random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from perta.methods.diagonal import Selective, Ssd
from perta.methods.method import Block, mean
from perta.methods.task_vectors import Dare, Negmerge, Ties, Tv, _uniform


def test_mean_of_one_is_that_one() -> None:
    vector = torch.tensor([1.0, -3.0])
    assert mean([vector]) is vector
    assert mean([vector, torch.tensor([3.0, -1.0])]).tolist() == [2.0, -2.0]


def test_ties_by_hand() -> None:
    one = torch.tensor([3.0, 2.0, -4.0, 0.5, 2.0])
    two = torch.tensor([-1.0, 4.0, -2.0, 5.0, -2.0])
    three = torch.tensor([-1.5, 0.1, 6.0, 0.0, 0.0])
    # Trimmed: (3, 2, -4, 0, 2), (0, 4, -2, 5, -2), (-1.5, 0, 6, 0, 0); sums 1.5, 6, 0, 5, 0.
    found = Ties().combine([one, two, three], Block(cuts=(2.0, 2.0, 1.5)))
    assert found.tolist() == [3.0, 3.0, 0.0, 5.0, 0.0]
    alone = Ties().combine([torch.tensor([1.0, -2.0, 0.5])], Block(cuts=(1.0,)))
    assert alone.tolist() == [1.0, -2.0, 0.0]


def test_agreement_by_hand() -> None:
    combine = Negmerge().combine
    one, two = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([3.0, -2.0, -2.0, 5.0])
    assert combine([one.clone(), two.clone()], Block()).tolist() == [2.0, -1.5, 0.0, 0.0]
    three = torch.tensor([2.0, 3.0, 1.0, 1.0])
    assert combine([one, two, three], Block()).tolist() == [2.0, 0.0, 0.0, 0.0]


def test_what_is_not_finite_stays_so() -> None:
    for method in (Tv(), Negmerge(), Ties(), Dare()):
        vectors = [torch.full((64,), math.nan), torch.ones(64)]
        assert not torch.isfinite(method.combine(vectors, Block(cuts=(1.0, 1.0)))).any()


def test_random_numbers_are_those_of_splitmix64() -> None:
    # First outputs of the published generator for seed 0.
    known = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    np.testing.assert_array_equal(_uniform(0, 0, 3), (known >> np.uint64(11)) * 2.0**-53)


@pytest.mark.parametrize("cut", [0, 1, 500, 1000])
def test_random_numbers_depend_on_their_place_alone(cut: int) -> None:
    whole = _uniform(5, 0, 1000)
    assert np.array_equal(
        whole, np.concatenate([_uniform(5, 0, cut), _uniform(5, cut, 1000 - cut)])
    )
    assert not np.array_equal(whole, _uniform(6, 0, 1000))


def test_dare_keeps_the_mean() -> None:
    block = Block(place=(3, "a", 17))
    found = Dare().combine([torch.ones(100_000)], block)
    assert found.unique().tolist() == pytest.approx([0.0, 10.0])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert float((found == 0).float().mean()) == pytest.approx(0.9, abs=0.003)
    # Two vectors draw apart: 1% of the weights are kept of both.
    both = Dare().combine([torch.ones(100_000), torch.ones(100_000)], block)
    assert float((both > 9).float().mean()) == pytest.approx(0.01, abs=0.001)


def test_saliency_is_a_magnitude() -> None:
    block = Block(forget=torch.tensor([2.0, 3.0]))
    (found,) = Selective().scores([torch.tensor([-1.5, 0.5])], block)
    assert found.tolist() == [3.0, 1.5]


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 1e-20, 1.0, 1e38])
def test_dampening_depends_on_proportions_alone(scale: float) -> None:
    # I / I_f is 1/4, infinite, 1 and 5/8; only the first is below 1/2.
    forget = torch.tensor([3.0, 0.0, 1.0, 2.0]) * scale
    retain = torch.tensor([0.0, 1.0, 1.0, 1.0]) * scale
    method = Ssd(selection=2.0)
    found = method.weigh(Block(forget, retain, forget_share=0.25))
    assert found.tolist() == pytest.approx([0.75, 0.0, 0.0, 0.0])
    assert float(method.weigh(Block(torch.zeros(1), torch.zeros(1), forget_share=0.25))) == 0
