"""GGUF files as checkpoints: every value and every setting of the file, or an error.

transformers converts the tensors that its model has a name for and drops the rest, and it knows no
scaling of positions but that of GPT-OSS. So numbers of values are compared here, and what a file
says of positions is written into the configuration.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, sections `[llm].rope`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perta.errors import CheckpointError, CorruptCheckpointError
from perta.models.complete import check_counts, check_loaded
from perta.models.load import plain_errors
from perta.models.trust import LOCAL, NO_CODE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_FREQUENCIES = "rope_freqs.weight"
_LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
_KNOWN_ROPE = re.compile(
    r"(dimension_(count|sections)|freq_base(_swa)?|scale_linear|scaling\.(type|factor|finetuned"
    r"|original_context_length))$"
)
"""Settings of positions that are read here or by transformers."""


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a GGUF file, dequantised to float32, or a CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, **LOCAL}
    with plain_errors(path, "GGUF file"):
        file = _reader(path)
        shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in file.tensors}
        # Lists are vocabularies, or of a length that something else bounds.
        fields = {name: field for name, field in file.fields.items() if len(field.types) == 1}
        settings = {name: field.contents() for name, field in fields.items()}
        check_counts(path, settings, list(shapes.values()))
        _check_blocks(path, settings, shapes)
        config = AutoConfig.from_pretrained(path.parent, **place)
        _complete(config, settings, shapes)
        _scale_positions(path, config, settings, _factors(file))
        with torch.device("meta"):  # of any size at no cost, before a real one is built
            _check_values(path, AutoModelForCausalLM.from_config(config, **NO_CODE), shapes)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, config=config, dtype=torch.float32, output_loading_info=True, **place
        )
        model: PreTrainedModel = loaded[0]
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        _complete_tokenizer(tokenizer, settings)
    check_loaded(loaded[1], path)
    # The weights are plain float32 now; a left-over quantisation record would make the saved
    # model unloadable.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model._weight_conversions = None  # type: ignore[assignment]  # GGUF tensor names are not the ones to save under
    return model, tokenizer


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Give a tokenizer the chat template and the special tokens that transformers leaves out."""
    tokenizer.chat_template = settings.get("tokenizer.chat_template")
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = settings.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(number)))


