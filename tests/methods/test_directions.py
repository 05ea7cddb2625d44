"""Structured directions against brute force in float64, their limits, and their traps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perta.errors import DivergenceError
from perta.methods.diagonal import share
from perta.methods.directions import Kron, input_direction, projected_direction
from perta.methods.method import Direction, Side
from perta.store.measured.second_moment import factor, is_factor

OUT, IN = 4, 6


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(width: int, rows: int, seed: int) -> Tensor:
    """A second moment of random rows, of rank min(rows, width)."""
    x = normal(rows, width, seed=seed)
    return x.T @ x / rows


def kron_direction(
    tau: Tensor, c_f: Tensor, c_r: Tensor, b_f: Tensor, b_r: Tensor, rho: float, damping: float
) -> Direction:
    inputs: dict[Side, Tensor] = {"forget": c_f, "retain": c_r}
    outputs: dict[Side, Tensor] = {"forget": b_f, "retain": b_r}
    (found,) = Kron(rho=rho, damping=damping).solve([tau], inputs, lambda _: outputs)
    return found


def brute_force(tau: Tensor, forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Minimise ½‖Δ−τ‖²_{F_f} + ½ρ‖Δ‖²_{F_r} by Newton's step on vec(Δ), row by row."""

    def objective(vec: Tensor) -> Tensor:
        apart = vec - tau.reshape(-1)
        return 0.5 * (apart @ forget @ apart) + 0.5 * rho * (vec @ retain @ vec)

    start = torch.zeros(tau.numel(), dtype=torch.float64)
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(start), start)
    hessian = torch.autograd.functional.hessian(objective, start)
    solution: Tensor = torch.linalg.solve(hessian, -gradient)
    return solution.reshape(tau.shape)


@pytest.mark.parametrize("rho", [0.3, 1.0, 40.0])
def test_input_direction_minimises_the_objective(rho: float) -> None:
    tau, forget, retain = (
        normal(OUT, IN, seed=0),
        moment(IN, 9, seed=1),
        moment(IN, 4, seed=2),
    )
    damping = 0.02
    lam = damping * (forget + rho * retain).diagonal().mean()
    eye_in, eye_out = torch.eye(IN).double(), torch.eye(OUT).double()
    expected = brute_force(
        tau,
        torch.kron(eye_out, forget),
        torch.kron(eye_out, retain + lam / rho * eye_in),
        rho,
    )
    found = input_direction(tau, forget, retain, rho, damping)
    torch.testing.assert_close(found.delta, expected, rtol=1e-9, atol=1e-11)


