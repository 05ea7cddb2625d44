"""Weighted directions from curvature that sees directions: tensors in, tensors out.

An edit Δ that undoes what learning the forget set did, at little harm to the retain set,
minimises, to second order and layer by layer,

    ½ ‖Δ − τ‖²_{F_f} + ½ ρ ‖Δ‖²_{F_r},        so  Δ = (F_f + ρ F_r)⁻¹ F_f τ.

With diagonal F this is the share of the diagonal weighting. Here F is a Kronecker product of the
second moment C of a layer's inputs and, for `perta-kron`, the second moment B of its output
gradients. Weights are (out, in) throughout. Everything is solved in float64: moments of language
models have a few directions far above the rest, and at a small damping float32 makes the step
grow in directions that neither set uses.

The forget side may be left out: `projected_direction` takes of τ what the retain set does not see.

Sources: C as the metric of a linear layer, RegMean, arXiv 2212.09849; B ⊗ C as curvature, K-FAC,
arXiv 1503.05671, section 3; the eigenvalue-corrected form, EK-FAC, arXiv 1806.03884;
the projection off retained inputs, AlphaEdit, arXiv 2410.02355.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perta.errors import DivergenceError
from perta.methods.method import Direction, Directions, Needs, SideMoments, option
from perta.store.measured.second_moment import few_together, is_factor, matrix, mean_diagonal, times

_POWER_STEPS = 12
"""Steps of the power iterations behind the reported condition; each costs two d² products."""


def input_direction(
    task_vector: Tensor,
    forget_moment: Tensor,
    retain_moment: Tensor,
    rho: float,
    damping: float,
    forget_damping: float = 0.0,
) -> Direction:
    """Δ = τ C_f (C_f + ρ C_r + λ I)⁻¹: the solution for F = I ⊗ C.

    λ is `damping` times the mean diagonal of C_f + ρ C_r. λ to infinity turns Δ to 0; at ρ = 0
    and small λ, Δ is τ on the span of the forget inputs and 0 off it. With diagonal C and λ = 0
    column j of τ is weighted by the share c^f_j / (c^f_j + ρ c^r_j).

    With a damping μ of the forget side, `forget_damping` times the mean diagonal of C_f, C_f is
    C_f + μ I everywhere above. A direction that neither set uses then has the share μ / (μ + λ)
    instead of 0: nearly all of what was learned there goes, and the retain set does not notice. As
    μ and ρ / μ grow, Δ tends to τ projected on the directions that retain inputs do not use.

    τ is (out, in); C is the mean over tokens of x xᵀ, (in, in), or its factor (n, in), see
    `store.measured.second_moment`. Layers with the same input have the same C: stack their τ to
    solve them at once. The cost is in³/3 + 4 · out · in² operations and two more (in, in) matrices.
    With a factor of the forget side the product with C_f takes 4 · out · n · in, not 2 · out · in²,
    and without μ the solve 2 · n · in² in place of 2 · out · in². With factors of n rows together,
    at most in / 2, nothing larger than (n, in) is formed, and about 8 · out · n · in + n² · in
    operations are all. DivergenceError where the matrix is not positive definite: too small a
    damping.
    """
    damping = _resolved_damping(damping, forget_moment, retain_moment)
    forget = mean_diagonal(forget_moment)
    kept = forget_damping * forget
    mean = forget + kept + rho * mean_diagonal(retain_moment)
    # Moments that are all zero ask for no change; any damping then gives exactly that.
    extra = kept + damping * mean if mean else 1.0
    ridge = _ridge([(forget_moment, 1.0), (retain_moment, rho)], extra)
    vector = task_vector.double()
    if is_factor(forget_moment) and not kept:
        rows = forget_moment.double()
        delta = (vector @ rows.t()) @ ridge.solve(rows.t()).t()
    else:
        delta = ridge.solve((times(vector, forget_moment) + kept * vector).t()).t()
    return Direction(delta, ridge.condition(), damping)


def projected_direction(task_vector: Tensor, retain_moment: Tensor, rho: float) -> Direction:
    """Δ = τ (I + ρ C_r / c)⁻¹, with c the mean diagonal of C_r: what the retain set hardly sees.

    It minimises ‖Δ − τ‖² + ρ/c · tr(Δ C_r Δᵀ): the step nearest to τ that changes little of what
    the layer makes of retained inputs. Along an eigenvector of C_r with eigenvalue s the share 1 /
    (1 + ρ s / c) of τ is in Δ. At ρ = 0 it is τ; ρ to infinity leaves the part of τ in the null
    space of the retain inputs, the projection of AlphaEdit. `input_direction` tends to it as μ
    grows with ρ / μ constant, so the forget set is read for τ alone.

    Shapes as there. The cost is in³/3 + 2 · out · in² operations and one more (in, in) matrix; with
    a factor 4 · out · n · in + n² · in, and nothing larger than (n, in). No eigenvalue of the
    matrix is below 1; DivergenceError where C_r is not positive semidefinite, or not finite.
    """
    mean = mean_diagonal(retain_moment)
    # Moments that are all zero ask for no protection.
    ridge = _ridge([(retain_moment, rho / mean if mean else 0.0)], 1.0)
    return Direction(ridge.solve(task_vector.double().t()).t(), ridge.condition(), 0.0)


def _direction_in_bases(
    task_vector: Tensor, inputs: _JointBasis, outputs: _JointBasis, rho: float
) -> Direction:
    """Δ for F = B ⊗ C: per-parameter task arithmetic in the basis where both F are diagonal.

    With U and V such that Uᵀ B U and Vᵀ C V are diagonal for both sets, and τ = U τ̃ Vᵀ,

        Δ = U (W̃ ⊙ τ̃) Vᵀ,   W̃_ij = b^f_i c^f_j / (b^f_i c^f_j + ρ b^r_i c^r_j).

    The condition is the worse of the two bases'.
    """
    rotated = outputs.inverse @ task_vector.double() @ inputs.inverse.t()
    forget = torch.outer(outputs.forget, inputs.forget)
    retain = torch.outer(outputs.retain, inputs.retain).mul_(rho)
    # Nothing but 0/0 is NaN: such a direction belongs to neither set.
    weighting = (forget / (forget + retain)).nan_to_num_(nan=0.0)
    delta = outputs.basis @ (weighting * rotated) @ inputs.basis.t()
    return Direction(
        delta, max(inputs.condition, outputs.condition), max(inputs.damping, outputs.damping)
    )


@dataclass(frozen=True)
class _JointBasis:
    """A basis V (d, d) in which two moments are diagonal, (d,): `forget`, `retain` damped by λ."""

    basis: Tensor
    inverse: Tensor
    forget: Tensor
    retain: Tensor
    condition: float
    damping: float


def _joint_basis(forget: Tensor, retain: Tensor, damping: float) -> _JointBasis:
    """Diagonalise two moments together; about 10 d³ multiplications.

    The retain side is damped by λ, `damping` times its mean diagonal, so that a direction that
    neither set uses is left alone.

    With S = C_f / f + C_r / r + λ I = L Lᵀ, where f and r are the mean diagonals, the
    eigenvectors Q of L⁻¹ (C_f / f) L⁻ᵀ give V = L⁻ᵀ Q: Vᵀ S V is the identity, so the retain
    side is one minus the forget side. Scaling each by its own mean first keeps the digits of
    output gradients, which differ between the sets by orders of magnitude.
    """
    damping = _resolved_damping(damping, forget, retain)
    scales = [mean_diagonal(m) for m in (forget, retain)]
    # A moment that is all zero has no scale, and stays zero at any.
    one, other = (matrix(m) / (s or 1.0) for m, s in zip((forget, retain), scales, strict=True))
    total = one + other
    damped = total.clone()
    factor = _cholesky(damped, damping)
    ridge = _Ridge(damped.matmul, lambda v: torch.cholesky_solve(v, factor), damped)
    half = torch.linalg.solve_triangular(factor, one, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.t(), upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.t()).mul_(0.5))
    values = values.clamp_(0, 1)
    return _JointBasis(
        torch.linalg.solve_triangular(factor.t(), vectors, upper=True),
        vectors.t() @ factor.t(),
        values * scales[0],
        (1 - values) * scales[1],
        ridge.condition(),
        damping,
    )


def _resolved_damping(damping: float, *moments: Tensor) -> float:
    """The damping, at least what float32 moments resolve: they are known to within d · 2⁻²³ · m."""
    if all(moment.dtype == torch.float64 for moment in moments):
        return damping
    return max(damping, moments[0].shape[1] * torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class _Ridge:
    """v -> (sum + added I) v, (d, k) -> (d, k), and its inverse; `like` has its width and type."""

    apply: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor], Tensor]
    like: Tensor

    def condition(self) -> float:
        """Largest eigenvalue over the smallest, both by power iteration."""
        return _largest(self.apply, self.like) * _largest(self.solve, self.like)


def _ridge(moments: Sequence[tuple[Tensor, float]], added: float) -> _Ridge:
    """Factor a sum of weighted moments plus `added` on the diagonal, > 0 with factors.

    With the moments' rows, weighted, stacked into X, where they are few, by Woodbury's identity
    (Xᵀ X + ν I)⁻¹ = (I − Xᵀ (X Xᵀ + ν I)⁻¹ X) / ν.
    """
    if not few_together([moment for moment, _ in moments]):
        (first, weight), *others = moments
        total = matrix(first) * weight
        for moment, weight in others:
            total.add_(matrix(moment), alpha=weight)
        whole = _cholesky(total, added)
        return _Ridge(total.matmul, lambda v: torch.cholesky_solve(v, whole), total)
    if added <= 0:
        raise _not_definite(moments[0][0].shape[1], added)
    rows = torch.cat([moment.double() * math.sqrt(weight) for moment, weight in moments])
    inner = _cholesky(rows @ rows.t(), added)

    def apply(v: Tensor) -> Tensor:
        return rows.t() @ (rows @ v) + added * v

    def solve(v: Tensor) -> Tensor:
        return (v - rows.t() @ torch.cholesky_solve(rows @ v, inner)) / added

    return _Ridge(apply, solve, rows)


def _cholesky(total: Tensor, added: float) -> Tensor:
    """Lower factor of a matrix, with something added to its diagonal in place."""
    total.diagonal().add_(added)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(total)
    if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise _not_definite(len(total), added)
    return factor


def _not_definite(width: int, added: float) -> DivergenceError:
    return DivergenceError(
        f"A moment matrix of width {width} is not positive definite with {added:.3g} added to its "
        "diagonal. Use a larger damping, where the method has one, or make the moments again."
    )


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Largest eigenvalue of a symmetric positive definite map, from below, by power iteration."""
    vector: Tensor = torch.linspace(1, 2, like.shape[1]).to(like).unsqueeze(1)
    # Alternating signs: a start without a part in the extreme directions would miss them.
    vector[1::2] *= -1
    growth = float(vector.norm())
    for _ in range(_POWER_STEPS):
        vector = apply(vector / growth)
        growth = float(vector.norm())
    return growth


