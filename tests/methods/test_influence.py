"""Influence removal against an explicit Hessian and against problems solved by hand."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import World
from helpers import tiny_llama
from perta.data.batch import IGNORE, Encoded, bucketed
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.errors import CheckpointMismatchError, ConfigError, DivergenceError, EmptyDatasetError
from perta.methods.influence import (
    _conjugate_gradients,
    _derivative,
    _twice_differentiable,
    remove_influence,
)
from perta.methods.objectives import Influence
from perta.models.load import load_model, load_tokenizer
from perta.models.loss import losses_of
from perta.options import ComputeConfig, DataConfig
from perta.stages.settings import TrainConfig
from perta.stages.train import train_checkpoint
from perta.store.record import read_manifest


def examples(number: int, seed: int) -> tuple[Encoded, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(number):
        ids = torch.randint(3, 30, (6 + row % 2,), generator=generator).tolist()
        found.append(Encoded(tuple(ids), (*[IGNORE] * 3, *ids[3:]), row + 1))
    return tuple(found)


FORGET, RETAIN = examples(2, 1), examples(3, 2)


def adapted(seed: int = 0) -> Any:
    """A tiny model with a LoRA adapter of 48 weights, none of them zero, in float64.

    The library computes norms, attention and rotations in float32 whatever the type: what is
    compared below agrees to about 1e-4 of its size.
    """
    torch.manual_seed(seed)
    model = tiny_llama(vocab=32, seed=seed).double()
    settings = LoraConfig(
        r=1, target_modules=["v_proj"], layers_to_transform=[0], task_type="CAUSAL_LM"
    )
    found: Any = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape).double())
    return found


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def loss_by_hand(model: Any, example: Encoded) -> Tensor:
    log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return -torch.stack(
        [log_probs[t - 1, label] for t, label in enumerate(example.labels) if label != IGNORE]
    ).mean()


def gradient_by_hand(model: Any, chosen: tuple[Encoded, ...], create: bool = False) -> Tensor:
    loss = torch.stack([loss_by_hand(model, example) for example in chosen]).sum() / 5
    return flat(torch.autograd.grad(loss, trained(model), create_graph=create))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    """Of the mean loss at the adapter, (P, P), one row after the other."""
    model = adapted()
    with _twice_differentiable(model):
        gradient = gradient_by_hand(model, (*FORGET, *RETAIN), create=True)
        rows = [
            flat(torch.autograd.grad(value, trained(model), retain_graph=True))
            for value in gradient
        ]
    return torch.stack(rows)


# --- conjugate gradients ------------------------------------------------------------------------


def spd(size: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_a_system_is_solved_in_at_most_as_many_steps_as_unknowns() -> None:
    matrix, wanted = spd(12), torch.linspace(-1, 2, 12, dtype=torch.float64)
    found = _conjugate_gradients(lambda v: matrix @ v, wanted, tolerance=1e-10, iterations=30)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, wanted), rtol=1e-7, atol=1e-9)
    assert found.iterations <= 14
    measured = ((matrix @ found.x - wanted).norm() / wanted.norm()).item()
    assert found.residual == pytest.approx(measured, rel=1e-3, abs=1e-13)
    again = _conjugate_gradients(lambda v: matrix @ v, 0 * wanted, tolerance=1e-6, iterations=3)
    assert not again.x.any()


def test_what_cannot_be_solved_is_refused_with_a_cure() -> None:
    wanted = torch.ones(12, dtype=torch.float64)
    with pytest.raises(
        DivergenceError, match=r"did not converge.*after 3.*iterations or tolerance"
    ):
        _conjugate_gradients(lambda v: spd(12) @ v, wanted, tolerance=1e-8, iterations=3)
    indefinite = torch.diag(torch.linspace(-2, 1, 12, dtype=torch.float64))
    with pytest.raises(DivergenceError, match=r"curvature -0\.5.*influence:damping"):
        _conjugate_gradients(lambda v: indefinite @ v, wanted, tolerance=1e-8, iterations=30)


def test_removal_is_exact_where_the_forgotten_loss_is_linear() -> None:
    """Retain loss ½ θᵀAθ - bᵀθ, forget loss cᵀθ: both minima are known."""
    a, b = spd(6, 1), torch.arange(6, dtype=torch.float64)
    c = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
    full, retrained = torch.linalg.solve(a, b - c), torch.linalg.solve(a, b)
    # n = 2: the Hessian of the mean loss is A/2, the forget gradient over n is c/2.
    step = _conjugate_gradients(lambda v: a @ v / 2, c / 2, tolerance=1e-12, iterations=50).x
    torch.testing.assert_close(full + step, retrained, rtol=1e-8, atol=1e-8)


# --- on a language model ------------------------------------------------------------------------


def test_gradient_and_hessian_products_are_those_of_the_loss(hessian: Tensor) -> None:
    model = adapted()
    assert close(hessian, hessian.T)
    vector = torch.randn(len(hessian), dtype=torch.float64)
    for size in (1, 5):
        with _twice_differentiable(model):
            everything = iter(bucketed((*FORGET, *RETAIN), size, 0))
            found = _derivative(model, trained(model), everything, 5, vector)
            gradient = _derivative(model, trained(model), iter(bucketed(FORGET, size, 0)), 5)
        assert close(found, hessian @ vector)
        assert close(gradient, gradient_by_hand(model, FORGET))


def test_the_step_solves_the_damped_system(hessian: Tensor) -> None:
    model = adapted()
    before = flat(trained(model)).detach().clone()
    gradient = gradient_by_hand(model, FORGET)
    damping = 0.05 - float(torch.linalg.eigvalsh(hessian)[0])
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    expected = torch.linalg.solve(damped, gradient)
    removed = remove_influence(
        model, FORGET, RETAIN, damping=damping, pad=0, tolerance=1e-5, iterations=300, batch_size=2
    )
    step = flat(trained(model)).detach() - before
    assert close(step, expected, 1e-2)
    # A damping taken for another, or none, would be seen.
    assert not close(
        step, torch.linalg.solve(damped + 0.05 * damping * torch.eye(len(damped)), gradient), 1e-2
    )
    assert removed.residual <= 1e-5
    assert removed.step_norm == pytest.approx(expected.norm().item(), rel=1e-2)
    assert removed.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-3)
    measured = losses_of(model, FORGET, batch_size=1, pad=0)
    assert removed.loss_after == pytest.approx(sum(measured) / 2, rel=1e-4)
    assert model.config._attn_implementation != "eager"


def test_negative_curvature_and_empty_sets_are_refused(hessian: Tensor) -> None:
    assert float(torch.linalg.eigvalsh(hessian)[0]) < 0
    with pytest.raises(DivergenceError, match="influence:damping"):
        remove_influence(
            adapted(), FORGET, RETAIN, damping=0.0, pad=0, tolerance=1e-9, iterations=300
        )
    with pytest.raises(EmptyDatasetError):
        remove_influence(adapted(), (), RETAIN, damping=1.0, pad=0)
    frozen = tiny_llama(vocab=32).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable weights"):
        remove_influence(frozen, FORGET, RETAIN, damping=1.0, pad=0)


# --- the stage -----------------------------------------------------------------------------------


def test_the_stage_edits_the_adapters_layers_only(
    world: World, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))

    def config(damping: float) -> TrainConfig:
        return TrainConfig(
            method=Influence(damping=damping, tolerance=1e-2),
            full=str(adapter), forget=str(world.forget), retain=str(world.retain),
            output=tmp_path / "out",
        )  # fmt: skip

    with pytest.raises(DivergenceError, match="Nothing was written"):
        train_checkpoint(config(0.0))
    assert not (tmp_path / "out").exists()
    output = train_checkpoint(config(1.0))
    manifest = read_manifest(output)
    assert manifest is not None
    assert set(manifest["inputs"]) == {"full", "adapter", "forget", "retain"}
    found = manifest["influence"]
    assert found["residual"] <= 1e-2
    assert found["loss_after"] > found["loss_before"]
    base = dict(load_model(world.base, ComputeConfig()).named_parameters())
    done = load_model(output, ComputeConfig())
    changed = {n for n, p in done.named_parameters() if not torch.equal(p, base[n])}
    assert changed == {n for n in base if "q_proj" in n or "v_proj" in n}
    tokenizer = load_tokenizer(output)
    encoded = encode_examples(load_examples(world.forget), tokenizer, DataConfig()).encoded
    losses = losses_of(done, encoded, batch_size=4, pad=0)
    assert sum(losses) / len(losses) == pytest.approx(found["loss_after"], rel=1e-3)
    assert "| damping lambda | 1 |" in (output / "README.md").read_text("utf-8")


def test_an_adapter_that_lacks_a_tensor_is_refused(
    world: World, adapter: Path, tmp_path: Path
) -> None:
    file = shutil.copytree(adapter, tmp_path / "cut") / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)
    config = TrainConfig(
        method="influence", full=str(tmp_path / "cut"), forget=str(world.forget),
        retain=str(world.retain), output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match="asks for"):
        train_checkpoint(config)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_one_use_of_a_tied_weight_is_refused(world: World, tmp_path: Path) -> None:
    model: Any = load_model(world.base, ComputeConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        model.save_pretrained(tmp_path / "head")
    config = TrainConfig(
        method="influence", full=str(tmp_path / "head"), base=str(world.base),
        forget=str(world.forget), retain=str(world.retain), output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="one weight for both"):
        train_checkpoint(config)
