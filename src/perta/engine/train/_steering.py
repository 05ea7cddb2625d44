"""Layers and activations of a model, for `rmu`, which steers one layer's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perta.data.batch import Batch
from perta.errors import ConfigError
from perta.methods.objectives import labelled_positions, steered_layer
from perta.models.states import decoder_layers
from perta.progress import warn

# The second matrix of a layer's MLP, in the families of the transformers library.
_DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h")
_TRAINED_LAYERS = 3


def chosen_layer(model: Any, chosen: int) -> int:
    """The layer to steer, from 0: the user's choice, or the default where it is -1."""
    layers = len(decoder_layers(model))
    layer = steered_layer(layers) if chosen < 0 else chosen
    if layer >= layers:
        raise ConfigError(
            f"`rmu`: steering_layer is {layer}, but the model has {layers} layers, counted from 0."
        )
    return layer


def train_only_down_projections(model: Any, layer: int) -> tuple[str, ...]:
    """Freeze all but the MLP outputs of a layer and the two below it; their modules' names."""
    chosen = {
        id(module)
        for block in decoder_layers(model)[max(0, layer + 1 - _TRAINED_LAYERS) : layer + 1]
        for name, module in block.named_modules()
        if name.endswith(_DOWN_PROJECTIONS)
    }
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no MLP output named like {', '.join(_DOWN_PROJECTIONS)}, "
            "which `rmu` trains. Use another method."
        )
    model.requires_grad_(False)
    trained = {name: module for name, module in model.named_modules() if id(module) in chosen}
    for module in trained.values():
        module.weight.requires_grad_(True)
    return tuple(trained)


def layer_activations(model: Any, layer: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Output of a layer, from 0, at the N labelled tokens, (N, D) float32, and their examples."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with decoder_layers(model)[layer].register_forward_hook(keep):
        # The decoder alone: the output head would compute logits nobody reads.
        model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    example, position = labelled_positions(batch.labels)
    return found[0][example, position].float(), example


@torch.no_grad()
def warn_if_short(model: Any, layer: int, length: float, batch: Batch) -> None:
    """Warn where the random vector is shorter than the activations it is to drown."""
    found, _ = layer_activations(model, layer, batch.to(next(model.parameters()).device))
    own = float(found.norm(dim=-1).mean())
    if length < own:
        warn(
            f"`rmu`: steering_coef is {length:g}, but layer {layer}'s activations have length "
            f"{own:.3g} on the forget set already: they are shortened rather than steered. Try "
            f"about {2 * own:.2g}, and another retain_weight."
        )
