"""Unlearning by training as a stage and in the pipeline: inputs, outputs, reuse, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import perta.recipes.unlearn
from conftest import World
from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.train.refusals import REFUSALS, refuse
from perta.errors import ConfigError, DivergenceError, OutputExistsError
from perta.models.load import load_model, load_tokenizer
from perta.models.loss import losses_of
from perta.options import (
    ComputeConfig,
    DataConfig,
    ScoringConfig,
    TrainSettings,
    TuneConfig,
    WeightingConfig,
)
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import plan_unlearn, unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig, TrainConfig
from perta.stages.train import train_checkpoint
from perta.store.checkpoint import open_index
from perta.store.fingerprint import fingerprint
from perta.store.record import aggregates, read_manifest

# --- the stage and the pipeline ---------------------------------------------------------------


STAGE = TrainSettings(epochs=2, learning_rate=1e-3, batch_size=2, accumulation=1)


def stage(world: World, output: Path, method: str, **more: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "full": str(world.full),
        "base": str(world.base),
        "forget": str(world.forget),
        "retain": str(world.retain),
        "training": STAGE,
        **more,
    }
    return TrainConfig(method=method, output=output, **given)


def test_the_output_is_a_traced_checkpoint_of_the_full_models_type(
    world: World, tmp_path: Path
) -> None:
    half = load_model(world.full, ComputeConfig(dtype="bfloat16"))
    half.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "half" / name).write_bytes((world.full / name).read_bytes())
    config = stage(world, tmp_path / "out", "npo_retain", full=str(tmp_path / "half"))
    output = train_checkpoint(config)
    assert {e.dtype for e in open_index(output).tensors.values()} == {torch.bfloat16}
    manifest = read_manifest(output)
    assert manifest is not None
    assert set(manifest["inputs"]) == {"full", "forget", "retain"}
    assert manifest["inputs"]["full"] == fingerprint(tmp_path / "half")
    assert manifest["settings"]["method_settings"]["beta"] == 0.1
    assert manifest["settings"]["method"] == "npo-retain"
    assert len(manifest["forget_terms"]) == len(manifest["retain_terms"]) == 2
    assert manifest["forget_tokens"] > 0
    card = (output / "README.md").read_text("utf-8")
    assert "npo-retain" in card
    assert "arXiv 2404.05868" in card
    rows = [json.loads(row) for row in world.forget.read_text("utf-8").splitlines()]
    assert not any(row["answer"] in card + json.dumps(manifest) for row in rows)
    assert not (tmp_path / "out.resume").exists()
    load_tokenizer(output)


def test_a_finished_output_is_reused_and_another_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage(world, tmp_path / "out", "ga")
    train_checkpoint(config)
    train_checkpoint(replace(config, save_every=0, retain=None))
    assert "reused" in capsys.readouterr().err
    other = replace(config, training=replace(STAGE, seed=1))
    with pytest.raises(OutputExistsError, match="other unlearn_seed"):
        train_checkpoint(other)


def test_there_is_one_seed(world: World, tmp_path: Path) -> None:
    def trained(name: str, **more: Any) -> str:
        return fingerprint(train_checkpoint(stage(world, tmp_path / name, "npo-retain", **more)))

    seeded = trained("seeded", seed=3)
    assert seeded == trained("set", training=replace(STAGE, seed=3)) != trained("other")
    run = pipeline(world, tmp_path / "run", "npo-retain")
    run = replace(run, training=STAGE, tune=TuneConfig(seed=3), held_back="0", evaluate=False)
    assert fingerprint(unlearn(run).folder) == seeded


def test_retraining_starts_from_the_base_and_sees_retain_rows_only(
    world: World, tmp_path: Path
) -> None:
    settings = replace(STAGE, epochs=15, learning_rate=5e-3)
    config = stage(world, tmp_path / "out", "retrain", training=settings, full=None, forget=None)
    output = train_checkpoint(config)
    manifest = read_manifest(output)
    assert manifest is not None
    assert set(manifest["inputs"]) == {"base", "retain"}
    model, tokenizer = load_model(output, ComputeConfig()), load_tokenizer(output)

    def loss(source: Path) -> float:
        encoded = encode_examples(load_examples(source), tokenizer, DataConfig()).encoded
        losses = losses_of(model, encoded, batch_size=8, pad=0)
        return sum(losses) / len(losses)

    assert loss(world.retain) < 0.5 < loss(world.forget)
    assert manifest["final_loss"] == pytest.approx(loss(world.retain), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "missing", "message"),
    [
        ("npo", {"full": None}, "--full"),
        ("retrain", {"base": None}, "--base"),
        ("npo", {"forget": None}, "--forget"),
        ("graddiff", {"retain": None}, "--retain"),
        ("influence", {}, "no adapter folder"),
        ("tv", {}, "Unknown method `tv`"),
    ],
)
def test_a_missing_input_is_named_before_any_work(
    world: World, tmp_path: Path, method: str, missing: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_checkpoint(stage(world, tmp_path / "out", method, **missing))
    assert list(tmp_path.iterdir()) == []


def test_refusals_keep_prompts_rows_and_order(world: World) -> None:
    forget = load_examples(world.forget)
    refused = refuse(forget, seed=1)
    for old, new in zip(forget.examples, refused.examples, strict=True):
        assert (old.prompt, old.row) == (new.prompt, new.row)
        assert new.answer in REFUSALS
    assert refused == refuse(forget, seed=1)


@pytest.mark.parametrize("method", ["altpo", "dpo", "idkpo"])
def test_plain_text_has_no_refusals_and_no_model_is_loaded_for_it(
    world: World, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Once upon a time."}\n', "utf-8")
    monkeypatch.setattr("perta.stages.train.load_model", None)
    output = tmp_path / "out"
    chosen = {"weighting": WeightingConfig(method=method), "tune": TuneConfig()}
    asked = world.request(output, forget=str(text), **chosen)
    for run in (
        lambda: train_checkpoint(stage(world, output, method, forget=str(text))),
        lambda: plan_unlearn(asked),
        lambda: unlearn(asked),
    ):
        with pytest.raises(ConfigError, match="no question to refuse"):
            run()
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("method", ["dpo", "idkpo"])
def test_a_row_whose_refusal_is_too_long_is_left_out_with_it(
    world: World, tmp_path: Path, method: str
) -> None:
    rows = [(f"{'Where was it? ' * long}", "Yes.") for long in (1, 30, 2)]
    data = tmp_path / "forget.jsonl"
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in rows)
    data.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    forget = load_examples(data)
    tokenizer = load_tokenizer(world.full)
    # As long as the second row: it fits with its answer, not with a refusal.
    limit = max(len(e.input_ids) for e in encode_examples(forget, tokenizer).encoded)
    fitting = DataConfig(max_length=limit, skip_bad_rows=True)
    refused = encode_examples(refuse(forget, 0), tokenizer, fitting)
    assert [len(e.input_ids) <= limit for e in refused.encoded] == [True, True]
    output = tmp_path / "out"
    config = stage(world, output, method, forget=str(data), data_config=fitting)
    train_checkpoint(config)
    assert len((read_manifest(output) or {})["final_losses"]) == 2


def test_alternates_are_drawn_before_training_and_not_kept(world: World, tmp_path: Path) -> None:
    method = "altpo:alternates=2"
    output = train_checkpoint(stage(world, tmp_path / "out", method))
    manifest = read_manifest(output) or {}
    rows = len(load_examples(world.forget))
    assert len(manifest["final_losses"]) == 2 * rows
    assert manifest["settings"]["method_settings"]["alternates"] == 2
    again = train_checkpoint(stage(world, tmp_path / "again", method))
    assert fingerprint(output) == fingerprint(again)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}
    other = train_checkpoint(stage(world, tmp_path / "other", "dpo"))
    assert fingerprint(other) != fingerprint(output)


def test_teaching_refusals_makes_them_likely(world: World, tmp_path: Path) -> None:
    settings = replace(STAGE, epochs=15, learning_rate=5e-3)
    output = train_checkpoint(stage(world, tmp_path / "out", "idkpo", training=settings))
    tokenizer = load_tokenizer(output)
    refused = refuse(load_examples(world.forget), seed=0)
    encoded = encode_examples(refused, tokenizer, DataConfig()).encoded

    def loss(folder: Path) -> float:
        model = load_model(folder, ComputeConfig())
        return sum(losses_of(model, encoded, batch_size=8, pad=0)) / len(encoded)

    assert loss(output) < 0.7 * loss(world.full)


def test_divergence_writes_nothing(world: World, tmp_path: Path) -> None:
    wild = replace(STAGE, epochs=30, learning_rate=3.0)
    with pytest.raises(DivergenceError, match="Nothing was written"):
        train_checkpoint(
            stage(world, tmp_path / "out", "graddiff:retain_weight=1e-6", training=wild)
        )
    assert list(tmp_path.iterdir()) == []


@contextmanager
def killed_before_saving(writes: str) -> Iterator[None]:
    """A stage that has trained is interrupted before it writes its checkpoint."""

    def kill(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writes, kill)
        yield


def test_a_killed_stage_leaves_its_state_and_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_checkpoint(stage(world, tmp_path / "whole", "npo-retain"))
    config = stage(world, tmp_path / "out", "npo-retain")
    with killed_before_saving("perta.stages.train.save_model"), pytest.raises(KeyboardInterrupt):
        train_checkpoint(config)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out.resume"}
    output = train_checkpoint(config)
    assert "Going on after epoch 1" in capsys.readouterr().err
    assert not (tmp_path / "out.resume").exists()
    assert fingerprint(output) == fingerprint(whole)


def test_a_killed_fine_tune_goes_on_when_asked_to(world: World, tmp_path: Path) -> None:
    def config(name: str, every: int | None) -> FinetuneConfig:
        tune = TuneConfig(epochs=3, learning_rate=1e-3, batch_size=1, save_every=every)
        return FinetuneConfig(
            base=str(world.base), data=str(world.forget), output=tmp_path / name, tune=tune
        )

    whole = finetune_checkpoint(config("whole", None))
    with killed_before_saving("perta.stages.finetune.save_tuned"), pytest.raises(KeyboardInterrupt):
        finetune_checkpoint(config("out", 1))
    assert (tmp_path / "out.resume" / "state.pt").exists()
    assert fingerprint(finetune_checkpoint(config("out", 1))) == fingerprint(whole)
    assert not (tmp_path / "out.resume").exists()


def pipeline(world: World, output: Path, method: str, **more: Any) -> UnlearnConfig:
    return world.request(
        output,
        tune=TuneConfig(),
        weighting=WeightingConfig(method=method, **more),
        training=replace(STAGE, epochs=15),
        scoring=ScoringConfig(generate=False),
    )


def test_the_pipeline_trains_evaluates_and_reports(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pipeline(world, tmp_path / "out", "npo-retain")
    result = unlearn(config)
    assert result.before is not None
    assert result.after is not None
    before, after = aggregates(result.before), aggregates(result.after)
    assert after["forget_probability"] < 0.7 * before["forget_probability"]
    assert after["retain_probability"] > after["forget_probability"]
    record = result.manifest["unlearn"]
    assert record["settings"]["method_settings"]["beta"] == 0.1
    assert record["seconds"]["train"] > 0
    assert not (tmp_path / "out.work" / "forget_checkpoint").exists()
    assert result.report is not None
    assert "npo-retain" in result.report.read_text("utf-8")
    monkeypatch.setattr(perta.recipes.unlearn, "train_checkpoint", None)
    assert unlearn(config).after == result.after


def test_the_pipeline_refuses_what_does_not_fit(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--unlearn-epochs"):
        unlearn(pipeline(world, tmp_path / "out", "npo", scaling_coef=1.0))
    with pytest.raises(ConfigError, match="Did you mean `graddiff`"):
        unlearn(pipeline(world, tmp_path / "out", "gradiff"))
    with pytest.raises(ConfigError, match="Did you mean `perta-fisher`"):
        unlearn(pipeline(world, tmp_path / "out", "perta-fishr"))
    assert list(tmp_path.iterdir()) == []
