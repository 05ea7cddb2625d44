"""The linear layers of a model, and which of them are its MLPs, found from the model's structure.

    config.json ── model without values ── its modules ── names as checkpoints store them

What mixes tokens needs to know their places: it takes a mask, positions, a cache or a state. A
module that takes one is a mixer if it holds linear layers and no further such module, and a block
if a module of its class holds one. The linear layers of a block outside its mixers work on each
token alone. Of those, two belong to an MLP if one reads what the other makes and gives back what
that one reads: the widths fit, once over, or twice where gate and up are fused. Routers and gates
of shared experts feed nothing of such a width, and stay out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from perta.models.complete import described_model
from perta.models.experts import expert_names, is_stacked_experts
from perta.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Slot = tuple[str, int]
"""A matrix in memory: name of the parameter, and of stacked experts which one (0 otherwise)."""

_CONTEXT = ("mask", "position", "past", "cache", "alibi")
"""Parts of the names of arguments that tell a module where a token stands."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the checkpoint, by its name, and the matrix in memory that holds it.

    `rows` are the rows of that matrix that are this weight, (out,) int64, as a fused one holds
    several stored weights; all if the matrix is stored `transposed`, as in x out.
    """

    name: str
    slot: Slot
    rows: Tensor
    transposed: bool


def find_slots(model: PreTrainedModel) -> list[Slot]:
    """Every matrix of a linear layer but the output head's, in the model's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    head = getattr(model.get_output_embeddings(), "weight", None)
    slots: dict[Slot, None] = {}
    for module in model.modules():
        if is_linear(module) and module.weight is not head:
            slots[names[module.weight], 0] = None  # type: ignore[index]
        elif is_stacked_experts(module):
            for name in expert_names(module):
                parameter = getattr(module, name)
                slots.update(dict.fromkeys((names[parameter], e) for e in range(len(parameter))))
    return list(slots)


def late_slots(model: PreTrainedModel) -> list[Slot]:
    """Those of `find_slots` in the last third of the blocks, counted down; of one or two, none.

    Blocks are the elements of the outermost list that holds a layer; outside of lists none is late.
    """
    modules = dict(model.named_modules())

    def is_late(name: str) -> bool:
        elements = [place for place in _above(name) if place and _is_element(modules, place)]
        if not elements:
            return False
        blocks, _, place = elements[-1].rpartition(".")
        return 3 * int(place) >= 2 * len(cast(nn.ModuleList, modules[blocks]))

    return [slot for slot in find_slots(model) if is_late(slot[0])]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one of transformers' linear layers."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weights of a linear layer or of stacked experts are stored as in x out."""
    return bool(getattr(module, "is_transposed", not isinstance(module, nn.Linear)))


def widths(parameter: Tensor, transposed: bool) -> tuple[int, int]:
    """Width of a layer's input and of its output."""
    out, into = parameter.shape[-2:]
    return (out, into) if transposed else (into, out)


