"""Task vectors of LoRA adapters, kept as the two thin factors that they are.

    τ = s · B A        B (out, r), A (r, in), s the adapter's scale

An adapter of plain LoRA stands for the checkpoint that it makes of its base, and is never merged:
beside the base its folder opens as the base's tensors, with a `ThinEntry` in the place of each that
it changes. Other adapters are merged (`adapters`). A direction's folder may hold thin tensors too,
as `NAME.left` and `NAME.right`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from perta.errors import CorruptCheckpointError
from perta.models.formats.adapters import (
    BLIND_STARTS,
    PREFIX,
    WEIGHTS,
    adapter_settings,
    lasting_name,
    put_on,
)
from perta.models.load import load_model, save_model, transposed_weights
from perta.options import ComputeConfig
from perta.store.checkpoint import (
    HEADS,
    CheckpointIndex,
    TensorEntry,
    is_float,
    name_ends_with,
    open_index,
    read_header,
    read_tensor,
)
from perta.store.record import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS = (".lora_A.weight", ".lora_B.weight")
_SIDES = (".left", ".right")
_PLAIN = {
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type"),
}
"""Settings of LoRA that may have a value where it adds s · B A to weights and does nothing else."""


@dataclass(frozen=True)
class Thin:
    """A matrix (m, n) as the product of two factors, (m, r) and (r, n)."""

    left: Tensor
    right: Tensor

    def t(self) -> Thin:
        """Its transpose."""
        return Thin(self.right.t(), self.left.t())

    def whole(self) -> Tensor:
        """The matrix itself."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm, from r × r numbers."""
        squares = (self.left.t() @ self.left) * (self.right @ self.right.t())
        return math.sqrt(max(float(squares.sum()), 0.0))

    def part(self, begin: int, count: int) -> Tensor:
        """Neighbouring elements of the matrix, row by row, (count,) float32."""
        width = self.right.shape[1]
        first, last = begin // width, -(-(begin + count) // width)
        rows = (self.left[first:last] @ self.right).flatten()
        return rows[begin - first * width :][:count].to(torch.float32)


@dataclass(frozen=True)
class ThinEntry(TensorEntry):
    """A step of a weight that is stored as two factors: scale · left right, or its transpose.

    Shape is that of the weight as it is stored; place and size are the left factor's.
    """

    left: TensorEntry
    right: TensorEntry
    scale: float = 1.0
    turned: bool = False


def read_thin(entry: ThinEntry, device: torch.device | None = None) -> Thin:
    """The factors of a step, float64; the scale is in the left one.

    CorruptCheckpointError where they are not finite.
    """
    left, right = (read_tensor(e).to(device, torch.float64) for e in (entry.left, entry.right))
    thin = Thin(left * entry.scale, right)
    if not bool(thin.left.isfinite().all() and right.isfinite().all()):
        raise CorruptCheckpointError(
            f"{entry.file}: the factors of {entry.name} hold NaN or Inf. The adapter is damaged, "
            "or its training diverged; make it again."
        )
    return thin.t() if entry.turned else thin


def _thin_entry(
    name: str, left: TensorEntry, right: TensorEntry, scale: float = 1.0, turned: bool = False
) -> ThinEntry:
    shape = (left.shape[0], right.shape[1])
    shape = shape[::-1] if turned else shape
    place = (left.file, left.offset, left.nbytes)
    return ThinEntry(name, torch.float32, shape, *place, left, right, scale, turned)


def joined(parts: Sequence[Thin], shape: Sequence[int], weight: float = 1.0) -> Thin:
    """The sum of matrices of a shape, times a weight, float64; their ranks add up, of none to 0."""
    rows, columns = shape
    like = parts[0].left if parts else torch.empty(0)
    none = torch.zeros(rows, 0, dtype=torch.float64, device=like.device)
    left = torch.cat([none, *(part.left * weight for part in parts)], 1)
    return Thin(left, torch.cat([none.new_zeros(0, columns), *(part.right for part in parts)]))


# --- directions -----------------------------------------------------------------------------------


def named_tensors(name: str, delta: Tensor | Thin) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a direction's tensor, float32, by name."""
    if isinstance(delta, Tensor):
        yield name, delta.float().cpu()
    else:
        for side, factor in zip(_SIDES, (delta.left, delta.right), strict=True):
            yield name + side, factor.float().cpu().contiguous()


def open_direction(folder: Path) -> CheckpointIndex:
    """Open a direction's folder, thin tensors as one entry each; errors as of `open_index`."""
    index = open_index(folder)
    tensors = dict(index.tensors)
    for name in [n.removesuffix(_SIDES[0]) for n in tensors if n.endswith(_SIDES[0])]:
        if name + _SIDES[1] in tensors:
            left, right = (tensors.pop(name + side) for side in _SIDES)
            tensors[name] = _thin_entry(name, left, right)
    return replace(index, tensors=tensors)


# --- adapters as checkpoints ----------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).exists()


def open_tuned(folder: Path, base: CheckpointIndex) -> CheckpointIndex:
    """Open a checkpoint tuned from the base; errors as of `open_index`.

    Of an adapter of plain LoRA, tensors that it leaves alone are the base's own entries.
    """
    steps = steps_of(folder, base) if is_adapter(folder) else None
    if steps is None:
        return open_index(folder)
    return replace(base, folder=folder, tensors=base.tensors | steps)