def _reader(path: Path) -> Any:
    """The library's reader, which would go on behind the end of the file, for ever so long."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:  # type: ignore[override]
            found = super()._get(offset, dtype, count, **order)
            if len(found) < count:
                raise CorruptCheckpointError(
                    f"{path} ends inside a value that its header counts. Copy or download it again."
                )
            return found

    return Reader(path)


def _complete(
    config: PreTrainedConfig, settings: Mapping[str, Any], shapes: Mapping[str, Any]
) -> None:
    """Write into a configuration what transformers leaves at its default."""
    family = settings["general.architecture"]
    text: Any = config
    if (width := settings.get(f"{family}.attention.key_length")) and hasattr(config, "head_dim"):
        text.head_dim = width
    if (width := settings.get(f"{family}.expert_feed_forward_length")) is not None:
        text.moe_intermediate_size = width
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = settings.get(f"{family}.rope.dimension_count")
    rope = getattr(config, "rope_parameters", None)
    if turned and turned != head and rope and "rope_theta" in rope:
        text.rope_parameters = {**rope, "partial_rotary_factor": turned / head}
    biases = {"attention_bias": ("q", "k", "v", "output"), "mlp_bias": ("gate", "up", "down")}
    for name, parts in biases.items():
        kind = "attn" if name == "attention_bias" else "ffn"
        if hasattr(config, name) and all(f"blk.0.{kind}_{p}.bias" in shapes for p in parts):
            setattr(text, name, True)


def _check_blocks(path: Path, settings: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blk\.(\d+)\.", name))}
    count = settings.get(f"{settings['general.architecture']}.block_count")
    if count != len(blocks) or blocks != set(range(len(blocks))):
        raise CorruptCheckpointError(
            f"{path}: the header counts {count} blocks, and the file holds tensors of "
            f"{len(blocks)}. Copy or download it again."
        )


def _check_values(path: Path, model: PreTrainedModel, shapes: Mapping[str, Any]) -> None:
    """Stop where the model has not taken in as many values as the file holds."""
    tied = model.config.get_text_config().tie_word_embeddings
    left = {_FREQUENCIES, *_LONG_ROPE, *(["output.weight"] if tied else [])}
    held = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in left)
    taken = sum(tensor.numel() for tensor in model.parameters())
    for module in model.modules():
        stored = dict(module.named_buffers(recurse=False))
        taken += sum(stored[n].numel() for n in stored.keys() - module._non_persistent_buffers_set)
    if held != taken:
        raise CorruptCheckpointError(
            f"{path} holds {held:,} values, and the model of its header takes {taken:,}: tensors "
            "would be left out, or invented. Convert the model again, without extra heads."
        )


# --- positions --------------------------------------------------------------------------------


def _factors(file: Any) -> dict[str, Tensor]:
    """What the file divides the frequencies of rotary positions by, (half of what turns,)."""
    found = [tensor for tensor in file.tensors if tensor.name in (_FREQUENCIES, *_LONG_ROPE)]
    return {tensor.name: torch.tensor(tensor.data.tolist()).flatten() for tensor in found}


def _scale_positions(
    path: Path, config: PreTrainedConfig, settings: Mapping[str, Any], factors: Mapping[str, Tensor]
) -> None:
    """Write into a configuration how a file scales rotary positions."""
    start = f"{settings['general.architecture']}.rope."
    rope = {name.removeprefix(start): v for name, v in settings.items() if name.startswith(start)}
    kind = rope.get("scaling.type") or ("linear" if "scale_linear" in rope else "none")
    factor = float(rope.get("scaling.factor") or rope.get("scale_linear") or 1.0)
    others = [name for name in rope if not _KNOWN_ROPE.match(name)]
    attention = rope.get("scaling.attn_factor", 1.0)
    if all(name in factors for name in _LONG_ROPE) and kind in ("none", "longrope"):
        kind, others = "longrope", [name for name in others if name != "scaling.attn_factor"]
    elif kind == "longrope":
        kind = "longrope without its factors"
    elif kind == "none" and attention == 1:
        others = []
    if kind not in ("none", "linear", "yarn", "longrope") or others:
        raise _unknown_scaling(path, f"rope.scaling.type {kind}, {', '.join(others)}")
    scaling: dict[str, Any] = {}
    original = int(rope.get("scaling.original_context_length") or config.max_position_embeddings)
    if kind == "longrope":
        long, short = (factors[name].tolist() for name in _LONG_ROPE)
        scaling = {"rope_type": kind, "long_factor": long, "short_factor": short, "factor": 1.0}
        scaling |= {"original_max_position_embeddings": original, "attention_factor": attention}
        # Some families have a default of their own, which would win.
        config.update({"original_max_position_embeddings": original})
    elif kind != "none" and factor != 1:
        scaling = {"rope_type": kind, "factor": factor}
        scaling |= {"original_max_position_embeddings": original} if kind == "yarn" else {}
    divisors = factors.get(_FREQUENCIES)
    if divisors is not None and bool((divisors != 1).any()):
        if scaling:
            raise _unknown_scaling(path, f"rope.scaling.type {kind} and {_FREQUENCIES}")
        scaling = _as_llama3(path, config, divisors.double())
    if scaling:
        config.rope_parameters = _merged(config.rope_parameters, scaling)


def _merged(parameters: dict[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Scaling goes to the layers that see everything, where a model has others beside them."""
    if isinstance(whole := parameters.get("full_attention"), dict):
        return {**parameters, "full_attention": {**whole, **scaling}}
    return {**parameters, **scaling}


def _as_llama3(path: Path, config: PreTrainedConfig, factors: Tensor) -> dict[str, Any]:
    """Find the settings of Llama 3's scaling that give the file's factors."""
    half = len(factors)
    theta = float(config.rope_parameters["rope_theta"])
    wavelength = 2 * torch.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    factor = float(factors.max())
    for original in (2**power for power in range(5, 21)):
        smooth = ((original / wavelength - 1) / 3).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise _unknown_scaling(path, _FREQUENCIES)


def _unknown_scaling(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} scales positions in a way that cannot be carried over ({what}). Give the "
        "safetensors checkpoint that it was made from."
    )
