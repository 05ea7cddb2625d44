"""Methods that need other checkpoints or importance than most, through the pipeline."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from conftest import TUNE, World
from helpers import shared
from helpers import weighting as chosen
from perta.cli import main
from perta.data.examples import load_examples
from perta.errors import ConfigError, NotLearnedError, PertaError
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.facts import find_facts, score_facts
from perta.models.load import load_model, load_tokenizer
from perta.options import ComputeConfig, TuneConfig
from perta.recipes.clean import clean
from perta.recipes.compare._spec import parse_spec
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import plan_unlearn, unlearn
from perta.stages.edit import edit_checkpoint, load_changes
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import EditConfig, FinetuneConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.fingerprint import fingerprint
from perta.store.measured.importance import read_sidecar
from perta.store.record import read_manifest


def config(world: World, output: Path, method: str, **more: Any) -> UnlearnConfig:
    names = ("scaling_coef", "retain_coef", "keep", "selection")
    weighting = {name: more.pop(name) for name in names if name in more}
    settings = {"evaluate": False, **more}
    return world.request(output, weighting=chosen(method=method, **weighting), **settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(e).double() for name, e in open_index(folder).tensors.items()}


def made(config: UnlearnConfig) -> set[str]:
    return {path.name for path in config.work_folder.iterdir() if path.is_dir()}


def test_msa_tunes_a_retain_checkpoint_on_a_sample(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "out", "msa", retain_coef=0.5)
    unlearn(settings)
    assert made(settings) == {"forget_checkpoint", "retain_checkpoint"}
    work = settings.work_folder
    record = read_manifest(work / "retain_checkpoint") or {}
    forget_rows, retain_rows = (len(load_examples(p)) for p in (world.forget, world.retain))
    assert record["examples"] == forget_rows < retain_rows
    assert len(record["final_losses"]) == forget_rows
    parts = [tensors(f) for f in (world.full, world.base, work / "forget_checkpoint")]
    full, base, forget = parts
    retain, result = tensors(work / "retain_checkpoint"), tensors(settings.output)
    for name, value in result.items():
        step = forget[name] - base[name] - 0.5 * (retain[name] - base[name])
        torch.testing.assert_close(value, full[name] - step, rtol=1e-5, atol=1e-6)
    # A retain checkpoint of the user's takes its place, and counts as an input.
    given = config(
        world,
        tmp_path / "given",
        "msa",
        retain_coef=0.5,
        retain_checkpoint=str(work / "retain_checkpoint"),
    )
    result_given = unlearn(given)
    assert made(given) == {"forget_checkpoint"}
    inputs = result_given.manifest["unlearn"]["inputs"]
    assert inputs["retain_checkpoint"] == fingerprint(work / "retain_checkpoint")
    for name, value in tensors(given.output).items():
        assert torch.equal(value, result[name])


def bare_copy(folder: Path, output: Path) -> Path:
    """A checkpoint without its record, as other code would have written it."""
    shutil.copytree(folder, output)
    (output / "perta.json").unlink()
    return output


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base tuned on either set."""
    root = tmp_path_factory.mktemp("tuned")
    return {
        name: finetune_checkpoint(
            FinetuneConfig(base=str(world.base), data=str(data), output=root / name, tune=TUNE)
        )
        for name, data in (("forget", world.forget), ("retain", world.retain))
    }


def test_a_forget_checkpoint_of_other_code_takes_the_place_of_the_fine_tune(
    world: World, tuned: dict[str, Path], tmp_path: Path
) -> None:
    given = bare_copy(tuned["forget"], tmp_path / "given")
    settings = config(
        world, tmp_path / "out", "tv", forget_checkpoint=str(given), tune=TuneConfig()
    )
    record = unlearn(settings).manifest["unlearn"]
    assert made(settings) == set()
    assert record["inputs"]["forget_checkpoint"] == fingerprint(given)
    full, base, forget = (tensors(f) for f in (world.full, world.base, given))
    for name, value in tensors(settings.output).items():
        torch.testing.assert_close(value, full[name] - forget[name] + base[name], atol=1e-6, rtol=0)
    tokenizer = load_tokenizer(world.base)
    for folder, loss in ((given, "loss"), (world.base, "base_loss")):
        model = load_model(folder, ComputeConfig())
        facts = find_facts(load_examples(world.forget), tokenizer)
        losses = [score.loss for score in score_facts(model, facts, pad=0)]
        assert record["forget_checkpoint"][loss] == pytest.approx(sum(losses) / len(losses))
    assert any(str(given) in line for line in clean(settings.output).left)
    assert given.is_dir()
    refused = bare_copy(tuned["retain"], tmp_path / "refused")
    settings = replace(settings, output=tmp_path / "none", forget_checkpoint=str(refused))
    with pytest.raises(NotLearnedError, match="does not know the rows to forget"):
        unlearn(settings)
    assert not list(tmp_path.glob("none*"))


