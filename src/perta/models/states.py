"""States between a model's layers: read, decoded as if they were the last, and exchanged.

Only those of positions that predict a labelled token are looked at. With N of them in a batch, in
row-major order, L layers and width D:

    layer_states(model, batch)             (L, N, D)   the residual stream behind each layer
    decoded(model, batch, states)          (L, N)      log p of the labels from each layer's state
    exchanged(model, batch, l, states[l])  (N,)        log p where layer l gives these states
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perta.data.batch import IGNORE, Batch
from perta.errors import ConfigError
from perta.models.loss import AnswerLogits, answer_logits, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model, first to last; ConfigError if they are not as many as configured."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(
        f"{type(model).__name__} has no list of {count} layers, which methods that steer a layer "
        "(`rmu`) and probes of the inside need. Use another method, or leave those probes out."
    )


@torch.no_grad()
def layer_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What each layer gives at the positions that predict a label: (L, N, D)."""
    rows, places = _predicting(batch)
    found: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        found.append(states[rows, places].detach())
        return states

    with _changed(list(decoder_layers(model)), keep):
        answer_logits(model, batch)
    return torch.stack(found)


@torch.no_grad()
def decoded(model: PreTrainedModel, batch: Batch, states: Tensor) -> Tensor:
    """Log-probability of each label by what lies behind the last layer (norm and head): (L, N).

    The states take the places of a pass's own, as many as there are places, so that a model ends
    as it always does, whatever its end is made of. They are (L, N, D), from `layer_states`.
    """
    targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE].repeat(len(states))
    flat = states.flatten(0, 1)
    size = batch.input_ids.numel()
    found = []
    for part, labels in zip(flat.split(size), targets.split(size), strict=True):

        def put(own: Tensor, part: Tensor = part) -> Tensor:
            filled = own.flatten(0, 1).clone()
            filled[: len(part)] = part
            return filled.view_as(own)

        with _changed([decoder_layers(model)[-1]], put):
            output = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        logits = output.logits.flatten(0, 1)[: len(part)]
        found.append(-token_losses(AnswerLogits(logits, labels, labels)))
    return torch.cat(found).view(states.shape[:2])


@torch.no_grad()
def exchanged(model: PreTrainedModel, batch: Batch, layer: int, states: Tensor) -> Tensor:
    """Log-probability of each label where a layer, from 0, gives (N, D) other states: (N,)."""
    rows, places = _predicting(batch)

    def put(own: Tensor) -> Tensor:
        changed = own.clone()
        changed[rows, places] = states.to(own.dtype)
        return changed

    with _changed([decoder_layers(model)[layer]], put):
        return -token_losses(answer_logits(model, batch))


def _predicting(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and place of every position that predicts a label."""
    rows, places = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return rows, places


@contextmanager
def _changed(layers: list[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what layers give goes through a function."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(hook))
        yield
