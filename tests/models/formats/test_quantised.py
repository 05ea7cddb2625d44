"""FP8 and MXFP4 checkpoints are read as plain ones; values are worked out number by number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from perta.errors import CheckpointError, CorruptCheckpointError
from perta.models.formats.quantised import _dequantise_fp8, _dequantise_mxfp4
from perta.models.load import load_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig

CPU = ComputeConfig(device="cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


def write(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any] | None = None) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if record:
        config["quantization_config"] = record
    (folder / "config.json").write_text(json.dumps(config))


def saved(folder: Path, kind: str, **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def fp8(folder: Path, block: int = 24) -> dict[str, Tensor]:
    """A Llama whose layers are quantised in blocks that do not divide them; its plain values."""
    tensors = saved(folder, "llama", tie_word_embeddings=False)
    wanted = {}
    for name in [name for name in tensors if "proj" in name]:
        out, into = tensors[name].shape
        codes = (tensors[name] * 900).to(torch.float8_e4m3fn)
        shape = math.ceil(out / block), math.ceil(into / block)
        scales = torch.rand(shape) / 900
        plain = torch.empty(out, into, dtype=torch.float64)
        for i in range(out):
            for j in range(into):
                plain[i, j] = float(codes[i, j].float()) * float(scales[i // block, j // block])
        wanted[name] = plain
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    write(folder, tensors, {"quant_method": "fp8", "weight_block_size": [block, block]})
    return {**tensors, **wanted}


def test_fp8_is_read_block_by_block(tmp_path: Path) -> None:
    wanted = fp8(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    folder = resolve_checkpoint(tmp_path)
    assert resolve_checkpoint(tmp_path) == folder != tmp_path
    found = load_file(folder / "model.safetensors")
    assert set(found) == {name for name in wanted if not name.endswith("_scale_inv")}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-6, atol=0)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    load_model(folder, CPU)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_fp8_with_one_scale_a_tensor() -> None:
    weight = torch.tensor([[1.5, -2.0]]).to(torch.float8_e4m3fn)
    assert _dequantise_fp8(weight, torch.tensor(0.25), None).tolist() == [[0.375, -0.5]]


def test_mxfp4_by_hand() -> None:
    """Codes 1, 2, 9 and 15 are ½, 1, -½ and -6; exponents of 128 and 126 double and halve them."""
    blocks = torch.tensor([[[[0x21, 0xF9]], [[0x07, 0x80]]]], dtype=torch.uint8)
    scales = torch.tensor([[[128], [126]]], dtype=torch.uint8)
    found = _dequantise_mxfp4(blocks, scales)
    assert found.tolist() == [[[1.0, 3.0], [2.0, 0.0], [-1.0, 0.0], [-12.0, 0.0]]]
    assert found.dtype == torch.bfloat16


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """A GPT-OSS whose experts are of random codes."""
    tensors = saved(folder, "gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, into, out = tensors.pop(name).shape
        size = (experts, out, into // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, size, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, size[:-1], dtype=torch.uint8)
    write(folder, tensors, {"quant_method": "mxfp4"})
    return tensors


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = mxfp4(tmp_path)
    folder = resolve_checkpoint(tmp_path)
    found = load_file(folder / "model.safetensors")
    packed = [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]
    assert len(packed) == 2
    for name in packed:
        wanted = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(found[name], wanted)
    for name in stored.keys() & found.keys():
        assert torch.equal(found[name], stored[name])
    load_model(folder, CPU)


@pytest.mark.parametrize("make", [fp8, mxfp4], ids=["fp8", "mxfp4"])
def test_missing_and_wrong_scales_are_named(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = min(name for name in tensors if name.endswith(("_scale_inv", "_scales")))
    write(tmp_path, {**tensors, name: tensors[name][..., :-1].contiguous()})
    with pytest.raises(CorruptCheckpointError, match="needs"):
        resolve_checkpoint(tmp_path)
    tensors.pop(name)
    write(tmp_path, tensors)
    with pytest.raises(CorruptCheckpointError, match=f"no file holds {name}"):
        resolve_checkpoint(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_scales_without_a_weight_are_not_dropped(tmp_path: Path) -> None:
    fp8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    write(tmp_path, {**tensors, name: tensors[name].float()})
    with pytest.raises(CheckpointError, match="is quantised"):
        resolve_checkpoint(tmp_path)
