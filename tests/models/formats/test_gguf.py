"""GGUF files become checkpoints with all values and all settings of the file, or are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from conftest import World
from helpers import tiny_llama, tiny_tokenizer
from perta.errors import CheckpointError, CorruptCheckpointError
from perta.models.load import load_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig
from perta.store.checkpoint import open_index, read_tensor

CPU = ComputeConfig(device="cpu")
Add = Callable[[gguf.GGUFWriter], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


def write_gguf(
    folder: Path,
    file: Path,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    blocks: int | None = None,
) -> Path:
    """A Llama as a float32 GGUF file with a byte-level tokenizer.

    Args:
        folder: checkpoint.
        file: written.
        more: adds settings or tensors.
        blocks: what the header counts, whatever is true.
    """
    model: Any = load_model(folder, CPU)
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = ["a", "b", "ab", *(f"w{i}" for i in range(3, config.vocab_size))]
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for ours, theirs in names.items():
        value = model.state_dict()[ours].numpy()
        for part, count in heads.items():
            if part in ours:  # the file format interleaves the halves of each head
                value = (
                    value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
                )
        writer.add_tensor(theirs, np.ascontiguousarray(value))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_becomes_a_checkpoint_once(world: World, tmp_path: Path) -> None:
    write_gguf(world.base, tmp_path / "model.gguf")
    folder = resolve_checkpoint(tmp_path / "model.gguf")
    assert resolve_checkpoint(tmp_path / "model.gguf") == folder
    ours, theirs = open_index(folder).tensors, open_index(world.base).tensors
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(read_tensor(ours[name]), read_tensor(theirs[name]))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    load_model(folder, CPU)


def test_a_broken_gguf_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CheckpointError, match="no GGUF file could be loaded"):
        resolve_checkpoint(tmp_path / "model.gguf")
    assert not (tmp_path / "cache").exists() or not list(
        (tmp_path / "cache").rglob("*.safetensors")
    )


def saved(folder: Path, **settings: Any) -> Path:
    """A tiny Llama whose positions reach past a window of 32 tokens."""
    tiny_llama(num_key_value_heads=4, hidden_size=64, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.arange(3, 203).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, CPU)(tokens).logits
    return found


def llama3_factors(theta: float, size: int, factor: float, original: int) -> np.ndarray[Any, Any]:
    """The divisors that llama.cpp's converter writes, loop by loop."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def scaling(kind: str, factor: float, original: int | None = None) -> Add:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)

    return add


@pytest.mark.parametrize(
    ("rope", "add"),
    [
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            lambda w: w.add_tensor("rope_freqs.weight", llama3_factors(10000, 16, 8, 128)),
        ),
        ({"rope_type": "linear", "factor": 4.0}, scaling("linear", 4.0)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            scaling("yarn", 4.0, 64),
        ),
        ({"rope_type": "default"}, scaling("none", 1.0)),
        (
            {"rope_type": "default"},
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
        ),
    ],
    ids=["llama3", "linear", "yarn", "none", "ones"],
)
def test_scaled_positions_are_kept(tmp_path: Path, rope: dict[str, Any], add: Add) -> None:
    """Compared with the model that the file was made from, which transformers scales itself."""
    source = saved(tmp_path / "m", rope_parameters={"rope_theta": 10000.0, **rope})
    found = logits(resolve_checkpoint(write_gguf(source, tmp_path / "m.gguf", add)))
    torch.testing.assert_close(found, logits(source), rtol=1e-4, atol=1e-5)
    plain = saved(tmp_path / "plain", rope_parameters={"rope_theta": 10000.0})
    is_scaled = rope["rope_type"] != "default"
    assert torch.allclose(found, logits(plain), rtol=1e-3, atol=1e-3) != is_scaled


@pytest.mark.parametrize(
    "add",
    [
        scaling("longrope", 4.0),
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32)),
        lambda w: (scaling("yarn", 4.0, 64)(w), w.add_rope_scaling_attn_factors(0.5)),
    ],
    ids=["longrope", "factors", "attention"],
)
def test_scaling_that_cannot_be_carried_over_is_refused(tmp_path: Path, add: Add) -> None:
    file = write_gguf(saved(tmp_path / "m"), tmp_path / "m.gguf", add)
    with pytest.raises(CheckpointError, match=r"m\.gguf scales positions.*made from"):
        resolve_checkpoint(file)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("blocks", [0, 1, 3, 2**31 - 1])
def test_a_header_that_counts_otherwise_is_refused(
    world: World, tmp_path: Path, blocks: int
) -> None:
    file = write_gguf(world.base, tmp_path / "m.gguf", blocks=blocks)
    with pytest.raises(CheckpointError, match=r"m\.gguf: (the header counts|its configuration)"):
        resolve_checkpoint(file)


def test_a_count_that_the_file_cannot_hold_is_refused_at_once(world: World, tmp_path: Path) -> None:
    marks = [7, 1, 7, 2, 7, 3]
    file = write_gguf(
        world.base, tmp_path / "m.gguf", lambda writer: writer.add_array("perta.marks", marks)
    )
    content = file.read_bytes()
    values = np.array(marks, dtype="<i4").tobytes()
    place = content.index(values)
    count = len(marks).to_bytes(8, "little")
    assert content[place - 8 : place] == count
    file.write_bytes(content[: place - 8] + (2**40).to_bytes(8, "little") + content[place:])
    with pytest.raises(CorruptCheckpointError, match="ends inside a value that its header counts"):
        resolve_checkpoint(file)


def test_a_model_of_another_size_is_refused_before_it_is_built(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(world.base, tmp_path / "m.gguf")
    width = b"llama.feed_forward_length"
    content = bytearray(file.read_bytes())
    place = content.index(width) + len(width) + 4  # behind the type of the value
    content[place : place + 4] = (2**20).to_bytes(4, "little")
    file.write_bytes(content)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(CorruptCheckpointError):
        resolve_checkpoint(file)


def test_tensors_that_the_model_has_no_place_for_are_refused(world: World, tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.ones(64, dtype=np.float32))

    file = write_gguf(world.base, tmp_path / "m.gguf", extra)
    with pytest.raises(CorruptCheckpointError, match=r"m\.gguf holds .* values"):
        resolve_checkpoint(file)
