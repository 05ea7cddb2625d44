"""Edits by others that are measured and not offered: docs/experiments/rivals.md.

    low_curvature     K-FAC edit: without the directions of a weight in which the loss is flat
    collapsed_ascent  RepSelect: a step up the forget loss without what is shared with much else

Both follow their authors' code, github.com/goodfire-ai/memorization_kfac (arXiv 2510.24256) and
`RepSelectSimple` of github.com/filyp/RepSelect (arXiv 2606.17168).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from perta.data.batch import Batch
from perta.models.loss import answer_logits, token_losses
from perta.models.states import decoder_layers
from perta.store.measured.moments import MomentFolder
from perta.store.measured.second_moment import matrix

KEPT_MASS = 0.8
LAST_LAYERS = 1 / 8
COLLAPSED, LORA_RATE = 512, 0.01
STEP = 0.01
"""Length of a step, as a share of the weights'."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def steep_part(weight: Tensor, inputs: Tensor, outputs: Tensor, mass: float) -> Tensor:
    """A weight (out, in) on as few pairs of eigenvectors of both moments as have a share of mass.

    The mass of a pair is the product of its eigenvalues. Everything is float64.
    """
    (a, v), (g, u) = (torch.linalg.eigh(m.double()) for m in (inputs, outputs))
    products = torch.outer(g.clamp(min=0), a.clamp(min=0))
    sums, order = products.flatten().sort(descending=True)
    sums = sums.cumsum(0)
    count = int((sums < mass * sums[-1]).sum()) + 1
    kept = torch.zeros_like(sums).index_fill(0, order[:count], 1.0).view_as(products)
    part: Tensor = u @ (kept * (u.T @ weight.double() @ v)) @ v.T
    return part


@torch.no_grad()
def low_curvature(model: Any, moments: MomentFolder) -> None:
    """Reduce the MLPs of the last layers to where the retain loss is steep, in place.

    `moments` are those of inputs and output gradients. The code names layers one by one, for a
    model of 32 those from 28 on; here the last eighth.
    """
    layers = decoder_layers(model)
    for layer in layers[len(layers) - math.ceil(LAST_LAYERS * len(layers)) :]:
        chosen = {id(m) for n, m in layer.named_modules() if n.endswith(PROJECTIONS)}
        for name, module in model.named_modules():
            if id(module) in chosen:
                entry = f"{name}.weight"
                inputs = matrix(moments.input_moment(entry))
                outputs = matrix(moments.output_moment(entry))
                module.weight.copy_(steep_part(module.weight, inputs, outputs, KEPT_MASS))


def collapsed(gradient: Tensor, count: int) -> Tensor:
    """A gradient (out, in) whose largest singular directions are divided by how large they are.

    On either side, each of the first `count` is divided by its singular value over the last's.
    """
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    s = s[:count]
    taken = 1 - s[-1] / s
    v, u = vt[:count].T, u[:, :count]
    gradient = gradient - (gradient @ v * taken) @ v.T
    rest: Tensor = gradient - u @ (taken.unsqueeze(1) * (u.T @ gradient))
    return rest


def collapsed_ascent(model: Any, batches: Sequence[Batch]) -> None:
    """A step up the forget loss along the collapsed gradient of the MLPs' weights, in place.

    The gradient is taken where an adapter has learned the forget set for an epoch of plain descent,
    which is taken off again. It is tiny where the rows are known by heart, and rounding would eat
    a step in proportion, so the step has a length of its own: its strength is looked for anyway.
    """
    adapted = get_peft_model(model, LoraConfig(target_modules=list(PROJECTIONS)))
    tuned = [p for name, p in adapted.named_parameters() if "lora_" in name]
    for batch in batches:
        gradients = torch.autograd.grad(_mean_loss(adapted, batch), tuned)
        with torch.no_grad():
            for parameter, gradient in zip(tuned, gradients, strict=True):
                parameter.sub_(gradient, alpha=LORA_RATE)
    weights = [
        module.base_layer.weight
        for name, module in adapted.named_modules()
        if name.endswith(PROJECTIONS)
    ]
    for weight in weights:
        weight.requires_grad_(True)
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        gradients = torch.autograd.grad(_mean_loss(adapted, batch), weights)
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient)
    adapted.unload()
    with torch.no_grad():
        steps = [collapsed(total, COLLAPSED) for total in sums]
        norms = [
            torch.cat([t.flatten() for t in part]).double().norm() for part in (weights, steps)
        ]
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step, alpha=float(STEP * norms[0] / norms[1]))
    model.requires_grad_(True)


def _mean_loss(model: Any, batch: Batch) -> Tensor:
    return token_losses(answer_logits(model, batch)).mean()
