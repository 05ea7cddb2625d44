"""What a run leaves: for its owner alone, and gone after `perta clean` where it knows."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import TUNE, World
from perta.errors import CheckpointError, ConfigError
from perta.models.resolve import resolve_checkpoint
from perta.options import ScoringConfig, TuneConfig, WeightingConfig
from perta.recipes.clean import clean
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store.checkpoint import copy_companions, open_index, read_tensor
from perta.store.fingerprint import fingerprint

sys.path.append(str(Path(__file__).parents[1] / "engine" / "edit" / "formats"))
from test_requantise import as_fp8


def config(world: World, output: Path, method: str, **more: Any) -> UnlearnConfig:
    given: dict[str, Any] = {"full": str(world.full), **more}
    return UnlearnConfig(
        base=str(world.base),
        forget=str(world.forget),
        retain=str(world.retain),
        output=output,
        weighting=WeightingConfig(method=method),
        tune=TUNE,
        scoring=ScoringConfig(max_new_tokens=4),
        **given,
    )


@pytest.fixture
def mask() -> Iterator[None]:
    """The usual mask, with which others may read what is written."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}


def texts(*files: Path) -> set[str]:
    """Answers of the rows, and their four-word parts."""
    words = [json.loads(line)["answer"] for f in files for line in f.read_text().splitlines()]
    parts = [text.split() for text in words]
    return {" ".join(p[i : i + 4]) for p in parts for i in range(max(1, len(p) - 3))}


