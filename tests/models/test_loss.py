"""The loss of labelled tokens, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the community's name for it
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perta.models import loss
from perta.models.loss import AnswerLogits, token_losses


def answers(dtype: torch.dtype, rows: int = 23, vocabulary: int = 50) -> AnswerLogits:
    """Logits as large as a model's, some rows sure of their target."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 8
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    logits[::3, :].scatter_(1, targets[::3, None], 60.0)
    return AnswerLogits(logits.to(dtype).requires_grad_(), targets, targets * 0)


@pytest.mark.parametrize("chunk", [1, 150, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_and_gradients_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(loss, "_CHUNK", chunk)
    given = answers(dtype)
    weights = torch.linspace(-1, 2, len(given.targets))
    exact = given.logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, given.targets, reduction="none")
    found = token_losses(given)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    (wanted,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    (gradient,) = torch.autograd.grad((found * weights).sum(), given.logits)
    assert gradient.dtype == dtype
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient.double(), wanted, rtol=step, atol=1e-7)


def test_a_second_derivative_is_that_of_float64() -> None:
    given = answers(torch.float64, 4, 6)
    small = (given.logits.detach() / 20).requires_grad_()

    def losses(logits: Tensor) -> Tensor:
        return token_losses(AnswerLogits(logits, given.targets, given.example))

    assert torch.autograd.gradcheck(losses, small)
    assert torch.autograd.gradgradcheck(losses, small)


class _Largest(TorchDispatchMode):
    """The most float32 numbers that any operation makes at once."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


def test_no_float32_copy_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK", 100)
    given = answers(torch.bfloat16)
    with _Largest() as largest:  # type: ignore[no-untyped-call]
        token_losses(given).sum().backward()
    assert largest.numel == 100
