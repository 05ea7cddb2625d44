"""The share W of each weight that belongs to forgetting: one function and one table row a method.

The edit is θ_full − α · W ⊙ τ, with τ = θ_f − θ₀ or another direction, for one method plus
β · (θ_r − θ₀). A method says what W is, what the direction is and how several task vectors become
one. Functions take float32 tensors of any shape, elementwise aligned, and return a new tensor of
that shape.

Source: Cai et al., "Per-parameter Task Arithmetic for Unlearning in Large Language Models",
arXiv 2601.22030, for `perta*`, from its public texts; the formulas are our reading of them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perta.errors import ConfigError
from perta.task_vectors import agreement, dare, mean, ties

Side = Literal["forget", "retain"]
Directions = Literal["forget - base", "full - base", "full"]
Combine = Callable[[Sequence[Tensor], "Block"], Tensor]
Scores = Callable[[Sequence[Tensor], "Block"], Sequence[Tensor]]

_PERTA = "Cai et al., arXiv 2601.22030"
_STRUCTURED = "this project; curvature as in RegMean, arXiv 2212.09849, and K-FAC, arXiv 1503.05671"
_TASK_ARITHMETIC = "Ilharco et al., arXiv 2212.04089"


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
            "drop": self.combine is _dare,
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


def share(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Share of the importance that belongs to forgetting.

    W = I_f / (I_f + ρ I_r), computed as 1 / (1 + ρ · (I_r / I_f)). Nothing is added before the
    division, so importance near the ends of the float32 range (1e-40 or 1e38; high orders get
    there) loses no digits. Shares too small to move a weight may come out as 0.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W in [0, 1]; 0 where both are 0: such a weight is left alone.
    """
    if rho == 0:
        return (forget > 0).to(forget.dtype)
    weighting = torch.div(retain, forget)
    if rho != 1:
        weighting.mul_(rho)
    weighting.add_(1).reciprocal_()
    # 0/0 is NaN up to here; x/0 was Inf and has become 0 by itself. A sum finds out whether there
    # is any for a third of what replacing costs.
    return weighting.nan_to_num_(nan=0.0) if math.isnan(weighting.sum()) else weighting


def ratio(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Forget importance in units of retain importance, unbounded.

    W = I_f / (ρ I_r). Where ρ I_r is 0 there is no such unit: W is 1 there if I_f > 0, the
    plain task vector on weights that the retain set does not use, and 0 if I_f is 0.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W >= 0; Inf where the quotient exceeds float32.
    """
    weighting = torch.div(forget, retain).div_(rho) if rho else torch.zeros_like(forget)
    unused = retain == 0 if rho else torch.ones_like(retain, dtype=torch.bool)
    return torch.where(unused, (forget > 0).to(forget.dtype), weighting)


def clipped_ratio(forget: Tensor, retain: Tensor, rho: float) -> Tensor:
    """Forget importance in units of retain importance, at most 1.

    W = min(1, I_f / (ρ I_r)); where ρ I_r is 0, W is 1 if I_f > 0 and 0 otherwise.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        rho: ρ >= 0.

    Returns:
        W in [0, 1].
    """
    return ratio(forget, retain, rho).clamp_(max=1)


def saliency(gradient: Tensor, task_vector: Tensor) -> Tensor:
    """First-order change of the forget loss that each weight's step makes: |g_f ⊙ τ|.

    Args:
        gradient: |g_f|, magnitude of the mean gradient on the forget set.
        task_vector: τ, same shape.

    Returns:
        Non-negative, same shape.
    """
    return (gradient * task_vector).abs_()


def dampened(
    forget: Tensor, retain: Tensor, forget_share: float, selection: float, dampening: float
) -> Tensor:
    """Share to take off weights that matter far more to the forget set than to all data.

    With the importance on all data I = s I_f + (1 − s) I_r,

        W = 1 − min(λ I / I_f, 1)  where I_f > selection · I,  otherwise 0.

    Quotients first, so that importance near the ends of the float32 range loses no digits.

    Args:
        forget: I_f, float32, non-negative and finite.
        retain: I_r, same shape.
        forget_share: s, share of all examples that belongs to the forget set.
        selection: α of the paper, > 0.
        dampening: λ of the paper, >= 0.

    Returns:
        W in [0, 1]; 0 where I_f is 0.
    Source: Foster et al., arXiv 2308.07707, equations 3 to 5.
    """
    quotient = torch.div(retain, forget).mul_(1 - forget_share).add_(forget_share)
    # 0/0 is NaN, compares as false, and is left alone like all that is not selected.
    selected = quotient * selection < 1
    return torch.where(selected, 1 - (quotient * dampening).clamp_(max=1), 0.0)


def shuffle(weighting: Tensor, seed: int) -> Tensor:
    """Permute values at random: same distribution, no relation to the weights they fall on.

    Args:
        weighting: any shape.
        seed: seed of the permutation.

    Returns:
        The same values in another order, same shape.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weighting.numel(), generator=generator)
    return weighting.reshape(-1)[order].reshape(weighting.shape)


