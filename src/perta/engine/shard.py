"""A model of which each process has its part of every weight alone (FSDP2).

    process 0    the whole model, in the computer's memory ──────── the whole model, trained
                        │ a tensor at a time                               ↑ a tensor at a time
    each         its N-th of every tensor ──── passes or steps ───── its N-th of every tensor

While it computes, a process has one layer whole at a time, and what is in no layer. In training
each has its part of the gradients and of the optimizer's state too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perta.errors import ConfigError
from perta.models.experts import blocks
from perta.parallel import count, everywhere, helpers, keep_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROOM = 0.7  # share of a GPU's memory for what is known before; the rest is for activations


def check_shard(wanted: bool | None) -> None:
    """Stop at `--shard` where there is nobody to share with; ConfigError."""
    if wanted and not helpers():
        raise ConfigError(
            "--shard divides the weights among processes, and there is one. Start several with "
            "torchrun, or leave --shard out."
        )


def is_sharded(wanted: bool | None, device: torch.device, taken: int) -> bool:
    """Whether to divide a model: as asked, or where it takes more bytes than a GPU has room for."""
    if not helpers() or wanted is not None or device.type != "cuda":
        return bool(wanted and helpers())
    return taken > _ROOM * torch.cuda.get_device_properties(device).total_memory


@contextmanager
def in_parts(load: Callable[[], PreTrainedModel], device: torch.device) -> Iterator[Any]:
    """What `load` loads, into the computer's memory, divided among the devices of all processes.

    Calls made `everywhere` with it find each process's part. All must make a pass together.
    """
    try:
        yield everywhere(_keep, *_apart(Whole.of(load(), device)))
    finally:
        everywhere(keep_part, None)


def _apart(whole: Whole) -> tuple[nn.Module, Whole]:
    return whole.outline(), whole


def _keep(outline: nn.Module, whole: Whole) -> nn.Module:
    if count() == 1:  # the others could not be sent it
        model: nn.Module = nn.Module.to(whole.model, whole.device)
        return model
    whole.divide(outline)
    keep_part(outline)
    return outline


def by_layer(model: nn.Module, device: torch.device, processes: int) -> None:
    """Divide every layer of a model by itself, and the rest of it together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh)


@dataclass(frozen=True)
class Whole:
    """Process 0's model, while it is used in parts; None on the others."""

    model: Any
    device: torch.device  # where the parts lie
    home: torch.device  # where the model lies before and after

    def __reduce__(self) -> tuple[Any, ...]:
        return Whole, (None, self.device, self.home)

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> Whole:
        """A model, out of the way of its parts."""
        home = model.device
        return cls(nn.Module.to(model, "cpu"), torch.device(device.type), home)

    def outline(self) -> PreTrainedModel:
        """A copy whose parameters have shapes and no memory, to be sent to every process."""
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in self.model.parameters()
        }
        outline: PreTrainedModel = copy.deepcopy(self.model, empty)
        return outline

    def divide(self, outline: nn.Module) -> None:
        """Give each process its part of every tensor in the outline's place."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        kept = {name: buffer.clone() for name, buffer in outline.named_buffers()}
        by_layer(outline, self.device, count())
        outline.to_empty(device=self.device)
        for name, buffer in outline.named_buffers():
            buffer.copy_(kept[name])
        values = self.model.state_dict() if self.model is not None else {}
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(outline, values, options=how)

    @torch.no_grad()
    def gather(self, divided: nn.Module) -> Any:
        """Process 0's model with the values of all parts; the others keep their part."""
        from torch.distributed.fsdp import FSDPModule

        own = dict(self.model.named_parameters()) if self.model is not None else {}
        for part in divided.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # what is in no layer stays whole after a pass
        for name, parameter in divided.named_parameters():
            value = parameter.full_tensor()  # type: ignore[attr-defined]
            if own:
                own[name].copy_(value)
        return divided if self.model is None else nn.Module.to(self.model, self.home)
