"""Damaged and hostile files: what is read is used rightly, or is one error of this package.

Each target takes a sound file or folder apart, changes it, and reads it as a user would. A short
run is part of the tests; `make faults` runs many thousands, `PERTA_FUZZ_CASES` says how many.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from conftest import World
from perta.cli import main
from perta.engine.edit.plan import plan_edit
from perta.errors import PertaError
from perta.models.load import load_model, longest_input
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, WeightingConfig
from perta.progress import set_quiet
from perta.report.collect import collect
from perta.report.settings import ReportConfig
from perta.report.write import write_report
from perta.stages.importance import compute_importance
from perta.stages.moments import compute_moments
from perta.stages.settings import ImportanceConfig, MomentsConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.measured.importance import order_folder, read_sidecar
from perta.store.measured.moments import open_moments
from perta.store.record import read_manifest

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("models/formats", "report")]
from report_cases import write_demo  # noqa: E402
from test_gguf import write_gguf  # noqa: E402

CASES = int(os.environ.get("PERTA_FUZZ_CASES", "25"))
IS_SHORT = "PERTA_FUZZ_CASES" not in os.environ
_LONGEST = 300
"""Seconds for one case of a long run."""
OUTCOMES: Counter[tuple[str, str]] = Counter()

# --- changes --------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**6, 2**31, 2**63, 2**64, 10**40, 0.5, -1e308, 1e999,
    float("nan"), "", "x", "\ud800", "\x1b[31m", "../x", "/etc/passwd", "NaN", "a" * 300, [], [1],
    [[]], {}, {"a": 1}, {"": None}, ["\u202e"], [None], {"agg_value": "x", "value_by_index": []},
)  # fmt: skip


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value of a JSON document; of long lists and objects to the first few."""
    yield path
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(parts)[:40]:
            yield from _paths(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> str:
    """A JSON document with a few values replaced, left out, or put under another name."""
    value = {"": deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_paths(value))[1:]))
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        how = draw(st.sampled_from(["replace", "replace", "delete", "rename", "swap"]))
        if how == "replace" or len(path) == 1:
            place[path[-1]] = deepcopy(draw(st.sampled_from(ODD)))
        elif how == "delete":
            del place[path[-1]]
        elif how == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(["", "x", "\ud800", "../x"]))] = place.pop(path[-1])
        else:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            place[path[-1]] = place[draw(st.sampled_from(list(keys)))]
        if not isinstance(value[""], (dict, list)):
            break
    return json.dumps(value[""])


