"""Which layers are MLPs, and what becomes of layers that were not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from conftest import World
from perta.errors import ConfigError
from perta.models.layers import find_slots, late_slots, mlp_names
from perta.models.load import load_tokenizer
from perta.options import WeightingConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.moments import compute_moments, merge_moments
from perta.stages.settings import EditConfig, MergeMomentsConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.measured.moments import _EXPECTED, open_moments

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "num_local_experts": 3,
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
ZAMBA2: dict[str, Any] = {
    **{k: v for k, v in COMMON.items() if k != "head_dim"},
    "num_mem_blocks": 1,
    "hybrid_layer_ids": [1],
    "layer_types": ["mamba", "hybrid"],
    "mamba_ngroups": 1,
    "n_mamba_heads": 2,
    "mamba_headdim": 16,
    "attention_hidden_size": 32,
    "attention_head_dim": 16,
}
GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
FC = ("fc1.weight", "fc2.weight")
STACKED = ("gate_up_proj", "down_proj")


def experts(place: str, names: tuple[str, ...] = GATED) -> list[str]:
    return [f"{place}.experts.{e}.{name}" for e in range(3) for name in names]


# Names of the second block's MLP weights, without its prefix, spelled out by hand.
ARCHITECTURES: dict[str, tuple[Any, list[str]]] = {
    "llama": (hf.LlamaConfig(**COMMON), [f"mlp.{n}" for n in GATED]),
    # As wide inside as outside, and experts as wide as the model: widths alone tell little.
    "square": (
        hf.LlamaConfig(**{**COMMON, "intermediate_size": 16}),
        [f"mlp.{n}" for n in GATED],
    ),
    "gemma3": (hf.Gemma3TextConfig(**COMMON), [f"mlp.{n}" for n in GATED]),
    "olmo": (hf.OlmoConfig(**COMMON), [f"mlp.{n}" for n in GATED]),
    "phi3": (hf.Phi3Config(**COMMON), ["mlp.gate_up_proj.weight", "mlp.down_proj.weight"]),
    "phi": (hf.PhiConfig(**COMMON), [f"mlp.{n}" for n in FC]),
    "starcoder2": (hf.Starcoder2Config(**COMMON), ["mlp.c_fc.weight", "mlp.c_proj.weight"]),
    "opt": (
        hf.OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
            num_attention_heads=2, word_embed_proj_dim=8,
        ),
        list(FC),
    ),
    "gpt2": (
        hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
        ["mlp.c_fc.weight", "mlp.c_proj.weight"],
    ),
    "gptj": (
        hf.GPTJConfig(vocab_size=64, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
        ["mlp.fc_in.weight", "mlp.fc_out.weight"],
    ),
    "bloom": (
        hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
        ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"],
    ),
    "falcon": (
        hf.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"],
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig(**COMMON),
        ["mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"],
    ),
    "bert": (
        hf.BertConfig(**COMMON, is_decoder=True),
        ["intermediate.dense.weight", "output.dense.weight"],
    ),
    "mixtral": (
        hf.MixtralConfig(**COMMON, **EXPERTS),
        experts("block_sparse_moe", ("w1.weight", "w2.weight", "w3.weight")),
    ),
    "qwen2_moe": (
        hf.Qwen2MoeConfig(**COMMON, **EXPERTS, shared_expert_intermediate_size=40),
        experts("mlp") + [f"mlp.shared_expert.{n}" for n in GATED],
    ),
    "square_moe": (
        hf.Qwen3MoeConfig(**COMMON, **{**EXPERTS, "moe_intermediate_size": 16}),
        experts("mlp"),
    ),
    "deepseek_v3": (
        hf.DeepseekV3Config(
            **{**COMMON, "num_key_value_heads": 2}, **EXPERTS, n_shared_experts=1,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        ),
        experts("mlp") + [f"mlp.shared_experts.{n}" for n in GATED],
    ),
    "gpt_oss": (
        hf.GptOssConfig(**COMMON, **EXPERTS, layer_types=["full_attention"] * 2),
        [f"mlp.experts.{n}" for n in STACKED],
    ),
    "llama4": (
        hf.Llama4TextConfig(**COMMON, **EXPERTS, intermediate_size_mlp=24, layer_types=None),
        [f"feed_forward.experts.{n}" for n in STACKED]
        + [f"feed_forward.shared_expert.{n}" for n in GATED],
    ),
    "jamba": (
        hf.JambaConfig(
            **{**COMMON, **EXPERTS}, attn_layer_period=2, attn_layer_offset=0,
            expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4,
        ),
        experts("feed_forward"),
    ),
    "zamba2": (
        hf.Zamba2Config(**ZAMBA2),
        [
            "shared_transformer.feed_forward.gate_up_proj.weight",
            "shared_transformer.feed_forward.down_proj.weight",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mlps_are_found_by_structure(tmp_path: Path, name: str) -> None:
    config, expected = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found = {open_index(tmp_path).find(n) for n in mlp_names(tmp_path)}
    assert None not in found
    stored = {entry.name for entry in found if entry}
    matched = (re.fullmatch(r"(?:[a-z_]+\.)+1\.(.+)", n) for n in stored)
    block = [match[1] for match in matched if match]
    assert sorted(block) == sorted(expected)


@pytest.mark.parametrize(
    "config",
    [
        hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4),
        hf.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1),
    ],
    ids=["mamba", "rwkv"],
)
def test_where_there_is_no_mlp_none_is_found(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    assert mlp_names(tmp_path) == frozenset()


@pytest.mark.parametrize("text", [None, "{}", "[]", '{"model_type": "unheard-of"}'])
def test_a_model_of_no_known_kind_has_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert mlp_names(tmp_path) == frozenset()


# --- the last third of the blocks -------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "late"), [(1, ""), (2, ""), (3, "2"), (4, "3"), (5, "4"), (6, "45")]
)
@pytest.mark.parametrize("kind", [hf.LlamaConfig, hf.GPT2Config, hf.MixtralConfig, hf.MambaConfig])
def test_late_layers_are_those_of_the_last_third_of_the_blocks(
    kind: Any, blocks: int, late: str
) -> None:
    sizes = {**COMMON, "num_hidden_layers": blocks, **EXPERTS, "state_size": 4}
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(kind(**sizes))
    every, found = find_slots(model), late_slots(model)
    assert found == [slot for slot in every if re.search(rf"\.[{late}-]\.", slot[0])]
    assert len(found) * blocks == len(every) * len(late)


def test_every_list_of_blocks_has_late_layers_of_its_own() -> None:
    def blocks(count: int) -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(3)) for _ in range(count))

    class Pair(hf.PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(hf.PretrainedConfig())
            self.bridge, self.sight, self.text = nn.Linear(2, 2), blocks(6), blocks(3)

    names = [f"{place}.{i}.weight" for place in ("sight.4", "sight.5", "text.2") for i in range(3)]
    assert late_slots(Pair()) == [(name, 0) for name in names]


# --- layers without moments ------------------------------------------------------------------


def checkpoints(root: Path, world: World, config: Any) -> tuple[Path, Path, Path]:
    """Base, full and forget checkpoint of a model: random, and moved from it at random."""
    tokenizer = load_tokenizer(world.base)
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 2
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    folders = (root / "base", root / "full", root / "forget")
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
    return folders


def moments(root: Path, base: Path, *answers: str) -> Path:
    """Moments of a set of its own, one row for each answer."""
    name = str(abs(hash(answers)))
    data = root / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": answer}) + "\n" for answer in answers))
    return compute_moments(
        MomentsConfig(checkpoint=str(base), data=str(data), output=root / f"{name}_moments")
    )


def edited_shares(
    folders: tuple[Path, Path, Path], retain: Path, output: Path, **settings: Any
) -> dict[str, float]:
    """Share of each task vector's norm that was subtracted."""
    base, full, forget = folders
    edit_checkpoint(
        EditConfig(
            full=str(full), base=str(base), forget_checkpoint=str(forget), retain_moments=retain,
            output=output,
            weighting=WeightingConfig(method="perta-project", scaling_coef=1.0, **settings),
        )
    )  # fmt: skip
    read: list[dict[str, Tensor]] = [
        {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}
        for folder in (*folders, output)
    ]
    return {
        name: float((read[1][name] - read[3][name]).norm() / (value - read[0][name]).norm())
        for name, value in read[2].items()
    }