def test_a_damped_forget_side_edits_what_neither_set_uses() -> None:
    """The last two inputs are used by neither set; their share is mu / (mu + lambda)."""
    tau = normal(OUT, IN, seed=0)
    forget, retain = (torch.zeros(IN, IN).double() for _ in range(2))
    forget[:3, :3], retain[1:4, 1:4] = moment(3, 5, seed=1), moment(3, 5, seed=2)
    mu = 0.5 * forget.diagonal().mean()
    matrix = forget + mu * torch.eye(IN).double() + 2 * retain
    lam = 0.02 * matrix.diagonal().mean()
    found = input_direction(tau, forget, retain, 2.0, 0.02, forget_damping=0.5).delta
    torch.testing.assert_close(found[:, 4:], mu / (mu + lam) * tau[:, 4:], rtol=1e-9, atol=1e-12)
    damped = forget + mu * torch.eye(IN).double()
    expected = tau @ damped @ torch.linalg.inv(damped + 2 * retain + lam * torch.eye(IN).double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    plain = input_direction(tau, forget, retain, 2.0, 0.02).delta
    torch.testing.assert_close(plain[:, 4:], torch.zeros(OUT, 2).double())


@pytest.mark.parametrize("rho", [0.3, 1.0, 40.0])
def test_projected_direction_minimises_the_objective(rho: float) -> None:
    tau, retain = normal(OUT, IN, seed=0), 5 * moment(IN, 4, seed=2)
    unit = retain / retain.diagonal().mean()
    eye = torch.eye(OUT * IN).double()
    expected = brute_force(tau, eye, torch.kron(torch.eye(OUT).double(), unit), rho)
    found = projected_direction(tau, retain, rho)
    torch.testing.assert_close(found.delta, expected, rtol=1e-9, atol=1e-11)
    values = torch.linalg.eigvalsh(torch.eye(IN).double() + rho * unit)
    assert 0.9 * float(values[-1]) <= found.condition <= float(values[-1]) * (1 + 1e-9)


def test_the_limits_of_the_projection() -> None:
    tau, forget, retain = normal(OUT, IN, seed=0), moment(IN, 9, seed=1), moment(IN, 3, seed=2)
    torch.testing.assert_close(projected_direction(tau, retain, 0.0).delta, tau)
    torch.testing.assert_close(projected_direction(tau, 0 * retain, 3.0).delta, tau)
    _, vectors = torch.linalg.eigh(retain)
    unused = vectors[:, : IN - 3]  # three rows span three directions
    off_retain = tau @ unused @ unused.T
    far = projected_direction(tau, retain, 1e8).delta
    torch.testing.assert_close(far, off_retain, rtol=1e-6, atol=1e-6)
    # The same scale on both sides, as the retain set's mean diagonal stands for both.
    forget *= retain.diagonal().mean() / forget.diagonal().mean()
    damped = input_direction(tau, forget, retain, 3e8, 0.0, forget_damping=1e8).delta
    torch.testing.assert_close(
        projected_direction(tau, retain, 3.0).delta, damped, rtol=1e-6, atol=1e-7
    )
    with pytest.raises(DivergenceError, match="make the moments again"):
        projected_direction(tau, retain * torch.nan, 3.0)


@pytest.mark.parametrize("rho", [0.3, 1.0, 40.0])
def test_kron_direction_minimises_the_objective(rho: float) -> None:
    tau = normal(OUT, IN, seed=0)
    c_f, c_r = 3 * moment(IN, 9, seed=1), moment(IN, 4, seed=2)
    b_f, b_r = 1e-6 * moment(OUT, 7, seed=3), moment(OUT, 3, seed=4)
    damping = 0.02
    damped = [m + damping * m.diagonal().mean() * torch.eye(len(m)).double() for m in (b_r, c_r)]
    # The sizes of 1e-6 and 1 are balanced first: the reference solves one dense system.
    expected = brute_force(tau, 1e6 * torch.kron(b_f, c_f), torch.kron(*damped), rho * 1e-6 * 1e6)
    found = kron_direction(tau, c_f, c_r, 1e6 * b_f, b_r, rho, damping)
    torch.testing.assert_close(found.delta, expected, rtol=1e-8, atol=1e-10)
    scaled = kron_direction(tau, c_f, c_r, b_f, 1e-6 * b_r, rho, damping)
    torch.testing.assert_close(scaled.delta, expected, rtol=1e-8, atol=1e-10)


def test_kron_with_equal_output_moments_is_the_input_direction() -> None:
    tau, forget, retain = normal(OUT, IN, seed=0), moment(IN, 9, seed=1), moment(IN, 9, seed=2)
    b = moment(OUT, 8, seed=3)
    found = kron_direction(tau, forget, retain, b, b, 2.0, 1e-12)
    expected = input_direction(tau, forget, retain, 2.0, 1e-12)
    torch.testing.assert_close(found.delta, expected.delta, rtol=1e-7, atol=1e-9)


def test_diagonal_moments_give_the_diagonal_weighting() -> None:
    tau = normal(OUT, IN, seed=0)
    c_f, c_r, b_f, b_r = (
        normal(n, seed=i).square() for i, n in enumerate((IN, IN, OUT, OUT), start=1)
    )
    found = input_direction(tau, c_f.diag(), c_r.diag(), 3.0, 0.0)
    torch.testing.assert_close(found.delta, share(c_f, c_r, 3.0) * tau)
    both = kron_direction(tau, c_f.diag(), c_r.diag(), b_f.diag(), b_r.diag(), 3.0, 0.0)
    expected = share(torch.outer(b_f, c_f), torch.outer(b_r, c_r), 3.0) * tau
    torch.testing.assert_close(both.delta, expected, rtol=1e-9, atol=1e-12)


def test_without_a_retain_set_it_is_the_task_vector_on_the_forget_span() -> None:
    tau, rows = normal(OUT, IN, seed=0), normal(3, IN, seed=1)
    found = input_direction(tau, rows.T @ rows, moment(IN, 9, seed=2), 0.0, 1e-10)
    span = torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(found.delta, tau @ span, rtol=1e-4, atol=1e-5)


def test_strong_damping_leaves_everything_alone() -> None:
    tau, c, b = normal(OUT, IN, seed=0), moment(IN, 9, seed=1), moment(OUT, 9, seed=2)
    assert input_direction(tau, c, c, 1.0, 1e9).delta.norm() < 1e-7 * tau.norm()
    assert kron_direction(tau, c, c, b, b, 1.0, 1e9).delta.norm() < 1e-7 * tau.norm()


def test_a_direction_that_neither_set_uses_is_left_alone() -> None:
    tau = normal(OUT, IN, seed=0)
    used = torch.eye(IN).double()
    used[-1, -1] = 0
    b = moment(OUT, 9, seed=1)
    for found in (
        input_direction(tau, used, used, 1.0, 1e-3),
        kron_direction(tau, used, used, b, b, 1.0, 1e-3),
    ):
        assert float(found.delta[:, -1].abs().max()) == 0
        assert float(found.delta[:, :-1].abs().min()) > 0
    empty = torch.zeros(IN, IN).double()
    assert float(input_direction(tau, empty, empty, 1.0, 0.01).delta.norm()) == 0


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("few", "other"), [(1, 2), (3, 9), (9, 2), (3, 2), (5, 4)])
def test_factors_give_the_dense_direction(few: int, other: int, mu: float) -> None:
    """Both sets with few rows, together as well or not, and one of them."""
    tau, x, y = normal(OUT, IN, seed=0), normal(few, IN, seed=1), normal(other, IN, seed=2)
    forget, retain = (factor(r) if len(r) < IN else r.T @ r for r in (x, y))
    assert is_factor(forget) == (few < IN)
    dense = input_direction(tau, x.T @ x, y.T @ y, 10.0, 0.01, mu)
    found = input_direction(tau, forget, retain, 10.0, 0.01, mu)
    torch.testing.assert_close(found.delta, dense.delta, rtol=1e-9, atol=1e-11)
    assert found.damping == dense.damping
    assert found.condition == pytest.approx(dense.condition, rel=1e-6)
    dense, found = (projected_direction(tau, m, 3.0) for m in (y.T @ y, retain))
    torch.testing.assert_close(found.delta, dense.delta, rtol=1e-9, atol=1e-11)
    assert found.condition == pytest.approx(dense.condition, rel=1e-6)
    b = moment(OUT, 9, seed=3)
    dense, found = (
        kron_direction(tau, f, r, b, b, 3.0, 0.01)
        for f, r in ((x.T @ x, y.T @ y), (forget, retain))
    )
    torch.testing.assert_close(found.delta, dense.delta, rtol=1e-9, atol=1e-11)


