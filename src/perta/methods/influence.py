"""Take the influence of examples off an adapter by one damped Newton step.

Let θ be the adapter's weights at a minimum of (1/n) Σ ℓ over n = |D_f| + |D_r| examples. To
first order, leaving out D_f moves the minimum by

    Δθ = (1/n) (H + λI)⁻¹ Σ_{x ∈ D_f} ∇ℓ(θ; x)

with H the Hessian of the mean loss over both sets. H is never formed: conjugate gradients need
only H·v, exact by differentiating the gradient's product with v once more. λ > 0 is needed
where H is not positive definite, as at every network's minimum in practice.

Cost: one product is a forward and a double backward pass over both sets, about three times a
training epoch. Memory: activations of one batch, twice; a few copies of the adapter.

Source: Ding et al., "Unified Parameter-Efficient Unlearning for LLMs" (LLMEraser), arXiv
2412.00383, instance removal; Koh and Liang, arXiv 1703.04730, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perta.data.batch import Batch, Encoded, bucketed
from perta.errors import ConfigError, DivergenceError, EmptyDatasetError
from perta.models.loss import losses_of, weighted_losses
from perta.temporary import temporarily

_CURE = "Raise its damping, as in influence:damping=0.1. Nothing was written."


@dataclass(frozen=True)
class _Solution:
    """Solution of A x = b, its residual ‖A x - b‖ / ‖b‖, and the number of products with A."""

    x: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True)
class Removed:
    """What `remove_influence` did."""

    iterations: int  # Hessian products
    residual: float  # ‖(H + λI) Δθ - g‖ / ‖g‖
    gradient_norm: float  # ‖g‖, g = (1/n) Σ ∇ℓ over the forget set
    step_norm: float  # ‖Δθ‖
    loss_before: float  # mean answer loss on the forget set, nats per token
    loss_after: float  # the same after the step


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], wanted: Tensor, *, tolerance: float, iterations: int
) -> _Solution:
    """Solve A x = b, (P,), A symmetric positive definite, known by v -> A v, to `tolerance`.

    Source: Hestenes and Stiefel, 1952.
    """
    x = torch.zeros_like(wanted)
    norm = float(wanted.norm())
    if norm == 0:
        return _Solution(x, 0.0, 0)
    residual, direction = wanted.clone(), wanted.clone()
    square = _dot(residual, residual)
    for done in range(1, iterations + 1):
        image = product(direction)
        curvature = _dot(direction, image)
        if not curvature > 0:
            least = curvature / _dot(direction, direction)
            raise DivergenceError(
                f"The damped Hessian is not positive definite: a direction has curvature "
                f"{least:.3g}. The loss is not at a minimum there. {_CURE}"
            )
        step = square / curvature
        x.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        previous, square = square, _dot(residual, residual)
        if square**0.5 <= tolerance * norm:
            return _Solution(x, square**0.5 / norm, done)
        direction.mul_(square / previous).add_(residual)
    raise DivergenceError(
        f"The solve for the influence did not converge: relative residual {square**0.5 / norm:.3g} "
        f"after {iterations} iterations, wanted {tolerance:g}. Raise its damping, "
        "iterations or tolerance, as in influence:damping=0.1. Nothing was written."
    )


def remove_influence(
    model: Any,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    *,
    damping: float,
    pad: int,
    tolerance: float = 1e-3,
    iterations: int = 100,
    batch_size: int = 8,
) -> Removed:
    """Move a model's trainable weights to where they would be without the forget set.

    The model is float32 and is changed in place; its trainable LoRA adapter was trained on both
    sets. `batch_size` does not change the result. DivergenceError where the solve fails, or the
    step leads to a loss that is not finite; EmptyDatasetError without forget examples.
    """
    if not forget:
        raise EmptyDatasetError("There is no influence to remove: the forget set is empty.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("The model has no trainable weights. Load its adapter as trainable.")
    device, everything = parameters[0].device, [*forget, *retain]
    model.eval()

    def batches(chosen: Sequence[Encoded]) -> Iterator[Batch]:
        return (batch.to(device) for batch in bucketed(chosen, batch_size, pad))

    def product(vector: Tensor) -> Tensor:
        batched, count = batches(everything), len(everything)
        return _derivative(model, parameters, batched, count, vector).add_(vector, alpha=damping)

    before = losses_of(model, forget, batch_size=batch_size, pad=pad)
    with _twice_differentiable(model):
        gradient = _derivative(model, parameters, batches(forget), len(everything))
        solution = _conjugate_gradients(
            product, gradient, tolerance=tolerance, iterations=iterations
        )
    _move(parameters, solution.x)
    after = losses_of(model, forget, batch_size=batch_size, pad=pad)
    losses = (sum(before) / len(before), sum(after) / len(after))
    if not math.isfinite(losses[1]):
        raise DivergenceError(f"After the step the loss is {losses[1]}. {_CURE}")
    norms = (float(gradient.norm()), float(solution.x.norm()))
    return Removed(solution.iterations, solution.residual, *norms, *losses)


@torch.no_grad()
def _move(parameters: Sequence[Tensor], step: Tensor) -> None:
    for parameter, part in zip(parameters, _split(step, parameters), strict=True):
        parameter.add_(part)


def _derivative(
    model: nn.Module,
    parameters: Sequence[Tensor],
    batches: Iterator[Batch],
    examples: int,
    vector: Tensor | None = None,
) -> Tensor:
    """(1/n) Σ ∇ℓ over the batches' examples, with n given, or (1/n) Σ ∇²ℓ · v: flat, (P,)."""
    total = torch.zeros_like(_flat(parameters))
    for batch in batches:
        loss = weighted_losses(model, batch).sum() / examples
        found = torch.autograd.grad(loss, list(parameters), create_graph=vector is not None)
        if vector is not None:
            parts = zip(found, _split(vector, parameters), strict=True)
            along = torch.stack([(g * v).sum() for g, v in parts]).sum()
            found = torch.autograd.grad(along, list(parameters), materialize_grads=True)
        total += _flat(found)
    return total


def _twice_differentiable(model: Any) -> AbstractContextManager[None]:
    """Attention in plain operations: fused kernels have no second derivative."""
    return temporarily(model.set_attn_implementation, "eager", model.config._attn_implementation)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _dot(one: Tensor, other: Tensor) -> float:
    # float32 sums over millions of weights would decide when to stop.
    return float(torch.dot(one.double(), other.double()))
