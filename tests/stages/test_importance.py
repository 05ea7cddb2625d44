"""The importance stage: files, sampling, names, architectures, oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from conftest import World
from perta.data.batch import Encoded, collate
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.gradients.engine import Moments, batched_moments
from perta.errors import ConfigError, OutputExistsError
from perta.models.load import load_model, load_tokenizer
from perta.models.loss import example_losses
from perta.options import ComputeConfig, DataConfig, EstimatorConfig
from perta.stages import importance
from perta.stages.importance import compute_importance, sample
from perta.stages.settings import ImportanceConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.measured.importance import order_folder


def measured(world: World, output: Path, **more: object) -> Path:
    return compute_importance(
        ImportanceConfig(
            checkpoint=str(more.pop("checkpoint", world.base)),
            data=str(world.retain),
            output=output,
            **more,  # type: ignore[arg-type]
        )
    )


def read(folder: Path, order: float) -> dict[str, Tensor]:
    index = open_index(order_folder(folder, order))
    return {name: read_tensor(entry) for name, entry in index.tensors.items()}


def encoded_retain(world: World, checkpoint: Path) -> tuple[Encoded, ...]:
    tokenizer = load_tokenizer(checkpoint)
    return encode_examples(load_examples(world.retain), tokenizer, DataConfig()).encoded


def oracle(
    model: PreTrainedModel, examples: tuple[Encoded, ...], order: float
) -> dict[str, Tensor]:
    """Example by example in float64, through autograd."""
    model = model.double()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in examples:
        loss = example_losses(model, collate([example], 0))[0]
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.abs() ** order
    return {name: value / len(examples) for name, value in total.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], order: float = 1.0) -> None:
    assert set(found) == set(expected)
    # Of a gradient that is 0, such as of a key's bias, float32 leaves 1e-8, whose root is larger.
    share = max(2e-5, 1e-8**order)
    for name, value in expected.items():
        scale = float(value.max())
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=share * scale)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_files_hold_the_mean_power_of_example_gradients(
    world: World, tmp_path: Path, name: str
) -> None:
    checkpoint = world.base
    tokenizer = load_tokenizer(world.base)
    if name != "llama":
        torch.manual_seed(0)
        checkpoint = tmp_path / name
        model: PreTrainedModel = (
            GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer),
                    n_embd=32,
                    n_layer=2,
                    n_head=2,
                    n_positions=128,
                    bos_token_id=0,
                    eos_token_id=2,
                )
            )
            if name == "gpt2"
            else Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=128,
                )
            )
        )
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(str(checkpoint))
    folder = measured(world, tmp_path / "i", checkpoint=checkpoint, orders=(1.0, 2.0, 0.5))
    for order in (1.0, 2.0, 0.5):
        model = load_model(checkpoint, ComputeConfig())
        expected = oracle(model, encoded_retain(world, checkpoint), order)
        assert_close(read(folder, order), expected, order)
    stored = open_index(checkpoint)
    for order in (1.0, 2.0, 0.5):
        files = open_index(order_folder(folder, order))
        assert {n: e.shape for n, e in files.tensors.items()} == {
            n: e.shape for n, e in stored.tensors.items()
        }


def test_files_are_sharded_like_the_checkpoint(world: World, tmp_path: Path) -> None:
    model = load_model(world.base, ComputeConfig())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    load_tokenizer(world.base).save_pretrained(str(tmp_path / "sharded"))
    folder = measured(world, tmp_path / "i", checkpoint=tmp_path / "sharded")
    shards = open_index(tmp_path / "sharded").shards
    assert len(shards) > 2
    assert open_index(order_folder(folder, 1.0)).shards == shards


def test_the_sidecar_says_what_was_measured(world: World, tmp_path: Path) -> None:
    folder = measured(world, tmp_path / "i", estimator=EstimatorConfig(importance_samples="2"))
    facts = json.loads((folder / "importance.json").read_text())
    assert facts["orders"] == [1.0]
    assert (facts["examples"], facts["examples_available"]) == (2, 6)
    assert facts["tokens"] > 2
    assert len(facts["model_fingerprint"]) == len(facts["data_fingerprint"]) == 64
    with pytest.raises(ConfigError, match=r"order"):
        order_folder(folder, 2.0)


def test_a_sample_is_seeded_and_sized_by_count_or_share() -> None:
    examples = [Encoded((i,), (i,), i) for i in range(50)]

    def rows(text: str | None, seed: int = 0) -> list[int]:
        config = EstimatorConfig(importance_samples=text, importance_seed=seed)
        return [e.row for e in sample(examples, config)]

    assert rows(None) == rows("1.0") == list(range(50))
    assert len(rows("0.2")) == len(rows("10")) == 10
    assert rows("10") == rows("10") == sorted(rows("10"))
    assert rows("10") != rows("10", seed=1)
    assert len(rows("1000")) == 50
    assert len(rows("0.001")) == 1


@pytest.mark.parametrize("text", ["0", "1.5", "-3", "half", "nan"])
def test_a_senseless_sample_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--importance-samples"):
        EstimatorConfig(importance_samples=text)


def test_batch_size_and_row_order_do_not_change_importance(world: World, tmp_path: Path) -> None:
    one = measured(world, tmp_path / "1", compute=ComputeConfig(pass_batch_size=1))
    many = measured(world, tmp_path / "2", compute=ComputeConfig(pass_batch_size=6))
    backwards = tmp_path / "backwards.jsonl"
    lines = world.retain.read_text("utf-8").splitlines()
    backwards.write_text("\n".join(reversed(lines)), "utf-8")
    turned = compute_importance(
        ImportanceConfig(checkpoint=str(world.base), data=str(backwards), output=tmp_path / "3")
    )
    expected = {name: value.double() for name, value in read(one, 1.0).items()}
    assert_close(read(many, 1.0), expected)
    assert_close(read(turned, 1.0), expected)


def test_abs_of_mean_is_another_quantity(world: World, tmp_path: Path) -> None:
    mean_of_abs = read(measured(world, tmp_path / "1"), 1.0)
    estimator = EstimatorConfig(reduction="abs_of_mean")
    abs_of_mean = read(measured(world, tmp_path / "2", estimator=estimator), 1.0)
    for name, value in abs_of_mean.items():
        assert (value <= mean_of_abs[name] * 1.001 + 1e-9).all()
    assert sum(float(v.sum()) for v in abs_of_mean.values()) < 0.9 * sum(
        float(v.sum()) for v in mean_of_abs.values()
    )


def test_reuse_and_its_invalidation(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(world, tmp_path / "i")
    measured(world, tmp_path / "i")
    assert "reused" in capsys.readouterr().err
    for change in (
        {"orders": (2.0,)},
        {"checkpoint": world.full},
        {"estimator": EstimatorConfig(importance_samples="2")},
        {"data_config": DataConfig(system_prompt="")},
    ):
        with pytest.raises(OutputExistsError, match="made with other"):
            measured(world, tmp_path / "i", **change)


def test_options_that_save_memory_reach_the_engine_and_change_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measured(world, tmp_path / "plain")
    seen: list[dict[str, object]] = []

    def noted(*args: Any, **how: Any) -> Moments:
        seen.append(how)
        return batched_moments(*args, **how)

    monkeypatch.setattr(importance, "batched_moments", noted)
    spared = measured(world, tmp_path / "spared", gradient_checkpointing=True, accumulate_on="cpu")
    assert [(how["gradient_checkpointing"], how["accumulate_on"]) for how in seen] == [
        (True, "cpu")
    ]
    for name, expected in read(plain, 1).items():
        torch.testing.assert_close(read(spared, 1)[name], expected)
    # Where the sums lie is no part of what they are.
    measured(world, tmp_path / "plain", accumulate_on="cpu")
    assert len(seen) == 1


@pytest.mark.parametrize("more", [{"gradient_checkpointing": True}, {"accumulate_on": "cpu"}])
def test_the_cheap_reduction_has_nothing_to_save(
    world: World, tmp_path: Path, more: dict[str, object]
) -> None:
    cheap = EstimatorConfig(reduction="abs_of_mean")
    with pytest.raises(ConfigError, match="--reduction is abs_of_mean"):
        measured(world, tmp_path / "out", estimator=cheap, **more)
    assert not (tmp_path / "out").exists()
