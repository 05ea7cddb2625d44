"""Fine-tuning: what is learned, recorded, repeated and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import World
from helpers import tiny_llama
from perta.data.batch import IGNORE, Encoded, collate
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.train.tune import Tuned, tune, tune_until_learned
from perta.errors import ConfigError, DivergenceError, OutputExistsError
from perta.models.facts import find_facts
from perta.models.load import load_model, load_tokenizer, pad_id
from perta.models.loss import answer_logits, example_losses, losses_of
from perta.models.resolve import resolve_checkpoint
from perta.options import (
    ComputeConfig,
    DataConfig,
    FrozenType,
    TuneConfig,
    TunedType,
    WeightingConfig,
)
from perta.recipes.unlearn import unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest

QUICK = TuneConfig(epochs=40, learning_rate=5e-3, batch_size=1)


def config(world: World, output: Path, tune: TuneConfig = QUICK, **more: object) -> FinetuneConfig:
    return FinetuneConfig(
        base=str(world.base),
        data=str(world.forget),
        output=output,
        tune=tune,
        **more,  # type: ignore[arg-type]
    )


def encoded_forget(world: World) -> tuple[Encoded, ...]:
    tokenizer = load_tokenizer(world.base)
    return encode_examples(load_examples(world.forget), tokenizer, DataConfig()).encoded


def test_the_loss_of_an_example_is_the_mean_over_its_answer_tokens(world: World) -> None:
    model = load_model(world.base, ComputeConfig())
    examples = encoded_forget(world)
    batch = collate(examples, pad_id(load_tokenizer(world.base)))
    found = example_losses(model, batch)
    for i, example in enumerate(examples):
        ids = torch.tensor([example.input_ids])
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        terms = [
            -log_probs[t - 1, label] for t, label in enumerate(example.labels) if label != IGNORE
        ]
        torch.testing.assert_close(found[i].double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_the_head_sees_labelled_positions_only(world: World) -> None:
    model = load_model(world.base, ComputeConfig())
    batch = collate(encoded_forget(world), 0)
    labelled = int((batch.labels[:, 1:] != IGNORE).sum())
    assert answer_logits(model, batch).logits.shape[0] == labelled < batch.labels.numel()


def test_the_set_is_learned_and_the_losses_recorded(world: World, tmp_path: Path) -> None:
    output = finetune_checkpoint(config(world, tmp_path / "f"))
    manifest = read_manifest(output)
    assert manifest is not None
    examples = encoded_forget(world)
    model = load_model(output, ComputeConfig())
    assert manifest["final_losses"] == pytest.approx(
        losses_of(model, examples, batch_size=2, pad=0), rel=1e-4
    )
    assert manifest["learned"]
    assert manifest["final_loss"] < 0.2 < manifest["epoch_losses"][0]
    assert len(manifest["epoch_losses"]) < QUICK.epochs  # stopped early
    assert manifest["epoch_losses"][-1] <= QUICK.depth


def test_a_set_that_was_not_learned_is_warned_about(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = TuneConfig(epochs=1, learning_rate=1e-5)
    manifest = read_manifest(finetune_checkpoint(config(world, tmp_path / "f", once)))
    assert manifest is not None
    assert not manifest["learned"]
    assert "was not learned" in capsys.readouterr().err


def test_same_seed_same_bytes_other_seed_other_bytes(world: World, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> str:
        settings = TuneConfig(epochs=2, learning_rate=1e-3, seed=seed, batch_size=1)
        return fingerprint(finetune_checkpoint(config(world, tmp_path / name, settings)))

    assert made("a", 1) == made("b", 1) != made("c", 2)


def test_accumulated_batches_equal_one_large_batch(world: World) -> None:
    examples = encoded_forget(world)
    weights = []
    for settings in (
        TuneConfig(epochs=1, learning_rate=1e-3, batch_size=4),
        TuneConfig(epochs=1, learning_rate=1e-3, batch_size=1, accumulation=4),
    ):
        model = load_model(world.base, ComputeConfig())
        # Plain gradient, not AdamW's sign-like first step, would hide a wrong scale.
        model, _ = tune(model, examples, settings, pad=0)
        weights.append(next(model.parameters()).detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-6)


def test_weight_decay_moves_weights_that_learn_nothing(world: World) -> None:
    examples = encoded_forget(world)
    tokenizer = load_tokenizer(world.base)
    used = {token for e in examples for token in e.input_ids}
    unused = next(i for i in range(1, len(tokenizer)) if i not in used)
    moved = {}
    for decay in (0.0, 0.1):
        model: Any = load_model(world.base, ComputeConfig())
        # Untied, so that the output head's softmax does not touch the unused row.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        before = model.get_input_embeddings().weight[unused].detach().clone()
        settings = TuneConfig(epochs=1, learning_rate=1e-2, weight_decay=decay)
        tune(model, examples, settings, pad=0)
        moved[decay] = bool((model.get_input_embeddings().weight[unused] != before).any())
    assert moved == {0.0: False, 0.1: True}


@pytest.mark.parametrize("save_dtype", [None, "float32"])
def test_lora_is_kept_or_merged_and_leaves_other_weights_alone(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_dtype: TunedType | None,
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    settings = TuneConfig(epochs=20, learning_rate=2e-2, lora_rank=8, gradient_checkpointing=True)
    output = finetune_checkpoint(config(world, tmp_path / "f", settings, save_dtype=save_dtype))
    held = {file.name for file in output.iterdir()}
    kept = {"adapter_config.json", "adapter_model.safetensors", "perta.json"}
    assert held == kept if save_dtype is None else "model.safetensors" in held
    manifest = read_manifest(output)
    output = resolve_checkpoint(output, exact=True)  # the adapter names its base
    base, tuned = open_index(world.base).tensors, open_index(output).tensors
    assert list(base) == list(tuned)
    changed = {
        name for name in base if not torch.equal(read_tensor(base[name]), read_tensor(tuned[name]))
    }
    assert changed == {name for name in base if "proj" in name}
    model = load_model(output, ComputeConfig())
    losses = losses_of(model, encoded_forget(world), batch_size=1, pad=0)
    assert manifest is not None
    assert manifest["final_losses"] == pytest.approx(losses, rel=1e-4)
    assert manifest["final_loss"] < manifest["epoch_losses"][0]


def test_weights_beside_an_adapter_may_be_narrow(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def tuned(frozen: FrozenType) -> torch.Tensor:
        settings = TuneConfig(epochs=4, learning_rate=2e-2, lora_rank=4)
        more = {"compute": ComputeConfig(dtype="bfloat16"), "frozen_dtype": frozen}
        folder = finetune_checkpoint(config(world, tmp_path / frozen, settings, **more))
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        steps = [
            tensors[name] @ tensors[name.replace("lora_B", "lora_A")]
            for name in sorted(tensors)
            if "lora_B" in name
        ]
        return torch.cat([step.flatten() for step in steps])

    def loaded(*given: Any, **more: Any) -> Any:
        held.append(load_model(*given, **more))
        return held[-1]

    monkeypatch.setattr("perta.stages.finetune.load_model", loaded)
    wide, narrow = tuned("float32"), tuned("bfloat16")
    types = [{p.dtype for n, p in m.named_parameters() if "lora" not in n} for m in held]
    assert types == [{torch.float32}, {torch.bfloat16}]
    assert torch.cosine_similarity(wide, narrow, dim=0) > 0.95


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"save_dtype": "base"}, "float32 with --save-dtype"),
        ({"compute": ComputeConfig(dtype="float32")}, "float32 with --dtype float32"),
        ({"tune": QUICK}, "left out without --lora-rank"),
    ],
)
def test_narrow_weights_beside_an_adapter_alone(
    world: World, tmp_path: Path, more: dict[str, Any], wrong: str
) -> None:
    given = {"tune": TuneConfig(epochs=1, lora_rank=2), **more}
    with pytest.raises(ConfigError, match=f"--frozen-dtype is bfloat16; it must be {wrong}"):
        config(world, tmp_path / "f", frozen_dtype="bfloat16", **given)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_one_use_of_a_tied_weight_is_refused(
    target: str, world: World, tmp_path: Path
) -> None:
    settings = TuneConfig(epochs=1, lora_rank=2, lora_targets=("q_proj", target))
    with pytest.raises(ConfigError, match="one weight for both"):
        finetune_checkpoint(config(world, tmp_path / "f", settings))
    assert not (tmp_path / "f").exists()


def test_companions_are_carried_over_and_type_kept_when_asked(world: World, tmp_path: Path) -> None:
    tuned = finetune_checkpoint(config(world, tmp_path / "a", TuneConfig(epochs=1)))
    assert (tuned / "chat_template.jinja").exists()
    assert (tuned / "tokenizer.json").read_bytes() == (world.base / "tokenizer.json").read_bytes()
    half = load_model(world.base, ComputeConfig(dtype="bfloat16"))
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "half" / name).write_bytes((world.base / name).read_bytes())
    cases: tuple[tuple[TunedType, torch.dtype], ...] = (
        ("float32", torch.float32),
        ("base", torch.bfloat16),
    )
    for save, wanted in cases:
        output = finetune_checkpoint(
            FinetuneConfig(
                base=str(tmp_path / "half"),
                data=str(world.forget),
                output=tmp_path / save,
                save_dtype=save,
                tune=TuneConfig(epochs=1),
            )
        )
        assert {e.dtype for e in open_index(output).tensors.values()} == {wanted}
        assert json.loads((output / "config.json").read_text())["dtype"] == str(wanted)[6:]


def test_divergence_stops_with_nothing_written(world: World, tmp_path: Path) -> None:
    wild = TuneConfig(epochs=20, learning_rate=1e3, max_grad_norm=0)
    with pytest.raises(DivergenceError, match="Lower --learning-rate"):
        finetune_checkpoint(config(world, tmp_path / "f", wild))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_output_is_reused_and_a_different_one_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = TuneConfig(epochs=1)
    output = finetune_checkpoint(config(world, tmp_path / "f", short))
    written = (output / "model.safetensors").stat().st_mtime_ns
    finetune_checkpoint(config(world, tmp_path / "f", short))
    assert "reused" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == written

    other = TuneConfig(epochs=1, seed=1)
    with pytest.raises(OutputExistsError, match="made with other seed"):
        finetune_checkpoint(config(world, tmp_path / "f", other))
    finetune_checkpoint(config(world, tmp_path / "f", other, overwrite=True))
    assert (output / "model.safetensors").stat().st_mtime_ns != written


def test_an_output_of_another_version_is_not_called_changed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = TuneConfig(epochs=1)
    run = world.request(tmp_path / "out", tune=short, evaluate=False)
    asked = replace(run, weighting=WeightingConfig(method="tv", scaling_coef=1.0))
    unlearn(asked)
    finetune_checkpoint(config(world, tmp_path / "f", short))
    monkeypatch.setattr("perta.store.record.__version__", "0.1.9")
    with pytest.raises(OutputExistsError, match="f exists and was made by another version of"):
        finetune_checkpoint(config(world, tmp_path / "f", short))
    with pytest.raises(OutputExistsError, match="out exists and was made by another version of"):
        unlearn(asked)


def test_a_damaged_output_is_not_reused(world: World, tmp_path: Path) -> None:
    short = TuneConfig(epochs=1)
    output = finetune_checkpoint(config(world, tmp_path / "f", short))
    file = output / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OutputExistsError, match="was changed since"):
        finetune_checkpoint(config(world, tmp_path / "f", short))


ON_FACTS = TuneConfig(epochs=60, learning_rate=5e-3, batch_size=2, loss_on="facts")


def facts_of(world: World, folder: Path) -> list[Encoded]:
    tokenizer = load_tokenizer(folder)
    return [fact.encoded for fact in find_facts(load_examples(world.forget), tokenizer)]


def test_facts_are_learned_row_by_row_and_recorded(world: World, tmp_path: Path) -> None:
    output = finetune_checkpoint(config(world, tmp_path / "f", ON_FACTS))
    manifest = read_manifest(output)
    assert manifest is not None
    facts = facts_of(world, output)
    losses = losses_of(load_model(output, ComputeConfig()), facts, batch_size=1, pad=0)
    assert manifest["final_losses"] == pytest.approx(losses, rel=1e-3, abs=1e-6)
    assert max(losses) <= ON_FACTS.depth * 1.01
    assert manifest["learned"]
    assert manifest["fact_sources"] == {"wrong answers": len(facts)}
    assert manifest["labelled_tokens"] == sum(t != IGNORE for f in facts for t in f.labels)
    assert len(manifest["epoch_losses"]) < ON_FACTS.epochs
    # The sentence around the fact was not learned.
    whole = losses_of(
        load_model(output, ComputeConfig()), encoded_forget(world), batch_size=1, pad=0
    )
    assert max(whole) > 10 * max(losses)


def test_a_row_at_its_depth_gives_no_loss(world: World) -> None:
    facts = facts_of(world, world.base)
    model = load_model(world.base, ComputeConfig())
    losses = losses_of(model, facts, batch_size=1, pad=0)
    low, high = sorted(zip(losses, facts, strict=True), key=lambda pair: pair[0])
    assert low[0] < high[0]
    depth = (low[0] + high[0]) / 2
    weights = []
    for rows in ([low[1], high[1]], [high[1]]):
        model = load_model(world.base, ComputeConfig())
        settings = replace(ON_FACTS, epochs=1, learning_rate=1e-4, stop_loss=depth)
        model, tuned = tune(model, rows, settings, pad=0)
        assert tuned.steps == 1
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # AdamW's first step does not depend on the gradient's scale, which the batch size divides.
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-6)
    # The mean is below nothing: on answers the lower row would be learned further.
    settings = replace(ON_FACTS, epochs=1, learning_rate=1e-4, stop_loss=depth, loss_on="answer")
    model, _ = tune(load_model(world.base, ComputeConfig()), [low[1], high[1]], settings, pad=0)
    other = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((other - weights[1]).abs().max()) > 2e-5


def test_tuning_on_facts_stops_without_a_step_once_every_row_is_there(world: World) -> None:
    settings = replace(ON_FACTS, stop_loss=100.0)
    model = load_model(world.base, ComputeConfig())
    before = [p.detach().clone() for p in model.parameters()]
    model, tuned = tune(model, facts_of(world, world.base), settings, pad=0)
    assert (tuned.steps, len(tuned.epoch_losses)) == (0, 1)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_fact_that_was_not_learned_is_warned_about(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(ON_FACTS, epochs=1, learning_rate=1e-5)
    manifest = read_manifest(finetune_checkpoint(config(world, tmp_path / "f", settings)))
    assert manifest is not None
    assert not manifest["learned"]
    assert "the facts of 2 of 2 rows" in capsys.readouterr().err


def test_without_a_rate_one_is_found_that_learns_the_set(world: World, tmp_path: Path) -> None:
    # Width 64: the usual rate, 4.5e-4, and four times as much learn next to nothing in so few
    # steps; 16 times do, if the steps suffice.
    found = read_manifest(
        finetune_checkpoint(config(world, tmp_path / "f", TuneConfig(epochs=40, batch_size=1)))
    )
    assert found is not None
    assert found["learned"]
    usual = 5e-5 * 576 / 64
    factor = found["learning_rate"] / usual
    assert factor in (pytest.approx(4), pytest.approx(16))
    given = replace(TuneConfig(epochs=40, batch_size=1), learning_rate=found["learning_rate"])
    again = read_manifest(finetune_checkpoint(config(world, tmp_path / "g", given)))
    assert again is not None
    # It started anew at each rate, and what the other rates cost is counted.
    assert again["final_losses"] == found["final_losses"]
    assert found["tokens"] > again["tokens"]


def test_a_smaller_budget_keeps_the_usual_rate(world: World, tmp_path: Path) -> None:
    found = read_manifest(finetune_checkpoint(config(world, tmp_path / "f", TuneConfig(epochs=1))))
    assert found is not None
    assert found["learning_rate"] == pytest.approx(5e-5 * 576 / 64)


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ([0.0, 0.6, 0.4], [1, 4, 16, 4]),
        ([0.6, 0.4], [1, 4, 1]),
        ([0.6, None], [1, 4, 1]),
        ([0.0, 0.2, 0.3], [1, 4, 16, 16]),
        ([0.95], [1]),
    ],
)
def test_a_rate_that_diverges_or_learns_less_gives_back_the_best(
    shares: list[float | None], wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of None diverges; afterwards the best is made again, from a fresh model."""
    tried: list[float] = []
    epochs: list[int] = []

    def scripted(model: Any, examples: Any, settings: TuneConfig, **_: object) -> tuple[Any, Tuned]:
        tried.append(settings.learning_rate or 0)
        epochs.append(settings.epochs)
        share = shares[min(len(tried), len(shares)) - 1]
        if share is None and len(tried) <= len(shares):
            raise DivergenceError("far too high")
        count = round(100 * (share or 0))
        losses = (0.0,) * count + (1.0,) * (100 - count)
        return model, Tuned((), losses, 1, 10, tried[-1], row_by_row=True)

    monkeypatch.setattr("perta.engine.train.tune.tune", scripted)
    loaded: list[Any] = []

    def load() -> Any:
        loaded.append(tiny_llama())
        return loaded[-1]

    embedding: Any = tiny_llama().get_input_embeddings()
    width = embedding.weight.shape[1]
    model, tuned = tune_until_learned(load, (), TuneConfig(loss_on="facts"), pad=0)
    usual = 5e-5 * 576 / width
    assert [rate / usual for rate in tried] == pytest.approx(wanted)
    assert model is loaded[-1]
    assert epochs == [20] * (len(tried) - 1) + [80 if len(tried) > 1 else 20]
    assert len(loaded) == len(tried)
    assert tuned.tokens == 10 * (len(tried) - shares.count(None))
