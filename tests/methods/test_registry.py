"""Methods of a user's own: in a file, in an installed package, as objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import TUNE, World
from perta.cli import main
from perta.methods import registry
from perta.methods.diagonal import Fisher
from perta.methods.method import KNOWN, Edit, Method
from perta.methods.registry import find, get_method, known, load_methods
from perta.options import ScoringConfig, TrainSettings, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.settings import TrainConfig
from perta.stages.train import train_checkpoint
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest

PART = """
from torch import Tensor
from perta.methods.method import Block, Weighting, option


class Part(Weighting):
    name = "part"
    summary = "one part of the task vector"
    done = "A part of it was taken off."
    formula = "W = part"
    source = "this file"
    part: float = option(default=0.5, help="the part", within="[0, 1]")

    def weigh(self, block: Block) -> float:
        return self.part
"""
PULL = """
from torch import Tensor
from perta.methods.objectives import Scene, Training, answer_losses
from perta.methods.method import option


class Pull(Training):
    name = "pull"
    summary = "ascent by half"
    done = "It was trained further."
    formula = "-pull l_f + l_r"
    source = "this file"
    retain = "nll"
    epochs = 2
    pull: float = option(default=1.0, help="strength of the ascent", within="(0, inf)")

    def forget(self, scene: Scene) -> Tensor:
        return -self.pull * answer_losses(scene.answers, scene.examples)
