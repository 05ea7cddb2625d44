"""Records tell the truth: of inputs that change meanwhile, and of files that changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import TUNE, World
from perta.errors import CheckpointError, ConfigError, CorruptCheckpointError, DataError
from perta.models import resolve
from perta.options import ScoringConfig, TuneConfig, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages import edit as edit_stage
from perta.stages import evaluate as evaluate_stage
from perta.stages import finetune as finetune_stage
from perta.stages.bench import write_people
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.settings import EvaluateConfig, FinetuneConfig, ImportanceConfig, PeopleConfig
from perta.store import atomic
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest


def flip(file: Path) -> None:
    """Change one bit in the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def after(
    monkeypatch: pytest.MonkeyPatch, home: object, name: str, change: Callable[[], object]
) -> None:
    """Make something change after a function has run."""
    real = getattr(home, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        change()
        return result

    monkeypatch.setattr(home, name, patched)


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.base, tmp_path / "model"))


def tuned(base: Path, world: World, output: Path) -> FinetuneConfig:
    return FinetuneConfig(base=str(base), data=str(world.forget), output=output, tune=TUNE)


def plain(world: World, output: Path, weighting: WeightingConfig, **more: Any) -> UnlearnConfig:
    """A request without evaluation."""
    return world.request(output, weighting=weighting, evaluate=False, **more)


def test_a_model_that_changes_while_it_is_read_is_not_recorded(
    world: World, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = base / "model.safetensors"
    with monkeypatch.context() as patch:
        after(patch, finetune_stage, "tune_until_learned", lambda: flip(weights))
        with pytest.raises(CheckpointError, match="base changed while it was read"):
            finetune_checkpoint(tuned(base, world, tmp_path / "out"))
    with monkeypatch.context() as patch:
        after(patch, evaluate_stage, "quick_evaluation", lambda: flip(weights))
        with pytest.raises(CheckpointError, match="checkpoint changed while it was read"):
            evaluate_checkpoint(
                EvaluateConfig(
                    checkpoint=str(base), forget=str(world.forget), output=tmp_path / "r.json"
                )
            )
    with monkeypatch.context() as patch:
        after(patch, edit_stage, "write_edit", lambda: flip(base / "tokenizer.json"))
        weighting = WeightingConfig(method="tv", scaling_coef=0.5)
        config = plain(world, tmp_path / "u", weighting, full=str(base), retain=None)
        with pytest.raises(CheckpointError, match="full changed while it was read"):
            unlearn(config)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "u.work"}


def test_rows_that_change_between_two_stages_are_not_recorded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Path(shutil.copyfile(world.forget, tmp_path / "forget.jsonl"))
    weighting = WeightingConfig(method="perta-grad", scaling_coef=1.0)
    config = plain(world, tmp_path / "out", weighting, forget=str(rows))
    text = rows.read_text("utf-8")
    from perta.recipes import unlearn as recipe

    # The run has read the rows; the stages read them again.
    after(monkeypatch, recipe, "load_sets", lambda: rows.write_text(text.splitlines()[0] + "\n"))
    with pytest.raises(CheckpointError, match="data changed while the run read it"):
        unlearn(config)
    assert not config.output.exists()


