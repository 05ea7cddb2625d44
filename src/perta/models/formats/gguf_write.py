"""Checkpoints as GGUF files: the weights, and what a file that they came from says, or config.json.

    θ_full was a GGUF file ── its settings, tokenizer and types as they are
    a checkpoint ──────────── settings and tokenizer from its own files, for some families

Values are given on the grid of their type already; packing them is exact.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from perta.errors import CheckpointError
from perta.models.formats._gguf_tokenizer import add_tokenizer
from perta.models.load import load_tokenizer, stored_dtype
from perta.models.trust import LOCAL, read_config
from perta.options import FileType, OutputFormat, at_home
from perta.store.arithmetic import Place, round_as_stored, thresholds
from perta.store.checkpoint import GGUF, open_index

Value = Callable[[str, Kind], Tensor]
"""Stored name and type -> values of that type, float32."""

_FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
}
"""Kind of model -> its name in GGUF files."""

_KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "float16": Kind.F16, "q8_0": Kind.Q8_0}
_TYPES = {Kind.BF16: torch.bfloat16, Kind.F16: torch.float16}
_FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q8_0: 7, Kind.BF16: 32}
_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
"""Families whose files hold the scale of a norm, where the model holds it less 1."""
_AS_NAMED = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "phi3", "stablelm", "starcoder2")
_BLOCK, _LARGEST = 32, 127
_ROPE = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight$")
_CONVERT = (
    "Write a checkpoint (--output-format checkpoint) and convert it with llama.cpp's "
    "convert_hf_to_gguf.py."
)
_QUANTIZE = (
    "Give --save-dtype float16 or q8_0, and make the type of your file from the result: "
    "`llama-quantize model.gguf small.gguf {name}`, a program of llama.cpp."
)


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF file will hold."""

    folder: Path  # checkpoint with θ_full's names, config.json and tokenizer
    source: Path | None  # GGUF file that θ_full was read from
    save: FileType  # type of the weights

    @cached_property
    def _file(self) -> Any:
        return gguf.GGUFReader(str(self.source))

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, **LOCAL)

    @cached_property
    def family(self) -> str:
        """Name of the family in GGUF files; CheckpointError where no file of it is written here."""
        if self.source is not None:
            family = self._file.fields["general.architecture"].contents()
            known = family in (*_AS_NAMED, *_PLUS_ONE)
        else:
            family = read_config(self.folder).get("model_type")
            known = family in _FAMILIES
        if not known:
            raise CheckpointError(f"{family} models are not written as GGUF files here. {_CONVERT}")
        return str(family if self.source is not None else _FAMILIES[family])

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Type of a tensor of the file; CheckpointError if the source's is not written here."""
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return Kind.F32  # all that llama.cpp multiplies such with
        if self.save != "full":
            kind = _KINDS[self.save]
        elif self.source is None:
            kind = _KINDS[str(stored_dtype(self.folder)).removeprefix("torch.")]
        else:
            kind = Kind(self._kinds[name])
            if kind not in _FILE_TYPES:
                raise CheckpointError(
                    f"{self.source}: {name} is of the type {kind.name}, which is not written here. "
                    f"{_QUANTIZE.format(name=kind.name)}"
                )
        return Kind.F16 if kind == Kind.Q8_0 and shape[-1] % _BLOCK else kind

    @cached_property
    def _kinds(self) -> dict[str, int]:
        return {tensor.name: tensor.tensor_type for tensor in self._file.tensors}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Name in the file -> the stored tensors that make it; CheckpointError if one has none."""
        config = self._config
        of = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.family]
        table = gguf.get_tensor_name_map(of, config.num_hidden_layers)
        found: dict[str, list[str]] = {}
        for name in open_index(self.folder).tensors:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            plain = re.sub(r"\.experts\.\d+\.", ".experts.", name)
            place = table.get_name(plain, try_suffixes=(".weight", ".bias"))
            if place is None or (self.source is not None and place not in self._kinds):
                raise CheckpointError(f"{name} has no place in a GGUF file. {_CONVERT}")
            found.setdefault(place, []).append(name)
        return {place: sorted(names, key=_expert) for place, names in found.items()}

    def roundings(self, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Stored name -> how its float32 values are rounded to their type in the file."""
        tensors, found = open_index(self.folder).tensors, dict[str, Callable[[Tensor], Tensor]]()
        for place, names in self.names.items():
            kind = self.kind(place, tensors[names[0]].shape)
            found |= {n: partial(round_for, kind, place=Place(seed, n)) for n in names}
        return found

    def check(self) -> None:
        """Stop before any long step at a family, type, tokenizer or setting that no file has."""
        tensors = open_index(self.folder).tensors
        for place, names in self.names.items():
            self.kind(place, tensors[names[0]].shape)
        if self.source is None:
            writer = gguf.GGUFWriter(None, self.family)
            _add_settings(writer, self._config, self.folder)
            add_tokenizer(writer, load_tokenizer(self.folder), self.folder, _CONVERT)

    def write(self, file: Path, value: Value) -> None:
        """Write the file, each tensor made when its turn comes."""
        writer, tensors = gguf.GGUFWriter(str(file), self.family), open_index(self.folder).tensors
        further = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in self._unmapped()}
        if self.source is not None:
            self._copy_settings(writer)
        else:
            further |= _add_settings(writer, self._config, self.folder)
            add_tokenizer(writer, load_tokenizer(self.folder), self.folder, _CONVERT)
        plans = {}
        for place, names in self.names.items():
            shape = tensors[names[0]].shape
            plans[place] = kind = self.kind(place, shape)
            whole = (len(names), *shape) if _expert(names[0]) >= 0 else shape
            _announce(writer, place, whole, kind)
        for name, tensor in further.items():
            _announce(writer, name, tuple(tensor.shape), Kind.F32)
        writer.add_file_type(_FILE_TYPES[Counter(plans.values()).most_common(1)[0][0]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, names in self.names.items():
            parts = [self._as_in_file(place, value(name, plans[place])) for name in names]
            data = torch.stack(parts) if _expert(names[0]) >= 0 else parts[0]
            writer.write_tensor_data(gguf.quantize(data.contiguous().numpy(), plans[place]))
        for tensor in further.values():
            writer.write_tensor_data(tensor.numpy())
        writer.close()

    def _unmapped(self) -> Iterator[Any]:
        """Tensors of the source that are no weights: what scales positions."""
        for tensor in self._file.tensors if self.source is not None else ():
            if _ROPE.search(tensor.name):
                yield tensor
            elif tensor.name not in self.names:
                raise CheckpointError(f"{self.source}: {tensor.name} is no weight of its model.")

    def _copy_settings(self, writer: gguf.GGUFWriter) -> None:
        general = (f"general.{n}" for n in ("architecture", "file_type", "quantization_version"))
        left = ("GGUF.", *general)
        for name, field in self._file.fields.items():
            if not name.startswith(left):
                array = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], array)

    def _as_in_file(self, place: str, values: Tensor) -> Tensor:
        """Values as llama.cpp lays them out."""
        if self.family in _PLUS_ONE and place.endswith("norm.weight"):
            return values + 1
        if self.family == "llama" and (found := re.search(r"\.attn_([qk])\.", place)):
            config = self._config
            count = config.num_key_value_heads if found[1] == "k" else config.num_attention_heads
            halves = values.reshape(count, 2, -1, *values.shape[1:])
            return halves.transpose(1, 2).reshape(values.shape)
        return values


