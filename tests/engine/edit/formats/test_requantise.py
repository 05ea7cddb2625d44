"""Edits of FP8 and MXFP4 checkpoints stay in that format: bytes, numbers, shares, whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import TUNE, World
from helpers import tiny_tokenizer, weighting
from perta.data.rows import write_jsonl
from perta.engine.edit.memory import EditedModel
from perta.errors import CheckpointError, CorruptCheckpointError
from perta.models.formats.quantised import (
    _dequantise_fp8,
    _dequantise_mxfp4,
    _requantise_fp8,
    _requantise_mxfp4,
)
from perta.models.load import load_model
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, ScoringConfig, TrainSettings
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint, load_changes
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EditConfig, FinetuneConfig, TrainConfig
from perta.stages.train import train_checkpoint
from perta.store.arithmetic import Place
from perta.store.checkpoint import open_index, read_tensor, write_tensors
from perta.store.record import aggregates, read_manifest

CPU = ComputeConfig(device="cpu")
PLACE = Place(0, "w")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))


def numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of an 8-bit type, float64, in order."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return torch.tensor(sorted({value for value in every.tolist() if math.isfinite(value)}))


def fp8(
    shape: tuple[int, ...], block: int, dtype: torch.dtype, scales: torch.dtype
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    codes = (torch.randn(shape) * 100).clamp(-400, 400).to(dtype)
    size = (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))
    return codes, (torch.rand(size) + 0.3).to(scales)


KINDS = [
    pytest.param(torch.float8_e4m3fn, torch.float32, id="e4m3"),
    pytest.param(torch.float8_e5m2, torch.bfloat16, id="e5m2"),
    pytest.param(torch.float8_e4m3fn, torch.float8_e8m0fnu, id="e8m0"),
]


@pytest.mark.parametrize(("dtype", "scales"), KINDS)
def test_fp8_changes_only_what_changed(dtype: torch.dtype, scales: torch.dtype) -> None:
    """Blocks of 16 do not divide 40 x 24; one number changes, by a tenth of the way to the next."""
    codes, factors = fp8((40, 24), 16, dtype, scales)
    plain = _dequantise_fp8(codes, factors, (16, 16))
    same = _requantise_fp8(codes, factors, plain, (16, 16), PLACE)
    for made, stored in zip(same, (codes, factors), strict=True):
        assert torch.equal(made.view(torch.uint8), stored.view(torch.uint8))
    grid, moved = numbers(dtype), plain.clone()
    value, factor = float(codes[17, 3]), float(factors[1, 0])
    upper = float(grid[grid > value][0])
    moved[17, 3] = (value + 0.1 * (upper - value)) * factor
    ups = 0
    for seed in range(400):
        made, kept = _requantise_fp8(codes, factors, moved, (16, 16), Place(seed, "w"))
        assert torch.equal(kept.view(torch.uint8), factors.view(torch.uint8))
        other = (made.float() != codes.float()).nonzero().tolist()
        assert other in ([], [[17, 3]])
        ups += float(made[17, 3]) == upper
    assert 20 < ups < 65  # 40 wanted; 400 draws have a deviation of 6


@pytest.mark.parametrize(("dtype", "scales"), KINDS)
@pytest.mark.parametrize("times", [3.0, 0.25], ids=["grown", "shrunk"])
def test_fp8_takes_new_factors_where_the_old_do_not_fit(
    dtype: torch.dtype, scales: torch.dtype, times: float
) -> None:
    codes, factors = fp8((48, 32), 16, dtype, scales)
    codes[20, 5] = torch.finfo(dtype).max  # fills the range of its block
    plain = _dequantise_fp8(codes, factors, (16, 16))
    moved = plain.clone()
    moved[16:32, :16] *= times
    made, new = _requantise_fp8(codes, factors, moved, (16, 16), PLACE)
    changed = (new.float() != factors.float()).nonzero().tolist()
    assert changed == [[1, 0]]
    found = _dequantise_fp8(made, new, (16, 16))
    assert torch.equal(found[:16], plain[:16])
    assert torch.equal(found[16:32, 16:], plain[16:32, 16:])
    ulp = 0.125 if dtype == torch.float8_e4m3fn else 0.25
    wanted, error = moved[16:32, :16], (found - moved)[16:32, :16].abs()
    smallest = torch.finfo(dtype).smallest_normal * float(new[1, 0].float())
    assert bool((error <= ulp * wanted.abs().clamp(min=smallest) * 1.01).all())


def test_one_factor_and_experts() -> None:
    """A factor for all of a weight, and experts in one tensor with blocks of their own."""
    codes = torch.tensor([[1.5, -2.0], [0.0, -0.0]]).to(torch.float8_e4m3fn)
    made, scale = _requantise_fp8(
        codes, torch.tensor([0.25]), torch.tensor([[0.375, -300.0], [0, 0.0]]), None, PLACE
    )
    assert scale.tolist() == [pytest.approx(300 / 448)]
    assert made[0, 1].item() == -448
    codes, factors = fp8((3, 40, 24), 16, torch.float8_e4m3fn, torch.float32)
    plain = _dequantise_fp8(codes, factors, (16, 16))
    plain[1, 2, 3] += 100
    made, _ = _requantise_fp8(codes, factors, plain, (16, 16), PLACE)
    same = (made.float() == codes.float()).flatten(1).all(1).tolist()
    assert same == [True, False, True]


def mxfp4(experts: int = 2, out: int = 6, groups: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 124, (experts, out, groups), dtype=torch.uint8)


def test_mxfp4_changes_only_what_changed() -> None:
    blocks, scales = mxfp4()
    plain = _dequantise_mxfp4(blocks, scales).float()
    made = _requantise_mxfp4(blocks, scales, plain + 0.0, PLACE)  # without a sign of zeros
    assert torch.equal(made[0], blocks)
    assert torch.equal(made[1], scales)
    # Input 33 of output 4 is the second low half of the second group; its code becomes 2.25 times
    # the scale, a quarter of the way from 2 to 3.
    blocks[1, 4, 1, 0] = 0xC4  # 2 and -2
    plain = _dequantise_mxfp4(blocks, scales).float()
    factor = 2.0 ** (int(scales[1, 4, 1]) - 127)
    assert plain[1, 32, 4] == 2 * factor
    plain[1, 32, 4] = 2.25 * factor
    found = []
    for seed in range(400):
        codes, kept = _requantise_mxfp4(blocks, scales, plain, Place(seed, "w"))
        assert torch.equal(kept, scales)
        found.append(int(codes[1, 4, 1, 0]))
        codes[1, 4, 1, 0] = 0xC4
        assert torch.equal(codes, blocks)
    assert set(found) == {0xC4, 0xC5}
    assert 70 < found.count(0xC5) < 130  # 100 wanted


@pytest.mark.parametrize("times", [1.6, 0.2], ids=["grown", "shrunk"])
def test_mxfp4_takes_a_new_exponent_where_the_old_does_not_fit(times: float) -> None:
    blocks, scales = mxfp4()
    blocks[0, 2, 1, 7] = 0x7F  # ±6, the largest of the group
    plain = _dequantise_mxfp4(blocks, scales).float()
    moved = plain.clone()
    moved[0, 32:64, 2] *= times
    made, new = _requantise_mxfp4(blocks, scales, moved, PLACE)
    # 9.6 takes twice the factor; 1.2 fits a quarter of it.
    assert (new.int() - scales.int()).nonzero().tolist() == [[0, 2, 1]]
    assert int(new[0, 2, 1]) - int(scales[0, 2, 1]) == (1 if times > 1 else -2)
    found = _dequantise_mxfp4(made, new).double()
    factor = 2.0 ** (int(new[0, 2, 1]) - 127)
    for value, wanted in zip(found[0, 32:64, 2], moved[0, 32:64, 2].double(), strict=True):
        level = (wanted / factor).abs()
        low, high = FP4[level >= FP4].max(), FP4[level <= FP4].min()
        assert abs(float(value)) / factor in (float(low), float(high))
        assert value == 0 or (value > 0) == (wanted > 0)
    found[0, 32:64, 2] = plain[0, 32:64, 2].double()
    assert torch.equal(found, plain.double())


# --- checkpoints --------------------------------------------------------------------------------


def as_fp8(folder: Path, target: Path, scales: torch.dtype = torch.float32) -> Path:
    """A checkpoint with its layers in FP8, 32 x 32 to a block, the largest number at 448."""
    index, tensors = open_index(folder), dict[str, Tensor]()
    for name, entry in index.tensors.items():
        tensors[name] = value = read_tensor(entry)
        if "_proj" not in name or len(entry.shape) != 2:
            continue
        rows, columns = (-(-size // 32) for size in entry.shape)
        factors = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = value[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
                factors[i, j] = part.abs().max() / 448
        if scales == torch.float8_e8m0fnu:
            factors = 2 ** factors.log2().ceil()
        spread = factors.repeat_interleave(32, 0).repeat_interleave(32, 1)
        spread = spread[: entry.shape[0], : entry.shape[1]]
        tensors[name] = (value / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = factors.to(scales)
    tensors["model.layers.0.mlp.up_proj.activation_scale"] = torch.ones(1)
    record = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    return stored(folder, target, tensors, record)


def as_mxfp4(folder: Path, target: Path) -> Path:
    """A GPT-OSS with its experts in MXFP4, everything else in bfloat16."""
    tensors = dict[str, Tensor]()
    for name, entry in open_index(folder).tensors.items():
        value = read_tensor(entry)
        if not name.endswith("_proj"):
            tensors[name] = value.to(torch.bfloat16)
            continue
        groups = value.float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-100, 100)
        scaled = (groups / 2 ** exponents.unsqueeze(-1)).double()
        codes = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1) + 8 * (scaled < 0)
        codes = codes.to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return stored(folder, target, tensors, {"quant_method": "mxfp4"})


def stored(folder: Path, target: Path, tensors: dict[str, Tensor], record: Any) -> Path:
    """Written in two files, with the other files of a checkpoint."""
    target.mkdir()
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half]}
    shards["model-00002-of-00002.safetensors"] = names[half:]
    write_tensors(target, tensors, shards)
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        if "safetensors" not in file.name and file.name != "perta.json":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = record
    (target / "config.json").write_text(json.dumps(config))
    return target


def model(folder: Path, kind: str, seed: int = 0, step: float = 0.0, **more: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=False, **more)
    made: Any = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * step)
    made.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(str(folder))
    return folder


MORE: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 40},
}


def edit(tmp_path: Path, kind: str, alpha: float = 1.0, step: float = 2e-3) -> EditConfig:
    """An edit by the plain task vector of a quantised model."""
    more = MORE.get(kind, {})
    base = model(tmp_path / "base", kind, **more)
    forget = model(tmp_path / "forget", kind, 1, step, **more)
    full = model(tmp_path / "plain", kind, 2, 0.01, **more)
    make = as_mxfp4 if kind == "gpt_oss" else as_fp8
    return EditConfig(
        full=str(make(full, tmp_path / "full")),
        base=str(base),
        forget_checkpoint=str(forget),
        output=tmp_path / "out",
        weighting=weighting("tv", scaling_coef=alpha, layers="all"),
    )


KIND = pytest.mark.parametrize("kind", ["llama", "gpt_oss"])


@KIND
def test_no_step_changes_no_byte(tmp_path: Path, kind: str) -> None:
    config = edit(tmp_path, kind, alpha=0.0)
    edit_checkpoint(config)
    for shard in Path(config.full).glob("model*"):
        assert (config.output / shard.name).read_bytes() == shard.read_bytes(), shard.name


@KIND
def test_an_edit_stays_in_the_format_and_tells_what_it_holds(tmp_path: Path, kind: str) -> None:
    config = edit(tmp_path, kind)
    edit_checkpoint(config)
    written = open_index(config.output)
    assert {n: (e.dtype, e.shape) for n, e in written.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in open_index(Path(config.full)).tensors.items()
    }
    settings = json.loads((config.output / "config.json").read_text())
    assert settings == json.loads((Path(config.full) / "config.json").read_text())
    plain = [resolve_checkpoint(Path(p)) for p in (config.full, config.output)]
    full, edited = (load_file_of(folder) for folder in plain)
    base, forget = (load_file_of(Path(p)) for p in (config.base, str(config.forget_checkpoint)))
    steps = {name: forget[name] - base[name] for name in base}
    along = sum(float(((full[n] - edited[n]) * step).sum()) for n, step in steps.items())
    share = along / sum(float(step.square().sum()) for step in steps.values())
    told = (read_manifest(config.output) or {})["edit"]["stored"]["stored_share"]
    assert told == pytest.approx(share, abs=1e-4)
    assert 0.9 < share < 1.1
    load_model(plain[1], CPU)


@KIND
def test_training_is_stored_in_the_format_as_well(tmp_path: Path, kind: str) -> None:
    """Against the same training stored as it is; a number lies within a step of the format."""
    full = Path(edit(tmp_path, kind).full)
    forget, retain = (
        write_jsonl([{"question": f"Who is {who}?", "answer": "A potter."}], tmp_path / who)
        for who in ("Odo.jsonl", "Mira.jsonl")
    )
    training = TrainSettings(epochs=3, learning_rate=1e-2, batch_size=1)
    config = TrainConfig(
        full=str(full), output=tmp_path / "out", method="graddiff", training=training,
        compute=ComputeConfig(device="cpu", dtype="float32"), forget=str(forget),
        retain=str(retain),
    )  # fmt: skip
    train_checkpoint(config)
    exact = replace(config, output=tmp_path / "exact", save_dtype="float32")
    train_checkpoint(exact)
    for name, entry in open_index(config.output).tensors.items():
        other = open_index(full).tensors[name]
        assert (entry.dtype, entry.shape) == (other.dtype, other.shape)
    settings = json.loads((config.output / "config.json").read_text())
    assert settings == json.loads((full / "config.json").read_text())
    before, found = (load_file_of(resolve_checkpoint(f)) for f in (full, config.output))
    wanted = load_file_of(exact.output)
    assert "quantization_config" not in json.loads((exact.output / "config.json").read_text())
    layers = [name for name in found if name.endswith(("_proj.weight", "_proj"))]
    layers = [name for name in layers if kind == "llama" or "experts" in name]
    along = whole = 0.0
    for name in layers:
        coarse = (2**-3, 1e-3) if kind == "llama" else (2**-1, 0.5)
        near = coarse[0] * wanted[name].abs() + coarse[1] * wanted[name].abs().max()
        assert bool(((found[name] - wanted[name]).abs() <= near).all())
        step = before[name] - wanted[name]
        along += float(((before[name] - found[name]) * step).sum())
        whole += float(step.square().sum())
    assert whole > 0
    told = (read_manifest(config.output) or {})["stored"]["stored_share"]
    assert told == pytest.approx(along / whole, abs=1e-4)
    assert 0.8 < told < 1.2


def load_file_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: value.double()
        for file in folder.glob("model*.safetensors")
        for name, value in load_file(file).items()
    }


@KIND
def test_another_type_is_plain(tmp_path: Path, kind: str) -> None:
    config = replace(edit(tmp_path, kind), save_dtype="bfloat16")
    edit_checkpoint(config)
    assert "quantization_config" not in json.loads((config.output / "config.json").read_text())
    types = {e.dtype for e in open_index(config.output).tensors.values()}
    assert types <= {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "qwen3_moe"])
def test_what_is_tried_is_what_is_stored(tmp_path: Path, kind: str) -> None:
    """Qwen3's experts are quantised one by one, and joined in memory."""
    config = edit(tmp_path, kind)
    edit_checkpoint(config)
    written = load_model(resolve_checkpoint(config.output), CPU, dtype=torch.float32)
    full = load_model(resolve_checkpoint(config.full), CPU, dtype=torch.float32)
    EditedModel(full, load_changes(config, CPU)).move(1.0)
    pairs = zip(full.named_parameters(), written.parameters(), strict=True)
    for (name, tried), wanted in pairs:
        assert torch.equal(tried, wanted), name


