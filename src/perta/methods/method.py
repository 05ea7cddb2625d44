"""What a method is: a row of the table, and the block of a tensor it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perta.errors import ConfigError
from perta.methods.diagonal import block_seed
from perta.methods.task_vectors import dare, mean

Side = Literal["forget", "retain"]
Directions = Literal["forget - base", "full - base", "full"]
Combine = Callable[[Sequence[Tensor], "Block"], Tensor]
Scores = Callable[[Sequence[Tensor], "Block"], Sequence[Tensor]]


_DIRECTIONS: Mapping[Directions, str] = {
    "forget - base": "(θ_f − θ₀)",
    "full - base": "(θ_full − θ₀)",
    "full": "θ_full",
}
_NOTHING = torch.empty(0)


@dataclass
class Block:
    """What a method may look at to weight one block of one tensor.

    Attributes:
        forget: importance on the forget set, float32, non-negative and finite; empty where the
            method needs none, as `retain` is.
        retain: importance on the retain set, same shape.
        rho: weight of the retain importance against the forget importance.
        constant: W of the method `constant`.
        place: seed, tensor name and first element, for methods that draw: see `block_seed`.
        task_vector: the direction, set when it is known and W is asked for.
        cuts: for methods that rank weights, the smallest score kept, one for each score.
        drop: share of a task vector that `dare` drops.
        selection: quotient of importances above which `ssd` dampens.
        dampening: strength of `ssd` on a selected weight.
        forget_share: share of the examples of both sets that belongs to the forget set.
    """

    forget: Tensor = _NOTHING
    retain: Tensor = _NOTHING
    rho: float = 1.0
    constant: float = 0.5
    place: tuple[int, str, int] = (0, "", 0)
    task_vector: Tensor = _NOTHING
    cuts: tuple[float, ...] = ()
    drop: float = 0.9
    selection: float = 10.0
    dampening: float = 1.0
    forget_share: float = 0.5


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: what users type.
        summary: one line on what it does.
        done: what was done, a sentence or two for people who have not heard of any method.
        formula: W, with I_f and I_r the importance on the forget and the retain set.
        source: where it comes from.
        needs_importance: whether importance is used.
        default_order: order p of the importance where the user gives none.
        any_order: whether the user may choose the order.
        weighting: block -> W of its shape, or one number for all of it.
        default_rho: weight of the retain side where the user gives none.
        default_damping: damping of the solve where the user gives none; None where there is none.
        default_forget_damping: damping of the forget side where the user gives none.
        default_scaling_coef: strength where the user gives none.
        moments: whether the direction is weighted by second moments of layers instead of W;
            `input` and `project`: by those of inputs, `kron`: of output gradients as well.
        sides: sets whose importance or moments are used, where any are.
        reduction: how the importance must have been reduced; either way without it.
        importance_at: model at which importance and moments are measured where the user gives
            none.
        weighs_sets: whether the number of examples in each set is used.
        direction: what is weighted and subtracted: a task vector, or something of θ_full itself.
        combine: task vectors -> the direction; it may overwrite them.
        min_task_vectors: number of forget checkpoints the method makes sense with.
        scores: for methods that keep the largest of something over all weights: task vectors ->
            what is ranked, non-negative, one tensor for each ranking.
        default_keep: share of the weights to keep, where the user gives none.
        retain_vector: whether β · (θ_r − θ₀) is added.
        default_layers: layers that are edited where the user gives none.
        searched: whether `perta unlearn` searches for the strength where the user gives none and
            there are examples to keep.
    """

    name: str
    summary: str
    done: str
    formula: str
    source: str
    needs_importance: bool = False
    default_order: float = 1.0
    any_order: bool = False
    weighting: Callable[[Block], Tensor | float] = lambda _block: 1.0
    default_rho: float = 1.0
    default_damping: float | None = None
    default_forget_damping: float = 0.0
    default_scaling_coef: float = 1.0
    moments: Literal["input", "kron", "project"] | None = None
    sides: tuple[Side, ...] = ("forget", "retain")
    reduction: Literal["mean_of_power", "abs_of_mean"] | None = None
    importance_at: Literal["base", "full"] = "base"
    weighs_sets: bool = False
    direction: Directions = "forget - base"
    combine: Combine = lambda vectors, _block: mean(vectors)
    min_task_vectors: int = 1
    scores: Scores | None = None
    default_keep: float = 1.0
    retain_vector: bool = False
    default_layers: Literal["mlp", "all"] = "all"
    searched: bool = False

    def check_place(self, at: str | None) -> None:
        """Stop at importance at the base where the method is defined on the full checkpoint.

        Args:
            at: model at which importance is to be measured; None for the method's own.

        Raises:
            ConfigError: it is the wrong one.
        """
        if self.importance_at == "full" and at == "base":
            raise ConfigError(
                f"`{self.name}` is defined on importance at the full checkpoint; leave the place "
                "to the method."
            )

    @property
    def settings(self) -> frozenset[str]:
        """Names of the settings that this method looks at."""
        used = {
            "order": self.needs_importance,
            "rho": "rho" in self.formula,
            "damping": self.default_damping is not None,
            "forget_damping": self.moments == "input",
            "granularity": self.needs_importance,
            "constant": "--constant" in self.formula,
            "retain_coef": self.retain_vector,
            "keep": self.scores is not None,
            "drop": self.combine is drop_at_random,
            "selection": self.weighs_sets,
            "dampening": self.weighs_sets,
        }
        always = {"scaling_coef", "layers", "include", "exclude", "weighting_seed"}
        return frozenset(always | {name for name, is_used in used.items() if is_used})

    @property
    def equation(self) -> str:
        """The edit as an equation."""
        step = "Δ" if self.moments else f"W ⊙ {_DIRECTIONS[self.direction]}"
        added = " + β · (θ_r − θ₀)" if self.retain_vector else ""
        return f"θ_u = θ_full − α · {step}{added}"


def drop_at_random(vectors: Sequence[Tensor], block: Block) -> Tensor:
    """`dare` on one block, its draws seeded by place."""
    seed, name, begin = block.place
    # Every vector draws for itself, and every element for its place in the tensor.
    seeds = [block_seed(seed, name, index) for index in range(len(vectors))]
    return dare(vectors, block.drop, seeds, begin)
