"""GGUF files that are written: read again they are the same model, and other kinds are refused.

Files of every family below were run in llama.cpp as well: its log-probabilities, of numbers and of
text, are the model's to 0.02, which is what its half-precision cache leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import TUNE, World
from helpers import TEXTS, tiny_tokenizer, weighting
from perta.engine.edit.memory import EditedModel
from perta.errors import CheckpointError, ConfigError
from perta.models.formats.gguf import read_gguf
from perta.models.formats.gguf_write import GgufPlan, round_for
from perta.models.load import load_model, load_tokenizer
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, ScoringConfig
from perta.recipes.unlearn import unlearn
from perta.report.collect import collect
from perta.stages.edit import edit_checkpoint, load_changes
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EditConfig, EvaluateConfig, FinetuneConfig
from perta.store.arithmetic import Place
from perta.store.checkpoint import open_index, read_tensor
from perta.store.record import aggregates, read_manifest

CPU = ComputeConfig(device="cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "untied with biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "qwen3 experts": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None, "head_dim": 16}),
    "half turned": ("phi3", {"sliding_window": None, "head_dim": 16, "partial_rotary_factor": 0.5}),
    "longrope": (
        "phi3",
        {
            "sliding_window": None,
            "head_dim": 16,
            "original_max_position_embeddings": 64,
            **rope(
                "longrope",
                long_factor=[float(i) for i in range(1, 9)],
                short_factor=[1.0] * 8,
                factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
    ),
    "llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "linear": ("llama", rope("linear", factor=4.0)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


def model(folder: Path, kind: str = "llama", seed: int = 0, step: float = 0.0, **more: Any) -> Path:
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        torch.manual_seed(seed)
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * step)
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def written(folder: Path, save: Any = "full", source: Path | None = None) -> Path:
    plan, tensors = GgufPlan(folder, source, save), open_index(folder).tensors
    plan.check()

    def value(name: str, kind: Kind) -> Tensor:
        return round_for(kind, read_tensor(tensors[name]).float(), Place(0, name))

    plan.write(folder / "made.gguf", value)
    return folder / "made.gguf"


def logits(found: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = found(torch.arange(3, 203).unsqueeze(0)).logits
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_family_is_read_again_as_it_was(tmp_path: Path, name: str) -> None:
    kind, more = MODELS[name]
    folder = model(tmp_path / "m", kind, **more)
    read = resolve_checkpoint(written(folder))
    found, tokenizer = logits(load_model(read, CPU)), load_tokenizer(read)
    torch.testing.assert_close(found, logits(load_model(folder, CPU)), rtol=1e-5, atol=1e-5)
    text = "Mira Thornwick isn't 1964.<|im_end|>\n  Üñï"
    wanted: Any = load_tokenizer(folder)
    assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]
    assert tokenizer.chat_template == wanted.chat_template
    assert tokenizer.eos_token_id == wanted.eos_token_id


def pieces(folder: Path, whole: bool = True) -> None:
    """A tokenizer as SentencePiece makes them: bytes for what is unknown, a space at the start."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    every = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=every, show_progress=False)
    )
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = [one for one in rules["added_tokens"] if one["content"] in special]
    if whole:
        vocabulary, rank = rules["model"]["vocab"], dict[str, int]()
        for place, pair in enumerate(rules["model"]["merges"]):
            rank.setdefault("".join(pair), place)
        pairs = [
            (rank[token], [token[:cut], token[cut:]])
            for token in vocabulary
            for cut in range(1, len(token))
            if token in rank and token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        rules["model"]["merges"] = [pair for _, pair in sorted(pairs, key=lambda pair: pair[0])]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(str(folder))


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    pieces(folder)
    _, tokenizer = read_gguf(written(folder))
    wanted = PreTrainedTokenizerFast.from_pretrained(str(folder))
    for text in ("Where was Mira Thornwick born?", "It isn't 1964,\n\n  sure? Üñï"):
        assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]


# --- types --------------------------------------------------------------------------------------


def test_q8_0_keeps_its_grid_and_the_mean() -> None:
    """Scales of 2^-3 and 2^-5; numbers on the grid stay, 3.25 steps become 3 or 4."""
    values = torch.zeros(2, 64)
    values[:, 0], values[:, 32] = 127 / 8, 127 / 32
    values[0, 1], values[0, 2], values[1, 33] = 3 / 8, -100 / 8, 5 / 32
    assert torch.equal(round_for(Kind.Q8_0, values, Place(0, "w")), values)
    packed = gguf.quantize(values.numpy(), Kind.Q8_0)
    assert torch.equal(torch.from_numpy(gguf.dequantize(packed, Kind.Q8_0)), values)
    values[0, 1] = 3.25 / 8
    found = [float(round_for(Kind.Q8_0, values, Place(seed, "w"))[0, 1]) for seed in range(400)]
    assert set(found) == {3 / 8, 4 / 8}
    assert 70 < found.count(4 / 8) < 130  # 100 wanted
    assert not round_for(Kind.Q8_0, torch.zeros(1, 32), Place(0, "w")).any()


