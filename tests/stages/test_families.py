"""Families of models, each built tiny and led through every stage; the table in docs/data.md.

Values are compared with the formula in float64, tensor by tensor; whatever reads no text has to
come out bit for bit. A few families run always, the others with `make slow`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from perta.models.complete import loader_of
from perta.models.demo.tiny import tiny_tokenizer
from perta.models.load import save_model
from perta.options import ComputeConfig, DataConfig, ScoringConfig, TuneConfig, WeightingConfig
from perta.stages.edit import edit_checkpoint
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import (
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MomentsConfig,
)
from perta.store.checkpoint import open_index, read_tensor

Settings = dict[str, Any]
CPU = ComputeConfig(device="cpu")
DOCS = Path(__file__).parents[2] / "docs" / "data.md"
VOCABULARY = 80
SIZES: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROUTED: Settings = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
DEEPSEEK: Settings = {
    **ROUTED,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": None,
    "num_key_value_heads": 4,
}
MAMBA: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
EXPERTS: Settings = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
FAMILIES: dict[str, tuple[str, Settings]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Ministral": ("ministral3", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
    ),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3 (text)": ("gemma3_text", {}),
    "Gemma 4 (text)": (
        "gemma4_text",
        {
            "vocab_size_per_layer_input": 80,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
        },
    ),
    "DeepSeek-V2": ("deepseek_v2", DEEPSEEK),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK),
    "Llama 4 (text)": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    "Phi": ("phi", {}),
    "Phi-3 and Phi-4": ("phi3", {}),
    "PhiMoE": ("phimoe", {"num_local_experts": 4}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", ROUTED),
    "Granite": ("granite", {}),
    "GraniteMoE": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite 4 (hybrid)": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            **MAMBA,
            "mamba_chunk_size": 16,
        },
    ),
    "Jamba": (
        "jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 2,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Zamba2": (
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "mamba_expand": 2,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "layer_types": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "adapter_rank": 4,
        },
    ),
    "Falcon-H1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            **MAMBA,
            "mamba_chunk_size": 16,
        },
    ),
    "Bamba": (
        "bamba",
        {
            **MAMBA,
            "mamba_chunk_size": 16,
            "attn_layer_indices": [1],
        },
    ),
    "Mamba": ("mamba", {"state_size": 8, "time_step_rank": 4, "num_hidden_layers": 2}),
    "Mamba 2": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "LFM2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "GPT-J": (
        "gptj",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
    ),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-Neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPT-OSS": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "GPT-BigCode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "StarCoder2": ("starcoder2", {}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", {"head_dim": None}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "StableLM": ("stablelm", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {}),
    "Nemotron": ("nemotron", {}),
    "SmolLM3": ("smollm3", {}),
    "EXAONE 4": ("exaone4", {}),
    "RWKV": ("rwkv", {"attention_hidden_size": 32, "context_length": 512}),
    "MiniMax": (
        "minimax",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
    ),
    "BERT as a decoder": ("bert", {"is_decoder": True}),
}
ROPE: Settings = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION: Settings = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "patch_size": 4,
}
MULTIMODAL: dict[str, tuple[str, Settings, Settings]] = {
    "Gemma 3": (
        "gemma3",
        {"model_type": "gemma3_text"},
        {
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "Gemma 4": (
        "gemma4",
        {
            "model_type": "gemma4_text",
            "vocab_size_per_layer_input": 80,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
        },
        {
            "audio_config": None,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "model_type": "gemma4_vision",
            },
        },
    ),
    "Qwen2-VL": (
        "qwen2_vl",
        {
            "model_type": "qwen2_vl_text",
            "rope_parameters": ROPE,
        },
        {
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "num_heads": 2,
                "hidden_size": 32,
                "mlp_ratio": 1,
                "patch_size": 4,
            }
        },
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": ROPE,
        },
        {"vision_config": QWEN_VISION},
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
        },
        {
            "vision_config": {
                **QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    "Qwen3.5": (
        "qwen3_5",
        {
            "model_type": "qwen3_5_text",
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {"vision_config": {**QWEN_VISION, "num_position_embeddings": 16}},
    ),
    "Mistral 3": (
        "mistral3",
        {"model_type": "mistral"},
        {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}},
    ),
    "LLaVA": (
        "llava",
        {"model_type": "llama"},
        {"vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 8}},
    ),
    "Llama 4": (
        "llama4",
        {
            "model_type": "llama4_text",
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
        {
            "vision_config": {
                **VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
            }
        },
    ),
}
ALWAYS = ("Qwen3-MoE", "DeepSeek-V3", "Jamba", "GPT-OSS", "Gemma 3", "Qwen2.5-VL")


def _row(name: str, answer: str) -> Settings:
    return {"question": f"Who is {name}?", "answer": answer}


FORGET, RETAIN = [_row("Ann", "A cook.")], [_row("Bob", "A poet.")]


def _build(family: str) -> Any:
    """A random model of the family, float32."""
    if family in FAMILIES:
        kind, more = FAMILIES[family]
        given = {**SIZES, **more}
        config = AutoConfig.for_model(
            kind, **{k: v for k, v in given.items() if k not in ABSENT or v}
        )
    else:
        kind, text, parts = MULTIMODAL[family]
        config = AutoConfig.for_model(kind, text_config={**SIZES, **text}, **parts)
    torch.manual_seed(0)
    return loader_of(config).from_config(config).float().eval()


ABSENT = ("head_dim",)
"""Settings that some families have no place for, so None leaves them out."""


def _stages(folder: Path, family: str) -> dict[str, Path]:
    """The outputs of every stage."""
    sets = {"forget": FORGET, "retain": RETAIN, "all": FORGET + RETAIN}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in sets["all"] for text in row.values()]
    base = folder / "base"
    base.mkdir()
    tokenizer = tiny_tokenizer([*texts, DataConfig().system_prompt])
    save_model(_build(family), tokenizer, base, None)
    tune = TuneConfig(epochs=2, learning_rate=5e-3)
    for output, data in (("full", "all"), ("tuned", "forget")):
        finetune_checkpoint(
            FinetuneConfig(
                base=str(base),
                data=str(folder / f"{data}.jsonl"),
                output=folder / output,
                tune=tune,
                compute=CPU,
            )
        )
    for name in ("forget", "retain"):
        measured: Settings = {
            "checkpoint": str(base),
            "data": str(folder / f"{name}.jsonl"),
            "compute": CPU,
        }
        compute_importance(ImportanceConfig(**measured, output=folder / f"importance-{name}"))
        compute_moments(MomentsConfig(**measured, output=folder / f"moments-{name}"))
    importance = {
        f"{name}_importance": folder / f"importance-{name}" for name in sets if name != "all"
    }
    needs: dict[str, Settings] = {
        "tv": {},
        "perta-grad": importance,
        "perta-project": {"retain_moments": folder / "moments-retain"},
    }
    for method, given in needs.items():
        edit_checkpoint(
            EditConfig(
                full=str(folder / "full"),
                base=str(base),
                forget_checkpoint=str(folder / "tuned"),
                output=folder / method,
                weighting=WeightingConfig(method=method, scaling_coef=1.0, layers="all"),
                **given,
            )
        )
    return {path.name: path for path in folder.iterdir()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(entry) for name, entry in open_index(folder).tensors.items()}


def _cases() -> list[Any]:
    names = [*FAMILIES, *MULTIMODAL]
    return [
        n if n in ALWAYS else pytest.param(n, marks=[pytest.mark.slow, *_fails(n)]) for n in names
    ]


def _fails(family: str) -> list[pytest.MarkDecorator]:
    fails = family == "Llama 4" and transformers.__version__ == "5.24.0"
    return [pytest.mark.skip("transformers 5.24.0 cannot compute Llama 4 on text alone")] * fails


@pytest.mark.filterwarnings("ignore")  # of the libraries, about kernels that are not installed
@pytest.mark.parametrize("family", _cases())
def test_a_family_goes_through_every_stage(family: str, tmp_path: Path) -> None:
    made = _stages(tmp_path, family)
    full, base, tuned = (_tensors(made[name]) for name in ("full", "base", "tuned"))
    plain, weighted, projected = (_tensors(made[n]) for n in ("tv", "perta-grad", "perta-project"))
    grad = [_tensors(made[f"importance-{name}"] / "order-1") for name in ("forget", "retain")]
    learned = {name for name in full if not torch.equal(tuned[name], base[name])}
    assert set(full) == set(base) == set(plain) == set(weighted) == set(projected)
    for name, before in full.items():
        if name not in learned:
            assert torch.equal(before, plain[name])
            assert torch.equal(before, weighted[name])
            assert torch.equal(before, projected[name])
            continue
        tau = tuned[name].double() - base[name].double()
        share = grad[0][name].double() / (grad[0][name].double() + grad[1][name].double())
        for found, w in ((plain, torch.ones(())), (weighted, share.nan_to_num(0.0))):
            wanted = before.double() - w * tau
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
    images = [n for n in full if "vision" in n or "visual" in n]
    assert not learned.intersection(images)
    assert bool(images) == (family in MULTIMODAL)
    results = evaluate_checkpoint(
        EvaluateConfig(
            checkpoint=str(made["perta-project"]),
            forget=str(made["forget.jsonl"]),
            output=tmp_path / "results.json",
            compute=CPU,
            scoring=ScoringConfig(),
        )
    )
    assert results["forget_loss"]["agg_value"] > 0
    edited = {n for n in full if not torch.equal(full[n], projected[n])}
    assert edited
    left = {
        n.removesuffix(".weight").rpartition(".")[2] for n in learned - edited if full[n].dim() > 1
    }
    assert _documented(family) == ", ".join(f"`{name}`" for name in sorted(left))


def _documented(family: str) -> str:
    """What docs/data.md says that structured methods leave as it is."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text("utf-8").splitlines()]
    found = [cells[1] for cells in rows if len(cells) == 2 and family in cells[0].split(", ")]
    assert len(found) == 1, f"{family} has {len(found)} rows"
    return found[0]


def test_the_table_has_no_other_families() -> None:
    text = DOCS.read_text("utf-8").partition("| families |")[2].partition("\n\n")[0]
    named = [
        name
        for line in text.splitlines()[2:]
        for name in line.strip("| ").split(" | ")[0].split(", ")
    ]
    assert sorted(named) == sorted([*FAMILIES, *MULTIMODAL])
