"""Moments from which rows are taken out are those of the rows that stay."""

from __future__ import annotations

import hmac
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from conftest import TUNE, World
from helpers import TEXTS, tiny_tokenizer
from perta.data.examples import Example, load_examples
from perta.data.rows import write_jsonl
from perta.data.tokens import encode_examples
from perta.errors import CheckpointMismatchError, ConfigError
from perta.models.load import load_tokenizer
from perta.options import ComputeConfig, DataConfig, MomentOptions, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.moments import compute_moments, holds, merge_moments, moments_without
from perta.stages.settings import LessMomentsConfig, MergeMomentsConfig, MomentsConfig
from perta.store.measured.moments import MomentFolder, key_rows, open_moments
from perta.store.measured.second_moment import matrix, without


def measure(checkpoint: Path, data: Path, output: Path, **more: Any) -> Path:
    return compute_moments(
        MomentsConfig(checkpoint=str(checkpoint), data=str(data), output=output, **more)
    )


def less(
    checkpoint: Path, moments: Path, rows: Sequence[Example], output: Path, **more: Any
) -> MomentFolder:
    config = LessMomentsConfig(moments=moments, checkpoint=str(checkpoint), output=output, **more)
    assert holds(moments, rows)
    return open_moments(moments_without(config, rows))


def in_float64(checkpoint: Path, data: Path) -> dict[str, Tensor]:
    """Σ x xᵀ of every linear layer, one row at a time."""
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    sums: dict[str, Tensor] = {}

    def listen(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, torch.tensor(0.0)) + rows.T @ rows

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, x, name=name: listen(f"{name}.weight", x[0]))
    tokenizer = load_tokenizer(checkpoint)
    with torch.no_grad():
        for row in encode_examples(load_examples(data), tokenizer, DataConfig()).encoded:
            model(input_ids=torch.tensor([row.input_ids]))
    return sums


@pytest.fixture
def sets(world: World, tmp_path: Path) -> tuple[Path, Path, list[Example]]:
    """All rows, those that stay, and those that go, in two steps of one and two rows."""
    whole = load_examples(world.forget.with_name("full.jsonl")).examples
    stay, go = [e.fields for e in whole[3:]], list(whole[:3])
    everything = write_jsonl([e.fields for e in whole], tmp_path / "whole.jsonl")
    return everything, write_jsonl(stay, tmp_path / "stay.jsonl"), go


def test_what_is_left_are_the_moments_of_the_rows_that_stay(
    world: World, sets: tuple[Path, Path, list[Example]], tmp_path: Path
) -> None:
    everything, stay, go = sets
    whole = open_moments(measure(world.base, everything, tmp_path / "all", gradients=True))
    again = open_moments(measure(world.base, stay, tmp_path / "again", gradients=True))
    less(world.base, whole.folder, go[:1], tmp_path / "one")
    left = less(world.base, tmp_path / "one", go, tmp_path / "two")  # one is not there any more
    assert not holds(left.folder, go)
    assert left.facts["rows"] == again.facts["rows"]
    for key in ("tokens", "examples", "examples_available", "seen", "inputs", "outputs"):
        assert left.facts[key] == again.facts[key]
    for name in again.facts["seen"]:
        size = float(matrix(whole.read(name)).diagonal().max())
        error = (matrix(left.read(name)) - matrix(again.read(name))).abs().max()
        assert float(error) <= 16 * 2**-24 * size
    for name, exact in in_float64(world.base, stay).items():
        found = matrix(left.read(left.facts["inputs"][name]))
        assert float((found - exact).abs().max()) <= 1e-5 * float(exact.diagonal().max())