def stored_weights(model: PreTrainedModel, slots: Sequence[Slot]) -> list[StoredWeight]:
    """The checkpoint's weights that lie in the given matrices, in the model's order.

    transformers fuses weights in memory that checkpoints store apart. Numbers that stand for
    the rows are sent through the conversion it saves with, so its own rules say where each row
    goes. A stored weight mixed from several matrices is left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    wanted = set(slots)
    markers: dict[str, Tensor] = {}
    owners: list[Slot] = []
    starts: list[int] = []
    count = 0
    for name, parameter in model.named_parameters():
        if (name, 0) not in wanted:
            continue
        experts, rows = (parameter.shape[0] if parameter.dim() == 3 else 1), parameter.shape[-2]
        marks = torch.arange(count, count + experts * rows, dtype=torch.float64)
        markers[name] = marks.view(*parameter.shape[:-1], 1)
        for expert in range(experts):
            owners.append((name, expert))
            starts.append(count + expert * rows)
        count += experts * rows
    edges = torch.tensor(starts, dtype=torch.float64)
    found: list[tuple[int, StoredWeight]] = []
    for name, marks in revert_weight_conversion(model, markers).items():
        places = marks.reshape(-1)
        owner = torch.bucketize(places, edges, right=True) - 1
        place = int(owner[0])
        if bool((owner != place).any()):
            warn(f"{name} is made of several layers in memory; it gets no moments.")
            continue
        slot = owners[place]
        rows_of = (places - edges[place]).long()
        module = model.get_submodule(slot[0].rpartition(".")[0])
        weight = StoredWeight(name, slot, rows_of, is_transposed(module))
        found.append((int(places[0]), weight))
    return [weight for _, weight in sorted(found, key=lambda pair: pair[0])]


# --- the MLPs -----------------------------------------------------------------------------


def _mlp_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the MLP weights in the model's order; none where they cannot be told apart.

    Matrices that no linear layer holds count as well, such as experts of a kind of their own.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    modules = dict(model.named_modules())
    scopes = {name for name, module in modules.items() if _takes_context(module)}

    def scope_of(name: str) -> str:
        return next((place for place in _above(name) if place in scopes), "")

    groups: dict[str, dict[str, list[tuple[int, int]]]] = {}
    normed: set[str] = set()
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and parameter.shape == (width,):
            normed.add(scope_of(name))
        # Outside of a list of layers there are embeddings, heads and what leads to them.
        elif any(isinstance(modules[place], nn.ModuleList) for place in _above(name)):
            ways = _readings(modules, name, parameter)
            if ways:
                groups.setdefault(scope_of(name), {})[name] = ways
    outer = {place for scope in groups for place in _above(scope) if scope}
    # An attention may hold a module that takes positions too; a block in a block has a norm.
    blocks = {
        type(modules[place])
        for place in outer
        if not place or place in normed or _is_element(modules, place)
    }
    found = {
        name
        for scope, sizes in groups.items()
        if type(modules[scope]) in blocks
        for name in _pairs(sizes, width)
    }
    return [name for name, _ in model.named_parameters() if name in found]


def mlp_names(folder: Path) -> frozenset[str]:
    """Names under which a checkpoint of a folder's configuration would store its MLP weights.

    None where the model is of no known kind, or its MLPs cannot be told apart.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        model = described_model(folder)
    except Exception:  # transformers raises what it likes at a configuration it cannot build
        return frozenset()
    if model is None:
        return frozenset()
    # Rows alone tell where a weight goes; its values would be as large as the model.
    rows = {
        name: torch.zeros(*model.get_parameter(name).shape[:-1], 1)
        for name in _mlp_parameters(model)
    }
    return frozenset(revert_weight_conversion(model, rows))


def _readings(
    modules: Mapping[str, nn.Module], name: str, parameter: Tensor
) -> list[tuple[int, int]]:
    """Widths of input and output a weight may have; none if it is of no layer."""
    place, _, last = name.rpartition(".")
    module = modules[place]
    if is_linear(module) or is_stacked_experts(module):
        weights = expert_names(module) if is_stacked_experts(module) else ("weight",)
        return [widths(parameter, is_transposed(module))] if last in weights else []
    # A stack of matrices of a module of its own kind; which way round it is, nothing tells.
    return [widths(parameter, turned) for turned in (False, True)] if parameter.dim() == 3 else []


def _is_element(modules: Mapping[str, nn.Module], name: str) -> bool:
    return isinstance(modules[name.rpartition(".")[0]], nn.ModuleList)


def _takes_context(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return any(name == "state" or any(part in name for part in _CONTEXT) for name in names)


def _above(name: str) -> Iterator[str]:
    """Names of the modules that hold something, from the inside out, the model itself last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _pairs(sizes: Mapping[str, Sequence[tuple[int, int]]], width: int | None) -> set[str]:
    """Weights of which one reads what the other makes, and gives back the width of the model."""
    ups = [(up, out) for up, ways in sizes.items() for into, out in ways if into == width]
    downs = [(down, into) for down, ways in sizes.items() for into, out in ways if out == width]
    return {
        name
        for up, made in ups
        for down, read in downs
        if up != down and made in (read, 2 * read)
        for name in (up, down)
    }