def test_a_damaged_original_leaves_no_output(tmp_path: Path) -> None:
    config = edit(tmp_path, "llama")
    file = Path(config.full) / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        edit_checkpoint(config)
    assert not config.output.exists()


def whole_run(world: World, base: Path, full: Path, method: str, alpha: Any) -> Path:
    """The output of `unlearn`, checked for its format and for what it forgot."""
    done = unlearn(
        base=str(base),
        full=str(full),
        forget=str(world.forget),
        retain=str(world.retain),
        output=full.with_name("out"),
        method=method,
        alpha=alpha,
        tune=TUNE,
        scoring=ScoringConfig(max_new_tokens=12),
    )
    settings = json.loads((done.folder / "config.json").read_text())
    assert settings == json.loads((full / "config.json").read_text())
    wanted = open_index(full).tensors
    assert {n: e.dtype for n, e in open_index(done.folder).tensors.items()} == {
        name: entry.dtype for name, entry in wanted.items()
    }
    assert done.manifest["edit"]["stored"]["stored_share"] == pytest.approx(1, abs=0.1)
    assert done.before is not None
    assert done.after is not None
    before, after = aggregates(done.before), aggregates(done.after)
    assert after["forget_probability"] < 0.9 * before["forget_probability"]
    # What was measured is known as what the record is about, so rows are judged.
    assert done.after["perta"]["inputs"]["checkpoint"] == done.manifest["content"]
    return done.folder