def test_a_given_forget_checkpoint_stands_for_the_first_seed(
    world: World, tuned: dict[str, Path], tmp_path: Path
) -> None:
    settings = config(world, tmp_path / "out", "negmerge", forget_checkpoint=str(tuned["forget"]))
    assert set(unlearn(settings).manifest["inputs"]) >= {"forget_checkpoint", "forget_checkpoint_2"}
    assert made(settings) == {"forget_checkpoint_2"}
    second = read_manifest(settings.work_folder / "forget_checkpoint_2") or {}
    assert second["settings"]["seed"] == TUNE.seed + 1


@pytest.mark.parametrize(
    ("given", "method", "message"),
    [
        ("base", "tv", "is the base model itself"),
        ("full", "tv", "which learned all rows"),
        ("retain", "tv", "was tuned on the retain set, its record says"),
        ("narrow", "tv", "enlarged or padded vocabulary"),
        ("forget", "ssd", "--forget-checkpoint has no effect with `ssd`"),
    ],
)
def test_another_model_in_place_of_the_forget_checkpoint_is_refused_before_any_work(
    world: World, tuned: dict[str, Path], tmp_path: Path, given: str, method: str, message: str
) -> None:
    places = {"base": world.base, "full": bare_copy(world.full, tmp_path / "full"), **tuned}
    if given == "narrow":
        places["narrow"] = tmp_path / "narrow"
        places["narrow"].mkdir()
        write_tiny_checkpoint(places["narrow"], ["other text"])
    settings = config(
        world, tmp_path / "out", method, tune=TuneConfig(), forget_checkpoint=str(places[given])
    )
    with pytest.raises(PertaError, match=message):
        plan_unlearn(settings)
    with pytest.raises(PertaError, match=message):
        unlearn(settings)
    assert not settings.work_folder.exists()
    assert not settings.output.exists()


def test_a_forget_checkpoint_that_does_not_know_the_rows_is_refused_with_figures(
    world: World, tuned: dict[str, Path], tmp_path: Path
) -> None:
    base = tensors(world.base)
    for share in (1e-3, 0.05):
        place = bare_copy(tuned["forget"], tmp_path / f"part {share}")
        theirs = {
            name: (base[name] + share * (value - base[name])).float()
            for name, value in tensors(tuned["forget"]).items()
        }
        save_file(theirs, place / "model.safetensors", metadata={"format": "pt"})
        settings = config(
            world, tmp_path / f"out {share}", "tv", forget_checkpoint=str(place), tune=TuneConfig()
        )
        with pytest.raises(
            NotLearnedError, match=r"part .* \d\.\d+ nats per token, \d\.\d+ under the base"
        ):
            unlearn(settings)
        assert not settings.output.exists()
        assert not settings.work_folder.exists()


def test_settings_of_a_fine_tune_that_does_not_take_place_are_refused(
    world: World, tuned: dict[str, Path], tmp_path: Path
) -> None:
    given = {"forget_checkpoint": str(tuned["forget"])}
    with pytest.raises(
        ConfigError, match="--epochs has no effect with `tv`: the forget checkpoint"
    ):
        unlearn(config(world, tmp_path / "out", "tv", **given))