def block_seed(seed: int, name: str, start: int) -> int:
    """Seed of one block of one tensor.

    It depends on the place of the block alone, so results do not depend on which thread or
    machine works on it.

    Args:
        seed: the user's seed.
        name: the tensor.
        start: the block's first element, counted in the flat tensor.

    Returns:
        An integer in [0, 2^63).
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{start}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def get_method(name: str) -> Method:
    """Find a method by name; `_` may stand for `-`.

    Args:
        name: the method.

    Returns:
        Its row.

    Raises:
        ConfigError: there is no such method.
    """
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), METHODS, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(f"Unknown method `{name}`; {hint}There are: {', '.join(METHODS)}.")
    return method


def importance_order(method: Method, order: float | None) -> float:
    """Order of the importance a method is to be run with.

    Args:
        method: row of the table.
        order: the user's choice, if any.

    Returns:
        The order p.

    Raises:
        ConfigError: the method has one order of its own, and another was chosen.
    """
    if order is None or order == method.default_order or not method.needs_importance:
        return method.default_order
    if not method.any_order:
        raise ConfigError(
            f"`{method.name}` is defined by order {method.default_order:g}, but --order is "
            f"{order:g}. Leave it out, or use `--method perta --order {order:g}`."
        )
    return order


def _dare(vectors: Sequence[Tensor], block: Block) -> Tensor:
    seed, name, begin = block.place
    # Every vector draws for itself, and every element for its place in the tensor.
    seeds = [block_seed(seed, name, index) for index in range(len(vectors))]
    return dare(vectors, block.drop, seeds, begin)


def _table(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _table(
    Method(
        name="tv",
        summary="plain task arithmetic: subtract the whole task vector",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, all by the same factor α (task vector negation).",
        formula="W = 1",
        source=_TASK_ARITHMETIC,
    ),
    Method(
        name="perta-grad",
        summary="share of the gradient magnitude that belongs to forgetting",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, in proportion to how much it matters for them rather than for the "
        "examples to keep. How much a weight matters is the mean absolute gradient over "
        "examples.",
        formula="W = I_f / (I_f + rho I_r), order 1",
        source=_PERTA,
        needs_importance=True,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta-fisher",
        summary="share of the diagonal Fisher information that belongs to forgetting",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, in proportion to how much it matters for them rather than for the "
        "examples to keep. How much a weight matters is the mean squared gradient over "
        "examples (diagonal Fisher information).",
        formula="W = I_f / (I_f + rho I_r), order 2",
        source=_PERTA,
        needs_importance=True,
        default_order=2.0,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta",
        summary="the general form: the share at any order; near 0 it is 1/2, far up a hard mask",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, in proportion to how much it matters for them rather than for the "
        "examples to keep. How much a weight matters is the mean over examples of the "
        "absolute gradient to the power p.",
        formula="W = I_f / (I_f + rho I_r), order p",
        source=_PERTA,
        needs_importance=True,
        any_order=True,
        weighting=lambda block: share(block.forget, block.retain, block.rho),
    ),
    Method(
        name="perta-input",
        summary="the share in directions of layer inputs; edits linear layers only",
        done="The weights of linear layers were moved back along what learning the removed "
        "examples alone does to them, most in the directions of the layers' inputs that the "
        "removed examples use and the examples to keep do not.",
        formula="direction tau (C_f + mu I) (C_f + rho C_r + (lambda + mu) I)^-1",
        source=_STRUCTURED,
        default_rho=100.0,
        default_damping=0.01,
        default_forget_damping=30.0,
        default_scaling_coef=2.3,
        moments="input",
    ),
    Method(
        name="perta-project",
        summary="what layer inputs of the retain set do not see of tau; edits the MLPs' layers",
        done="The weights of linear layers were moved back along what learning the removed "
        "examples alone does to them, except in the directions of the layers' inputs that "
        "the examples to keep use.",
        formula="direction tau (I + rho C_r / c)^-1",
        source="this project; a soft form of the projection of AlphaEdit, arXiv 2410.02355",
        default_rho=3.0,
        default_scaling_coef=2.7,
        moments="project",
        default_layers="mlp",
        searched=True,
        sides=("retain",),
    ),
    Method(
        name="perta-kron",
        summary="the share in the basis where input and gradient moments are diagonal",
        done="The weights of linear layers were moved back along what learning the removed "
        "examples alone does to them, most in the directions of the layers' inputs and "
        "output gradients that matter for the removed examples and not for those to keep.",
        formula="W = b_f c_f / (b_f c_f + rho b_r c_r), rotated",
        source=_STRUCTURED,
        default_rho=10.0,
        default_damping=0.01,
        default_scaling_coef=1.5,
        moments="kron",
    ),
    Method(
        name="ratio",
        summary="forget importance over retain importance, unbounded",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, multiplied by how much it matters for them over how much it matters "
        "for the examples to keep, without a bound.",
        formula="W = I_f / (rho I_r)",
        source=f"another reading of {_PERTA}",
        needs_importance=True,
        any_order=True,
        weighting=lambda block: ratio(block.forget, block.retain, block.rho),
    ),
    Method(
        name="clipped-ratio",
        summary="forget importance over retain importance, at most 1",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, multiplied by how much it matters for them over how much it matters "
        "for the examples to keep, at most by 1.",
        formula="W = min(1, I_f / (rho I_r))",
        source=f"another reading of {_PERTA}",
        needs_importance=True,
        any_order=True,
        weighting=lambda block: clipped_ratio(block.forget, block.retain, block.rho),
    ),
    Method(
        name="constant",
        summary="the same share everywhere (ablation)",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, all by the same share (an ablation).",
        formula="W = --constant",
        source=f"ablation, {_PERTA}",
        weighting=lambda block: block.constant,
    ),
    Method(
        name="random",
        summary="the values of `perta`, shuffled within blocks of each tensor (ablation)",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, by shares that were shuffled at random within each tensor (an "
        "ablation).",
        formula="W = shuffle(I_f / (I_f + rho I_r)), order p",
        source=f"ablation, {_PERTA}",
        needs_importance=True,
        any_order=True,
        weighting=lambda block: shuffle(
            share(block.forget, block.retain, block.rho), block_seed(*block.place)
        ),
    ),
    Method(
        name="msa",
        summary="model state arithmetic: plain task arithmetic, and a retain vector added",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, and forward along what learning some of the examples to keep alone "
        "does to it.",
        formula="W = 1; + beta (theta_r - theta_0)",
        source="Rezaei et al., arXiv 2506.20941",
        retain_vector=True,
    ),
    Method(
        name="selective",
        summary="only the weights whose step changes the forget loss most",
        done="The weights whose step changes the loss on the removed examples most were moved "
        "back along what learning those examples alone does to them; all others stayed as "
        "they were.",
        formula="W = top-k mask of |g_f tau|, k = --keep",
        source="our reading of selective task arithmetic, arXiv 2411.16139",
        needs_importance=True,
        weighting=lambda block: (
            saliency(block.forget, block.task_vector) >= block.cuts[0]
        ).float(),
        sides=("forget",),
        reduction="abs_of_mean",
        scores=lambda vectors, block: [saliency(block.forget, mean(vectors))],
        default_keep=0.1,
    ),
    Method(
        name="ssd",
        summary="selective synaptic dampening: shrink weights that matter to the forget set",
        done="The weights that matter much more for the removed examples than for all examples "
        "were shrunk towards zero; all others stayed as they were. No model was tuned.",
        formula="direction theta_full, W = 1 - min(lambda I / I_f, 1) where I_f > --selection I",
        source="Foster et al., arXiv 2308.07707",
        needs_importance=True,
        default_order=2.0,
        weighting=lambda block: dampened(
            block.forget, block.retain, block.forget_share, block.selection, block.dampening
        ),
        importance_at="full",
        weighs_sets=True,
        direction="full",
    ),
    Method(
        name="ties",
        summary="the largest values of each task vector, signs elected, averaged",
        done="Every edited weight was moved back along what learning the removed examples alone "
        "does to it, where only the largest changes count and only those with the sign that "
        "prevails among the models tuned on them.",
        formula="direction ties(tau_1, ...), W = 1",
        source="Yadav et al., arXiv 2306.01708",
        combine=lambda vectors, block: ties(vectors, block.cuts),
        scores=lambda vectors, _block: [vector.abs_() for vector in vectors],
        default_keep=0.2,
    ),
    Method(
        name="dare",
        summary="a random part of the task vector, rescaled to the same mean",
        done="A random part of the weights was moved back along what learning the removed "
        "examples alone does to them, further by as much as the part is smaller; all others "
        "stayed as they were.",
        formula="direction tau * (kept with 1 - p) / (1 - p), W = 1",
        source="Yu et al., arXiv 2311.03099",
        combine=_dare,
    ),
    Method(
        name="negmerge",
        summary="mean of several task vectors where the signs of all agree",
        done="The weights that all models tuned on the removed examples alone move the same way "
        "were moved back by the mean of those moves; all others stayed as they were.",
        formula="direction mean(tau_1, ...) where signs agree, W = 1",
        source="Kim et al., arXiv 2410.05583",
        combine=lambda vectors, _block: agreement(vectors),
        min_task_vectors=2,
    ),
    Method(
        name="interpolate",
        summary="back towards the base model everywhere (control)",
        done="Every edited weight was moved back towards the base model by the same factor α (a "
        "control): what was learned of all examples is weakened alike. No model was tuned.",
        formula="direction theta_full - theta_0, W = 1",
        source="control",
        direction="full - base",
    ),
)
