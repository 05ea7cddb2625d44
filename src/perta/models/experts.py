"""Parts of a model in memory: blocks, stacked experts, and forward passes replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a row of, as far as the library marks them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' stacked experts, with weights (E, …, …)."""
    return (
        all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
        and all(isinstance(getattr(module, n, None), nn.Parameter) for n in expert_names(module))
        and not getattr(module, "_is_expert_parallel", False)
    )


def expert_names(module: Any) -> tuple[str, str]:
    """Parameters of stacked experts: what reads the tokens, and what makes the result."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
