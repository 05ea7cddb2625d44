"""The edit in a loaded model: θ_full − α Δ at any α, with the very values that would be stored.

Δ comes from the source that the files come from, and is kept in memory, or the factors of a thin
one; a strength is then one pass over the weights that it moves, and no checkpoint. Values are
rounded as the edit rounds them, by the tensors of the checkpoint, so what is tried is what would be
written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from perta.engine.edit._chunks import CHUNK
from perta.engine.edit._stream import Step, check_effect, edit_share, open_edit
from perta.engine.edit.plan import DIRECTION, EditInputs, Target
from perta.methods.registry import at_strength
from perta.models.formats.low_rank import Thin, ThinEntry, read_thin
from perta.models.load import save_type, stored_dtype
from perta.options import SaveType, WeightingConfig
from perta.parallel import Own
from perta.store.arithmetic import Place, round_as_stored, square_norm
from perta.store.checkpoint import CheckpointIndex, is_float, open_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Change:
    """What an edit does to one tensor of θ_full; `delta` is None where it stays."""

    delta: Tensor | Thin | None  # Δ in the stored shape, float32, or its factors
    dtype: torch.dtype  # in which the edit stores the tensor
    rounded: Callable[[Tensor], Tensor]  # float32 values -> that type, as the edit rounds them

    def step(self, device: torch.device) -> Tensor | None:
        """Δ itself, float32; None where the tensor stays."""
        delta = self.delta.whole().float() if isinstance(self.delta, Thin) else self.delta
        return None if delta is None else delta.to(device)

    @torch.no_grad()
    def applied(self, full: Tensor, scaling_coef: float) -> Tensor:
        """The tensor at a strength: float32, with values of the stored type."""
        values, delta = full.to(self.dtype).to(torch.float32), self.step(full.device)
        if delta is None:
            return values
        # In two steps, as the edit does it: a fused one differs in the last bit.
        return self.rounded(values - delta * scaling_coef).to(torch.float32)


@dataclass(frozen=True)
class Changes:
    """What an edit does to the tensors of θ_full, by name; of a tied one, the first of two."""

    full: CheckpointIndex
    tensors: Mapping[str, _Change]

    def located(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Any, _Change]]:
        """Where each tensor lies in a model, see `_stored_places`, and its change."""
        places = _stored_places(model, self.full)
        for name, change in self.tensors.items():
            if name in places:
                yield *places[name], change


class EditedModel:
    """A loaded model at θ_full − α Δ; `move` changes its weights in place."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, changes: Changes) -> None:
        self.model = model
        self._moved: list[tuple[Tensor, Any, Tensor, _Change]] = []
        for memory, where, change in changes.located(model):
            if change.delta is None:
                # What the edit leaves alone needs no copy, but may be stored in another type.
                memory[where] = change.applied(memory[where], 0.0)
            else:
                full = memory[where].to(change.dtype, copy=True)
                self._moved.append((memory, where, full, change))

    @torch.no_grad()
    def move(self, scaling_coef: float) -> None:
        """Give the model the weights of a strength."""
        for memory, where, full, change in self._moved:
            memory[where] = change.applied(full, scaling_coef)


def changes_of(
    inputs: EditInputs,
    weighting: WeightingConfig,
    *,
    save_dtype: SaveType = "full",
    formats: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    device: torch.device | None = None,
    threads: int | None = None,
    chunk: int = CHUNK,
) -> Changes:
    """What an edit of any method does to θ_full, at any strength; see `write_edit`.

    A retain vector is part of it in its configured proportion: Δ = W ⊙ τ − (β/α) (θ_r − θ₀).
    `formats` say of tensors stored in one of their own as what float32 values are read again.
    """
    editor = open_edit(inputs, at_strength(weighting, 1.0), threads, chunk)
    targets = [target for target in editor.targets if target.alias_of is None]
    edited = replace(editor, targets=[target for target in targets if target.sources])
    # A direction is Δ itself at this strength.
    sources = ((t.full.name, t.sources.get(DIRECTION)) for t in edited.targets)
    thin = {name: entry for name, entry in sources if isinstance(entry, ThinEntry)}
    whole = (target.full for target in edited.targets if target.full.name not in thin)
    kept = {entry.name: torch.empty(entry.shape) for entry in whole}

    def keep(target: Target, steps: Iterator[Step]) -> None:
        values = kept.get(target.full.name)
        for step in steps:
            delta = cast(Tensor, step.delta)
            if not math.isfinite(square_norm(delta)):
                step.refuse_infinite(torch.float32)
            if values is not None:
                values.view(-1)[step.begin : step.begin + step.count] = delta

    check_effect(edit_share(edited, keep, Own(None)), edited, inputs)
    full, seed = open_index(inputs.full), weighting.weighting_seed
    main, saved = stored_dtype(full.folder), save_type(save_dtype, full.folder)
    formats = formats or {}
    found = {}
    for target in targets:
        name, dtype = target.full.name, target.full.dtype
        if not is_float(target.full):
            continue
        dtype = saved if dtype == main else dtype
        rounded: Callable[[Tensor], Tensor]
        rounded = partial(round_as_stored, dtype=dtype, place=Place(seed, name))
        if name in formats:
            dtype, rounded = torch.float32, formats[name]
        delta: Tensor | Thin | None = kept.pop(name).to(device) if name in kept else None
        if name in thin:  # Apple's GPUs have no float64
            delta = read_thin(thin[name], None if device and device.type == "mps" else device)
        found[name] = _Change(delta, dtype, rounded)
    return Changes(full, found)


# --- stored tensors in a model's memory -----------------------------------------------------------


class _View(Tensor):
    """A tensor that is not copied where a copy is asked for to have it in one piece."""

    def contiguous(self, *_args: Any, **_named: Any) -> Tensor:
        """Itself, so that it stays a view of the model's memory."""
        return self


def _stored_places(model: PreTrainedModel, index: CheckpointIndex) -> dict[str, tuple[Tensor, Any]]:
    """Stored name -> tensor `t` and index `i`: `t[i]` has the stored shape, and is in the model.

    transformers fuses in memory what checkpoints store apart, or parts it. Its own rules, by which
    it saves, are applied to views of the memory; where they mix the elements of several tensors,
    these are moved together first, and their places sent through the rules.
    """
    from transformers.core_model_loading import revert_weight_conversion

    held = model.state_dict()
    views = revert_weight_conversion(model, {n: t.as_subclass(_View) for n, t in held.items()})
    own = {tensor.data_ptr(): name for name, tensor in held.items()}
    memory = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    seen = {view.untyped_storage().data_ptr() for view in views.values()}
    places = {
        name: (view.as_subclass(Tensor), ...)
        for name, view in views.items()
        if view.untyped_storage().data_ptr() in memory
    }
    mixed = [n for n in own.values() if held[n].untyped_storage().data_ptr() not in seen]
    if mixed:
        flat = torch.cat([held[name].flatten() for name in mixed])
        parts = flat.split([held[name].numel() for name in mixed])
        numbers = torch.arange(len(flat), device=flat.device).split([len(part) for part in parts])
        for name, part in zip(mixed, parts, strict=True):
            model.get_parameter(name).data = part.view(held[name].shape)
        shaped = {n: k.view(held[n].shape) for n, k in zip(mixed, numbers, strict=True)}
        places |= {n: (flat, k) for n, k in revert_weight_conversion(model, shaped).items()}
    return {entry.name: place for n, place in places.items() if (entry := index.find(n))}
