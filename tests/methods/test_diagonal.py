"""Every weighting against a float64 oracle, and at the ends of the float32 range."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perta.errors import ConfigError
from perta.methods.diagonal import ClippedRatio, Grad, Random, Ratio, share
from perta.methods.method import Block, Edit, block_seed
from perta.methods.registry import get_method, known

Weighting = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

SMALLEST = 2.0**-149
LARGEST = float(np.finfo(np.float32).max)
IMPORTANCE = st.one_of(
    st.just(0.0),
    st.floats(0, 1, width=32),
    st.floats(0, LARGEST, width=32, allow_infinity=False),
    st.sampled_from([SMALLEST, 3 * SMALLEST, 1e-40, 1e-38, 1e-30, 1.0, 1e30, LARGEST]),
)
RHO = st.sampled_from([0.0, 1e-6, 0.3, 1.0, 10.0, 1e6])


def ratio(forget: torch.Tensor, retain: torch.Tensor, rho: float) -> torch.Tensor:
    return Ratio(rho=rho).weigh(Block(forget, retain))


def clipped_ratio(forget: torch.Tensor, retain: torch.Tensor, rho: float) -> torch.Tensor:
    return ClippedRatio(rho=rho).weigh(Block(forget, retain))


def oracle(
    method: str, forget: NDArray[np.float64], retain: NDArray[np.float64], rho: float
) -> NDArray[np.float64]:
    """Value by value, with Python floats, straight from the definitions."""
    result = []
    for f, r in zip(forget.ravel().tolist(), retain.ravel().tolist(), strict=True):
        if f == 0:
            result.append(0.0)
        elif method == "share":
            result.append(f / (f + rho * r))
        else:
            quotient = f / (rho * r) if rho * r > 0 else 1.0
            result.append(min(1.0, quotient) if method == "clipped" else quotient)
    return np.array(result).reshape(forget.shape)


def assert_close(actual: torch.Tensor, expected: NDArray[np.float64]) -> None:
    # A weight moves by W times its task vector: shares below 1e-30 are zeros, and ratios above
    # 1e30 are equally useless, so how the ends of the range round does not matter.
    values = actual.double().numpy()
    assert not np.isnan(values).any()
    np.testing.assert_allclose(
        np.minimum(values, 1e30), np.minimum(expected, 1e30), rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize(
    ("name", "function"), [("share", share), ("ratio", ratio), ("clipped", clipped_ratio)]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), rho=RHO)
def test_weightings_equal_float64_oracle(
    name: str, function: Weighting, data: st.DataObject, rho: float
) -> None:
    size = data.draw(st.integers(1, 20))
    values = st.lists(IMPORTANCE, min_size=size, max_size=size)
    forget = torch.tensor(data.draw(values), dtype=torch.float32)
    retain = torch.tensor(data.draw(values), dtype=torch.float32)
    before = forget.clone(), retain.clone()
    actual = function(forget, retain, rho)
    assert_close(actual, oracle(name, forget.double().numpy(), retain.double().numpy(), rho))
    assert torch.equal(forget, before[0])
    assert torch.equal(retain, before[1])


@settings(deadline=None)
@given(forget=IMPORTANCE, retain=IMPORTANCE, rho=RHO)
def test_share_and_clipped_ratio_lie_in_unit_interval(
    forget: float, retain: float, rho: float
) -> None:
    for function in (share, clipped_ratio):
        value = float(function(torch.tensor([forget]), torch.tensor([retain]), rho))
        assert 0 <= value <= 1


@pytest.mark.parametrize("rho", [0.0, 1.0, 7.0])
def test_zero_over_zero_leaves_the_weight_alone(rho: float) -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    for function in (share, ratio, clipped_ratio):
        assert float(function(zero, zero, rho)) == 0
        assert float(function(zero, one, rho)) == 0
        assert float(function(one, zero, rho)) == 1


@pytest.mark.parametrize("scale", [SMALLEST, 1e-40, 1e-30, 1.0, 1e30, 1e38])
def test_share_depends_on_proportions_alone(scale: float) -> None:
    forget, retain = torch.tensor([3.0]) * scale, torch.tensor([1.0]) * scale
    assert float(share(forget, retain, 1.0)) == pytest.approx(0.75, rel=1e-6)


def test_share_of_swapped_sets_adds_to_one() -> None:
    forget, retain = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    total = share(forget, retain, 1.0) + share(retain, forget, 1.0)
    torch.testing.assert_close(total, torch.ones(1000))


def test_order_zero_and_infinity_are_a_half_and_a_mask() -> None:
    gradients = torch.tensor([[0.5, 2.0], [1.0, 1.5]])
    low = share(gradients[0] ** 1e-4, gradients[1] ** 1e-4, 1.0)
    torch.testing.assert_close(low, torch.full((2,), 0.5), atol=1e-4, rtol=0)
    high = share(gradients[0] ** 60, gradients[1] ** 60, 1.0)
    torch.testing.assert_close(high, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_shuffle_keeps_the_distribution_and_the_seed_decides() -> None:
    forget, retain = torch.rand(2, 50, 4)
    values = share(forget, retain, 1.0)
    places = [(seed, "a", 0) for seed in (1, 1, 2)]
    one, again, other = (Random().weigh(Block(forget, retain, place=p)) for p in places)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, values)
    assert one.shape == values.shape
    assert torch.equal(one.flatten().sort().values, values.flatten().sort().values)


def test_block_seed_differs_by_seed_tensor_and_place() -> None:
    places = list(itertools.product((0, 1), ("a", "b"), (0, 64)))
    seeds = {block_seed(seed, name, start) for seed, name, start in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert block_seed(0, "a", 0) == 1509917800607555658


@pytest.mark.parametrize("name", known(Edit))
def test_every_method(name: str) -> None:
    forget, retain = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([3.0, 0.0, 1.0])
    settings = {"constant": "constant=0.25", "ssd": "selection=1.5,dampening=0.5"}
    expected: dict[str, list[float]] = {
        "tv": [1.0, 1.0, 1.0],
        "constant": [0.25, 0.25, 0.25],
        "ratio": [1 / 6, 0.0, 2.0],
        "clipped-ratio": [1 / 6, 0.0, 1.0],
        # |g tau| is 2, 0 and 4; the cut is 3.
        "selective": [0.0, 0.0, 1.0],
        # I is 0.2 I_f + 0.8 I_r: 2.6, 0 and 1.6; above 1.5 I is the last alone.
        "ssd": [0.0, 0.0, 1 - 0.5 * 1.6 / 4],
    }
    # What they subtract is weighted or combined before.
    structured = ("perta-input", "perta-project", "perta-kron", "sage")
    combining = ("msa", "ties", "dare", "negmerge", "interpolate", *structured)
    expected |= {name: [1.0, 1.0, 1.0] for name in combining}
    share_values = [1 / 7, 0.0, 4 / 6]
    block = Block(
        forget,
        retain,
        place=(1, "a", 0),
        task_vector=torch.tensor([-2.0, 5.0, 1.0]),
        cuts=(3.0,),
        forget_share=0.2,
    )
    has_rho = "rho" in get_method(name).settings
    method = get_method(f"{name}:{settings.get(name, 'rho=2' if has_rho else '')}")
    weighting = torch.as_tensor(method.weigh(block)).expand(3)
    if name == "random":
        assert sorted(weighting.tolist()) == pytest.approx(sorted(share_values))
    else:
        assert weighting.tolist() == pytest.approx(expected.get(name, share_values))
    assert bool(method.needs.moments) == (name in structured)
    assert bool(method.needs.importance) == (name not in {"tv", "constant", *combining})
    assert get_method(str(method)) == method
    assert all((method.summary, method.formula, method.source, method.done))


def test_a_method_is_found_by_name_and_the_nearest_is_named() -> None:
    assert get_method("clipped_ratio") == ClippedRatio()
    assert get_method("PerTA-Grad") == Grad()
    with pytest.raises(ConfigError, match=r"Did you mean `perta-fisher`.*perta-grad, perta"):
        get_method("perta-fischer")
    with pytest.raises(ConfigError, match=r"There are: .*tv"):
        get_method("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tv:rho=1", "unknown setting `rho`.*`perta-grad`.*have it.*has none"),
        ("perta-project:roh=1", "unknown setting `roh`. Did you mean `rho`"),
        ("perta-project:rho", "`rho` is not of the form key=value"),
        ("perta-project:rho=-1", r"rho is -1.* in \[0, inf\)"),
        ("perta-project:rho=.nan", r"rho is nan"),
        ("perta-project:rho=.inf", r"rho is inf"),
        ("perta-project:rho=high", "rho is high; it must be a number"),
        ("perta-project:rho=true", "rho is True; it must be a number"),
        ("perta-project:rho=", "rho is None"),
        ("perta-project:rho=[", "rho is"),
        ("perta:order=0", r"order is 0.*\(0, 32\]"),
        ("perta:order=33", "order is 33"),
        ("perta-fisher:order=1", "unknown setting `order`"),
        ("constant:constant=1.5", r"\[0, 1\]"),
        ("dare:drop=1", r"\[0, 1\)"),
        ("ties:keep=0", r"\(0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_method(text)


def test_orders() -> None:
    assert get_method("perta-fisher").order == 2
    assert get_method("perta:order=0.5").order == 0.5
    assert get_method("perta").order == 1