# --- the methods ----------------------------------------------------------------------------------

_STRUCTURED = "curvature as in RegMean, arXiv 2212.09849, and K-FAC, arXiv 1503.05671"
_MOVED = (
    "The weights of linear layers were moved back along what learning the removed examples alone "
    "does to them, "
)


def _together(
    solve: Callable[[Tensor], Direction], vectors: Sequence[Tensor]
) -> Iterator[Direction]:
    """Layers that read the same input, solved as one."""
    whole = solve(torch.cat(list(vectors)))
    for part in whole.delta.split([len(vector) for vector in vectors]):
        yield replace(whole, delta=part)


class Project(Directions):
    """What layer inputs of the retain set do not see of tau; edits the MLPs' layers."""

    name = "perta-project"
    done = _MOVED + (
        "except in the directions of the layers' inputs that the examples to keep use."
    )
    formula = "direction tau (I + rho C_r / c)^-1"
    source = "as SAGE, arXiv 2606.18309, up to its spectral cut; AlphaEdit, arXiv 2410.02355"
    needs = Needs(moments=("retain",), facts=True, at="full")
    strength = 2.7
    layers: ClassVar[Literal["mlp", "all"]] = "mlp"
    searched = True
    by_rows = True
    rho: float = option(default=3.0, help="weight ρ of the retain moments", within="[0, inf)")

    def solve(
        self, vectors: Sequence[Tensor], inputs: SideMoments, outputs: Callable[[int], SideMoments]
    ) -> Iterable[Direction]:
        """`projected_direction`."""
        del outputs
        return _together(lambda v: projected_direction(v, inputs["retain"], self.rho), vectors)