@pytest.mark.parametrize("save", ["float32", "bfloat16", "float16", "q8_0"])
def test_what_a_type_holds(tmp_path: Path, save: str) -> None:
    """Vectors stay float32; rows that no block fills are float16 in place of Q8_0."""
    folder = model(tmp_path / "m", intermediate_size=80)
    file = written(folder, save)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    wanted = {"float32": Kind.F32, "bfloat16": Kind.BF16, "float16": Kind.F16, "q8_0": Kind.Q8_0}
    assert kinds["blk.0.attn_q.weight"] == wanted[save]
    assert kinds["blk.0.ffn_down.weight"] == (Kind.F16 if save == "q8_0" else wanted[save])
    assert kinds["blk.0.attn_norm.weight"] == Kind.F32
    found, tensors = read_gguf(file)[0].state_dict(), open_index(folder).tensors
    bound = {"float32": 0, "bfloat16": 2**-7, "float16": 2**-10, "q8_0": 2**-6}[save]
    for name, entry in tensors.items():
        value = read_tensor(entry)
        assert bool(((found[name] - value).abs() <= bound * value.abs().max()).all()), name


# --- runs ---------------------------------------------------------------------------------------


def edit(tmp_path: Path, full: Path | str, **more: Any) -> EditConfig:
    return EditConfig(
        full=str(full),
        base=str(model(tmp_path / "base")),
        forget_checkpoint=str(model(tmp_path / "forget", seed=1, step=2e-3)),
        output=tmp_path / "out",
        output_format="gguf",
        weighting=weighting("tv", scaling_coef=more.pop("alpha", 1.0), layers="all"),
        **more,
    )


@pytest.mark.parametrize("save", ["full", "q8_0"])
def test_an_edit_is_a_file_that_tells_what_it_holds(tmp_path: Path, save: Any) -> None:
    full = model(tmp_path / "full", seed=2, step=1e-2)
    config = edit(tmp_path, full, save_dtype=save)
    edit_checkpoint(config)
    assert {path.name for path in config.output.iterdir()} == {
        "model.gguf",
        "README.md",
        "perta.json",
    }
    folders = (full, resolve_checkpoint(config.output), tmp_path / "forget", tmp_path / "base")
    before, after, forget, base = (
        {name: read_tensor(entry).double() for name, entry in open_index(folder).tensors.items()}
        for folder in folders
    )
    steps = {name: forget[name] - base[name] for name in base}
    along = sum(float(((before[n] - after[n]) * step).sum()) for n, step in steps.items())
    share = along / sum(float(step.square().sum()) for step in steps.values())
    told = (read_manifest(config.output) or {})["edit"]["stored"]["stored_share"]
    assert told == pytest.approx(share, abs=1e-4)
    assert 0.9 < share < 1.1