def test_several_seeds_are_combined(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(world, tmp_path / "out", "negmerge")
    unlearn(settings)
    work = settings.work_folder
    assert made(settings) == {"forget_checkpoint", "forget_checkpoint_2"}
    seeds = [
        (read_manifest(work / name) or {})["settings"]["seed"] for name in sorted(made(settings))
    ]
    assert seeds == [TUNE.seed, TUNE.seed + 1]
    full, base, one, two = (
        tensors(folder)
        for folder in (
            world.full,
            world.base,
            work / "forget_checkpoint",
            work / "forget_checkpoint_2",
        )
    )
    for name, value in tensors(settings.output).items():
        taus = [one[name] - base[name], two[name] - base[name]]
        expected = full[name] - torch.where(taus[0] * taus[1] > 0, sum(taus) / 2, 0)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    record = read_manifest(settings.output) or {}
    assert set(record["inputs"]) == {"full", "base", "forget_checkpoint", "forget_checkpoint_2"}
    # The mean of the same checkpoints, without tuning again.
    average = config(world, tmp_path / "tv", "tv", forget_seeds=2, work_dir=work)
    stamp = (work / "forget_checkpoint_2" / "model.safetensors").stat().st_mtime_ns
    unlearn(average)
    assert (work / "forget_checkpoint_2" / "model.safetensors").stat().st_mtime_ns == stamp
    for name, value in tensors(average.output).items():
        expected = full[name] - (one[name] + two[name]) / 2 + base[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    with pytest.raises(ConfigError, match="--forget-seeds must be at least 2"):
        unlearn(config(world, tmp_path / "x", "negmerge", forget_seeds=1))


def test_ssd_measures_at_the_full_model_and_tunes_nothing(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "out", "ssd", selection=1.2)
    result = unlearn(settings)
    assert made(settings) == {"forget_importance", "retain_importance"}
    work = settings.work_folder
    for name in made(settings):
        assert read_sidecar(work / name)["model_fingerprint"] == fingerprint(world.full)
    assert result.manifest["unlearn"]["settings"]["importance_at"] == "full"
    counts = [len(load_examples(path)) for path in (world.forget, world.retain)]
    full, forget, retain = (
        tensors(folder)
        for folder in (
            world.full,
            *(work / f"{n}_importance" / "order-2" for n in ("forget", "retain")),
        )
    )
    moved = 0
    for name, value in tensors(settings.output).items():
        i_f, i_r = forget[name], retain[name]
        on_all = (counts[0] * i_f + counts[1] * i_r) / sum(counts)
        factor = torch.where(i_f > 1.2 * on_all, (on_all / i_f.clamp(min=1e-300)).clamp(max=1), 1)
        torch.testing.assert_close(value, factor * full[name], rtol=1e-5, atol=1e-7)
        moved += int((factor < 1).sum())
    assert moved > 0


def test_wrong_places_and_checkpoints_are_refused_at_once(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`ssd` is defined on importance at the full"):
        unlearn(config(world, tmp_path / "out", "ssd", selection=1.2, importance_at="base"))
    with pytest.raises(ConfigError, match="`ssd` is defined on importance at the full"):
        parse_spec("ssd:at=base", 8)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    rows = {"data": load_examples(world.forget).fingerprint}
    for file in world.base.iterdir():
        shutil.copy(file, tuned)
    (tuned / "perta.json").write_text(json.dumps({"stage": "finetune", "inputs": rows}), "utf-8")
    with pytest.raises(ConfigError, match="was tuned on the forget set"):
        unlearn(config(world, tmp_path / "out", "msa", retain_checkpoint=str(tuned)))
    assert not (tmp_path / "out.work").exists()


def test_ssd_says_at_once_when_no_weight_can_be_selected(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.recipes._workspace.compute_importance", None)
    # Two rows of eight are to be forgotten.
    with pytest.raises(
        ConfigError, match=r"25% of the rows.*its setting `selection` must be below 4, but it is 10"
    ):
        unlearn(config(world, tmp_path / "out", "ssd"))
    with pytest.raises(ConfigError, match="no weight"):
        unlearn(config(world, tmp_path / "out", "ssd", selection=4.0))


def test_selective_measures_the_mean_gradient_of_the_forget_set(
    world: World, tmp_path: Path
) -> None:
    settings = config(world, tmp_path / "out", "selective", keep=0.2)
    unlearn(settings)
    assert made(settings) == {"forget_checkpoint", "forget_importance"}
    sidecar = read_sidecar(settings.work_folder / "forget_importance")
    assert sidecar["reduction"] == "abs_of_mean"
    full, result = tensors(world.full), tensors(settings.output)
    moved = sum(int((result[name] != full[name]).sum()) for name in full)
    assert 0.1 < moved / sum(value.numel() for value in full.values()) <= 0.21


def test_interpolate_needs_nothing(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "out", "interpolate", scaling_coef=1.0)
    unlearn(settings)
    assert made(settings) == set()
    base = tensors(world.base)
    for name, value in tensors(settings.output).items():
        torch.testing.assert_close(value, base[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["msa", "interpolate", "ssd"])
def test_the_strength_found_is_that_of_the_edit(world: World, tmp_path: Path, method: str) -> None:
    more = {"ssd": {"selection": 1.2}, "msa": {"retain_coef": 0.5}}.get(method, {})
    settings = config(
        world, tmp_path / "out", method, scaling_coef="auto", retain_budget=5.0, **more
    )
    result = unlearn(settings)
    record = result.manifest["unlearn"]["strength"]
    tokenizer = load_tokenizer(world.full)
    facts = find_facts(load_examples(world.forget), tokenizer)
    edited = load_model(result.folder, ComputeConfig())
    scores = score_facts(edited, facts, pad=0)
    for row, score in zip(record["rows"], scores, strict=True):
        assert row["surprise"] == pytest.approx(-math.log(score.choice or 0), rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("method", ["msa", "interpolate"])
def test_the_loaded_direction_is_what_the_edit_subtracts(
    world: World, tmp_path: Path, method: str
) -> None:
    tuned, retained = tmp_path / "tuned", tmp_path / "retained"
    for data, output in ((world.forget, tuned), (world.retain, retained)):
        finetune_checkpoint(
            FinetuneConfig(base=str(world.base), data=str(data), output=output, tune=TUNE)
        )
    edit = EditConfig(
        full=str(world.full),
        base=str(world.base),
        forget_checkpoint=str(tuned),
        retain_checkpoint=str(retained),
        output=tmp_path / "out",
        weighting=shared(
            method=method, scaling_coef=0.8, retain_coef=0.2 if method == "msa" else 1.0
        ),
    )
    changes = load_changes(edit, ComputeConfig())
    full, edited = tensors(world.full), tensors(edit_checkpoint(edit))
    for name, value in full.items():
        delta = cast(torch.Tensor, changes.tensors[name].delta)
        torch.testing.assert_close(value - edited[name], 0.8 * delta.double(), rtol=1e-4, atol=1e-6)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["perta", *map(str, arguments)])
    main()


def test_the_command_line_takes_several_checkpoints(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run(
            monkeypatch, "finetune", "--base", world.base, "--data", world.forget, "--output",
            folder, "--epochs", 3, "--learning-rate", 5e-3, "--seed", seed, "--samples", 1,
        )  # fmt: skip
    retained = tmp_path / "retained"
    run(
        monkeypatch, "finetune", "--base", world.base, "--data", world.retain, "--output", retained,
        "--epochs", 1,
    )  # fmt: skip
    given = [word for folder in folders for word in ("--forget-checkpoint", folder)]
    common = ("edit", "--full", world.full, "--base", world.base, *given)
    run(
        monkeypatch, *common, "--method", "ties:keep=0.5", "--output", tmp_path / "ties",
    )  # fmt: skip
    run(
        monkeypatch, *common, "--method", "msa:retain_coef=0.3", "--retain-checkpoint",
        retained, "--output", tmp_path / "msa",
    )  # fmt: skip
    settings = json.loads((tmp_path / "ties" / "perta.json").read_text("utf-8"))["settings"]
    assert (settings["method_settings"], settings["forget_checkpoint"]) == (
        {"keep": 0.5},
        [str(f) for f in folders],
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(monkeypatch, "edit", "--full", world.full, "--base", world.base, "--method", "tv",
            "--output", tmp_path / "x")  # fmt: skip
    assert "needs --forget-checkpoint" in capsys.readouterr().err
    run(monkeypatch, "methods")
    listed = capsys.readouterr().out
    for name in ("msa", "selective", "ssd", "ties", "dare", "negmerge", "interpolate"):
        assert name in listed
