"""Checkpoints that do not hold what their config.json describes stop before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import World
from perta.errors import CheckpointError, CorruptCheckpointError
from perta.models import complete
from perta.models.load import load_model, longest_input
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig
from perta.store.checkpoint import write_tensors

CPU = ComputeConfig(device="cpu")
Tensors = dict[str, Tensor]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def tiny(folder: Path, kind: str = "llama", **more: Any) -> Path:
    """A tiny random model of some kind, saved."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **more})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def changed(
    folder: Path, edit: Callable[[Tensors], object] = Tensors.copy, **settings: Any
) -> Path:
    """The checkpoint with other tensors or settings."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def refused(
    folder: Path, match: str, error: type[CheckpointError] = CorruptCheckpointError
) -> None:
    """Whoever names the folder is stopped, and so is whoever loads it."""
    with pytest.raises(error, match=match):
        resolve_checkpoint(folder)
    with pytest.raises(error, match=match):
        load_model(folder, CPU)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, kind: str, name: str, sharded: bool) -> None:
    folder = tiny(tmp_path / "m", kind, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if sharded:
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        write_tensors(folder, tensors, {"a.safetensors": names[:9], "b.safetensors": names[9:]})
    else:
        save_file(tensors, folder / "model.safetensors")
    refused(folder, rf"m: no file holds {name}, which")


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", "mixtral", num_local_experts=4)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    refused(changed(folder, lambda t: t.pop(name)), "m: ", CheckpointError)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_hidden_layers": 1}, r"has no place for model\.layers\.1\..* and 6 more"),
        ({"num_hidden_layers": 3}, r"no file holds model\.layers\.2\..* and 6 more"),
        ({"tie_word_embeddings": False}, r"no file holds lm_head\.weight"),
        ({"hidden_size": 32, "head_dim": 4}, r"\(64, 16\) in the files, but \(64, 32\)"),
    ],
)
def test_a_configuration_of_another_model(
    tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    folder = tiny(tmp_path / "m", tie_word_embeddings=True)
    refused(changed(folder, **settings), match)


def test_tensors_of_other_names_have_no_place(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["value_head.weight"] = torch.ones(1, 16)

    refused(changed(tiny(tmp_path / "m"), rename), r"has no place for value_head\.weight")


def test_heads_tied_by_the_configuration_alone_stay_what_the_files_say(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", tie_word_embeddings=False)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    loaded = load_model(resolve_checkpoint(changed(folder, tie_word_embeddings=True)), CPU)
    assert torch.equal(loaded.get_output_embeddings().weight, head)


def test_what_may_be_missing_or_left_over(tmp_path: Path) -> None:
    """Tied heads, tables that older versions stored, and OpenAI's names without the prefix."""

    def old(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        for name in sorted(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    folder = changed(tiny(tmp_path / "gpt2", "gpt2", n_head=4, n_embd=16, n_layer=2), old)
    assert resolve_checkpoint(folder) == folder
    load_model(folder, CPU)

    def rotary(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    load_model(resolve_checkpoint(changed(tiny(tmp_path / "llama"), rotary)), CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layers": 10**9}},
        {"num_labels": 10**9},
        {"num_local_experts": 10**9},
        {"max_position_embeddings": 10**12},
    ],
)
def test_absurd_counts_stop_before_anything_is_built(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = changed(tiny(tmp_path / "m"), **settings)
    refused(folder, "configuration says .* but the files have", CheckpointError)


def test_absurd_tables_stop_before_they_are_made(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", "gptj", n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    refused(changed(folder, n_positions=10**9), "far too large", CheckpointError)


@pytest.mark.parametrize("positions", [1, 0, -5, "many", 2.5])
def test_positions_that_hold_no_text(tmp_path: Path, positions: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        longest_input(tmp_path)


def test_positions_of_the_language_part(tmp_path: Path) -> None:
    parts = {"text_config": {"max_position_embeddings": 77}, "vision_config": {"n_positions": 5}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    assert longest_input(tmp_path) == 77


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_a_quantised_checkpoint_is_refused_with_the_way_out(tmp_path: Path, place: str) -> None:
    record = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = changed(tiny(tmp_path / "m"), **(record if place == "top" else {place: record}))
    refused(folder, r"quantised \(gptq.*made from", CheckpointError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.down_proj.weight", torch.ones(16, 24, dtype=torch.float8_e4m3fn)),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.ones(4, 16, 16, dtype=torch.uint8)),
        ("model.layers.0.mlp.down_proj.qweight", torch.ones(4, 16, dtype=torch.int32)),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.0.mlp.down_proj.weight.absmax", torch.ones(6)),
    ],
)
def test_quantised_tensors_without_a_record_are_refused(
    tmp_path: Path, name: str, value: Tensor
) -> None:
    folder = changed(tiny(tmp_path / "m"), lambda tensors: tensors.update({name: value}))
    refused(folder, "is quantised", CheckpointError)


def test_other_files_than_those_checked_are_never_loaded(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m")
    shutil.copy(
        folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors"
    )
    refused(folder, "in place of the files that are checked", CheckpointError)
    folder = tiny(tmp_path / "n")
    refused(changed(folder, transformers_weights="x.safetensors"), "in place of", CheckpointError)


def test_nothing_of_the_library_is_printed(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(world.base, tmp_path / "m")
    changed(folder, lambda tensors: tensors.pop("model.norm.weight"))
    capfd.readouterr()
    refused(folder, r"model\.norm\.weight")
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_compared_once_as_long_as_no_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    build = complete.described_model

    def counted(folder: Path) -> PreTrainedModel | None:
        built.append(folder)
        return build(folder)

    monkeypatch.setattr(complete, "described_model", counted)
    folder = tiny(tmp_path / "m")
    for _ in range(2):  # files that are so new that a change of them might not show
        resolve_checkpoint(folder)
    assert len(built) == 2
    monkeypatch.setattr("perta.store.fingerprint._SETTLED", 0)
    for _ in range(3):
        resolve_checkpoint(folder)
    assert len(built) == 3
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    refused(folder, "needs and would run without")
    copy = Path(shutil.copytree(tiny(tmp_path / "n"), tmp_path / "o"))
    resolve_checkpoint(copy)
    (copy / "shard-1-model-1-of-1.safetensors").write_bytes(b"")
    refused(copy, "transformers would read", CheckpointError)
    (copy / "shard-1-model-1-of-1.safetensors").unlink()
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(copy, "neither model.safetensors nor", CheckpointError)
