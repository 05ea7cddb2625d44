"""When a model is divided; what comes of it is in test_parallel.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import TUNE, World
from helpers import tiny_llama
from perta.data.batch import Encoded
from perta.engine.shard import is_sharded
from perta.engine.train.optimizer import Resume
from perta.engine.train.tune import tune
from perta.errors import ConfigError
from perta.options import ComputeConfig, TuneConfig
from perta.recipes.unlearn import unlearn
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import (
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    MomentsConfig,
)
from perta.stages.stage import loaded


@pytest.mark.parametrize(
    ("gigabytes", "each", "sharded"),
    [(80, 16, False), (24, 16, True), (24, 4, False), (4, 4, True)],
)
def test_a_model_is_divided_where_a_gpu_is_too_small(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, each: int, sharded: bool
) -> None:
    gpu, taken = torch.device("cuda"), each * 1_240_000_000
    memory = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert not is_sharded(True, gpu, taken)
    monkeypatch.setattr("perta.engine.shard.helpers", lambda: 1)
    assert is_sharded(None, gpu, taken) == sharded
    assert is_sharded(True, gpu, taken)
    assert not is_sharded(False, gpu, taken)
    assert not is_sharded(None, torch.device("cpu"), taken)


def test_one_process_has_nobody_to_share_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = replace(TUNE, shard=True)
    given = FinetuneConfig(
        base=str(world.base), data=str(world.forget), output=tmp_path / "out", tune=tuning
    )
    request = world.request(tmp_path / "clean", tune=tuning)
    common: dict[str, Any] = {"data": str(world.forget), "output": tmp_path / "out", "shard": True}
    stages: list[Callable[[], object]] = [
        lambda: finetune_checkpoint(given),
        lambda: compute_importance(ImportanceConfig(checkpoint=str(world.base), **common)),
        lambda: compute_moments(MomentsConfig(checkpoint=str(world.base), **common)),
        lambda: evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=str(world.base),
                forget=str(world.forget),
                output=tmp_path / "out.json",
                shard=True,
            )
        ),
    ]
    for stage in stages:
        with pytest.raises(ConfigError, match=r"--shard divides .*torchrun"):
            stage()
    monkeypatch.delattr("perta.stages.finetune.check_shard")  # long before that
    with pytest.raises(ConfigError, match=r"--shard divides .*torchrun"):
        unlearn(request)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("beside", [None, 4])
def test_a_model_in_parts_was_on_no_gpu_as_a_whole(
    world: World, monkeypatch: pytest.MonkeyPatch, beside: int | None
) -> None:
    @contextmanager
    def in_parts(load: Callable[[], Any], device: torch.device) -> Iterator[Any]:
        assert device.type == "meta"
        yield load()

    for module in ("models.load", "stages.stage"):
        monkeypatch.setattr(f"perta.{module}.pick_device", lambda _: torch.device("meta"))
    monkeypatch.setattr("perta.engine.shard.helpers", lambda: 1)
    monkeypatch.setattr("perta.stages.stage.in_parts", in_parts)
    with loaded(world.base, ComputeConfig(dtype="float32"), True, beside) as model:
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert {p.requires_grad for p in model.parameters()} == {beside is not None}


def test_the_state_of_a_divided_model_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("perta.engine.shard.helpers", lambda: 1)
    config, rows = TuneConfig(shard=True), [Encoded((3, 4), (3, 4), 1)]
    with pytest.raises(ConfigError, match="--save-every"):
        tune(tiny_llama(), rows, config, pad=0, resume=Resume(tmp_path / "place", "key", 1))
