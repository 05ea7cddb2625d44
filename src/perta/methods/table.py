"""Every method that edits weights: the table, its defaults, and finding a row by name."""

from __future__ import annotations

import difflib
from dataclasses import replace

from perta.errors import ConfigError
from perta.methods.diagonal import (
    block_seed,
    clipped_ratio,
    dampened,
    ratio,
    saliency,
    share,
    shuffle,
)
from perta.methods.method import Method, drop_at_random
from perta.methods.task_vectors import agreement, mean, ties
from perta.options import WeightingConfig

_PERTA = "Cai et al., arXiv 2601.22030"
_STRUCTURED = "this project; curvature as in RegMean, arXiv 2212.09849, and K-FAC, arXiv 1503.05671"
_TASK_ARITHMETIC = "Ilharco et al., arXiv 2212.04089"


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
        combine=drop_at_random,
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


def with_defaults(weighting: WeightingConfig) -> WeightingConfig:
    """The settings with the method's own where the user gave none.

    Args:
        weighting: method and its settings.

    Returns:
        The settings to use and to record.

    Raises:
        ConfigError: there is no such method.
    """
    method = get_method(weighting.method)
    rho, alpha, keep = weighting.rho, weighting.scaling_coef, weighting.keep
    damping, mu = weighting.damping, weighting.forget_damping
    return replace(
        weighting,
        rho=method.default_rho if rho is None else rho,
        damping=method.default_damping if damping is None else damping,
        forget_damping=method.default_forget_damping if mu is None else mu,
        scaling_coef=method.default_scaling_coef if alpha is None else alpha,
        keep=method.default_keep if keep is None else keep,
        # Patterns that say what to edit are not cut short by a default.
        layers=weighting.layers or ("all" if weighting.include else method.default_layers),
    )


def at_strength(weighting: WeightingConfig, scaling_coef: float) -> WeightingConfig:
    """The settings at another strength α; β keeps its proportion to it.

    So an edit at any strength is the same direction, and a search needs to try α alone. β counts
    as given for the configured α, or for the method's own where that is `auto` or 0.

    Args:
        weighting: method and its settings.
        scaling_coef: α.

    Returns:
        The settings with both.
    """
    if not get_method(weighting.method).retain_vector:
        return replace(weighting, scaling_coef=scaling_coef)
    configured = with_defaults(weighting).scaling_coef
    if not isinstance(configured, float | int) or configured == 0:
        configured = get_method(weighting.method).default_scaling_coef
    retain_coef = weighting.retain_coef * scaling_coef / configured
    return replace(weighting, scaling_coef=scaling_coef, retain_coef=retain_coef)


def refuse_auto(weighting: WeightingConfig) -> None:
    """Stop at `--scaling-coef auto`, which an edit alone cannot resolve."""
    if weighting.scaling_coef == "auto":
        raise ConfigError(
            "--scaling-coef auto needs the examples: use `perta unlearn`, or give a number."
        )
