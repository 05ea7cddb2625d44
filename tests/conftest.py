"""A tiny base model and a tiny benchmark, made once for all tests that need files."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch counts GPUs; what tests start inherits it

import pytest
import torch

from perta.data.examples import load_examples
from perta.data.tokens import encode_examples
from perta.engine.train.unlearn import unlearn_by_training
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.load import load_model, load_tokenizer
from perta.options import ComputeConfig, DataConfig, TrainSettings, TuneConfig
from perta.recipes.settings import UnlearnConfig
from perta.stages.bench import write_people
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig, PeopleConfig

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
torch.cpu._is_amx_tile_supported = lambda: False  # the suite's bits depend on no processor
os.fsync = lambda fd: None  # noqa: ARG005 - nothing here outlives the machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs aside ignores it
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

TUNE = TuneConfig(epochs=30, learning_rate=5e-3, batch_size=2)


@dataclass(frozen=True)
class World:
    """Folders of a small world: people, a base model, and the base tuned on all people."""

    base: Path
    full: Path
    forget: Path
    retain: Path

    def request(self, output: Path, **settings: Any) -> UnlearnConfig:
        """A request to unlearn; the tuning is that of the world."""
        given = {"tune": TUNE, **{name: str(place) for name, place in vars(self).items()}}
        return UnlearnConfig(output=output, **{**given, **settings})


@pytest.fixture(scope="session", autouse=True)
def _config_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four people, one of them to be forgotten."""
    return make_world(tmp_path_factory.mktemp("world"), people=4, forget_people=1)


def make_world(root: Path, people: int, forget_people: int, blocks: int = 2) -> World:
    """A world of so many people, two questions each, and a model of so many blocks."""
    data = root / "data"
    write_people(PeopleConfig(output=data, people=people, questions=2, forget_people=forget_people))
    rows = load_examples(root / "data" / "full.jsonl")
    texts = [text for e in rows.examples for text in (e.prompt, e.answer)]
    base = root / "base"
    base.mkdir()
    write_tiny_checkpoint(base, [*texts, DataConfig().system_prompt], blocks=blocks)
    full = finetune_checkpoint(
        FinetuneConfig(
            base=str(base), data=str(root / "data" / "full.jsonl"), output=root / "full", tune=TUNE
        )
    )
    return World(base, full, root / "data" / "forget.jsonl", root / "data" / "retain.jsonl")


@pytest.fixture(scope="session")
def adapter(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny base, tuned on all people."""
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer(world.base)
    rows = [
        e
        for source in (world.forget, world.retain)
        for e in encode_examples(load_examples(source), tokenizer, DataConfig()).encoded
    ]
    torch.manual_seed(0)
    model: Any = get_peft_model(
        load_model(world.base, ComputeConfig()),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    settings = TrainSettings(epochs=10, learning_rate=2e-2, accumulation=1)
    unlearn_by_training(model, (), rows, settings, method="retain-finetune", pad=0)
    # Training frees all weights at its end; only the adapter is saved.
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(world.base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
