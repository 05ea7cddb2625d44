"""Means of powers of which each process holds its part, as of the model (FSDP2).

    process 0    its examples' powers, of one parameter ──┐
    process 1    its examples' powers, of one parameter ──┴─ added, cut into rows ── each its part

Powers are taken of each example's own gradient before anything is added, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perta.engine.gradients.powers import Means
from perta.parallel import is_part, place


@dataclass(frozen=True)
class MeansInParts(Means):
    """This process's rows of the means; every process adds to each parameter as often."""

    parameter: Any  # whose rows they are, a DTensor

    @contextmanager
    def adding(self, counts: bool = True) -> Iterator[Means]:
        """Whole means of the examples of this process, where they count; then all are added up."""
        from torch.distributed.tensor import DTensor, Partial, Shard

        shape, device = self.parameter.shape, self.parameter.device
        whole = {o: torch.zeros(shape, dtype=m.dtype, device=device) for o, m in self._parts}
        yield Means(whole, self.weight)
        mesh = self.parameter.device_mesh
        for order, part in self._parts:
            powers = whole.pop(order)
            of_all = DTensor.from_local(powers if counts else powers.zero_(), mesh, [Partial()])
            part.add_(of_all.redistribute(mesh, [Shard(0)]).to_local().to(part.device))

    def total(self, order: float) -> Tensor:
        """All rows, on process 0 and in the computer's memory; nothing on the others."""
        from torch.distributed.tensor import DTensor, Shard

        like, part = self.parameter, self.by_order[order].to(self.parameter.device)
        rows = DTensor.from_local(
            part, like.device_mesh, [Shard(0)], shape=like.shape, stride=like.stride()
        )
        whole = rows.full_tensor()
        return whole.cpu() if place() == 0 else whole.new_empty(0)

    @property
    def _parts(self) -> list[tuple[float, Tensor]]:
        return list(self.by_order.items())


def own_rows(parameter: Tensor) -> Tensor:
    """What this process has of a parameter."""
    rows: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return rows


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; of a model in parts as they are while their layer computes."""
    found = dict(model.named_parameters())
    if not is_part(model):
        return found
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in (module for module in model.modules() if isinstance(module, FSDPModule)):
        part.unshard()
        found |= {n: p for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        part.reshard()
    return found