def test_a_weight_used_without_calling_its_layer_stays_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=64)
    folders = checkpoints(tmp_path, world, config)
    retain = moments(tmp_path, folders[0], "Red is a colour.", "The Rhine is a river.")
    names = [f"backbone.layers.{layer}.mixer.dt_proj.weight" for layer in (0, 1)]
    facts = open_moments(retain).facts
    assert [facts["seen"][facts["inputs"][name]]["tokens"] for name in names] == [0, 0]
    capsys.readouterr()
    shares = edited_shares(folders, retain, tmp_path / "out")
    err = " ".join(capsys.readouterr().err.split())
    assert [shares[name] for name in names] == [0, 0]
    assert 0 < shares["backbone.layers.0.mixer.in_proj.weight"] < 0.999
    assert f"{names[0]}, {names[1]} stay as they are" in err
    assert "MLP layers" in err
    named = edited_shares(folders, retain, tmp_path / "named", include=("*.dt_proj.*",))
    assert [named[name] for name in names] == pytest.approx([1, 1])
    assert "edited without protection" in " ".join(capsys.readouterr().err.split())
    # A pattern that matches measured layers as well does not ask for these.
    both = edited_shares(folders, retain, tmp_path / "both", include=("*.mixer.*",))
    assert [both[name] for name in names] == [0, 0]
    with pytest.raises(ConfigError, match="no token was measured"):
        edited_shares(
            folders,
            retain,
            tmp_path / "none",
            include=("*.mixer.*",),
            exclude=("*.in_proj.*", "*.out_proj.*", "*.x_proj.*"),
        )


