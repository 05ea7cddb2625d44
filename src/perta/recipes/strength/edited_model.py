"""θ_full − α Δ in a loaded model, with the very values that the edit would store.

Δ is made once, by the edit itself, and kept in memory; a strength is then one pass over the
weights that it moves, and no checkpoint. A checkpoint in bfloat16 or float16 is rounded here as
the edit rounds it, so what is tried is what would be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perta.engine.edit.write import write_edit
from perta.methods.registry import at_strength, with_defaults
from perta.models.formats.quantised import Quantised, quantised_tensors
from perta.models.load import load_model, save_type, stored_dtype
from perta.options import ComputeConfig, SaveType
from perta.stages.edit import as_inputs, find_inputs, with_direction
from perta.stages.settings import EditConfig
from perta.store.arithmetic import Place, round_as_stored, round_by, thresholds
from perta.store.checkpoint import (
    CheckpointIndex,
    TensorEntry,
    copy_companions,
    open_index,
    write_tensors,
)

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Change:
    """What an edit does to one parameter of a loaded model.

    Attributes:
        delta: Δ, float32; θ_u = θ_full − α Δ.
        dtype: type in which the edit stores the parameter.
        rounded: float32 values -> that type, as the edit rounds them.
    """

    delta: Tensor
    dtype: torch.dtype
    rounded: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def applied(self, full: Tensor, scaling_coef: float) -> Tensor:
        """The parameter at a strength: float32, with values of the stored type."""
        # In two steps, as the edit does it: a fused one differs in the last bit.
        values = full.to(self.dtype).to(torch.float32) - self.delta * scaling_coef
        return self.rounded(values).to(torch.float32)


class EditedModel:
    """A loaded model at θ_full − α Δ; `move` changes its weights in place."""

    def __init__(self, model: PreTrainedModel, changes: Sequence[Change]) -> None:
        self.model = model
        self._moved: list[tuple[nn.Parameter, Tensor, Change]] = []
        for parameter, change in zip(model.parameters(), changes, strict=True):
            full = parameter.detach().to(change.dtype, copy=True)
            if bool(change.delta.any()):
                self._moved.append((parameter, full, change))
            else:
                # What the edit leaves alone needs no copy, but may be stored in another type.
                parameter.data.copy_(full)

    @torch.no_grad()
    def move(self, scaling_coef: float) -> None:
        """Give the model the weights of a strength."""
        for parameter, full, change in self._moved:
            parameter.copy_(change.applied(full, scaling_coef))


def load_changes(folder: Path, edit: EditConfig, compute: ComputeConfig) -> list[Change]:
    """What an edit of any method does to every parameter, in the order of `model.parameters()`.

    Δ is what the edit makes at α = −1 when it subtracts from a checkpoint of zeros, so names, tied
    weights and patterns are treated as in the edit itself. A retain vector is part of it in its
    configured proportion: Δ = W ⊙ τ − (β/α) (θ_r − θ₀).

    Args:
        folder: empty folder for intermediate files, two float32 checkpoints.
    """
    weighting = with_defaults(edit.weighting)
    edit = replace(edit, weighting=weighting)
    given = with_direction(edit, find_inputs(edit))
    inputs, original = as_inputs(given), given.get("quantised")
    index = open_index(inputs.full)
    delta = folder / "delta"
    delta.mkdir()
    zeros = _write_like(index, folder / "zeros", lambda entry: torch.zeros(()).expand(entry.shape))
    write_edit(delta, inputs, at_strength(weighting, -1.0), onto=zeros)
    model = load_model(delta, compute, dtype=torch.float32)
    # What an adapter or a type of GGUF files alone leaves is not tried.
    is_wide = edit.output_format == "adapter" or edit.save_dtype == "q8_0"
    wanted = "float32" if is_wide else cast(SaveType, edit.save_dtype)
    quantised = quantised_tensors(open_index(original)) if original else {}
    saved = save_type(wanted, index.folder)
    kept = _Kept(index, stored_dtype(index.folder), saved, quantised)
    rounded = _roundings(model, kept, weighting.weighting_seed, folder / "thresholds", compute)
    steps = [parameter.detach() for parameter in model.parameters()]
    return [Change(step, *how) for step, how in zip(steps, rounded, strict=True)]


@dataclass(frozen=True)
class _Kept:
    """What θ_full stores, most of it in `main`, which the edit stores in the type `saved`.

    What is quantised is stored so again.
    """

    index: CheckpointIndex
    main: torch.dtype
    saved: torch.dtype
    quantised: Mapping[str, Quantised]

    def dtype(self, entry: TensorEntry) -> torch.dtype:
        """Type in which the edit stores a tensor."""
        return self.saved if entry.dtype == self.main else entry.dtype


Rounding = tuple[torch.dtype, Callable[[Tensor], Tensor]]


def _roundings(
    model: PreTrainedModel, kept: _Kept, seed: int, folder: Path, compute: ComputeConfig
) -> list[Rounding]:
    """How the edit rounds each parameter of a model.

    The random numbers of the rounding belong to stored tensors. Where transformers makes a
    parameter of several of these (the experts of a mixture, for one), the numbers are loaded like
    weights, so that its own rules say which of them belongs where.
    """
    entries = _stored_entries(model, kept.index)
    drawn: list[Tensor | None] = [None] * len(entries)
    if None in entries and kept.saved in _NARROW:
        _write_like(kept.index, folder, lambda e: thresholds(Place(seed, e.name), e.numel).float())
        numbers = load_model(folder, compute, dtype=torch.float32)
        drawn = [parameter.detach().to(torch.int32) for parameter in numbers.parameters()]
    found: list[Rounding] = []
    for entry, above in zip(entries, drawn, strict=True):
        if entry is not None and entry.name in kept.quantised:
            how = kept.quantised[entry.name].rounded
            found.append((torch.float32, partial(how, seed=seed)))
        elif entry is not None:
            place, dtype = Place(seed, entry.name), kept.dtype(entry)
            found.append((dtype, partial(round_as_stored, dtype=dtype, place=place)))
        elif above is not None:
            found.append((kept.saved, partial(round_by, dtype=kept.saved, above=above)))
        else:
            found.append((kept.saved, partial(Tensor.to, dtype=kept.saved)))
    return found


def _stored_entries(model: PreTrainedModel, index: CheckpointIndex) -> list[TensorEntry | None]:
    """The stored tensor that each parameter is; None where there is no such.

    A tied parameter that is stored twice goes by the first, as in the edit.
    """
    order = {name: place for place, name in enumerate(index.tensors)}
    entries: dict[nn.Parameter, TensorEntry] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = index.find(name)
        if entry is None or entry.shape != tuple(parameter.shape):
            continue
        known = entries.setdefault(parameter, entry)
        entries[parameter] = min(known, entry, key=lambda e: order[e.name])
    return [entries.get(parameter) for parameter in model.parameters()]


def _write_like(
    index: CheckpointIndex, folder: Path, values: Callable[[TensorEntry], Tensor]
) -> Path:
    """Write a float32 checkpoint with the names and shapes of another."""
    folder.mkdir()
    tensors = {
        name: values(entry).view(entry.shape)
        for name, entry in index.tensors.items()
        if entry.dtype.is_floating_point
    }
    write_tensors(folder, tensors, index.shards)
    copy_companions(index.folder, folder)
    return folder