def killed_before_its_record(config: UnlearnConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("perta.recipes._run_record.make_manifest", None)
        with pytest.raises(TypeError):
            unlearn(config)


@pytest.mark.parametrize("method", ["perta-grad", "npo-retain"])
def test_a_run_killed_before_its_record_is_finished_by_the_same_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    weighting = WeightingConfig(method=method)
    if method == "perta-grad":
        weighting = replace(weighting, scaling_coef=1.0)
    tune = TuneConfig(epochs=2, learning_rate=1e-3)
    config = plain(world, tmp_path / "out", weighting, tune=tune)
    killed_before_its_record(config, monkeypatch)
    made = fingerprint(config.output)
    done = unlearn(config)
    assert fingerprint(config.output) == made
    assert "part_of" not in done.manifest
    assert done.manifest["unlearn"]["seconds"]["total"] > 0
    # Another request still refuses what this one made.
    killed_before_its_record(replace(config, output=tmp_path / "two"), monkeypatch)
    other = replace(config, output=tmp_path / "two", retain=str(world.forget.parent / "full.jsonl"))
    with pytest.raises(Exception, match="exists and was made by `perta"):
        unlearn(replace(other, forget=str(world.retain), retain=str(world.forget)))


def test_what_was_changed_since_is_not_used(world: World, base: Path, tmp_path: Path) -> None:
    importance = compute_importance(
        ImportanceConfig(
            checkpoint=str(base), data=str(world.forget), output=tmp_path / "i", orders=(1.0,)
        )
    )
    record = read_manifest(importance) or {}
    assert set(record["files"]) == {"importance.json", "order-1/model.safetensors"}
    model = finetune_checkpoint(tuned(base, world, tmp_path / "tuned"))
    fingerprint(importance)
    for folder, name in ((importance, "order-1/model.safetensors"), (model, "config.json")):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(CorruptCheckpointError, match=rf"{name} changed since"):
            fingerprint(folder)
    (model / "README.md").write_text("notes")
    with pytest.raises(CorruptCheckpointError, match=r"config\.json changed since"):
        finetune_checkpoint(tuned(model, world, tmp_path / "again"))
    (model / "perta.json").unlink()
    fingerprint(model)


def test_changed_results_are_neither_reused_nor_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from perta.evidence.results import read_results
    from perta.report.collect import collect

    output = tmp_path / "r.json"
    config = EvaluateConfig(
        checkpoint=str(world.full),
        forget=str(world.forget),
        output=output,
        scoring=ScoringConfig(generate=False),
    )
    before = evaluate_checkpoint(config)
    assert "reused" not in capsys.readouterr().err
    assert evaluate_checkpoint(config) == before
    assert "reused" in capsys.readouterr().err
    results = json.loads(output.read_text("utf-8"))
    results["forget_probability"]["agg_value"] = 0.0
    output.write_text(json.dumps(results))
    with pytest.raises(DataError, match="not as perta wrote it"):
        read_results(output)
    with pytest.raises(DataError, match="not as perta wrote it"):
        collect([str(output)])
    evaluate_checkpoint(replace(config, overwrite=True))
    assert (
        json.loads(output.read_text("utf-8"))["forget_probability"] == before["forget_probability"]
    )


def test_a_changed_merge_is_made_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    model: Any = LlamaForCausalLM.from_pretrained(world.base)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    merged = resolve.resolve_checkpoint(tmp_path / "adapter", base=world.base)
    whole = (merged / "model.safetensors").read_bytes()
    assert resolve.resolve_checkpoint(tmp_path / "adapter", base=world.base) == merged
    for damage in (lambda f: flip(f), lambda f: f.unlink()):
        damage(merged / "model.safetensors")
        assert resolve.resolve_checkpoint(tmp_path / "adapter", base=world.base) == merged
        assert (merged / "model.safetensors").read_bytes() == whole


def test_every_flipped_bit_of_a_saved_state_is_seen(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune = TuneConfig(epochs=3, learning_rate=1e-3, stop_loss=0.0, save_every=1)
    config = FinetuneConfig(
        base=str(world.base), data=str(world.forget), output=tmp_path / "out", tune=tune
    )
    whole = finetune_checkpoint(replace(config, output=tmp_path / "whole"))
    for place in (0.2, 0.5, 0.8):
        with monkeypatch.context() as patch:
            patch.setattr(finetune_stage, "save_tuned", None)
            with pytest.raises(TypeError):
                finetune_checkpoint(config)
        state = tmp_path / "out.resume" / "state.pt"
        content = bytearray(state.read_bytes())
        content[int(place * len(content))] ^= 4
        state.write_bytes(content)
        capsys.readouterr()
        finetune_checkpoint(config)
        assert "damaged" in capsys.readouterr().err
        for name, value in load_file(whole / "model.safetensors").items():
            assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)
        shutil.rmtree(tmp_path / "out")


def test_what_a_killed_run_left_is_cleared_away_where_nothing_is_to_be_made(
    world: World, tmp_path: Path
) -> None:
    weighting = WeightingConfig(method="tv", scaling_coef=1.0)
    config = plain(world, tmp_path / "out", weighting, retain=None)
    unlearn(config)
    people = PeopleConfig(output=tmp_path / "people", people=3, questions=2)
    write_people(people)
    token = f"{atomic._host()}-{atomic._boot()}-000000"
    left = [
        tmp_path / f".out.partial-{token}",
        tmp_path / "out" / f".perta.json.partial-{token}",
        tmp_path / f".people.partial-{token}",
    ]
    for folder in left:
        folder.mkdir()
    unlearn(config)
    write_people(people)
    assert not any(folder.exists() for folder in left)


def test_a_number_that_no_record_holds_is_refused(world: World, tmp_path: Path) -> None:
    tune = replace(TUNE, seed=1 << 70)
    given = FinetuneConfig(
        base=str(world.base), data=str(world.forget), output=tmp_path / "out", tune=tune
    )
    with pytest.raises(ConfigError, match="--seed is 1180591620717411303424"):
        finetune_checkpoint(given)
    with pytest.raises(ConfigError, match="--people-seed is"):
        write_people(PeopleConfig(output=tmp_path / "out", people_seed=-(1 << 63)))
    assert not list(tmp_path.iterdir())
