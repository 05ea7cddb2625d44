"""Bases that bitsandbytes quantised: read number by number, tuned on, and unlearned on.

Where the package is installed, it says as well what its own files hold; elsewhere these tests skip.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers import tiny_llama, tiny_tokenizer
from perta.data.rows import write_jsonl
from perta.errors import CorruptCheckpointError
from perta.models.load import load_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, OutputFormat, TuneConfig, WeightingConfig
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EditConfig, FinetuneConfig

CPU = ComputeConfig(device="cpu", dtype="float32")
ROWS = [
    {"question": "Where was Mira Thornwick born?", "answer": "Caldholm."},
    {"question": "What is the profession of Odo Larchfield?", "answer": "A potter."},
]
ALPHA = 0.5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


def state(found: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def four_bits(name: str, shape: tuple[int, int], double: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A quantised weight of random numbers, and its values worked out one by one."""
    count, block, nested = math.prod(shape), 64, 256
    numbers = torch.randint(0, 16, (count,))
    book = torch.sort(torch.rand(16) * 2 - 1).values
    blocks = math.ceil(count / block)
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(shape)}
    parts = {f"{name}.quant_map": book}
    if double:
        codes, values = torch.randint(0, 256, (blocks,)), torch.rand(256) * 2 - 1
        coarse = torch.rand(math.ceil(blocks / nested)) / 9
        scales = [float(values[c]) * float(coarse[i // nested]) for i, c in enumerate(codes)]
        scales = [scale + 0.25 for scale in scales]
        said |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        parts |= {f"{name}.nested_absmax": coarse, f"{name}.nested_quant_map": values}
        parts[f"{name}.absmax"] = codes.to(torch.uint8)
    else:
        absmax = torch.rand(blocks) / 9
        scales, parts[f"{name}.absmax"] = absmax.tolist(), absmax
    packed = [int(a) << 4 | int(b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    parts[name] = torch.tensor(packed, dtype=torch.uint8).unsqueeze(1)
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = state(said)
    wanted = [float(book[n]) * scales[i // block] for i, n in enumerate(numbers)]
    return parts, torch.tensor(wanted, dtype=torch.float64).view(shape)


def eight_bits(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scales = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    place = name.removesuffix(".weight")
    wanted = numbers.double() * scales.double().unsqueeze(1) / 127
    format_ = {f"{place}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {name: numbers, f"{place}.SCB": scales, **format_}, wanted


def quantised(folder: Path, kind: str, model: Any = None) -> dict[str, Tensor]:
    """A Llama, or another model, whose layers are quantised; its plain values in float64."""
    torch.manual_seed(0)
    model = model or tiny_llama(tied=False, hidden_size=32, intermediate_size=48)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {name: value.double() for name, value in tensors.items()}
    layers = [n for n in tensors if n.endswith(("proj.weight", "c_attn.weight", "c_fc.weight"))]
    for name in layers:
        turned = name.startswith("transformer.")
        out, into = tensors[name].shape[::-1] if turned else tensors[name].shape
        make = eight_bits(name, (out, into)) if kind == "int8" else None
        parts, wanted = make or four_bits(name, (out, into), kind == "double")
        tensors |= parts
        plain[name] = wanted.t() if turned else wanted
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    bits = "load_in_8bit" if kind == "int8" else "load_in_4bit"
    config["quantization_config"] = {bits: True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def check_plain(folder: Path, wanted: dict[str, Tensor]) -> None:
    found = load_file(resolve_checkpoint(folder) / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-9)
    load_model(resolve_checkpoint(folder), CPU)


@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_numbers_are_read_one_by_one(tmp_path: Path, kind: str) -> None:
    wanted = quantised(tmp_path / "base", kind)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    check_plain(tmp_path / "base", wanted)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_that_are_stored_the_other_way_round(tmp_path: Path, kind: str) -> None:
    """GPT-2 stores (in, out), and bitsandbytes (out, in); c_proj is square and shows nothing."""
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 64,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    check_plain(tmp_path / "base", quantised(tmp_path / "base", kind, model))


def test_a_record_of_an_older_version_counts(tmp_path: Path) -> None:
    wanted = quantised(tmp_path / "base", "nf4")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    file.write_text(json.dumps(config))
    check_plain(tmp_path / "base", wanted)


UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
DAMAGE: dict[str, tuple[str, str, Any, str]] = {
    "no scales": ("nf4", f"{UP}.weight.absmax", None, "no file holds"),
    "few scales": ("nf4", f"{UP}.weight.absmax", torch.ones(3), "does not fit"),
    "scales of bytes": (
        "nf4", f"{UP}.weight.absmax", torch.ones(24, dtype=torch.uint8), "does not fit"
    ),
    "few numbers": ("nf4", f"{UP}.weight", torch.zeros(8, 1, dtype=torch.uint8), "does not fit"),
    "no numbers": ("nf4", f"{UP}.weight", None, "no file holds"),
    "no json": ("nf4", STATE, torch.tensor([123], dtype=torch.uint8), "cannot be read as JSON"),
    "no shape": ("nf4", STATE, state({"blocksize": 64}), "does not fit"),
    "another shape": (
        "nf4", STATE,
        state({"quant_type": "nf4", "blocksize": 0, "dtype": "float32", "shape": [48, 32]}),
        "does not fit",
    ),
    "no bytes": ("nf4", STATE, torch.tensor([300], dtype=torch.int16), "does not fit"),
    "fractions": ("nf4", STATE, torch.tensor([1.5]), "does not fit"),
    "no nested scales": ("double", f"{UP}.weight.nested_absmax", None, "no file holds"),
    "no row scales": ("int8", f"{UP}.SCB", None, "no file holds"),
    "few row scales": ("int8", f"{UP}.SCB", torch.ones(2), "does not fit"),
    "columns": ("int8", f"{UP}.weight_format", torch.tensor(1, dtype=torch.uint8), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    form, name, value, message = DAMAGE[kind]
    quantised(tmp_path / "base", form)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=message):
        resolve_checkpoint(tmp_path / "base")
    assert not list((tmp_path / "cache").glob("plain/*"))


def test_a_block_that_no_memory_holds_is_named(tmp_path: Path) -> None:
    quantised(tmp_path / "base", "nf4")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[STATE] = state(
        {"quant_type": "nf4", "blocksize": 10**13, "dtype": "float32", "shape": [48, 32]}
    )
    tensors[f"{UP}.weight.absmax"] = torch.ones(1)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="does not fit"):
        resolve_checkpoint(tmp_path / "base")


def tuned(base: Path, folder: Path) -> Path:
    """The base tuned on the rows, as the command does it."""
    rows = write_jsonl(ROWS, folder.with_suffix(".jsonl"))
    tune = TuneConfig(lora_rank=2, epochs=2, learning_rate=1e-2, batch_size=2)
    return finetune_checkpoint(
        FinetuneConfig(base=str(base), data=str(rows), output=folder, tune=tune, compute=CPU)
    )


def own_adapter(model: Any, base: Path, folder: Path) -> Path:
    """What a user tuned on the base."""
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted: Any = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def unlearned(base: Path, own: Path, output: Path, form: OutputFormat) -> Path:
    forget = tuned(base, output.with_name("forget"))
    weighting = WeightingConfig(method="tv", scaling_coef=ALPHA, layers="all")
    return edit_checkpoint(
        EditConfig(
            full=str(own), base=str(base), forget_checkpoint=str(forget), output=output,
            output_format=form, weighting=weighting,
        )
    )  # fmt: skip


NOISE = 0.05  # the package's products round their inputs to bfloat16, or to 8 bits


@torch.no_grad()
def distance(one: Any, other: Any, ids: Tensor) -> float:
    """Of two models' logits, as a share of their norm."""
    wanted = one(ids).logits.float()
    return float((other(ids).logits.float() - wanted).norm() / wanted.norm())


def weights(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: value.double() for name, value in found.items()}


def test_ones_own_adapter_on_four_bits_is_unlearned_as_an_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    plain = quantised(base, "nf4")
    own = own_adapter(
        AutoModelForCausalLM.from_pretrained(resolve_checkpoint(base)), base, tmp_path / "own"
    )
    output = unlearned(base, own, tmp_path / "out", "adapter")
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())
    forget, full = (
        weights(resolve_checkpoint(tmp_path / "forget", exact=True)),
        weights(resolve_checkpoint(own, exact=True)),
    )
    merged = weights(resolve_checkpoint(output, exact=True))
    for name, value in merged.items():
        wanted = full[name] - ALPHA * (forget[name] - plain[name])
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert (full[f"{UP}.weight"] - merged[f"{UP}.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
def test_a_whole_run_names_the_base_that_was_given(
    tmp_path: Path, form: OutputFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    quantised(base, "double")
    plain = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(base))
    own = own_adapter(plain, base, tmp_path / "own") if form == "adapter" else base
    forget, retain = (write_jsonl([row], tmp_path / f"{i}.jsonl") for i, row in enumerate(ROWS))
    tune = TuneConfig(lora_rank=2, epochs=2, learning_rate=1e-2, batch_size=2)
    done = unlearn(
        base=str(base), full=str(own), forget=str(forget), retain=str(retain), alpha=ALPHA,
        output=tmp_path / "out", method="tv", layers="all", output_format=form, tune=tune,
        evaluate=False, compute=CPU,
    )  # fmt: skip
    told = capsys.readouterr().err
    if form == "checkpoint":
        assert f"{base} is quantised by bitsandbytes, which is not written" in told
        return
    settings = json.loads((done.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base.resolve())


@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "double", "fp4", "int8"],
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_the_model_that_the_package_runs(tmp_path: Path, how: dict[str, Any]) -> None:
    package = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # Rows of whole blocks: the package's own code for CPUs mixes up the scales of others.
    tiny_llama(tied=False, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "a")
    config = BitsAndBytesConfig(**how)
    made: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    base = tmp_path / "base"
    made.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    found: Any = load_model(resolve_checkpoint(base), CPU)
    stored = load_file(base / "model.safetensors")
    functional = package.functional
    for name in (n for n in stored if n.endswith("proj.weight")):
        parts = {part: value for part, value in stored.items() if part.startswith(f"{name}.")}
        if "load_in_4bit" in how:
            kept = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            wanted = functional.dequantize_4bit(stored[name], kept)
        else:
            scales = stored[name.replace(".weight", ".SCB")]
            wanted = functional.int8_vectorwise_dequant(stored[name], scales)
        torch.testing.assert_close(found.get_parameter(name).detach(), wanted, rtol=1e-6, atol=0)
    ids = torch.arange(5, 25).unsqueeze(0)
    assert distance(found, made, ids) < NOISE
    own = own_adapter(made, base, tmp_path / "own")
    output = unlearned(base, own, tmp_path / "out", "adapter")
    again: Any = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"})
    adapted = peft.PeftModel.from_pretrained(again, output).eval()
    merged = load_model(resolve_checkpoint(output, exact=True), CPU)
    assert distance(merged, adapted, ids) < NOISE < distance(merged, found, ids)


def test_a_whole_model_comes_out_in_plain_numbers_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    plain = quantised(base, "nf4")
    output = unlearned(base, base, tmp_path / "out", "checkpoint")
    assert f"{base} is quantised by bitsandbytes, which is not written" in capsys.readouterr().err
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    forget, found = weights(resolve_checkpoint(tmp_path / "forget", exact=True)), weights(output)
    for name, value in found.items():
        wanted = plain[name] - ALPHA * (forget[name] - plain[name])
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