def test_factors_without_damping_are_refused() -> None:
    tau = normal(OUT, IN, seed=0)
    forget, retain = (factor(normal(1, IN, seed=seed)) for seed in (1, 2))
    with pytest.raises(DivergenceError, match="larger damping"):
        input_direction(tau, forget, retain, 1.0, 0.0)
    nothing = factor(normal(0, IN, seed=1))
    assert float(input_direction(tau, nothing, nothing, 1.0, 0.01).delta.norm()) == 0
    torch.testing.assert_close(projected_direction(tau, nothing, 3.0).delta, tau)


def test_the_condition_is_that_of_the_matrix() -> None:
    width = 40
    basis = torch.linalg.qr(normal(width, width, seed=0)).Q
    values = torch.logspace(-3, 2, width, dtype=torch.float64)
    matrix = basis @ values.diag() @ basis.T
    matrix = (matrix + matrix.T) / 2
    zero = torch.zeros_like(matrix)
    found = input_direction(normal(OUT, width, seed=1), matrix, zero, 1.0, 0.0)
    assert found.condition == pytest.approx(1e5, rel=0.05)


def test_the_float32_trap_is_guarded() -> None:
    """Inputs in a quarter of the directions, one feature far above the others, tiny damping."""
    width = 256
    tau, plane = normal(OUT, width, seed=0), normal(width // 4, width, seed=1)
    exact: list[Tensor] = []
    for seed in (2, 3):
        coordinates = normal(400, width // 4, seed=seed)
        coordinates[:, 0] += 30
        rows = coordinates @ plane
        exact.append(rows.T @ rows / len(rows))
    forget, retain = (m.float() for m in exact)
    expected = input_direction(tau, exact[0], exact[1], 10.0, 1e-6).delta
    assert float(expected.norm()) < 0.5 * float(tau.norm())

    total = forget + 10 * retain
    total.diagonal().add_(1e-6 * total.diagonal().mean())
    trapped = torch.linalg.solve(total, (tau.float() @ forget).T).T
    assert float((trapped - expected).norm()) > float(expected.norm())

    found = input_direction(tau, forget, retain, 10.0, 1e-6)
    assert found.damping == width * torch.finfo(torch.float32).eps
    wanted = input_direction(tau, exact[0], exact[1], 10.0, found.damping)
    assert float((found.delta - wanted.delta).norm()) < 0.05 * float(wanted.delta.norm())
    # A damping above what float32 moments resolve is used as it is.
    assert input_direction(tau, forget, retain, 10.0, 0.01).damping == 0.01


def test_what_is_not_positive_definite_is_refused() -> None:
    tau, rows = normal(OUT, IN, seed=0), 1e-3 * normal(2, IN, seed=1)
    negative = -torch.eye(IN).double()
    with pytest.raises(DivergenceError, match="larger damping"):
        input_direction(tau, negative, negative, 1.0, 0.01)
    with pytest.raises(DivergenceError, match="larger damping"):
        input_direction(tau, rows, negative, 1.0, 0.01)
    with pytest.raises(DivergenceError, match="larger damping"):
        kron_direction(tau, negative * float("nan"), negative, negative, negative, 1.0, 0.01)