def test_an_expert_without_tokens_is_measured_where_others_had_many(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf.MixtralConfig(
        **{**COMMON, "num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=1
    )
    folders = checkpoints(tmp_path, world, config)
    for folder in folders:
        never_choose_the_last(folder, "block_sparse_moe.gate.weight")
    few, many = (moments(tmp_path, folders[0], text) for text in ("A", "Red is a colour. " * 9))
    weights = [f"model.layers.0.block_sparse_moe.experts.3.w{i}.weight" for i in (1, 2, 3)]
    for folder, is_measured in ((few, False), (many, True)):
        opened = open_moments(folder)
        name = opened.facts["inputs"][weights[0]]
        assert opened.facts["seen"][name]["tokens"] == 0
        average = opened.facts["tokens"] / 4
        assert opened.facts["seen"][name]["average"] == average
        assert (average >= _EXPECTED) == is_measured
        assert opened.is_measured(weights[0]) == is_measured
        shares = edited_shares(folders, folder, tmp_path / f"out{is_measured}")
        share = 1.0 if is_measured else 0.0
        assert [shares[weight] for weight in weights] == pytest.approx([share] * 3)
        said = capsys.readouterr().err
        assert ("stay as they are" in said) == (not is_measured)
    both = merge_moments(MergeMomentsConfig(folders=(few, many), output=tmp_path / "both"))
    counts = [open_moments(folder).facts["seen"] for folder in (few, many, both)]
    for name in counts[0]:
        for key in ("tokens", "average"):
            assert counts[0][name][key] + counts[1][name][key] == counts[2][name][key]


def never_choose_the_last(folder: Path, ending: str) -> None:
    """Make the last row of a router the mean of the others: never the largest of them."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name][3] = tensors[name][:3].mean(0)
    save_file(tensors, file, {"format": "pt"})
