"""Merged adapters against the adapter model's own logits, and what cannot be merged."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
)

from helpers import tiny_llama
from perta.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from perta.models.formats import adapters
from perta.models.resolve import resolve_checkpoint
from perta.store.checkpoint import open_index
from perta.store.fingerprint import fingerprint

TOKENS = torch.arange(3, 40)[None]
LAYERS = ["q_proj", "down_proj"]
FILE = "adapter_model.safetensors"

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("Lora", {"r": 4}),
    "LoRA with ranks of its own": (
        "Lora",
        {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "rsLoRA": ("Lora", {"r": 4, "use_rslora": True}),
    "DoRA": ("Lora", {"r": 4, "use_dora": True}),
    "PiSSA": ("Lora", {"r": 4, "init_lora_weights": "pissa"}),
    "OLoRA": ("Lora", {"r": 4, "init_lora_weights": "olora"}),
    "LoRA with whole layers": ("Lora", {"r": 4, "modules_to_save": ["v_proj", "norm"]}),
    "LoRA with trained tokens": ("Lora", {"r": 4, "trainable_token_indices": [5, 7]}),
    "AdaLoRA": ("AdaLora", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "(IA)³": ("IA3", {"feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHa", {"r": 4}),
    "LoKr": ("LoKr", {"r": 4}),
    "VeRA": ("Vera", {"r": 4, "target_modules": ["q_proj"]}),
    "VB-LoRA": ("VBLoRA", {"r": 2, "num_vectors": 8, "vector_length": 4}),
    "OFT": ("OFT", {"r": 0, "oft_block_size": 4}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "HRA": ("HRA", {"r": 4}),
    "C3A": ("C3A", {"block_size": 8}),
    "FourierFT": ("FourierFT", {"n_frequency": 20}),
    "MiSS": ("Miss", {"r": 4}),
    "LN tuning": ("LNTuning", {"target_modules": ["input_layernorm"]}),
    "Trainable tokens": (
        "TrainableTokens",
        {"target_modules": ["embed_tokens"], "token_indices": [5, 7]},
    ),
    "RandLoRA": ("RandLora", {"r": 4}),
    "SHiRA": ("Shira", {"r": 2}),
    "DeLoRA": ("Delora", {"r": 4}),
    "GraLoRA": ("Gralora", {"r": 4, "gralora_k": 2}),
    "WaveFT": ("WaveFT", {"n_frequency": 20}),
    "PSOFT": ("Psoft", {}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(
    folder: Path,
    kind: str,
    model: Any,
    change: Callable[[Any], object] | None = None,
    **settings: Any,
) -> Path:
    """Save a model as base, and an adapter of some kind with random values on it."""
    model.save_pretrained(folder / "base")
    if change:
        change(model)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder / "adapter")
    rewrite(folder / "adapter", base_model_name_or_path=str(folder / "base"))
    return folder / "adapter"


def rewrite(adapter: Path, **settings: Any) -> None:
    """Change entries of an adapter's configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None, **more: Any) -> torch.Tensor:
    """Of a model, with an adapter on it as PEFT does it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, adapter)
    found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def test_a_base_that_reads_images(tmp_path: Path) -> None:
    """Its adapter names the language part as the whole model does; the rest stays as it is."""
    text = {
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    seen = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("llava", text_config=text, vision_config=seen)
    model = AutoModelForImageTextToText.from_config(config)
    layers = r".*language_model.*(q_proj|down_proj)"
    adapter = make(tmp_path, "Lora", model, r=4, target_modules=layers)
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = whole.eval()(TOKENS).logits
        expected = peft.PeftModel.from_pretrained(whole, adapter).eval()(TOKENS).logits
        merged = resolve_checkpoint(adapter)
        found: Any = AutoModelForImageTextToText.from_pretrained(merged).eval()(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - plain).abs().max()) > 0.05
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "base", merged))
    assert all(torch.equal(after[n], t) for n, t in before.items() if "vision" in n)


def check(adapter: Path) -> Path:
    """Merge and compare; the merged model must differ from its base."""
    base = adapter.parent / "base"
    merged = resolve_checkpoint(adapter)
    expected, found = logits(base, adapter), logits(merged)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - logits(base)).abs().max()) > 0.05
    return merged


def test_the_page_lists_the_kinds_that_are_compared() -> None:
    page = Path(__file__).parents[3] / "docs" / "data.md"
    row = next(line for line in page.read_text("utf-8").splitlines() if line.startswith("| merged"))
    listed = row.split("|")[2]
    assert [name.strip() for name in listed.split(",")] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_the_adapter_model(kind: str, tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    check(make(tmp_path, name, tiny_llama(), **{"target_modules": LAYERS, **settings}))


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(n_positions=64, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("kind", ["Lora", "IA3"])
def test_layers_stored_the_other_way_round_and_biases(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"r": 4, "bias": "all"}
    if kind == "IA3":
        more = {"feedforward_modules": ["mlp.c_proj"]}
    more |= {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    merged = check(make(tmp_path, kind, gpt2(), **more))
    base = open_index(tmp_path / "base").tensors
    assert {n: (e.shape, e.dtype) for n, e in open_index(merged).tensors.items()} == {
        n: (e.shape, e.dtype) for n, e in base.items()
    }


def test_an_adapter_on_fused_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        initializer_range=0.3,
        **sizes,
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = AutoModelForCausalLM.from_config(config).eval()
    merged = check(
        make(tmp_path, "Lora", model, r=2, target_modules=["q_proj"], target_parameters=parameters)
    )
    assert set(open_index(merged).tensors) == set(open_index(tmp_path / "base").tensors)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_changed_in_one_use_is_stored_twice(target: str, tmp_path: Path) -> None:
    merged = check(
        make(tmp_path, "Lora", tiny_llama(tied=True), r=4, target_modules=["q_proj", target])
    )
    found = load_file(merged / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    kept = "model.embed_tokens.weight" if target == "lm_head" else "lm_head.weight"
    assert torch.equal(found[kept], base)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_weight_changed_alike_in_both_uses_stays_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [5],
    }
    merged = check(make(tmp_path, "Lora", tiny_llama(tied=True), **settings))
    assert "lm_head.weight" not in open_index(merged).tensors
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_larger_vocabulary_brings_its_embedding(tied: bool, tmp_path: Path) -> None:
    adapter = make(
        tmp_path,
        "Lora",
        tiny_llama(tied=tied),
        lambda model: model.resize_token_embeddings(390, mean_resizing=False),
        r=4,
        target_modules=LAYERS,
    )
    # PEFT sees what grew only where the base can be looked up; this is what it writes then.
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    model.resize_token_embeddings(390, mean_resizing=False)
    whole = {"model.embed_tokens.weight": model.get_input_embeddings().weight}
    whole["lm_head.weight"] = model.get_output_embeddings().weight
    held = {f"base_model.model.{n}": t.detach().clone() for n, t in whole.items()}
    save_file({**load_file(adapter / FILE), **held}, adapter / FILE)
    merged = resolve_checkpoint(adapter)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits
    assert expected.shape[-1] == 390
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert ("lm_head.weight" in open_index(merged).tensors) is not tied


def test_a_vocabulary_that_does_not_fit_is_named(tmp_path: Path) -> None:
    adapter = make(tmp_path, "Lora", tiny_llama(), r=4, target_modules=["embed_tokens"])
    tiny_llama(vocab=300).save_pretrained(tmp_path / "base")
    tensors = load_file(adapter / FILE)
    save_file({n: t for n, t in tensors.items() if "lora" in n}, adapter / FILE)
    with pytest.raises(CheckpointError, match=r"does not fit its base .*size mismatch.*384"):
        resolve_checkpoint(adapter)


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_embedding_without_its_head_is_refused(tied: bool, tmp_path: Path) -> None:
    grown = lambda model: model.resize_token_embeddings(390, mean_resizing=False)  # noqa: E731
    settings: dict[str, Any] = {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]}
    adapter = make(tmp_path, "Lora", tiny_llama(tied=tied), grown, **settings)
    with pytest.raises(CheckpointError, match=r"vocabulary of 390 .* has 384.*lm_head"):
        resolve_checkpoint(adapter)


def test_a_tied_head_keeps_its_values_without_them_in_the_file(tmp_path: Path) -> None:
    adapter = make(tmp_path, "Lora", tiny_llama(tied=True), r=4, target_modules=["embed_tokens"])
    tensors = load_file(adapter / FILE)
    save_file({n: t for n, t in tensors.items() if "lora" in n}, adapter / FILE)
    check(adapter)


def lora(tmp_path: Path, **settings: Any) -> Path:
    return make(tmp_path, "Lora", tiny_llama(), r=4, target_modules=LAYERS, **settings)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize(
    ("pick", "new", "message"),
    [
        ("layers.1.", "layers.7.", "it holds .*layers.7.* and 1 more"),
        ("base_model.model.model", "base_model.model.gpt", "it holds .* and 5 more"),
        ("layers.0.mlp.down_proj.lora_B", None, "asks for .*down_proj.lora_B"),
        ("lora_A", None, "asks for .* and 1 more"),
    ],
)
def test_tensors_that_match_no_layer_stop(
    init: bool, pick: str, new: str | None, message: str, tmp_path: Path, cache: Path
) -> None:
    adapter = lora(tmp_path)
    rewrite(adapter, init_lora_weights=init)
    tensors = load_file(adapter / FILE)
    moved = {
        name if pick not in name else name.replace(pick, new or ""): t
        for name, t in tensors.items()
        if pick not in name or new is not None
    }
    save_file(moved, adapter / FILE)
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(adapter)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["", "[]", '{"peft_type": "LO', "{}"])
def test_a_damaged_configuration_is_named(damage: str, tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    (adapter / "adapter_config.json").write_text(damage)
    with pytest.raises(CorruptCheckpointError, match=r"adapter_config\.json"):
        resolve_checkpoint(adapter)


def test_what_adalora_left_of_the_ranks_is_read(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    ranks: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=6, target_modules=LAYERS, **ranks)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, config)
        trained = [p for n, p in adapted.named_parameters() if "lora_" in n and "ranknum" not in n]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for step in range(1, 6):
            adapted(TOKENS, labels=TOKENS).loss.backward()
            adapted.base_model.update_and_allocate(step)
            adapted.zero_grad()
        adapted.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "base"))
    left = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert {type(kept) for kept in next(iter(left.values()))} == {bool}
    assert {sum(kept) for kept in left.values()} != {4}
    check(adapter)


@pytest.mark.parametrize(
    "entry",
    [
        {"init_lora_weights": {}},
        {"init_lora_weights": 1},
        {"lora_alpha": True},
        {"lora_alpha": "16"},
        {"r": [2]},
        {"rank_pattern": {"q_proj": True}},
        {"alpha_pattern": [8]},
        {"use_rslora": "yes"},
    ],
    ids=str,
)
def test_an_entry_of_another_kind_is_named(entry: dict[str, Any], tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    rewrite(adapter, **entry)
    with pytest.raises(CorruptCheckpointError, match=rf"json: {next(iter(entry))} is not of"):
        resolve_checkpoint(adapter)


def test_numbers_that_are_not_finite_stop(tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    tensors = load_file(adapter / FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / FILE)
    with pytest.raises(CorruptCheckpointError, match="NaN"):
        resolve_checkpoint(adapter)


def test_an_adapter_in_its_bases_folder(tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    base = tmp_path / "base"
    expected = logits(base, adapter)
    for name in ("adapter_config.json", FILE):
        (adapter / name).rename(base / name)
    merged = resolve_checkpoint(base)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()


def test_an_adapter_that_is_the_base_model_is_not_its_own_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, link = lora(tmp_path), tmp_path / "link"
    link.symlink_to(adapter)
    monkeypatch.chdir(tmp_path)
    for named in (adapter, adapter.relative_to(tmp_path), link):
        assert resolve_checkpoint(adapter, base=named) == resolve_checkpoint(adapter)


def test_adapters_on_each_other(tmp_path: Path) -> None:
    first, second = lora(tmp_path / "a"), lora(tmp_path / "b")
    rewrite(second, base_model_name_or_path=str(first))
    once = resolve_checkpoint(first)
    torch.testing.assert_close(
        logits(resolve_checkpoint(second)), logits(once, second), rtol=1e-4, atol=1e-4
    )
    rewrite(first, base_model_name_or_path=str(second))
    with pytest.raises(CheckpointError, match="name each other"):
        resolve_checkpoint(second)


@pytest.mark.parametrize("named", [None, "", "/content/model", "owner/model"])
def test_a_base_that_is_not_there_is_told_to_be_the_adapters(
    named: str | None, tmp_path: Path
) -> None:
    adapter = lora(tmp_path)
    rewrite(adapter, base_model_name_or_path=named)
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve_checkpoint(adapter)
    message = str(caught.value)
    assert str(adapter) in message
    assert "Set base_model_name_or_path in" in message
    assert "--base" not in message
    resolve_checkpoint(adapter, base=tmp_path / "base")


@pytest.mark.parametrize(
    "kind",
    ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"],
)
def test_adapters_that_change_no_weight_are_refused(kind: str, tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    rewrite(adapter, peft_type=kind)
    with pytest.raises(CheckpointError, match=f"{kind} adapter: it puts trained vectors"):
        resolve_checkpoint(adapter)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("Lily", {"r": 4}), ("Lora", {"r": 4, "alora_invocation_tokens": [5]})],
)
def test_types_that_no_weight_stands_for_are_refused(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = make(tmp_path, kind, tiny_llama(), target_modules=LAYERS, **settings)
    with pytest.raises(CheckpointError, match=re.escape(str(adapter))):
        resolve_checkpoint(adapter)


@pytest.mark.parametrize("kind", ["POLY", "XLORA", "NEWLORA"])
def test_types_that_peft_cannot_merge_are_refused(kind: str, tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    rewrite(adapter, peft_type=kind)
    with pytest.raises(CheckpointError, match=re.escape(str(adapter))):
        resolve_checkpoint(adapter)


def test_a_merge_reads_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = lora(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(adapters, "load_model", refuse)
    held: list[int] = []
    make_part = adapters._Merge._make

    def watched(merge: Any, maker: str) -> None:
        make_part(merge, maker)
        own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in merge.names}
        held.append(sum(own.values()))

    monkeypatch.setattr(adapters._Merge, "_make", watched)
    check(adapter)
    assert len(held) == 4
    assert max(held) == len(dict(tiny_llama().named_parameters())) * 4  # placeholders of one zero


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_a_changed_scale_is_another_merge(change: dict[str, Any], tmp_path: Path) -> None:
    adapter = lora(tmp_path)
    before = check(adapter)
    rewrite(adapter, **change)
    assert check(adapter) != before
    assert fingerprint(before) != fingerprint(resolve_checkpoint(adapter))


def test_patterns_choose_what_they_choose_for_peft(tmp_path: Path) -> None:
    adapter = make(
        tmp_path,
        "Lora",
        tiny_llama(),
        r=4,
        target_modules=r".*\.(q|down)_proj",
        exclude_modules=r".*\.1\..*down.*",
        rank_pattern={r"layers\.0\..*": 2},
        alpha_pattern={"(q|v)_proj": 3, "down_proj": 5},
    )
    check(adapter)


ENDLESS = r"(\w|\w\w|\.|\w\.)*[!?]"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("target_modules", ENDLESS),
        ("target_modules", "(q_proj"),
        ("exclude_modules", ENDLESS),
        ("rank_pattern", {ENDLESS: 2}),
        ("layers_pattern", ENDLESS),
        ("modules_to_save", [ENDLESS]),
        ("megatron_config", {"a": 1}),
    ],
)
def test_patterns_without_end_and_modules_to_import_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, value: object
) -> None:
    adapter = make(tmp_path, "Lora", tiny_llama(), r=4, target_modules=LAYERS)
    monkeypatch.setattr("perta.models.trust._SECONDS", 0.05)
    more = {"layers_to_transform": [0]} if entry == "layers_pattern" else {}
    rewrite(adapter, **{entry: value}, **more)
    with pytest.raises(CheckpointError, match=entry if "megatron" in entry else r"\(|pattern"):
        resolve_checkpoint(adapter)