def test_an_expert_without_any_token_left_has_no_moment(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"vocab_size": 384, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5},
        **{"num_local_experts": 32, "num_experts_per_tok": 1},
    }
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))
    checkpoint = tmp_path / "model"
    model.save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    texts = [{"text": text} for text in ("~|^`{}@#$%&*<>+=0987", *TEXTS * 3)]
    everything = write_jsonl(texts, tmp_path / "all.jsonl")
    stay = write_jsonl(texts[1:], tmp_path / "stay.jsonl")
    whole = measure(checkpoint, everything, tmp_path / "all")
    again = open_moments(measure(checkpoint, stay, tmp_path / "again"))
    left = less(checkpoint, whole, load_examples(everything).examples[:1], tmp_path / "left")
    emptied = 0
    for name, count in left.facts["seen"].items():
        assert count == again.facts["seen"][name]
        emptied += not count["tokens"] and open_moments(whole).facts["seen"][name]["tokens"] > 0
        assert bool(left.read(name).any()) == (count["tokens"] > 0)
        size = float(matrix(open_moments(whole).read(name)).diagonal().max())
        torch.testing.assert_close(
            matrix(left.read(name)), matrix(again.read(name)), atol=1e-6 * size, rtol=0
        )
    assert emptied


def test_of_equal_rows_all_go_and_of_a_text_every_window(world: World, tmp_path: Path) -> None:
    texts = [{"text": " ".join(TEXTS)}, *({"text": text} for text in TEXTS * 4)]
    everything = write_jsonl([*texts, texts[0]], tmp_path / "all.jsonl")
    stay = write_jsonl(texts[1:], tmp_path / "stay.jsonl")
    short = {"data_config": DataConfig(max_length=48)}
    whole = measure(world.base, everything, tmp_path / "all", **short)
    again = open_moments(measure(world.base, stay, tmp_path / "again", **short))
    rows = load_examples(everything).examples[:1]
    left = less(world.base, whole, rows, tmp_path / "left", **short)
    assert left.facts["rows"] == again.facts["rows"]
    assert left.facts["tokens"] == again.facts["tokens"]
    with pytest.raises(ConfigError, match="another template or --max-length"):
        less(world.base, whole, rows, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_taken_out_is_refused(
    world: World, sets: tuple[Path, Path, list[Example]], tmp_path: Path
) -> None:
    everything, _, go = sets
    whole = measure(world.base, everything, tmp_path / "all")
    for more, message in (
        ({"data_config": DataConfig(chat_template=False)}, "another template"),
        ({"compute": ComputeConfig(dtype="bfloat16")}, "--dtype float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            less(world.base, whole, go, tmp_path / "left", **more)
    with pytest.raises(CheckpointMismatchError, match="another model"):
        less(world.full, whole, go, tmp_path / "left")
    # At most half at once, and a quarter of what was once measured stays.
    rows = load_examples(everything).examples
    with pytest.raises(ConfigError, match="more than half"):
        less(world.base, whole, rows[:5], tmp_path / "five")
    less(world.base, whole, rows[:3], tmp_path / "three")
    less(world.base, tmp_path / "three", rows[3:5], tmp_path / "five")
    with pytest.raises(ConfigError, match="less than a quarter"):
        less(world.base, tmp_path / "five", rows[5:7], tmp_path / "seven")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"all", "three", "five"}


def test_merged_moments_know_the_rows_of_all_sets(world: World, tmp_path: Path) -> None:
    one, other = (measure(world.base, s, tmp_path / s.stem) for s in (world.forget, world.retain))
    both = merge_moments(MergeMomentsConfig(folders=(one, other), output=tmp_path / "both"))
    rows = load_examples(world.forget).examples
    left = less(world.base, both, rows, tmp_path / "left")
    assert left.facts["rows"] == open_moments(other).facts["rows"]
    again = MergeMomentsConfig(folders=(left.folder, one), output=tmp_path / "again")
    facts = open_moments(merge_moments(again)).facts
    assert facts["tokens"] == open_moments(both).facts["tokens"]
    assert facts["taken_out"] == open_moments(one).facts["tokens"]


def test_moments_of_a_ledger_are_merged_with_others(world: World, tmp_path: Path) -> None:
    one, other = (measure(world.base, s, tmp_path / s.stem) for s in (world.forget, world.retain))
    kept = {key: tmp_path / key / "moments" for key in ("a", "b")}
    for key, folder in kept.items():
        shutil.copytree(one, folder)
        (folder / "perta.json").unlink()
        key_rows(folder, key.encode())
        (folder.parent / "key").write_text(key)
    plain = merge_moments(MergeMomentsConfig(folders=(other, one), output=tmp_path / "plain"))
    config = MergeMomentsConfig(folders=(other, kept["a"]), output=tmp_path / "a" / "both")
    both = open_moments(merge_moments(config))
    for name in both.index.tensors:
        assert torch.equal(both.read(name), open_moments(plain).read(name))
    assert both.facts["rows"] == [
        [hmac.digest(b"a", mark.encode(), "sha256").hex()[:32] for mark in marks]
        for marks in open_moments(plain).facts["rows"]
    ]
    assert holds(both.folder, load_examples(world.retain).examples)
    several = MergeMomentsConfig(folders=tuple(kept.values()), output=tmp_path / "none")
    with pytest.raises(ConfigError, match="several ledgers"):
        merge_moments(several)
    (tmp_path / "a" / "key").unlink()
    with pytest.raises(ConfigError, match="recognised by a key"):
        merge_moments(replace(config, output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_moment_that_rounding_would_drown_is_no_moment() -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] *= 1e-2
    whole = (x.T @ x).float()
    assert without(whole, (x[1:].T @ x[1:]).float()) is None
    assert torch.equal(without(whole, whole), torch.zeros(4, 4).double())  # type: ignore[arg-type]
    left = without(whole, (x[:10].T @ x[:10]).float())
    assert left is not None
    torch.testing.assert_close(left, x[10:].T @ x[10:], atol=1e-6, rtol=1e-6)
    assert without(x[:1].float(), x[1:].T @ x[1:]) is None  # no part of it


def test_saved_moments_lose_the_rows_that_go_and_those_that_judge(
    world: World, tmp_path: Path
) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(40)]
    retain = write_jsonl(rows, tmp_path / "retain.jsonl")
    forget = [dict(e.fields) for e in load_examples(world.forget).examples]
    everything = write_jsonl([*rows, *forget], tmp_path / "all.jsonl")
    saved = measure(world.base, everything, tmp_path / "saved")
    config = UnlearnConfig(
        base=str(world.base),
        full=str(world.full),
        forget=str(world.forget),
        retain=str(retain),
        retain_moments=saved,
        output=tmp_path / "out",
        weighting=WeightingConfig(method="perta-project", scaling_coef=1.0),
        tune=TUNE,
        evaluate=False,
    )
    held = unlearn(config).manifest["unlearn"]["held_back"]
    assert (held["rows"], held["used"]) == (8, True)
    assert "seen_by" not in held
    protected = tmp_path / "out.work" / "retain_protected.jsonl"
    again = open_moments(measure(world.base, protected, tmp_path / "again"))
    used = open_moments(tmp_path / "out.work" / "retain_moments")
    assert used.facts["rows"] == again.facts["rows"]
    for name in again.facts["seen"]:
        torch.testing.assert_close(
            matrix(used.read(name)), matrix(again.read(name)), atol=1e-4, rtol=1e-6
        )
    # The output's record names what was given, so that the same command finds it done.
    assert json.loads((tmp_path / "out" / "perta.json").read_text())["unlearn"]["inputs"][
        "retain_moments"
    ]
    assert unlearn(config).folder == tmp_path / "out"
    other = replace(config, output=tmp_path / "o2", moments=MomentOptions(moment_memory=4.0))
    with pytest.raises(ConfigError, match="another template"):
        unlearn(replace(other, data_config=DataConfig(chat_template=False)))
    assert not (tmp_path / "o2.work").exists()