class Sage(Project):
    """The step to another model (--base), without what retained layer inputs see of it."""

    name = "sage"
    done = (
        "The weights of linear layers were moved to those of another model, such as one that was "
        "unlearned by other means, except in the directions of the layers' inputs that the "
        "examples to keep use. No model was tuned."
    )
    formula = "direction (theta_full - theta_0) (I + rho C_r / c)^-1"
    source = "SAGE, arXiv 2606.18309, up to its spectral cut"
    needs = Needs(tuned=0, moments=("retain",))
    direction = "full - base"
    strength = 1.0
    layers = "all"
    searched = False


class _OfBothSets(Directions):
    source = _STRUCTURED
    needs = Needs(moments=("forget", "retain"))
    rho: float = option(default=10.0, help="weight ρ of the retain moments", within="[0, inf)")
    damping: float = option(
        default=0.01,
        help="damping λ, relative to the mean diagonal of the moments",
        within="[0, inf)",
    )


class Input(_OfBothSets):
    """The share in directions of layer inputs; edits linear layers only."""

    name = "perta-input"
    done = _MOVED + (
        "most in the directions of the layers' inputs that the removed examples use and the "
        "examples to keep do not."
    )
    formula = "direction tau (C_f + mu I) (C_f + rho C_r + (lambda + mu) I)^-1"
    strength = 2.3
    by_rows = True
    rho: float = option(default=100.0, help="weight ρ of the retain moments", within="[0, inf)")
    forget_damping: float = option(
        default=30.0,
        help="damping μ of the forget side; the larger, the more goes wherever the retain set "
        "does not object",
        within="[0, inf)",
    )

    def solve(
        self, vectors: Sequence[Tensor], inputs: SideMoments, outputs: Callable[[int], SideMoments]
    ) -> Iterable[Direction]:
        """`input_direction`."""
        del outputs
        moments, settings = (inputs["forget"], inputs["retain"]), self.settings
        return _together(lambda v: input_direction(v, *moments, **settings), vectors)


class Kron(_OfBothSets):
    """The share in the basis where input and gradient moments are diagonal."""

    name = "perta-kron"
    done = _MOVED + (
        "most in the directions of the layers' inputs and output gradients that matter for the "
        "removed examples and not for those to keep."
    )
    formula = "W = b_f c_f / (b_f c_f + rho b_r c_r), rotated"
    needs = Needs(moments=("forget", "retain"), gradients=True)
    strength = 1.5

    def solve(
        self, vectors: Sequence[Tensor], inputs: SideMoments, outputs: Callable[[int], SideMoments]
    ) -> Iterator[Direction]:
        """In a basis of the inputs and one of each layer's output gradients."""
        basis = _joint_basis(inputs["forget"], inputs["retain"], self.damping)
        for place, vector in enumerate(vectors):
            moments = outputs(place)
            other = _joint_basis(moments["forget"], moments["retain"], self.damping)
            yield _direction_in_bases(vector, basis, other, self.rho)