def holding(folder: Path, wanted: set[str]) -> list[str]:
    """Files that hold one of some texts."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes().decode("utf-8", errors="replace")
            if any(text in content for text in wanted):
                found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize("method", ["perta-project", "perta-grad", "graddiff"])
def test_what_a_run_leaves_is_private_and_cleaned(
    world: World, tmp_path: Path, mask: None, method: str
) -> None:
    name = method
    settings = config(world, tmp_path / "out", name)
    if name != "graddiff":
        settings = replace(settings, weighting=WeightingConfig(method=name, scaling_coef=1.0))
    unlearn(settings)
    work, output = tmp_path / "out.work", tmp_path / "out"
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    found = modes(work)
    results = [path for path in found if path.startswith("evaluation")]
    assert results
    assert all(
        not found[path] & 0o077 for path in (*results, *(["direction"] * (name == "perta-project")))
    )
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "state.pt").write_bytes(b"weights")
    (work / "forget_checkpoint.resume").mkdir()
    (work / "forget_checkpoint.resume" / "state.pt").write_bytes(b"weights")
    (work / "mine.txt").write_text("mine")
    kept = {p.name: fingerprint(p) for p in work.glob("retain_*") if p.is_dir()}
    weights = fingerprint(output)

    planned = clean(output, dry_run=True)
    assert set(modes(work)) >= set(found)
    done = clean(output)
    assert done.deleted == planned.deleted
    assert not any(path.exists() for path in done.deleted)
    assert {p.name: fingerprint(p) for p in work.glob("retain_*") if p.is_dir()} == kept
    assert {p.name for p in work.iterdir()} <= {*kept, "mine.txt", "strength.json", "audit.json"}
    assert any("mine.txt" in line for line in done.left)
    assert any(str(world.forget) in line for line in done.left)
    assert fingerprint(output) == weights
    forgotten = texts(world.forget) - texts(world.retain)
    assert not holding(tmp_path, forgotten)
    assert clean(output).deleted == ()


def test_no_part_of_a_forgotten_row_is_in_output_record_or_report(
    world: World, tmp_path: Path
) -> None:
    settings = config(world, tmp_path / "out", "perta-grad")
    unlearn(replace(settings, weighting=WeightingConfig(method="perta-grad", scaling_coef=1.0)))
    secrets = texts(world.forget) - texts(world.retain)
    inside = [path for path in holding(tmp_path, secrets) if not path.startswith("out.work")]
    # The tokenizer of this tiny model was trained on all rows and holds words, no sentences.
    assert [path for path in inside if not path.endswith("tokenizer.json")] == []


def test_a_killed_run_and_merged_adapters_are_cleaned(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(world.base)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    settings = config(world, tmp_path / "out", "tv", full=str(tmp_path / "adapter"))
    tv = replace(settings, weighting=WeightingConfig(method="tv", scaling_coef=1.0))
    unlearn(replace(tv, evaluate=False))
    [merged] = (tmp_path / "cache" / "merged").iterdir()
    assert stat.S_IMODE(merged.stat().st_mode) == 0o700
    done = clean(tmp_path / "out")
    assert merged in done.deleted
    assert tmp_path / "out.work" / "forget_checkpoint" in done.deleted
    assert (tmp_path / "adapter").is_dir()  # the user's own

    # Of a run that did not come to its end only its work folder is there.
    unlearn(replace(tv, output=tmp_path / "other", evaluate=False))
    shutil.rmtree(tmp_path / "other")
    assert clean(tmp_path / "other").deleted == (tmp_path / "other.work" / "forget_checkpoint",)


def test_plain_copies_of_a_quantised_model_are_cleaned(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    full = as_fp8(world.full, tmp_path / "full")
    output = tmp_path / "out"
    tv = WeightingConfig(method="tv", scaling_coef=1.0)
    unlearn(world.request(output, full=str(full), weighting=tv, evaluate=False))
    copy = resolve_checkpoint(full)
    assert copy in clean(output).deleted
    assert not copy.exists()


def test_what_was_given_to_a_run_is_named_and_stays(world: World, tmp_path: Path) -> None:
    at_one = WeightingConfig(method="tv", scaling_coef=1.0)
    first = replace(config(world, tmp_path / "first", "tv"), weighting=at_one, evaluate=False)
    unlearn(first)
    given = tmp_path / "first.work" / "forget_checkpoint"
    second = replace(
        first, output=tmp_path / "second", forget_checkpoint=str(given), tune=TuneConfig()
    )
    unlearn(second)
    before = fingerprint(given)
    for output in (second.output, edit_checkpoint(edit_of(world, given, tmp_path / "third"))):
        done = clean(output)
        assert given not in done.deleted
        assert f"{given}: a model tuned on the forget set, which is yours to delete" in done.left
        assert fingerprint(given) == before
    assert clean(first.output).deleted == (given,)


def test_what_a_run_made_is_not_told_as_given_from_another_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    unlearn(replace(config(world, Path("out"), "tv"), evaluate=False))
    monkeypatch.chdir(tmp_path)
    done = clean(tmp_path / "there" / "out")
    assert tmp_path / "there" / "out.work" / "forget_checkpoint" in done.deleted
    assert not [line for line in done.left if "forget_checkpoint" in line]


def test_a_run_given_from_its_own_folder_is_cleaned_once_and_is_no_other_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(world, Path("out"), "perta-project")
    unlearn(
        replace(settings, evaluate=False, weighting=replace(settings.weighting, scaling_coef=1.0))
    )
    for dry_run in (True, False):
        done = clean(Path("out"), dry_run=dry_run)
        places = [place.resolve() for place in done.deleted]
        assert tmp_path / "out.work" / "direction" in places
        assert len(places) == len(set(places))
        assert not [line for line in done.left if "another run's" in line]


def test_a_run_of_the_same_name_in_the_folder_of_the_call_stays(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        unlearn(replace(config(world, Path("out"), "tv"), evaluate=False))
    done = clean(Path("../here/out"))
    assert [place.resolve() for place in done.deleted] == [
        tmp_path / "here" / "out.work" / "forget_checkpoint"
    ]
    assert (tmp_path / "there" / "out.work" / "forget_checkpoint").is_dir()


def edit_of(world: World, given: Path, output: Path) -> EditConfig:
    return EditConfig(
        base=str(world.base),
        full=str(world.full),
        forget_checkpoint=str(given),
        output=output,
        weighting=WeightingConfig(method="tv", scaling_coef=1.0),
    )


def test_what_is_no_run_is_not_cleaned(world: World, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.work").mkdir()
    (tmp_path / "plain.work" / "evaluation_after.json").write_text("{}")
    for place in (tmp_path / "plain", tmp_path / "absent", world.base, world.full):
        with pytest.raises(ConfigError, match="no run that can be cleaned"):
            clean(place)
    assert (tmp_path / "plain.work" / "evaluation_after.json").exists()


def test_links_out_of_a_checkpoint_are_not_followed(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    for name in ("LICENSE", "NOTICE.txt", "code.py", "tokenizer.model", "generation_config.json"):
        folder = tmp_path / f"with {name}"
        shutil.copytree(world.base, folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        for read in (fingerprint, lambda f: copy_companions(f, tmp_path)):
            with pytest.raises(CheckpointError, match="is a link to"):
                read(folder)
    folder = tmp_path / "linked folder"
    shutil.copytree(world.base, folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        fingerprint(folder)


def test_the_hubs_cache_links_to_its_own_files(world: World, tmp_path: Path) -> None:
    place = tmp_path / "models--a--b"
    snapshot, blobs = place / "snapshots" / "1", place / "blobs"
    shutil.copytree(world.base, snapshot)
    blobs.mkdir()
    for path in [p for p in snapshot.iterdir() if p.is_file()]:
        shutil.move(path, blobs / path.name)
        path.symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert fingerprint(snapshot) == fingerprint(world.base)
    (tmp_path / "target").mkdir()
    copy_companions(snapshot, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    shutil.move(blobs, tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is a link to"):
        fingerprint(snapshot)
    name, entry = next(iter(open_index(world.base).tensors.items()))
    assert torch.equal(read_tensor(open_index(snapshot).tensors[name]), read_tensor(entry))


def test_nothing_is_wider_than_the_mask(world: World, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        unlearn(
            replace(
                config(world, tmp_path / "out", "tv"),
                weighting=WeightingConfig(method="tv", scaling_coef=1.0),
            )
        )
    finally:
        os.umask(before)
    assert [path for path, mode in modes(tmp_path).items() if mode & 0o077] == []