def steps_of(adapter: Path, base: CheckpointIndex) -> dict[str, ThinEntry] | None:
    """What an adapter adds to the tensors of its base, by name; None unless it is plain LoRA.

    Plain is what can be told from settings and headers to add s · B A to stored matrices of linear
    layers, and to nothing else: to all that its settings ask for, in the shapes that they say.
    """
    settings = adapter_settings(adapter)
    rank, alpha, targets = (settings.get(k) for k in ("r", "lora_alpha", "target_modules"))
    is_plain = (
        settings["peft_type"] == "LORA"
        and settings.get("bias", "none") == "none"
        and settings.get("init_lora_weights", True) in BLIND_STARTS
        and not any(v for name, v in settings.items() if name not in {*_PLAIN, "bias"})
    )
    if not is_plain or not isinstance(rank, int) or rank < 1 or not isinstance(targets, list):
        return None
    if not isinstance(alpha, int | float):
        return None
    factors = {entry.name: entry for entry in read_header(adapter / WEIGHTS)[0]}
    transposed, steps = transposed_weights(base.folder), dict[str, ThinEntry]()
    for key in [name for name in factors if name.endswith(_ENDS[0])]:
        module = key.removesuffix(_ENDS[0])
        right, left = (factors.pop(module + end, None) for end in _ENDS)
        stored = base.find(module.removeprefix(PREFIX) + ".weight")
        if left is None or right is None or stored is None:
            return None
        sizes = (*left.shape[1:], *right.shape[:1], len(right.shape))
        if sizes != (rank, rank, 2) or not (is_float(left) and is_float(right)):
            return None
        step = _thin_entry(stored.name, left, right, alpha / rank, stored.name in transposed)
        if step.shape != stored.shape:
            return None
        steps[stored.name] = step
    # As PEFT reads `target_modules`: a module's name, or how it ends.
    ends = tuple(f".{target}" for target in targets)
    asked = {n for n in base.tensors if f".{n.removesuffix('.weight')}".endswith(ends)}
    if factors or steps.keys() != asked or any(name_ends_with(name, HEADS) for name in steps):
        return None
    return steps


def load_tuned(
    folder: Path, base: Path, compute: ComputeConfig, *, dtype: torch.dtype | None = None
) -> Any:
    """Load a checkpoint tuned from the base as `load_model` does; an adapter lies on its base."""
    if not is_adapter(folder):
        return load_model(folder, compute, dtype=dtype)
    return put_on(load_model(base, compute, dtype=dtype), folder, base).eval()


# --- writing --------------------------------------------------------------------------------------


def save_tuned(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, base: Path, named: str
) -> None:
    """Write a tuned model: one with an adapter as that alone, of the base that is `named` so."""
    if not hasattr(model, "peft_config"):
        save_model(model, tokenizer, folder, base)
        return
    from peft import get_peft_model_state_dict

    (config,) = model.peft_config.values()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.float() for name, tensor in state.items()}
    _write(folder, {**config.to_dict(), "inference_mode": True}, tensors, lasting_name(named))


def write_sum(folder: Path, parts: Sequence[tuple[Path, float, Collection[str]]]) -> None:
    """Write the sum of adapters of one base, each times a weight and without some parameters.

    All must be plain LoRA; their ranks add up: B = (w₁ s₁ B₁, …), A = (A₁; …).
    """
    read = [(_factors(adapter), weight, without) for adapter, weight, without in parts]
    rank, tensors = sum(adapter_settings(adapter)["r"] for adapter, _, _ in parts), {}
    for module in {module: None for factors, _, _ in read for module in factors}:
        own = [
            Thin(factors[module].left * weight, factors[module].right)
            for factors, weight, without in read
            if module in factors and f"{module}.weight" not in without
        ]
        if own:
            left, right = torch.cat([t.left for t in own], 1), torch.cat([t.right for t in own])
            more = rank - len(right)
            tensors[f"{PREFIX}{module}{_ENDS[0]}"] = pad(right, (0, 0, 0, more)).float()
            tensors[f"{PREFIX}{module}{_ENDS[1]}"] = pad(left, (0, more)).float()
    settings = adapter_settings(parts[0][0])
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": targets}
    _write(folder, settings, tensors, settings["base_model_name_or_path"])


def _factors(adapter: Path) -> dict[str, Thin]:
    """What an adapter of plain LoRA adds to each module."""
    settings, entries = adapter_settings(adapter), read_header(adapter / WEIGHTS)[0]
    stored = {entry.name.removeprefix(PREFIX): entry for entry in entries}
    scale = settings["lora_alpha"] / settings["r"]
    return {
        module: read_thin(_thin_entry(module, stored[module + _ENDS[1]], stored[name], scale))
        for name in stored
        if (module := name.removesuffix(_ENDS[0])) != name
    }


def _write(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], named: str
) -> None:
    from safetensors.torch import save_file

    own = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    own["base_model_name_or_path"] = named
    text = json.dumps(own, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", "utf-8")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
