"""What lies in a model's folder is read and never run, and nobody is asked whether to."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from conftest import World
from perta.errors import CheckpointError
from perta.models.load import load_model, load_tokenizer, transposed_weights
from perta.models.trust import read_config
from perta.options import ComputeConfig

SOURCES = Path(__file__).parents[2] / "src" / "perta"


def _with_code(world: World, folder: Path) -> Path:
    """A checkpoint of a kind that transformers does not know, with code that leaves a mark."""
    shutil.copytree(world.base, folder)
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Mine:\n    pass\n"
    (folder / "mine.py").write_text(code, "utf-8")
    names = ("AutoConfig", "AutoModelForCausalLM")
    changes = {
        "config.json": {
            "model_type": "mine",
            "architectures": ["Mine"],
            "auto_map": dict.fromkeys(names, "mine.Mine"),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Mine",
            "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
        },
    }
    for name, change in changes.items():
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**content, **change}), "utf-8")
    return folder


def test_code_of_a_checkpoint_never_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _with_code(world, tmp_path / "model")
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(CheckpointError, match="code of its own"):
        load_model(folder, ComputeConfig())
    with pytest.raises(CheckpointError, match="code of its own"):
        load_tokenizer(folder)
    assert not transposed_weights(folder)
    assert answers.tell() == 0
    assert not (folder / "ran").exists()


def test_kernels_of_a_configuration_are_refused(world: World, tmp_path: Path) -> None:
    for inner in (True, False):
        folder = tmp_path / str(inner)
        folder.mkdir()
        named = {"attn_implementation": "someone/kernel"}
        (folder / "config.json").write_text(json.dumps({"text_config": named} if inner else named))
        with pytest.raises(CheckpointError, match="someone/kernel"):
            read_config(folder)


def test_every_loader_says_that_no_code_is_run() -> None:
    bare = []
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                spread = {ast.unparse(k.value) for k in node.keywords if k.arg is None}
                if node.func.attr in ("from_pretrained", "from_config") and (
                    owner.startswith("Auto") and not spread & {"LOCAL", "NO_CODE", "place"}
                ):
                    bare.append(f"{file.name}:{node.lineno}")
    assert not bare