@pytest.mark.parametrize(
    "block", [[0, 0], "x", [32], [32, 32, 32], 32, [32.5, 32], [-1, 32], True, {}, [[32], [32]]]
)
def test_blocks_that_cannot_be_are_named(tmp_path: Path, block: Any) -> None:
    folder = as_fp8(model(tmp_path / "plain", "llama"), tmp_path / "full")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpointError, match="weight_block_size"):
        resolve_checkpoint(folder)


UP = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
SPOILT: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "whole scales": ("llama", lambda t: t.update({f"{UP}_scale_inv": t[f"{UP}_scale_inv"].int()})),
    "vector": (
        "llama",
        lambda t: t.update(
            {
                "model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn),
                "model.norm.weight_scale_inv": torch.ones(1),
            }
        ),
    ),
    "float blocks": (
        "llama",
        lambda t: t.update({"x_blocks": torch.zeros(2, 2, 1, 16), "x_scales": torch.ones(2, 2, 1)}),
    ),
    "signed": ("gpt_oss", lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"].char()})),
    "float scales": (
        "gpt_oss",
        lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"].float()}),
    ),
    "a number": (
        "gpt_oss",
        lambda t: t.update(
            dict.fromkeys((f"{EXPERTS}_blocks", f"{EXPERTS}_scales"), torch.tensor(3).byte())
        ),
    ),
    "twice": ("gpt_oss", lambda t: t.update({EXPERTS: torch.zeros(2, 96, 64)})),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_of_no_such_format_are_named(tmp_path: Path, name: str) -> None:
    kind, spoil = SPOILT[name]
    plain = model(tmp_path / "plain", kind, **MORE.get(kind, {}))
    folder = (as_mxfp4 if kind == "gpt_oss" else as_fp8)(plain, tmp_path / "full")
    tensors = {n: read_tensor(entry) for n, entry in open_index(folder).tensors.items()}
    spoil(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    write_tensors(folder, tensors)
    with pytest.raises(CorruptCheckpointError, match=r"of no such format|needs|twice"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize(
    ("scales", "method", "alpha"),
    [(torch.float32, "perta-project", "auto"), (torch.float8_e8m0fnu, "perta-grad", 1.5)],
    ids=["project", "e8m0"],
)
def test_a_whole_run_of_an_fp8_model(
    world: World, tmp_path: Path, scales: torch.dtype, method: str, alpha: Any
) -> None:
    full = as_fp8(world.full, tmp_path / "full", scales)
    base = as_fp8(world.base, tmp_path / "base", scales)
    whole_run(world, base, full, method, alpha)


def test_a_whole_run_of_an_mxfp4_model(world: World, tmp_path: Path) -> None:
    base = model(tmp_path / "base", "gpt_oss", **MORE["gpt_oss"])
    data = str(world.forget.with_name("full.jsonl"))
    plain = FinetuneConfig(base=str(base), data=data, output=tmp_path / "plain", tune=TUNE)
    full = as_mxfp4(finetune_checkpoint(plain), tmp_path / "full")
    output = whole_run(world, as_mxfp4(base, tmp_path / "small"), full, "perta-grad", 1.5)
    names = open_index(output).tensors
    assert any(name.endswith("_blocks") for name in names)
