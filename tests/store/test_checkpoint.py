"""Headers, fingerprints, and writes that are all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perta.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    OutputExistsError,
)
from perta.store.atomic import atomic_file, atomic_folder
from perta.store.checkpoint import copy_companions, open_index, read_tensor, write_tensors
from perta.store.fingerprint import fingerprint
from perta.store.measured.importance import order_folder, read_sidecar

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 4).to(torch.bfloat16),
        "b": torch.tensor(3.0),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d": torch.tensor([True, False, True]),
        "e": torch.arange(5),
        "f": torch.randn(4, 6).T,
    }


def hand_made(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "checkpoint"
    result.mkdir()
    return result


@pytest.fixture
def sharded(folder: Path) -> Path:
    shards = {"model-00001-of-00002.safetensors": "abc", "model-00002-of-00002.safetensors": "def"}
    write_tensors(folder, some_tensors(), {k: list(v) for k, v in shards.items()})
    return folder


# --- reading


def test_reads_what_safetensors_writes(folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    index = open_index(folder)
    assert set(index.tensors) == set(tensors)
    assert index.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        stored = read_tensor(index.tensors[name])
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored, tensor)


def test_safetensors_reads_what_we_write(sharded: Path) -> None:
    expected = some_tensors()
    for shard, names in open_index(sharded).shards.items():
        loaded = load_file(sharded / shard)
        assert set(loaded) == set(names)
        for name in names:
            assert loaded[name].dtype == expected[name].dtype
            assert loaded[name].shape == expected[name].shape
        with safe_open(sharded / shard, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["e"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == 3 * 4 * 2 + 4 + 3 + 5 * 8 + 4 * 6 * 4


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {
        name: (torch.randn(shape) * 3).to(dtype) for name, (dtype, shape) in described.items()
    }
    write_tensors(folder, tensors)
    index = open_index(folder)
    assert set(index.tensors) == set(tensors)
    for name, tensor in tensors.items():
        stored = read_tensor(index.tensors[name])
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(stored, tensor)


def test_write_tensors_leaves_out_names_without_tensor(folder: Path) -> None:
    write_tensors(folder, {"a": torch.ones(2)}, {"one.safetensors": ["a", "x"], "two": ["y"]})
    assert open_index(folder).shards == {"one.safetensors": ("a",)}
    assert not (folder / "two").exists()
    with pytest.raises(ConfigError, match="b is in no shard"):
        write_tensors(folder, {"b": torch.ones(2)}, {"one.safetensors": ["a"]})


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere does not exist"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"has no model\.safetensors"):
        open_index(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        open_index(file)


@pytest.mark.parametrize("kept", [0, 4, 7, 20, 150, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    write_tensors(folder, some_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is truncated"):
        open_index(folder)


def test_file_longer_than_its_header_says(folder: Path) -> None:
    write_tensors(folder, some_tensors())
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CorruptCheckpointError, match="longer than its header says"):
        open_index(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "has 4"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, "damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "begins at"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "begins at",
        ),
        ({"a": {"dtype": "F32", "shape": [2]}}, "cannot be read"),
        ({"a": 3}, "cannot be read"),
        ([1], "not a JSON object"),
    ],
)
def test_contradictory_header(folder: Path, header: Any, message: str) -> None:
    hand_made(folder / "model.safetensors", header, bytes(8))
    with pytest.raises(CorruptCheckpointError, match=message):
        open_index(folder)


def test_unreadable_header(folder: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for text in (b"not json", f'{{"a":{entry},"a":{entry}}}'.encode(), b"\xff\xfe"):
        data = len(text).to_bytes(8, "little") + text
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(CorruptCheckpointError, match="header cannot be read"):
            open_index(folder)


def test_unknown_type(folder: Path) -> None:
    entry = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
    hand_made(folder / "model.safetensors", {"a": entry}, bytes(1))
    with pytest.raises(CheckpointError, match="a has type F4"):
        open_index(folder)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"names model-00002.*1 of 2"):
        open_index(sharded)


def test_index_names_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    edit_index(sharded, {"z": "model-00001-of-00002.safetensors"})
    with pytest.raises(CorruptCheckpointError, match="holds z, but it does not"):
        open_index(sharded)


def test_index_may_name_a_tied_head_that_no_shard_holds(sharded: Path) -> None:
    """Transformers loads such a checkpoint; whether the head is needed its configuration says."""
    before = open_index(sharded).tensors
    edit_index(sharded, {"lm_head.weight": "model-00001-of-00002.safetensors"})
    assert open_index(sharded).tensors == before


def test_shard_holds_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    edit_index(sharded, {"a": None})
    with pytest.raises(CorruptCheckpointError, match=r"holds a, which .* does not name"):
        open_index(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({name: torch.ones(2) for name in "abc"}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CorruptCheckpointError, match="a is in both"):
        open_index(sharded)


def test_index_must_be_an_index_of_its_own_folder(sharded: Path) -> None:
    edit_index(sharded, {"a": "../elsewhere.safetensors"})
    with pytest.raises(CorruptCheckpointError, match="outside its folder"):
        open_index(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CorruptCheckpointError, match="expected a JSON object"):
        open_index(sharded)


def edit_index(folder: Path, changes: dict[str, str | None]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name, shard in changes.items():
        if shard is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = shard
    file.write_text(json.dumps(index))


def test_checkpoints_of_two_runs_in_one_folder(sharded: Path) -> None:
    write_tensors(sharded, some_tensors())
    with pytest.raises(CorruptCheckpointError, match="checkpoints of two runs"):
        open_index(sharded)


def test_files_that_the_index_does_not_name_are_no_part_of_it(sharded: Path) -> None:
    save_file({"stale": torch.ones(1)}, sharded / "model-00001-of-00009.safetensors")
    assert set(open_index(sharded).tensors) == set("abcdef")


def test_single_file_with_an_index_of_itself(folder: Path) -> None:
    write_tensors(folder, {"a": torch.ones(1)})
    index = {"weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_index(folder).tensors) == {"a"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_loaded(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(CorruptCheckpointError, match=r"never loaded.*save_pretrained"):
        open_index(folder)


def test_safetensors_of_another_kind(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="adapter_model"):
        open_index(folder)


def test_file_shortened_after_its_header_was_read(folder: Path) -> None:
    write_tensors(folder, {"a": torch.ones(100)})
    entry = open_index(folder).tensors["a"]
    os.truncate(entry.file, entry.offset + 10)
    with pytest.raises(CorruptCheckpointError, match="ended while a was read"):
        read_tensor(entry)


# --- importance folders


def test_order_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="perta importance --order 1"):
        order_folder(tmp_path / "nowhere", 1.0)
    for order in ("1", "0.5"):
        (tmp_path / f"order-{order}").mkdir()
    assert order_folder(tmp_path, 1.0) == tmp_path / "order-1"
    assert order_folder(tmp_path, 0.5) == tmp_path / "order-0.5"
    with pytest.raises(ConfigError, match=r"no importance of order 2; it has 0\.5, 1.*--order 2"):
        order_folder(tmp_path, 2.0)


def test_read_sidecar(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not an importance folder"):
        read_sidecar(tmp_path)
    (tmp_path / "importance.json").write_text('{"orders": [1.0]}')
    assert read_sidecar(tmp_path) == {"orders": [1.0]}
    for text in ("{", "[]"):
        (tmp_path / "importance.json").write_text(text)
        with pytest.raises(CorruptCheckpointError):
            read_sidecar(tmp_path)


# --- fingerprints


def test_fingerprint_depends_on_content_not_on_place(sharded: Path, tmp_path: Path) -> None:
    (sharded / "config.json").write_text("{}")
    first = fingerprint(sharded)
    copy = shutil.copytree(sharded, tmp_path / "elsewhere")
    assert fingerprint(copy) == first
    for name in ("README.md", "perta.json", "trainer_state.json", "forget.jsonl"):
        (copy / name).write_text("x")
    assert fingerprint(copy) == first
    changes = [("config.json", b"{ }"), ("chat_template.jinja", b"x"), ("tokenizer.json", b"{}")]
    seen = {first}
    for name, content in changes:
        (copy / name).write_bytes(content)
        seen.add(fingerprint(copy))
    shard = copy / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    seen.add(fingerprint(copy))
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    seen.add(fingerprint(copy))
    assert len(seen) == 6


def test_fingerprint_is_what_b3sum_gives_of_its_own_list(tmp_path: Path) -> None:
    parts = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"no part"}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    counted = ("config.json", "model.safetensors")
    listed = "".join(f"{blake3(parts[name]).hexdigest()}  {name}\n" for name in counted)
    assert fingerprint(tmp_path) == blake3(listed.encode()).hexdigest()
    assert fingerprint(tmp_path / "config.json") == blake3(b"{}").hexdigest()


def test_fingerprint_of_importance_counts_every_order(tmp_path: Path) -> None:
    for order in ("order-1", "order-2"):
        (tmp_path / order).mkdir()
        write_tensors(tmp_path / order, {"a": torch.ones(1)})
    (tmp_path / "importance.json").write_text("{}")
    first = fingerprint(tmp_path)
    write_tensors(tmp_path / "order-2", {"a": torch.zeros(1)})
    assert fingerprint(tmp_path) != first


def test_fingerprint_reads_unchanged_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("abc")
    monkeypatch.setattr("perta.store.fingerprint._SETTLED", 0)
    known = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"  # BLAKE3
    assert fingerprint(file) == known
    monkeypatch.setattr("perta.store.fingerprint.blake3", None)
    assert fingerprint(file) == known
    monkeypatch.undo()
    status = file.stat()
    file.write_text("abd")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(file) != known


def test_a_file_hashed_right_after_its_change_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("abc")
    fingerprint(file)
    # Another change might leave no trace in its times.
    monkeypatch.setattr("perta.store.fingerprint.blake3", None)
    with pytest.raises(TypeError):
        fingerprint(file)


def test_fingerprint_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        fingerprint(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        fingerprint(tmp_path)


# --- writing


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_atomic_folder_appears_when_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with atomic_folder(output) as partial:
        (partial / "file").write_text("x")
        assert partial.parent.parent == output.parent
        assert partial.parent.name.startswith(".out.partial-")
        assert not output.exists()
    assert (output / "file").read_text() == "x"
    assert hidden(output.parent) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(overwrite: bool) -> None:
        with atomic_folder(tmp_path / "out", overwrite=overwrite) as partial:
            (partial / "file").write_text("new")
            raise error

    with pytest.raises(error):
        write(False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(error):
        write(True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert hidden(tmp_path) == []


def test_existing_output_stays_unless_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_folder(output):
        pass
    with atomic_folder(output, overwrite=True) as partial:
        (partial / "new").touch()
        assert (output / "old").exists()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert hidden(tmp_path) == []


def test_output_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def write() -> None:
        with atomic_folder(output):
            output.mkdir()

    with pytest.raises(OutputExistsError):
        write()
    assert hidden(tmp_path) == []


def test_failed_swap_restores_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), atomic_folder(output, overwrite=True):
        pass
    assert (output / "old").exists()
    assert hidden(tmp_path) == []


def test_home_and_working_folder_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(OutputExistsError, match="contains"), atomic_folder(tmp_path, True):
        pass


def test_one_output_is_not_written_twice_at_once(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
        message = "being written"
        with pytest.raises(OutputExistsError, match=message), atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").exists()


def test_killed_process_leaves_no_output(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom perta.store.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').touch()\n    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "out").exists()
    with atomic_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == []


def test_atomic_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.json"

    def write(text: str, fail: bool = False, overwrite: bool = False) -> None:
        with atomic_file(file, overwrite) as partial:
            partial.write_text(text)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", fail=True)
    assert list(file.parent.iterdir()) == []
    write("one")
    with pytest.raises(OutputExistsError):
        write("two")
    with pytest.raises(KeyboardInterrupt):
        write("two", fail=True, overwrite=True)
    assert file.read_text() == "one"
    write("two", overwrite=True)
    assert file.read_text() == "two"
    with pytest.raises(OutputExistsError, match="is a folder"), atomic_file(tmp_path, True):
        pass
    assert hidden(file.parent) == []


def test_copy_companions_takes_what_a_model_needs_and_no_more(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    needed = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "modeling_custom.py",
        "LICENSE.txt",
    ]
    left = [
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "perta.json",
        "adapter_config.json",
        "training_args.bin",
        "trainer_state.json",
        "train.json",
        "forget.txt",
        "optimizer.pt",
    ]
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in needed + left:
        (source / name).write_text(name)
    target.mkdir()
    copy_companions(source, target)
    copied = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert copied == set(needed)
    assert (target / "config.json").read_text() == "config.json"


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "a\0b.safetensors", "../a"])
def test_names_of_shards_that_are_none_are_refused(sharded: Path, name: str) -> None:
    edit_index(sharded, {"a": name})
    with pytest.raises(CorruptCheckpointError, match="outside its folder"):
        open_index(sharded)


@pytest.mark.parametrize("text", ["[]", "0", '""', "false", '{"a": 1}'])
def test_free_text_of_a_header_is_an_object_of_texts(tmp_path: Path, text: str) -> None:
    header = f'{{"__metadata__": {text}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptCheckpointError, match="__metadata__"):
        open_index(tmp_path)