def gguf_plan(output: OutputFormat, full: str, folder: Path, save: FileType) -> GgufPlan | None:
    """The plan of a GGUF file, checked; None for another output. `full` is as the user named it."""
    if output != "gguf":
        return None
    file = at_home(full)
    file = file / GGUF if file.is_dir() else file
    plan = GgufPlan(folder, file if file.is_file() else None, save)
    plan.check()
    return plan


def _expert(name: str) -> int:
    """Number of the expert that a tensor is of, -1 if of none."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = math.prod(shape) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, kind)


def round_for(kind: Kind, values: Tensor, place: Place) -> Tensor:
    """Float32 values on the grid of F32, F16, BF16 or Q8_0 (32 a group), rounded at random."""
    if kind in _TYPES:
        return round_as_stored(values, _TYPES[kind], place).float()
    if kind == Kind.F32:
        return values
    blocks = values.reshape(-1, _BLOCK)
    factors = (blocks.abs().amax(1, keepdim=True) / _LARGEST).half().float()
    steps = torch.where(factors > 0, blocks / factors, 0.0)
    # The largest number stays the largest, which the scale is made from again; what lies on the
    # grid up to rounding stays there.
    nearest = steps.round()
    above = thresholds(place, values.numel()).view(blocks.shape) / 2.0**16
    is_fixed = ((steps - nearest).abs() < _ON_GRID) | (nearest.abs() >= _LARGEST)
    counts = torch.where(is_fixed, nearest, (steps + above).floor()).clamp(-_LARGEST, _LARGEST)
    return (counts * factors).view(values.shape)


_ON_GRID = 1e-3


def _add_settings(writer: gguf.GGUFWriter, config: Any, folder: Path) -> dict[str, Tensor]:
    """Say what config.json says; tensors that scale positions."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(config.rope_parameters)
    theta, share = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise CheckpointError(f"{folder}: sliding_window is in no such GGUF file. {_CONVERT}")
    if config.hidden_act != "silu":
        raise CheckpointError(f"{folder}: {config.hidden_act} is in no such GGUF file. {_CONVERT}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * share))
    writer.add_rope_freq_base(float(theta))
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if not config.norm_topk_prob or config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise CheckpointError(f"{folder}: its choice of experts is in no GGUF file. {_CONVERT}")
    rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    longest = config.max_position_embeddings
    return _add_positions(writer, rope, theta, int(width * share), longest, folder)


def _add_positions(
    writer: gguf.GGUFWriter,
    rope: dict[str, Any],
    theta: float,
    width: int,
    longest: int,
    folder: Path,
) -> dict[str, Tensor]:
    """Say how positions are scaled."""
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    original, factor = rope.pop("original_max_position_embeddings"), rope.pop("factor", None)
    if kind == "llama3":
        low, high = rope.pop("low_freq_factor"), rope.pop("high_freq_factor")
        wave = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        smooth = ((original / wave - low) / (high - low)).clamp(0, 1)
        tensors = {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}
    else:
        tensors = {}
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(factor))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        for name in ("long", "short"):
            tensors[f"rope_factors_{name}.weight"] = torch.tensor(rope.pop(f"{name}_factor"))
        writer.add_rope_scaling_orig_ctx_len(original)
        times = max(1.0, factor or longest / original)
        usual = math.sqrt(1 + math.log(times) / math.log(original))
        writer.add_rope_scaling_attn_factors(rope.pop("attention_factor", None) or usual)
    left = sorted(name for name, value in rope.items() if value is not None)
    if left or kind not in ("default", "llama3", "linear", "yarn", "longrope"):
        what = ", ".join([f"rope_type {kind}", *left])
        raise CheckpointError(
            f"{folder}: its positions ({what}) have no GGUF form here. {_CONVERT}"
        )
    return tensors
