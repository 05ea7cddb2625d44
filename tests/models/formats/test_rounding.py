"""Rounded weights: each scheme against its definition in float64, and a model that comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from helpers import tiny_llama
from perta.models.formats.rounding import SCHEMES, rounded


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_eight_bits_by_hand() -> None:
    # 12.7 / 127 = 0.1: -3.14 is -31 steps, 0.04 none. A row of zeros stays.
    weight = torch.tensor([[12.7, -3.14, 0.04, 5.26], [0, 0, 0, 0]])
    expected = torch.tensor([[12.7, -3.1, 0.0, 5.3], [0, 0, 0, 0]])
    torch.testing.assert_close(SCHEMES["int8"](weight), expected)


def test_four_bits_in_groups_by_hand() -> None:
    # From -0.5 to 1 in 15 steps of 0.1, zero the fifth; the second group lies above 0 throughout.
    first = [-0.5, 1.0, 0.26, -0.04] + [0.0] * 124
    weight = torch.tensor([[*first, 3.0, 1.1]])
    expected = torch.tensor([[-0.5, 1.0, 0.3, 0.0] + [0.0] * 124 + [3.0, 1.2]])
    found = SCHEMES["int4"](weight)
    # 1.1 / 0.2 is 5.5, which float32 may take to either side.
    torch.testing.assert_close(found[:, :-1], expected[:, :-1])
    assert abs(float(found[0, -1]) - 1.1) < 0.101


def test_the_book_of_nf4_is_that_of_the_paper() -> None:
    # Quantiles of the normal distribution at even steps from both ends to 0, see appendix E.
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    book = np.sort([*above, 0.0, *below]) / above.max()
    weight = torch.tensor(np.concatenate([book, np.zeros(48)]), dtype=torch.float32)
    torch.testing.assert_close(SCHEMES["nf4"](weight), weight, rtol=0, atol=1e-6)


def test_nf4_takes_the_nearest_value_of_the_book() -> None:
    weight = normal(3, 50)
    flat, found = weight.flatten().double(), SCHEMES["nf4"](weight).flatten()
    book = torch.tensor(_book(), dtype=torch.float64)
    assert len(book) == 16
    for start in range(0, 150, 64):
        part = flat[start : start + 64]
        scale = part.abs().max()
        nearest = book[((part / scale)[:, None] - book).abs().argmin(1)] * scale
        got = found[start : start + 64].double()
        torch.testing.assert_close(got, nearest, rtol=1e-6, atol=1e-7)


def _book() -> list[float]:
    """Every value that a number beside a 1 can become."""
    ones = torch.zeros(64)
    ones[0] = 1.0
    values = set()
    for x in torch.linspace(-1, 1, 2001).tolist():
        ones[1] = x
        values.add(float(SCHEMES["nf4"](ones)[1]))
    return sorted(values)


def test_nf4_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(32, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(SCHEMES["nf4"](weight), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("name", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_gguf_rounds_blocks_of_32(name: str, levels: int) -> None:
    scheme, weight = SCHEMES[name], normal(4, 64)
    found = scheme(weight).double()
    for row in range(4):
        for start in (0, 32):
            block = weight[row, start : start + 32].double()
            most = block[block.abs().argmax()]
            exact = block.abs().max() / 127 if levels == 127 else most / -8
            scale = float(exact.to(torch.float16))
            steps = found[row, start : start + 32] / scale
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
            # Half a step, and a whole one where the range of 4 bits ends at 7.
            error = (found[row, start : start + 32] - block).abs().max() / abs(scale)
            assert float(error) <= (0.51 if levels == 127 else 1.01)
    assert not scheme(torch.zeros(1, 32)).any()
    odd = normal(2, 33)
    assert torch.equal(scheme(odd), odd)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_are_rounded_and_come_back(scheme: str) -> None:
    model = tiny_llama(tied=False, hidden_size=64, intermediate_size=96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with rounded(model, scheme):
        changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(model.get_parameter(name), SCHEMES[scheme](before[name]))
    assert changed == {n for n in before if "proj" in n}
    with pytest.raises(RuntimeError, match="inside"), rounded(model, scheme):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
