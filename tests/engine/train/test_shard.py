"""When a model in training is divided; what comes of it is in test_parallel.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import TUNE, World
from helpers import tiny_llama
from perta.data.batch import Encoded
from perta.engine.train.optimizer import Resume
from perta.engine.train.shard import is_sharded
from perta.engine.train.tune import tune
from perta.errors import ConfigError
from perta.options import TuneConfig
from perta.recipes.unlearn import unlearn
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig


@pytest.mark.parametrize(
    ("gigabytes", "tunes_adapter", "sharded"),
    [(80, False, False), (24, False, True), (24, True, False), (4, True, True)],
)
def test_a_model_is_divided_where_a_gpu_is_too_small(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, tunes_adapter: bool, sharded: bool
) -> None:
    weights = [SimpleNamespace(nbytes=4 * 1_240_000_000)]
    model: Any = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: weights)
    memory = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert not is_sharded(True, model, tunes_adapter)
    monkeypatch.setattr("perta.engine.train.shard.helpers", lambda: 1)
    assert is_sharded(None, model, tunes_adapter) == sharded
    assert is_sharded(True, model, tunes_adapter)
    assert not is_sharded(False, model, tunes_adapter)
    assert not is_sharded(None, tiny_llama(), tunes_adapter)


def test_one_process_has_nobody_to_share_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = replace(TUNE, shard=True)
    given = FinetuneConfig(
        base=str(world.base), data=str(world.forget), output=tmp_path / "out", tune=tuning
    )
    request = world.request(tmp_path / "clean", tune=tuning)
    with pytest.raises(ConfigError, match=r"--shard divides .*torchrun"):
        finetune_checkpoint(given)
    monkeypatch.delattr("perta.stages.finetune.check_shard")  # long before that
    with pytest.raises(ConfigError, match=r"--shard divides .*torchrun"):
        unlearn(request)
    assert not [*tmp_path.iterdir()]


def test_the_state_of_a_divided_model_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("perta.engine.train.shard.helpers", lambda: 1)
    config, rows = TuneConfig(shard=True), [Encoded((3, 4), (3, 4), 1)]
    with pytest.raises(ConfigError, match="--save-every"):
        tune(tiny_llama(), rows, config, pad=0, resume=Resume(tmp_path / "place", "key", 1))