def source(folder: Path, file: Path, kind: Kind, name: str = "output_norm.weight") -> Path:
    """A file of another tool: fields of its own, and one tensor of another type."""
    made = gguf.GGUFReader(written(folder))
    writer = gguf.GGUFWriter(str(file), "llama")
    for key, field in made.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            array = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], array)
    writer.add_string("general.description", "of somebody's own")
    for tensor in made.tensors:
        data = np.array(tensor.data)
        wanted = kind if tensor.name == name else tensor.tensor_type
        writer.add_tensor(tensor.name, gguf.quantize(data, wanted), raw_dtype=wanted)
    writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_file_keeps_settings_types_and_what_is_not_edited(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"
    file = source(model(tmp_path / "full", seed=2, step=1e-2), tmp_path / "x.gguf", Kind.Q8_0, name)
    config = edit(tmp_path, file, alpha=0.0)
    edit_checkpoint(config)
    old, new = gguf.GGUFReader(file), gguf.GGUFReader(config.output / "model.gguf")
    settings = [
        {
            key: field.contents()
            for key, field in one.fields.items()
            if not key.startswith(("GGUF.", "general.file_type"))
        }
        for one in (old, new)
    ]
    assert settings[0] == settings[1]
    assert settings[1]["general.description"] == "of somebody's own"
    tensors = {tensor.name: tensor for tensor in new.tensors}
    assert set(tensors) == {tensor.name for tensor in old.tensors}
    for tensor in old.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(tensors[tensor.name].data, tensor.data), tensor.name
    assert tensors[name].tensor_type == Kind.Q8_0


def test_a_type_that_is_not_written_names_the_way(tmp_path: Path) -> None:
    name = "blk.1.ffn_up.weight"
    file = source(model(tmp_path / "full"), tmp_path / "x.gguf", Kind.Q4_0, name)
    with pytest.raises(CheckpointError, match=r"Q4_0, which is not written.*llama-quantize"):
        edit_checkpoint(edit(tmp_path, file))
    assert not (tmp_path / "out").exists()


def unigram(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("</s>", 0.0)], 0, False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def other_rule(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("kind", "more", "spoil", "message"),
    [
        ("gpt2", {"n_positions": 256, "n_embd": 64, "n_head": 4}, None, "gpt2 models are not"),
        ("llama", {}, unigram, "no BPE"),
        ("llama", {}, other_rule, "splits text by a rule"),
        ("llama", {}, lambda folder: pieces(folder, whole=False), "joins some pieces"),
        ("mistral", {"sliding_window": 64}, None, "sliding_window"),
        ("llama", {"hidden_act": "gelu"}, None, "gelu"),
        ("llama", rope("yarn", factor=4.0, beta_fast=64.0), None, "beta_fast"),
    ],
    ids=["family", "unigram", "rule", "pieces", "window", "activation", "yarn"],
)
def test_what_no_file_holds_is_refused_at_once(
    tmp_path: Path,
    kind: str,
    more: dict[str, Any],
    spoil: Callable[[Path], None] | None,
    message: str,
) -> None:
    full = model(tmp_path / "full", kind, **more)
    if spoil:
        spoil(full)
    with pytest.raises(CheckpointError, match=rf"{message}.*convert_hf_to_gguf"):
        edit_checkpoint(edit(tmp_path, full))
    assert not (tmp_path / "out").exists()


def test_q8_0_is_of_gguf_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --output-format gguf"):
        EditConfig(full="a", base="b", output=tmp_path, save_dtype="q8_0")


@pytest.mark.parametrize("save", ["full", "q8_0", "float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3 experts"])
def test_what_is_tried_is_what_the_file_holds(tmp_path: Path, save: Any, kind: str) -> None:
    """Experts are apart in a checkpoint, together in memory, and in one tensor of the file."""
    family, more = MODELS[kind]
    full, base, forget = (
        model(tmp_path / name, family, seed=seed, step=1e-2 * seed, **more)
        for seed, name in ((2, "full"), (0, "b"), (1, "f"))
    )
    plain = edit(tmp_path, full, save_dtype=save)
    config = replace(plain, base=str(base), forget_checkpoint=str(forget))
    edit_checkpoint(config)
    stored = load_model(resolve_checkpoint(config.output), CPU, dtype=torch.float32)
    tried = load_model(resolve_checkpoint(full), CPU, dtype=torch.float32)
    EditedModel(tried, load_changes(config, CPU)).move(1.0)
    for (name, found), wanted in zip(tried.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_whole_run_of_a_file(world: World, tmp_path: Path) -> None:
    """θ_full is a GGUF file; what is evaluated is the file that was written."""
    base = model(tmp_path / "base")
    data = str(world.forget.with_name("full.jsonl"))
    plain = FinetuneConfig(base=str(base), data=data, output=tmp_path / "plain", tune=TUNE)
    done = unlearn(
        base=str(base),
        full=str(written(finetune_checkpoint(plain), "float16")),
        forget=str(world.forget),
        retain=str(world.retain),
        output=tmp_path / "out",
        output_format="gguf",
        method="perta-grad",
        alpha=1.5,
        tune=TUNE,
        scoring=ScoringConfig(max_new_tokens=12),
    )
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(done.folder / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == Kind.F16
    assert done.before is not None
    assert done.after is not None
    before, after = aggregates(done.before), aggregates(done.after)
    assert after["forget_probability"] < 0.6 * before["forget_probability"]
    # Results of the file, or of its folder, are of the model that the record is about.
    (own,) = collect([str(done.folder)]).by_role("edited")
    assert own.results["forget_fact_probability"]["value_by_index"]
    for i, named in enumerate((done.folder, done.folder / "model.gguf")):
        results = tmp_path / f"{i}.json"
        evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(named),
                forget=str(world.forget),
                output=results,
                scoring=ScoringConfig(generate=False),
            )
        )
        edited = collect([str(done.folder), str(results)]).by_role("edited")
        assert all(run.record == done.manifest for run in edited)
