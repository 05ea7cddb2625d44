"""Bytes from outside: plain values, or one error that names the place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from perta.errors import ConfigError, CorruptCheckpointError, DataError
from perta.evidence.results import read_results
from perta.store.checkpoint import CheckpointIndex, TensorEntry, read_header
from perta.store.parse import NUMBERS, fits, parse_json, parse_yaml, read_json
from perta.store.record import read_manifest

HOSTILE_JSON = {
    "deep beyond the parser": "[" * 100_000 + "]" * 100_000,
    "deep": '{"a": ' * 100 + "1" + "}" * 100,
    "digits beyond the parser": "1" * 5000,
    "digits": "1" * 30,
    "not finite": "NaN",
    "overflow": "1e999",
    "twice": '{"a": 1, "a": 2}',
    "half a character": '"\\ud800"',
    "cut": '{"a": ',
    "empty": "",
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_odd_json_is_one_error_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="here"):
        parse_json(text, "here", DataError)
    # The same wherever it stands: a header, a record, a results file.
    whole = f'{{"x": {text}}}'
    (tmp_path / "perta.json").write_text(whole, "utf-8")
    if text not in ("NaN", "1e999"):  # published logs have them
        assert read_manifest(tmp_path) is None
        with pytest.raises(DataError, match=r"perta\.json"):
            read_results(tmp_path / "perta.json")
    header = whole.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptCheckpointError, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


HOSTILE_YAML = {
    "deep": "[" * 2000,
    "key": "? [1, 2]\n: 3",
    "twice": "a: 1\nb: {c: 2, c: 2}",
    "number as key": "1: 2",
    "boolean as key": "yes: 2",
    "date": "a: 2024-13-45",
    "digits": "a: " + "9" * 5000,
    "empty number": 'a: !!int ""',
    "binary": "a: !!binary x",
    "object": "a: !!python/object/apply:os.system [ls]",
    "itself": "a: &a [*a, *a]",
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_odd_yaml_is_one_error(text: str) -> None:
    if text == HOSTILE_YAML["itself"]:
        assert parse_yaml(text, "here", ConfigError)  # looked at once, and no text of its own
        return
    with pytest.raises(ConfigError, match="here"):
        parse_yaml(text, "here", ConfigError)


def test_laughing_yaml_is_read_in_its_own_size() -> None:
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert len(parse_yaml("\n".join(lines), "here", ConfigError)) == 40


def test_only_regular_files_of_some_length_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "long").write_text("[" + "1," * 100, "utf-8")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "zero", "absent", "bytes", "."):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            read_json(tmp_path / name, DataError)
    with pytest.raises(DataError, match="longer than 100 bytes"):
        read_json(tmp_path / "long", DataError, limit=100)


def test_forms() -> None:
    form = {"a": {str: NUMBERS}, "b?": [str]}
    assert fits({"a": {"x": 1, "y": 2.5}, "c": None}, form)
    assert fits({"a": {}, "b": ["t"]}, form)
    wrong = (
        "{}",
        "[]",
        '{"a": {"x": true}}',
        '{"a": {"x": "1"}}',
        '{"a": {}, "b": [1]}',
        '{"a": []}',
    )
    for text in wrong:
        assert not fits(json.loads(text), form)


def test_a_record_of_another_form_is_none(tmp_path: Path) -> None:
    for text in ('{"inputs": {"a": 1}}', '{"settings": []}', '{"unlearn": {"seconds": "x"}}'):
        (tmp_path / "perta.json").write_text(text, "utf-8")
        assert read_manifest(tmp_path) is None


def test_names_are_found_with_and_without_prefix_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = 0

    class Counted(dict[str, TensorEntry]):
        def __contains__(self, name: object) -> bool:
            nonlocal looked
            looked += 1
            return super().__contains__(name)

    entry = TensorEntry("", None, (), Path(), 0, 0)  # type: ignore[arg-type]
    names = [f"p{i}.w{i}" for i in range(500)]
    index = CheckpointIndex(Path(), Counted(dict.fromkeys(names, entry)), {}, {})
    assert all(index.find(f"w{i}") is entry for i in range(500))
    assert index.find("p3.p3.w3") is entry
    assert index.find("w500") is None
    assert looked < 4000
