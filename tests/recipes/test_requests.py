"""Requests over time: added, applied, looked at again, verified and cleaned."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch

from conftest import TUNE, World
from helpers import pem_keys
from perta.data.examples import load_examples, rows_fingerprint
from perta.data.rows import read_rows, write_jsonl
from perta.data.tokens import row_mark
from perta.errors import (
    CheckpointMismatchError,
    ConfigError,
    DataError,
    LedgerError,
    PertaError,
    VerdictError,
)
from perta.models.resolve import resolve_checkpoint
from perta.options import ComputeConfig, DataConfig, WeightingConfig
from perta.recipes._request import hold_back
from perta.recipes.requests.apply import apply_requests
from perta.recipes.requests.clean import clean_requests
from perta.recipes.requests.look import recheck_requests, verify_requests
from perta.recipes.requests.settings import (
    LedgerConfig,
    RequestsAddConfig,
    RequestsApplyConfig,
    RequestsInitConfig,
    RequestsRecheckConfig,
)
from perta.recipes.requests.state import read_state
from perta.recipes.requests.take import add_request, start_ledger
from perta.stages.finetune import finetune_checkpoint
from perta.stages.moments import compute_moments, holds
from perta.stages.settings import FinetuneConfig, MomentsConfig
from perta.store.fingerprint import fingerprint
from perta.store.ledger import HEAD, LEDGER, append, read_ledger
from perta.store.measured.moments import open_moments
from perta.store.measured.second_moment import matrix
from perta.store.record import read_manifest

sys.path.append(str(Path(__file__).parents[1] / "engine" / "edit" / "formats"))
from test_requantise import as_fp8

METHOD = WeightingConfig(method="interpolate", scaling_coef=1.0)
"""Back to the base model, which is the yardstick: nothing stands out after it."""
WEAK = WeightingConfig(method="interpolate", scaling_coef=0.01)


@pytest.fixture
def ledger(world: World, tmp_path: Path) -> Path:
    everything = [*read_rows(str(world.forget), ""), *read_rows(str(world.retain), "")]
    data = write_jsonl(everything, tmp_path / "all.jsonl")
    folder = tmp_path / "ledger"
    start_ledger(
        RequestsInitConfig(
            folder=folder, base=str(world.base), full=str(world.full), retain=str(data)
        )
    )
    return folder


def _add(folder: Path, rows: Path, name: str) -> None:
    add_request(
        RequestsAddConfig(folder=folder, forget=str(rows), name=name, received="2026-11-27")
    )


def test_a_request_from_its_day_to_its_end(world: World, ledger: Path) -> None:
    _add(ledger, world.forget, "r1")
    texts = (ledger / LEDGER).read_text()
    for example in load_examples(world.forget).examples:
        assert example.answer not in texts
    entry = apply_requests(RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE))
    checkpoint = ledger / entry.facts["checkpoint"]
    assert (entry.facts["before"], entry.facts["after"]) == (
        fingerprint(world.full),
        fingerprint(checkpoint),
    )
    # What was to be forgotten is not among what was kept.
    kept = load_examples(next((ledger / "work").glob("*/retain.jsonl")))
    assert {e.messages for e in kept.examples}.isdisjoint(
        {e.messages for e in load_examples(world.forget).examples}
    )
    assert len(kept) == len(load_examples(world.retain))
    assert entry.facts["audit"]["level"] == "quick"
    assert "fact" in entry.facts["audit"]["not sure"]  # two rows are too few
    assert recheck_requests(RequestsRecheckConfig(folder=ledger)).facts["still_there"] == {"r1": []}
    (request,) = verify_requests(ledger).requests
    assert (request.name, request.rows, request.still_there) == ("r1", 2, 0)
    _, gone = clean_requests(LedgerConfig(folder=ledger))
    assert gone
    assert not list((ledger / "rows").iterdir())
    assert not list((ledger / "work").iterdir())
    assert verify_requests(ledger).requests[0].cleaned
    assert fingerprint(checkpoint) == entry.facts["after"]
    # Its rows are known without being there: they stay out of what is kept.
    (later,) = load_examples(world.retain).examples[:1]
    _add(ledger, write_jsonl([later.fields], ledger.with_name("later.jsonl")), "r2")
    next_entry = apply_requests(RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE))
    kept = load_examples(ledger / "work" / str(next_entry.number) / "retain.jsonl")
    assert len(kept) == len(load_examples(world.retain)) - 1


def test_a_second_request_starts_where_the_first_ended(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    first, second = load_examples(world.forget).examples, load_examples(world.retain).examples[:2]
    _add(ledger, world.forget, "r1")
    one = apply_requests(RequestsApplyConfig(folder=ledger, weighting=WEAK, tune=TUNE))
    looked = recheck_requests(RequestsRecheckConfig(folder=ledger)).facts
    assert looked["still_there"] == {"r1": [1, 2]}
    audit = json.loads((ledger / "audits" / "4" / "r1" / "audit.json").read_text("utf-8"))
    assert {"fact", "fact-token"} <= set(looked["audits"]["r1"]["leaks"])
    assert looked["audits"]["r1"]["content"] == audit["perta"]["content"]
    assert audit["model"]["checkpoint"] == looked["checkpoint"]
    # Retained rows are looked at without those of the request, which are in the ledger's set.
    assert audit["rows"]["retain"] == len(load_examples(world.retain))
    _add(ledger, write_jsonl([e.fields for e in second], tmp_path / "second.jsonl"), "r2")
    two = apply_requests(RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE))
    assert two.facts["before"] == one.facts["after"]
    assert two.facts["names"] == ["r2"]
    record = read_manifest(ledger / two.facts["checkpoint"])
    assert record is not None
    assert record["inputs"]["full"] == one.facts["after"]
    # The rows of both are out of what is kept.
    kept = load_examples(ledger / "work" / str(two.number) / "retain.jsonl")
    removed = {e.messages for e in (*first, *second)}
    assert removed.isdisjoint({e.messages for e in kept.examples})
    assert len(kept) == len(load_examples(world.retain)) - 2


@pytest.mark.parametrize("kind", ["adapter", "fp8"])
def test_models_that_are_converted_to_be_read_live_on_without_the_cache(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    everything = world.forget.with_name("full.jsonl")
    if kind == "fp8":
        full = as_fp8(world.full, tmp_path / "full")
    else:
        tune = replace(TUNE, lora_rank=4, learning_rate=5e-3)
        full = finetune_checkpoint(
            FinetuneConfig(
                base=str(world.base), data=str(everything), output=tmp_path / "full", tune=tune
            )
        )
    ledger = tmp_path / "ledger"
    start = start_ledger(
        RequestsInitConfig(
            folder=ledger, base=str(world.base), full=str(full), retain=str(everything)
        )
    )
    assert start.facts["full"] == {"path": str(full), "blake3": fingerprint(full)}
    _add(ledger, world.forget, "r1")
    apply = RequestsApplyConfig(folder=ledger, weighting=WEAK, tune=TUNE)
    apply_requests(apply)
    shutil.rmtree(tmp_path / "cache")
    looked = recheck_requests(RequestsRecheckConfig(folder=ledger)).facts
    assert looked["still_there"] == {"r1": [1, 2]}
    assert list(looked["audits"]) == ["r1"]
    (later, *_) = load_examples(world.retain).examples
    _add(ledger, write_jsonl([later.fields], tmp_path / "later.jsonl"), "r2")
    apply_requests(apply)
    read = fingerprint(resolve_checkpoint(full))
    clean_requests(LedgerConfig(folder=ledger))  # the first checkpoint and its record go
    assert read not in map(fingerprint, (tmp_path / "cache").glob("*/*"))
    again = recheck_requests(RequestsRecheckConfig(folder=ledger)).facts
    assert list(again["audits"]) == ["r1", "r2"]
    verify_requests(ledger)


def test_moments_are_made_once_and_kept_without_the_rows_of_each_request(
    world: World, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def measure(config: MomentsConfig) -> Path:
        measured.append(config.output)
        return compute_moments(config)

    def facts_alone(config: MomentsConfig) -> Path:
        assert config.facts_by
        return compute_moments(config)

    monkeypatch.setattr("perta.recipes.requests.apply.compute_moments", measure)
    monkeypatch.setattr("perta.recipes._workspace.compute_moments", facts_alone)
    projection = WeightingConfig(method="perta-project", scaling_coef=1.0)
    apply = RequestsApplyConfig(folder=ledger, weighting=projection, tune=TUNE)
    rows = load_examples(world.retain).examples
    _add(ledger, world.forget, "r1")
    apply_requests(apply)
    _add(ledger, write_jsonl([rows[0].fields], tmp_path / "second.jsonl"), "r2")
    entry = apply_requests(apply)
    clean_requests(LedgerConfig(folder=ledger))
    assert len(measured) == 1
    kept = open_moments(ledger / "moments")
    assert not holds(kept.folder, [*load_examples(world.forget).examples, rows[0]])
    assert holds(kept.folder, rows[1:])
    stay = write_jsonl([row.fields for row in rows[1:]], tmp_path / "stay.jsonl")
    config = MomentsConfig(checkpoint=str(world.base), data=str(stay), output=tmp_path / "again")
    again = open_moments(compute_moments(config))
    assert kept.facts["tokens"] == again.facts["tokens"]
    for name in again.facts["seen"]:
        torch.testing.assert_close(
            matrix(kept.read(name)), matrix(again.read(name)), rtol=1e-5, atol=1e-4
        )
    # What the edit read is named by its record.
    record = read_manifest(ledger / entry.facts["checkpoint"])
    assert record is not None
    assert record["unlearn"]["inputs"]["retain_moments"] == fingerprint(kept.folder)
    # What was tokenised otherwise serves nobody, whether rows of it go or not.
    _add(ledger, write_jsonl([{"question": "Q?", "answer": "A."}], tmp_path / "third.jsonl"), "r3")
    apply_requests(replace(apply, data_config=DataConfig(chat_template=False)))
    assert len(measured) == 2
    assert not holds(ledger / "moments", rows[:1])
    other = replace(apply, compute=ComputeConfig(dtype="bfloat16"))
    _add(ledger, write_jsonl([{"question": "R?", "answer": "A."}], tmp_path / "fourth.jsonl"), "r4")
    apply_requests(replace(other, data_config=DataConfig(chat_template=False)))
    assert len(measured) == 3


def test_a_run_measures_its_own_moments_where_most_of_those_kept_are_of_rows_it_judges_by(
    world: World, tmp_path: Path
) -> None:
    def rows(long: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"question": f"Question {n}?", "answer": "So it is. " * (30 if n in long else 1)}
            for n in range(40)
        ]

    short = load_examples(write_jsonl(rows([]), tmp_path / "short.jsonl"))
    held = hold_back(short, None, None).held_back
    assert held is not None
    data = write_jsonl(rows([e.row - 1 for e in held.examples]), tmp_path / "all.jsonl")
    start_ledger(
        RequestsInitConfig(
            folder=tmp_path / "ledger",
            base=str(world.base),
            full=str(world.full),
            retain=str(data),
        )
    )
    _add(tmp_path / "ledger", world.forget, "r1")
    projection = WeightingConfig(method="perta-project", scaling_coef=1.0)
    apply = RequestsApplyConfig(folder=tmp_path / "ledger", weighting=projection, tune=TUNE)
    entry = apply_requests(apply)
    record = read_manifest(tmp_path / "ledger" / entry.facts["checkpoint"])
    assert record is not None
    assert record["unlearn"]["held_back"]["rows"] == len(held)
    assert "retain_moments" not in record["unlearn"]["inputs"]
    measured = open_moments(tmp_path / "ledger" / "work" / "3" / "run" / "retain_moments")
    assert not holds(measured.folder, load_examples(data).examples[held.examples[0].row - 1 :][:1])


def test_nobody_without_the_key_can_confirm_a_row_in_the_moments(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    projection = WeightingConfig(method="perta-project", scaling_coef=1.0)
    apply = RequestsApplyConfig(folder=ledger, weighting=projection, tune=TUNE)
    _add(ledger, world.forget, "r1")
    apply_requests(apply)
    rows, moments = load_examples(world.retain).examples, ledger / "moments"
    sidecar = (moments / "moments.json").read_text("utf-8")
    for row in rows:
        messages = json.dumps([[m.role, m.content] for m in row.messages], ensure_ascii=False)
        for guess in (row.as_text, messages):
            assert blake3.blake3(guess.encode()).hexdigest(16) not in sidecar
    assert holds(moments, rows[:1])
    assert not holds(moments, load_examples(world.forget).examples)
    # Whoever has the folder alone cannot look, and is told why; nothing passes for "not in it".
    shutil.copytree(moments, tmp_path / "taken" / "moments")
    with pytest.raises(ConfigError, match="recognised by a key"):
        holds(tmp_path / "taken" / "moments", rows[:1])
    (tmp_path / "taken" / "key").write_text("00" * 32)
    with pytest.raises(ConfigError, match="recognised by a key"):
        holds(tmp_path / "taken" / "moments", rows[:1])
    # Plain hashes of before are keyed by the next request, without measuring again.
    shutil.copy(next((ledger / "work").glob("*/moments/moments.json")), moments)
    assert "rows_key" not in open_moments(moments).facts
    _add(ledger, write_jsonl([{"question": "Q?", "answer": "A."}], tmp_path / "other.jsonl"), "r2")
    apply_requests(apply)
    assert (moments / "moments.json").read_text("utf-8") == sidecar
    # Nor is there one of a row that is taken out of such moments.
    shutil.copy(next((ledger / "work").glob("*/moments/moments.json")), moments)
    gone = [marks for marks in open_moments(moments).facts["rows"] if marks[0] == row_mark(rows[0])]
    _add(ledger, write_jsonl([rows[0].fields], tmp_path / "one.jsonl"), "r3")
    apply_requests(apply)
    record = read_manifest(moments) or {}
    assert record["stage"] == "moments-without"
    assert record["inputs"]["rows"] != rows_fingerprint([{"marks": gone}])


def _rewritten(ledger: Path, number: int, **facts: Any) -> None:
    """Write a ledger anew with other facts in one entry: its chain fits, and so does its head."""
    entries = read_ledger(ledger)
    for name in (LEDGER, HEAD):
        (ledger / name).unlink()
    for entry in entries:
        more = facts if entry.number == number else {}
        append(ledger, entry.kind, {**entry.facts, **more})


@pytest.mark.parametrize(
    ("number", "facts"),
    [
        (1, {"base": "a"}),
        (1, {"retain": None}),
        (2, {"name": "../../etc/passwd"}),
        (2, {"rows_hmac_sha256": [1]}),
        (3, {"name": "r1"}),
        (4, {"names": ["r1", "nobody"]}),
        (5, {"checkpoint": "../elsewhere"}),
        (5, {"signed": {"public_key": "x"}}),
        (5, {"record": 1}),
        (6, {"still_there": {"r1": ["1"]}}),
    ],
)
def test_entries_that_perta_does_not_write_are_refused(
    world: World, ledger: Path, number: int, facts: dict[str, Any]
) -> None:
    _add(ledger, world.forget, "r1")
    _add(ledger, world.retain, "r2")
    append(ledger, "clean", {"names": ["r1"], "deleted": []})
    done = {"names": ["r1"], "before": "b", "after": "a", "met": True, "verdict": None}
    append(ledger, "apply", {**done, "checkpoint": "checkpoints/5"})
    append(ledger, "recheck", {"still_there": {"r2": [1]}})
    assert len(read_state(ledger).entries) == 6
    _rewritten(ledger, number, **facts)
    with pytest.raises(LedgerError, match=f"line {number} is no entry that perta writes"):
        read_state(ledger)


def test_rows_that_are_not_those_that_were_asked_for_are_not_forgotten(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    _add(ledger, world.forget, "r1")
    for name in ("R1", ".r", "-r", "r/1", "r 1", "ä", "r\n", "r" * 65, ""):
        with pytest.raises(ConfigError, match=r"--name|Choose another"):
            _add(ledger, world.retain, name)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        _add(ledger, tmp_path / "none.jsonl", "r2")
    rows, key, base = ledger / "rows" / "r1.jsonl", ledger / "key", world.base / "config.json"
    apply = RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE)
    before = (ledger / LEDGER).read_bytes()
    for file, content, message in (
        (rows, rows.read_text().replace("?", "!"), "does not hold the rows that r1 asked for"),
        (rows, "".join(rows.read_text().splitlines(keepends=True)[:1]), "does not hold the rows"),
        (rows, None, "clean` was cut off"),
        (key, "00" * 32, "the key by which rows are recognised"),
        (key, None, "the key by which rows are recognised"),
        (base, base.read_text() + " ", "base is not what"),
    ):
        whole = file.read_text()
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(LedgerError, match=message):
            apply_requests(apply)
        file.write_text(whole)
    assert (ledger / LEDGER).read_bytes() == before
    assert not (ledger / "work").exists()


def test_rows_are_taken_down_under_the_ledgers_own_key_alone(world: World, ledger: Path) -> None:
    before = (ledger / LEDGER).read_bytes()
    for other in ("", "00", "00" * 32):
        (ledger / "key").write_text(other)
        with pytest.raises(LedgerError, match="missing or another one"):
            _add(ledger, world.forget, "r1")
    assert (ledger / LEDGER).read_bytes() == before


def test_keys_may_lie_in_the_home_folder(
    world: World, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    public = pem_keys(tmp_path, "own", "ed25519")[1].name
    config = RequestsAddConfig(
        folder=Path("~") / ledger.name, forget=str(world.forget), name="r1", key=Path("~/own.pem")
    )
    assert add_request(config).signature
    with pytest.raises(LedgerError, match="line 1 is not signed"):
        verify_requests(ledger, public_keys=[Path("~") / public])


def test_clean_follows_no_link_and_finds_what_failed_runs_left(
    world: World, ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _add(ledger, world.forget, "r1")
    number = apply_requests(RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE)).number
    recheck_requests(RequestsRecheckConfig(folder=ledger))
    elsewhere = tmp_path / "elsewhere"
    shutil.move(ledger / "work", elsewhere)
    (ledger / "work").symlink_to(elsewhere)
    (ledger / "checkpoints" / "1").symlink_to(elsewhere)
    (ledger / "rows" / "cut-off.jsonl").write_text("{}")
    clean_requests(LedgerConfig(folder=ledger))
    assert (elsewhere / str(number) / "forget.jsonl").exists()
    told = capsys.readouterr().err
    for link in ("work", "checkpoints/1"):
        assert f"{ledger / link} is a link" in told
        (ledger / link).unlink()
    assert not [*(ledger / "rows").iterdir()]
    # A run that failed, and another request came before it was tried again.
    (ledger / "work" / "3").mkdir(parents=True)
    (ledger / "work" / "3" / "forget.jsonl").write_text("{}")
    _, gone = clean_requests(LedgerConfig(folder=ledger))
    assert gone == [ledger / "work" / "3"]


def test_clean_names_what_it_cannot_find_once(
    world: World, ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply = RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE)
    _add(ledger, world.forget, "r1")
    first = apply_requests(apply).facts["checkpoint"]
    (row, *_) = load_examples(world.retain).examples
    _add(ledger, write_jsonl([row.fields], tmp_path / "second.jsonl"), "r2")
    apply_requests(apply)
    shutil.move(ledger / first, tmp_path / "kept")
    entry, _ = clean_requests(LedgerConfig(folder=ledger))
    assert f"{ledger / first} is not there" in capsys.readouterr().err
    assert entry.facts["not_found"] == [first]
    assert clean_requests(LedgerConfig(folder=ledger))[0].facts["not_found"] == []
    assert "is not there" not in capsys.readouterr().err


def test_a_ledger_that_cannot_be_written_stays_as_it_is(world: World, ledger: Path) -> None:
    before = (ledger / LEDGER).read_bytes()
    (ledger / ".lock").unlink(missing_ok=True)
    outside = ledger.with_name("outside")
    outside.write_text("theirs")
    (ledger / ".lock").symlink_to(outside)
    with pytest.raises(LedgerError, match="cannot be written"):
        _add(ledger, world.forget, "r1")
    assert outside.read_text() == "theirs"
    assert (ledger / LEDGER).read_bytes() == before
    assert not (ledger / "rows").exists()


def test_what_does_not_fit_is_refused(world: World, ledger: Path, tmp_path: Path) -> None:
    apply = RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE)
    with pytest.raises(ConfigError, match="No request waits"):
        apply_requests(apply)
    _add(ledger, world.forget, "r1")
    before = (ledger / LEDGER).read_bytes()
    for rows, name, message in (
        (world.forget, "r1", "choose|Choose"),
        (world.forget, "r2", "2 of the rows belong to an earlier request"),
        (world.retain, "../r", "--name"),
        (tmp_path / "none.jsonl", "r3", "none.jsonl"),
    ):
        with pytest.raises(PertaError, match=message):
            _add(ledger, rows, name)
    with pytest.raises(PertaError, match="received"):
        RequestsAddConfig(folder=ledger, forget="f", name="r", received="yesterday")
    with pytest.raises(LedgerError, match="no ledger"):
        read_state(tmp_path)
    new = tmp_path / "new"
    with pytest.raises(CheckpointMismatchError, match="given for each other"):
        start_ledger(
            RequestsInitConfig(
                folder=new, base=str(world.full), full=str(world.base), retain=str(world.retain)
            )
        )
    assert not new.exists()
    with pytest.raises(LedgerError, match="hash"):
        verify_requests(ledger, head="0" * 64)
    data = tmp_path / "all.jsonl"
    whole = data.read_text()
    data.write_text(whole + json.dumps({"question": "Q?", "answer": "A."}) + "\n")
    with pytest.raises(LedgerError, match="retain set"):
        apply_requests(apply)
    data.write_text(whole)
    assert (ledger / LEDGER).read_bytes() == before


def test_a_changed_checkpoint_is_found(world: World, ledger: Path) -> None:
    _add(ledger, world.forget, "r1")
    entry = apply_requests(RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE))
    file = ledger / entry.facts["checkpoint"] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for step in (
        lambda: verify_requests(ledger),
        lambda: recheck_requests(RequestsRecheckConfig(folder=ledger)),
        lambda: clean_requests(LedgerConfig(folder=ledger)),
    ):
        with pytest.raises(PertaError, match="is not what"):
            step()
    assert list((ledger / "rows").iterdir())
    content[-1] ^= 1
    file.write_bytes(content)
    verify_requests(ledger)
    # What is no part of the model tells how it was made, and recognises the rows.
    for place, message in (
        (file.with_name("README.md"), "is not what the ledger says"),
        (file.with_name("perta.json"), "is not what the ledger says"),
        (ledger / "key", "the key by which rows are recognised"),
    ):
        text = place.read_text()
        place.write_text(text.replace("e", "f"))
        with pytest.raises(LedgerError, match=message):
            verify_requests(ledger)
        place.write_text(text)
    verify_requests(ledger)


def test_signed_entries_and_checkpoints_are_checked_against_trusted_keys(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing", reason="the extra `signing` is not installed")
    _add(ledger, world.forget, "r1")
    key, public = pem_keys(tmp_path, "model", "secp256r1")
    other = pem_keys(tmp_path, "other", "secp256r1")[1]
    apply = RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE)
    with pytest.raises(ConfigError, match="--model-key"):
        apply_requests(replace(apply, model_key=public))
    entry = apply_requests(replace(apply, model_key=key))
    verify_requests(ledger, public_keys=[public])
    verify_requests(ledger, public_keys=[other, public])
    with pytest.raises(LedgerError, match="another key"):
        verify_requests(ledger, public_keys=[other])
    # What counts for no fingerprint counts here.
    card = ledger / entry.facts["checkpoint"] / "README.md"
    card.write_text(card.read_text() + "approved by all\n")
    with pytest.raises(LedgerError, match="does not fit its signature"):
        verify_requests(ledger)


def test_every_entry_must_be_signed_with_a_trusted_key(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    public = pem_keys(tmp_path, "own", "ed25519")[1]
    _add(ledger, world.forget, "r1")
    with pytest.raises(LedgerError, match="line 1 is not signed"):
        verify_requests(ledger, public_keys=[public])
    # A key that cannot be used is told before the run, not after it.
    apply = RequestsApplyConfig(folder=ledger, weighting=METHOD, tune=TUNE, key=public)
    with pytest.raises(ConfigError, match="no private key"):
        apply_requests(apply)
    assert not (ledger / "work").exists()


def test_what_is_not_forgotten_is_kept_and_forgotten_once_more(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    def apply(method: WeightingConfig, **more: Any) -> RequestsApplyConfig:
        return RequestsApplyConfig(folder=ledger, weighting=method, tune=TUNE, **more)

    _add(ledger, world.forget, "r1")
    before = (ledger / LEDGER).read_bytes()
    with pytest.raises(VerdictError, match="ledger"):
        apply_requests(apply(WEAK, fail_unless="met"))
    assert (ledger / LEDGER).read_bytes() == before
    one = apply_requests(apply(WEAK))
    clean_requests(LedgerConfig(folder=ledger))
    assert [file.name for file in (ledger / "rows").iterdir()] == ["r1.jsonl"]
    with pytest.raises(ConfigError, match="--again"):
        apply_requests(apply(METHOD))
    with pytest.raises(ConfigError, match=r"no such request.*Did you mean `r1`"):
        apply_requests(apply(METHOD, again=("r11",)))
    two = apply_requests(apply(METHOD, again=("r1",)))
    assert (two.facts["before"], two.facts["names"]) == (one.facts["after"], ["r1"])
    recheck_requests(RequestsRecheckConfig(folder=ledger))
    clean_requests(LedgerConfig(folder=ledger))
    assert not list((ledger / "rows").iterdir())
    with pytest.raises(ConfigError, match="cleaned"):
        apply_requests(apply(METHOD, again=("r1",)))
    _add(ledger, world.forget, "r1-back")  # the data came back, and has to go again


def test_rows_that_cannot_be_forgotten_together_are_refused_at_once(
    world: World, ledger: Path, tmp_path: Path
) -> None:
    _add(ledger, world.forget, "r1")
    other = write_jsonl([{"text": "A diary of a stay in Rome."}], tmp_path / "text.jsonl")
    with pytest.raises(DataError):
        _add(ledger, other, "r2")
    assert [request.name for request in read_state(ledger).requests] == ["r1"]