@st.composite
def damaged(draw: st.DrawFn, content: bytes, first: int = 1 << 40) -> bytes:
    """Bytes cut off, overwritten, doubled or put in, at the beginning more often."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(len(data), first) - 1)))
        length = draw(st.integers(1, 16))
        new = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"[" * 5000, b"9" * 5000])))
        how = draw(st.sampled_from(["write", "write", "insert", "cut", "delete"]))
        if how == "write":
            data[at : at + len(new)] = new
        elif how == "insert":
            data[at:at] = new
        elif how == "delete":
            del data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def text_of(data: st.DataObject, file: Path) -> bytes:
    """A JSON file, changed as a document or as bytes."""
    content = file.read_bytes()
    if data.draw(st.booleans()):
        return data.draw(damaged(content))
    return data.draw(changed(json.loads(content))).encode()


# --- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """What targets take apart; all of it is read without an error as it is."""

    checkpoint: Path
    sharded: Path
    adapter: Path
    moments: Path
    importance: Path
    results: Path
    gguf: Path


@pytest.fixture(scope="module")
def sound(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sound]:
    root = tmp_path_factory.mktemp("sound")
    model: Any = load_model(world.base, ComputeConfig(device="cpu"))
    shutil.copytree(world.base, root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    write_gguf(world.base, root / "gguf.gguf")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(str(root / "adapter"))
    file = root / "adapter" / "adapter_config.json"
    named = {**json.loads(file.read_text()), "base_model_name_or_path": str(world.base)}
    file.write_text(json.dumps(named))
    given: dict[str, Any] = {"checkpoint": str(world.base), "data": str(world.retain)}
    moments = compute_moments(MomentsConfig(output=root / "moments", **given))
    importance = compute_importance(ImportanceConfig(output=root / "importance", **given))
    results = write_demo(root / "results")
    set_quiet(True)
    yield Sound(
        world.base, root / "sharded", root / "adapter", moments, importance, results,
        root / "gguf.gguf",
    )  # fmt: skip
    set_quiet(False)
    for (target, outcome), count in sorted(OUTCOMES.items()):
        sys.stderr.write(f"{target}: {count} {outcome}\n")


def header(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """A safetensors file; what is read is what the format's own library reads."""
    whole = (sound.checkpoint / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        text = data.draw(changed(json.loads(whole[8:end]))).encode()
        bytes_ = len(text).to_bytes(8, "little") + text + whole[end:]
    else:
        bytes_ = data.draw(damaged(whole, first=end))
    (folder / "model.safetensors").write_bytes(bytes_)
    index = open_index(folder)
    with safe_open(folder / "model.safetensors", "pt") as theirs:
        assert set(theirs.keys()) == set(index.tensors)
        for name, entry in index.tensors.items():
            mine, other = read_tensor(entry), theirs.get_tensor(name)
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            same = mine.contiguous().view(-1).view(torch.uint8)
            assert torch.equal(same, other.contiguous().view(-1).view(torch.uint8))


def index(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """The index of a checkpoint in several files."""
    shutil.copytree(sound.sharded, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors.index.json"
    file.write_bytes(text_of(data, file))
    whole = open_index(resolve_checkpoint(folder)).tensors
    assert whole.keys() == open_index(sound.sharded).tensors.keys()


def config(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """config.json; what loads has every stored value and no other."""
    shutil.copytree(sound.checkpoint, folder, dirs_exist_ok=True)
    file = folder / "config.json"
    file.write_bytes(text_of(data, file))
    used = resolve_checkpoint(folder)
    longest_input(used)
    model: Any = load_model(used, ComputeConfig(device="cpu"))
    held = open_index(used).tensors
    for name, value in model.state_dict().items():
        if name in held:
            assert torch.equal(value, read_tensor(held[name]).float())
    plan_edit(open_index(used), {}, WeightingConfig())


def adapter(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """The settings of an adapter."""
    shutil.copytree(sound.adapter, folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_bytes(text_of(data, file))
    open_index(resolve_checkpoint(folder / "adapter", base=sound.checkpoint))


def sidecar(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """What moments and importance say of themselves, and records."""
    source, name = data.draw(
        st.sampled_from(
            [(sound.moments, "moments.json"), (sound.importance, "importance.json"),
             (sound.moments, "perta.json")]
        )
    )  # fmt: skip
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(text_of(data, folder / name))
    record = read_manifest(folder) or {}
    assert isinstance(record.get("inputs", {}), dict)
    if source == sound.moments:
        opened = open_moments(folder)
        for weight in opened.facts["inputs"]:
            opened.is_measured(weight)
            opened.input_moment(weight)
    else:
        read_sidecar(folder)
        order_folder(folder, 1)


def report(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """Results and records that a report is made of."""
    shutil.copytree(sound.results, folder / "demo")
    file = data.draw(st.sampled_from(sorted((folder / "demo").rglob("*.json"))))
    file.write_bytes(text_of(data, file))
    collect([str(folder / "demo")])
    page = write_report(ReportConfig(results=(str(folder / "demo"),), output=folder / "r.html"))
    assert "\x1b" not in page.read_text("utf-8")


def yaml(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """Options from a file, through the command line."""
    options = {
        "checkpoint": str(folder / "absent"), "forget": "f.jsonl", "output": "x", "batch-size": 2,
        "max_new_tokens": 4, "device": "cpu",
    }  # fmt: skip
    text = data.draw(st.one_of(changed(options).map(str.encode), st.binary(max_size=40)))
    (folder / "o.yaml").write_bytes(text)
    before = sys.argv
    sys.argv = ["perta", "evaluate", "--config", str(folder / "o.yaml")]
    try:
        main()
    except SystemExit as end:
        raise PertaError(f"status {end.code}") from None
    finally:
        sys.argv = before


def gguf(data: st.DataObject, sound: Sound, folder: Path) -> None:
    """A GGUF file."""
    (folder / "m.gguf").write_bytes(data.draw(damaged(sound.gguf.read_bytes(), first=9000)))
    load_model(resolve_checkpoint(folder / "m.gguf"), ComputeConfig(device="cpu"))


@pytest.mark.parametrize(
    ("target", "share"),
    [
        (header, 1.0), (index, 1.0), (config, 1.0), (adapter, 0.4), (sidecar, 1.0), (report, 0.2),
        (yaml, 1.0), (gguf, 0.2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_is_damaged_is_used_rightly_or_refused(
    target: Callable[[st.DataObject, Sound, Path], None],
    share: float,
    sound: Sound,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @settings(
        max_examples=max(5, int(CASES * share)),
        deadline=None,
        derandomize=IS_SHORT,
        database=None,
        phases=(Phase.generate,) if IS_SHORT else (Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as place:
            monkeypatch.setenv("PERTA_CACHE", str(Path(place) / "cache"))
            folder = Path(place) / "case"
            folder.mkdir()
            if not IS_SHORT:
                # A case without end ends the run, and shows where it was.
                faulthandler.dump_traceback_later(_LONGEST, exit=True, file=2)
            try:
                target(data, sound, folder)
                outcome = "used"
            except PertaError:
                outcome = "refused"
            finally:
                faulthandler.cancel_dump_traceback_later()
            OUTCOMES[target.__name__, outcome] += 1
        assert "Traceback" not in capsys.readouterr().err

    run()
    assert sum(n for (name, _), n in OUTCOMES.items() if name == target.__name__) >= 5
