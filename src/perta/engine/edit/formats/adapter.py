"""The edit as a PEFT adapter: the change of every layer as two thin factors.

    θ_u − θ_ref = B A + rest,   θ_ref the model that the adapter is put on

Exact, up to rounding, where the change of a layer has no higher rank than is allowed: a forget
checkpoint tuned with LoRA leaves such an edit. Norms and biases are held whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from perta.engine.edit.stored import Stored, Sums
from perta.errors import CheckpointError
from perta.models.complete import described_model
from perta.progress import track
from perta.store.checkpoint import CheckpointIndex, open_index, read_tensor

_SPARE, _ITERATIONS = 8, 6
"""Further directions, and passes over the matrix, by which its leading ones are found."""
_FEW = 4  # where more than this part of all directions is wanted, finding all of them costs no more


@dataclass
class LowRank:
    """What an adapter holds of an edit."""

    ranks: dict[str, int] = field(default_factory=dict)  # layer -> rank of its factors
    truncated: list[str] = field(default_factory=list)  # layers whose change has a higher rank
    whole: list[str] = field(default_factory=list)  # modules that are held as they are
    stored: Stored = field(default_factory=lambda: Sums().stored(0))  # what is held of the step


def write_adapter(
    folder: Path, edited: Path, full: Path, reference: Path, *, named: str, rank: int
) -> LowRank:
    """Write the adapter that makes θ_u, `edited` in float32, of a reference, layer by layer.

    The reference, `named` in it, is θ_full or what θ_full itself adapts; `rank` is the highest of a
    layer's factors. CheckpointError where weights changed that no adapter can hold.
    """
    from transformers.pytorch_utils import Conv1D

    adapter, tensors, sums, elements = LowRank(), dict[str, Tensor](), Sums(), 0
    new, old, before = open_index(edited), open_index(full), open_index(reference)
    owners = _owners(reference, before)
    with track("adapter", len(new.tensors)) as advance:
        for name in new.tensors:
            step, change = _differences(name, new, old, before)
            if bool(change.any()):
                if name not in owners:
                    raise _has_no_place(name)
                values = read_tensor(new.tensors[name])
                rest = _hold(adapter, tensors, *owners[name], change, values, rank)
                sums.add(
                    Sums(
                        delta=float(step.square().sum()),
                        along=float((rest * step).sum()),
                        error=float(rest.square().sum()),
                        changed=float((change != rest).sum()),
                    )
                )
                elements += change.numel()
            advance()
    held = (module for place, module, _ in owners.values() if place in adapter.ranks)
    _write(folder, adapter, tensors, named, turns=any(isinstance(m, Conv1D) for m in held))
    adapter.stored = sums.stored(elements)
    return adapter


def _differences(
    name: str, new: CheckpointIndex, old: CheckpointIndex, before: CheckpointIndex
) -> tuple[Tensor, Tensor]:
    """The step θ_full − θ_u and the change θ_u − θ_ref of one tensor, in float64."""
    entries = [index.find(name) for index in (new, old, before)]
    if None in entries:
        raise _has_no_place(name)
    ours, full, reference = (read_tensor(entry).double() for entry in entries if entry is not None)
    if reference.shape != ours.shape:
        raise _has_no_place(name)
    return full - ours, ours - reference


def _has_no_place(name: str) -> CheckpointError:
    return CheckpointError(
        f"The edit changes {name}, which an adapter cannot hold: it is tied, fused with others in "
        f"memory, or not in the base. Leave it out with --exclude '{name}', or write a checkpoint "
        "(--output-format checkpoint)."
    )


def _owners(folder: Path, index: CheckpointIndex) -> dict[str, tuple[str, nn.Module, str]]:
    """Stored name -> name of the module that has it, the module, and the parameter's own name."""
    model = described_model(folder)
    uses: dict[nn.Parameter, int] = {}
    found: dict[str, tuple[nn.Parameter, tuple[str, nn.Module, str]]] = {}
    for place, module in model.named_modules() if model is not None else ():
        for own, parameter in module.named_parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1
            entry = index.find(f"{place}.{own}")
            if entry is not None and entry.shape == parameter.shape:
                found[entry.name] = (parameter, (place, module, own))
    return {name: owner for name, (parameter, owner) in found.items() if uses[parameter] == 1}


def _hold(
    adapter: LowRank,
    tensors: dict[str, Tensor],
    place: str,
    module: nn.Module,
    own: str,
    change: Tensor,
    values: Tensor,
    rank: int,
) -> Tensor:
    """Take one parameter into the adapter; what of its change is left out."""
    from transformers.pytorch_utils import Conv1D

    key = f"base_model.model.{place}"
    is_embedding = isinstance(module, nn.Embedding)
    if change.dim() == 2 and isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        turned = isinstance(module, (Conv1D, nn.Embedding))
        wanted = change.T if turned else change
        noise = (
            2**-23
            * float(values.double().norm())
            * sum(1 / math.sqrt(size) for size in values.shape)
        )
        left, right, is_exact = _factors(wanted, rank, noise)
        adapter.ranks[place] = len(right)
        adapter.truncated += [] if is_exact else [place]
        names = ("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight")
        tensors[f"{key}.lora_{names[0]}"] = right.float().contiguous()
        tensors[f"{key}.lora_{names[1]}"] = left.float().contiguous()
        rest = wanted - left.float().double() @ right.float().double()
        return rest.T if turned else rest
    if isinstance(module, (nn.Linear, Conv1D)):
        tensors[f"{key}.base_layer.{own}"] = values.float()
    elif change.dim() == 1:
        adapter.whole += [] if place in adapter.whole else [place]
        tensors[f"{key}.{own}"] = values.float()
    else:
        raise _has_no_place(f"{place}.{own}")
    return torch.zeros_like(change)


def _factors(matrix: Tensor, rank: int, noise: float) -> tuple[Tensor, Tensor, bool]:
    """B (m, r) and A (r, n), r <= `rank`, of a truncated SVD; whether no more is above `noise`."""
    smaller = min(matrix.shape)
    kept = min(rank, smaller)
    count = min(kept + _SPARE, smaller)
    if count * _FEW >= smaller:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=count, niter=_ITERATIONS)
        vh = v.T
    above = int((s > noise).sum())
    kept = max(1, min(kept, above))
    root = s[:kept].sqrt()
    return u[:, :kept] * root, root[:, None] * vh[:kept], above <= kept


def _write(
    folder: Path, adapter: LowRank, tensors: dict[str, Tensor], named: str, *, turns: bool
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = max(adapter.ranks.values())
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=named,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=list(adapter.ranks),
        # Rank and alpha of each layer are the same: B A is added as it is.
        rank_pattern=dict(adapter.ranks),
        alpha_pattern=dict(adapter.ranks),
        modules_to_save=adapter.whole or None,
        bias="lora_only" if any(".base_layer." in key for key in tensors) else "none",
        fan_in_fan_out=turns,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