"""


@pytest.fixture(autouse=True)
def _methods_as_before() -> Iterator[None]:
    before = dict(KNOWN)
    yield
    KNOWN.clear()
    KNOWN.update(before)


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text, "utf-8")
    return file


def perta(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["perta", *map(str, words)])
    main()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: v.double() for name, v in load_file(folder / "model.safetensors").items()}


def test_a_weighting_is_one_file_and_its_changed_code_edits_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine, output = written(tmp_path, PART), tmp_path / "out"
    words = (
        *("unlearn", "--method-file", mine, "--method", "part:part=0.25", "--alpha", "2"),
        *("--base", world.base, "--full", world.full, "--forget", world.forget),
        *("--output", output, "--epochs", "2", "--learning-rate", "5e-3", "--no-evaluate"),
    )

    def expected(share: float) -> dict[str, torch.Tensor]:
        tuned = tensors(tmp_path / "out.work" / "forget_checkpoint")
        full, base = tensors(world.full), tensors(world.base)
        return {name: full[name] - 2 * share * (tuned[name] - base[name]) for name in full}

    perta(monkeypatch, *words)
    found, wanted = tensors(output), expected(0.25)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
    record = read_manifest(output)
    assert record is not None
    assert record["settings"]["method_settings"] == {"part": 0.25}
    assert "A part of it" in (output / "README.md").read_text("utf-8")
    capsys.readouterr()
    perta(monkeypatch, *words)
    assert "up to date, reused" in capsys.readouterr().err
    mine.write_text(PART.replace("return self.part", "return self.part**2"), "utf-8")
    with pytest.raises(SystemExit):
        perta(monkeypatch, *words)
    assert "made with other method_code" in capsys.readouterr().err
    perta(monkeypatch, *words, "--overwrite")
    found, again = tensors(output), expected(0.0625)
    for name in again:
        torch.testing.assert_close(found[name], again[name], rtol=0, atol=1e-6)
    assert any((again[name] - wanted[name]).abs().max() > 1e-3 for name in again)


def test_a_training_method_is_one_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = written(tmp_path, PULL)
    shared = ("--full", world.full, "--forget", world.forget, "--retain", world.retain)
    loop = ("--unlearn-batch-size", "2", "--unlearn-learning-rate", "1e-3")
    perta(
        monkeypatch, "train", "--method", "pull:pull=0.5", "--method-file", mine,
        *shared, *loop, "--output", tmp_path / "own",
    )  # fmt: skip
    record = read_manifest(tmp_path / "own")
    assert record is not None
    assert (record["settings"]["method"], record["settings"]["unlearn_epochs"]) == ("pull", 2)
    assert len(record["settings"]["method_code"]) == 1
    same = TrainConfig(
        method="graddiff:forget_weight=0.5",
        full=str(world.full), forget=str(world.forget), retain=str(world.retain),
        output=tmp_path / "ours",
        training=TrainSettings(epochs=2, batch_size=2, learning_rate=1e-3),
    )  # fmt: skip
    assert fingerprint(train_checkpoint(same)) == fingerprint(tmp_path / "own")


def test_a_method_of_a_file_is_listed_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine = written(tmp_path, PART)
    perta(monkeypatch, "methods", "--method-file", mine, "part")
    assert "part = 0.5, in [0, 1]" in capsys.readouterr().out
    perta(monkeypatch, "methods", "--json", "--method-file", mine)
    assert json.loads(capsys.readouterr().out)["part"]["settings"][0]["help"] == "the part"


def test_a_yaml_file_names_a_method_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    mine, run = written(tmp_path, PART), tmp_path / "run.yaml"
    for named in (str(mine), [str(mine)]):
        KNOWN.pop("part", None)
        run.write_text(json.dumps({"method-file": named}), "utf-8")
        perta(monkeypatch, "methods", "part:part=0.1", "--config", run)
        assert "one part of the task vector" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "There is no Python file"),
        (PART + "\n1 / 0", "mine.py cannot be run: ZeroDivisionError"),
        (PART + "\nraise SystemExit(0)", "mine.py cannot be run: SystemExit"),
        (PART + "\n(", "mine.py cannot be run: SyntaxError"),
        ("x = 1", "defines no method"),
        (PART.replace('    name = "part"\n', ""), "defines no method"),
        (PART.replace('name = "part"', 'name = "tv"'), "There is a method `tv` already"),
        (PART.replace("    done =", "    told ="), "The method `part` lacks done"),
        (PART.replace("    summary =", "    told ="), "The method `part` lacks summary"),
        (PART.replace("def weigh(", "def wiegh("), "The method `part` lacks weigh"),
        (
            PART.replace("    part: float = option", "    part: float = 0.5  # "),
            "says nothing of itself",
        ),
    ],
)
def test_a_file_that_fails_leaves_no_method_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str | None, said: str
) -> None:
    before = dict(KNOWN)
    mine = tmp_path / "mine.py" if text is None else written(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        perta(monkeypatch, "methods", "--method-file", mine)
    assert end.value.code == 1
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error
    assert before == KNOWN


def test_an_installed_package_offers_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    site = tmp_path / "site"
    for name, text in (("good", PART), ("broken", PULL + "\n1 / 0")):
        info = site / f"{name}_methods-1.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}_methods.py").write_text(text, "utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-methods\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[perta.methods]\n{name} = {name}_methods\n")
    monkeypatch.syspath_prepend(site)
    registry._load_installed.cache_clear()
    try:
        assert find("part", Edit).name == "part"
        assert "part" in known(Method)
        assert "pull" not in known(Method)
        assert "broken_methods are left out" in capsys.readouterr().err
        # The hash of its file is in records, so a new version edits again.
        assert len(get_method("part").record()["method_code"]) == 1
    finally:
        registry._load_installed.cache_clear()
        for name in ("good_methods", "broken_methods"):
            sys.modules.pop(name, None)


def test_methods_are_given_as_objects(world: World, tmp_path: Path) -> None:
    load_methods(written(tmp_path, PART))
    part: type[Any] = KNOWN["part"]
    config = UnlearnConfig(
        base=str(world.base), full=str(world.full), forget=str(world.forget),
        output=tmp_path / "one", tune=replace(TUNE, epochs=2), evaluate=False,
        scoring=ScoringConfig(), weighting=WeightingConfig(method=part(part=0.25)),
    )  # fmt: skip
    assert config.weighting.method == "part:part=0.25"
    one = unlearn(config)
    other = unlearn(config, method=part(part=0.25), output=tmp_path / "other")
    assert fingerprint(one.folder) == fingerprint(other.folder)
    assert WeightingConfig(method=Fisher(rho=5)).method == "perta-fisher:rho=5.0"
