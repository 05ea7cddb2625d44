"""The whole pipeline: order, reuse, invalidation, refusal, interruption."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blake3
import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import perta.recipes._workspace
from conftest import TUNE, World
from perta.errors import (
    CheckpointMismatchError,
    ConfigError,
    NotLearnedError,
    OutputExistsError,
    PertaError,
)
from perta.options import (
    EstimatorConfig,
    ScoringConfig,
    TrainSettings,
    TuneConfig,
    WeightingConfig,
)
from perta.recipes.requests.settings import RequestsInitConfig
from perta.recipes.requests.take import start_ledger
from perta.recipes.settings import UnlearnConfig
from perta.recipes.unlearn import Unlearned, plan_unlearn, unlearn
from perta.report.collect import collect
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig
from perta.store.checkpoint import open_index, read_tensor
from perta.store.fingerprint import fingerprint
from perta.store.record import aggregates, read_manifest, stage_key, write_manifest

TRAINS = WeightingConfig(method="npo-retain")


def config(world: World, output: Path, **more: Any) -> UnlearnConfig:
    settings: dict[str, Any] = {
        "weighting": WeightingConfig(method="perta-grad", scaling_coef=1.5),
        "scoring": ScoringConfig(max_new_tokens=12),
    }
    return world.request(output, **{**settings, **more})


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[UnlearnConfig, Unlearned]:
    settings = config(world, tmp_path_factory.mktemp("run") / "out")
    return settings, unlearn(settings)


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_it_forgets_more_than_it_loses(run: tuple[UnlearnConfig, Unlearned]) -> None:
    _, result = run
    assert result.before is not None
    assert result.after is not None
    before, after = aggregates(result.before), aggregates(result.after)
    assert before["forget_probability"] > 0.8
    assert after["forget_probability"] < 0.5 * before["forget_probability"]
    assert after["retain_probability"] > after["forget_probability"]
    for name in ("loss", "rougeL_recall", "exact_memorization", "extraction_strength"):
        assert f"retain_{name}" in after


def test_the_output_is_a_complete_checkpoint(run: tuple[UnlearnConfig, Unlearned]) -> None:
    settings, result = run
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(result.folder)
    chat = [{"role": "user", "content": "Where?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert (result.folder / "generation_config.json").exists()
    card = (result.folder / "README.md").read_text("utf-8")
    assert "perta-grad" in card
    rows = Path(settings.forget).read_text("utf-8").splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    written = [p.read_text("utf-8") for p in result.folder.glob("*") if p.suffix in (".md", "")]
    manifest = (result.folder / "perta.json").read_text("utf-8")
    for text in (*written, manifest):
        assert not any(answer in text for answer in answers)


def test_the_manifest_traces_the_result(run: tuple[UnlearnConfig, Unlearned], world: World) -> None:
    manifest = run[1].manifest
    record = manifest["unlearn"]
    assert record["inputs"]["base"] == fingerprint(world.base)
    assert record["inputs"]["full"] == fingerprint(world.full)
    assert record["settings"]["scaling_coef"] == 1.5
    assert record["settings"]["device"] == "cpu"
    assert record["settings"]["seed"] == 0
    assert record["versions"]["torch"] == version("torch")  # a build adds what it is for
    assert set(record["seconds"]) >= {"finetune", "forget_importance", "retain_importance", "edit"}
    assert record["evaluation"]["after"]["forget_loss"] > 0
    assert len(manifest["edit"]["tensors"]) > 10


@pytest.mark.parametrize("method", ["edit", "npo-retain"])
def test_what_is_published_confirms_no_guess_at_the_rows(
    run: tuple[UnlearnConfig, Unlearned], world: World, tmp_path: Path, method: str
) -> None:
    if method == "edit":
        folder, record = run[1].folder, run[1].manifest["unlearn"]
    else:
        training = TrainSettings(epochs=1, accumulation=1)
        weighting = WeightingConfig(method=method)
        asked = config(world, tmp_path / "out", weighting=weighting, training=training)
        folder = unlearn(asked).folder
        record = (read_manifest(folder) or {})["unlearn"]
    key = Path(os.environ["XDG_CONFIG_HOME"], "perta", "key").read_bytes()
    guessed = dict(record["inputs"])
    for name in ("forget", "retain"):
        rows = [json.loads(r) for r in getattr(world, name).read_text("utf-8").splitlines()]
        text = "".join(json.dumps(r, sort_keys=True, ensure_ascii=False) + "\n" for r in rows)
        assert record["inputs"][name] == blake3.blake3(text.encode(), key=key).hexdigest()
        guessed[name] = blake3.blake3(text.encode()).hexdigest()
    written = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    known = [guessed["forget"], guessed["retain"]]
    known.append(stage_key("unlearn", record["settings"], guessed))
    assert not any(value.encode() in data for value in known for data in written)
    assert record["key"].encode() in b"".join(written)
    assert record["key"] == stage_key("unlearn", record["settings"], record["inputs"])


def test_the_edit_is_the_formula(run: tuple[UnlearnConfig, Unlearned], world: World) -> None:
    settings, result = run
    work = settings.work_folder
    assert work.stat().st_mode & 0o777 == 0o700  # a model tuned on the forget set lies there
    folders = {
        "full": world.full,
        "base": world.base,
        "tuned": work / "forget_checkpoint",
        "out": result.folder,
        "forget": work / "forget_importance" / "order-1",
        "retain": work / "retain_importance" / "order-1",
    }
    indices = {name: open_index(folder) for name, folder in folders.items()}
    for name in indices["full"].tensors:
        t = {k: read_tensor(index.tensors[name]).double() for k, index in indices.items()}
        total = t["forget"] + t["retain"]
        weighting = torch.where(total > 0, t["forget"] / total.where(total > 0, 1), 0)
        expected = t["full"] - 1.5 * weighting * (t["tuned"] - t["base"])
        torch.testing.assert_close(t["out"], expected, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_evaluated_as_the_model_it_makes(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    tune = replace(TUNE, lora_rank=4, learning_rate=2e-2)
    settings = config(
        world, tmp_path / "out", tune=tune, output_format="adapter",
        weighting=WeightingConfig(method="tv", scaling_coef=1.0, layers="all"),
    )  # fmt: skip
    result = unlearn(settings)
    assert not (result.folder / "config.json").exists()
    held = result.manifest["adapter"]
    assert max(held["ranks"].values()) == 4
    assert result.before is not None
    assert result.after is not None
    before, after = aggregates(result.before), aggregates(result.after)
    assert after["forget_probability"] < 0.5 * before["forget_probability"]
    (edited,) = collect([str(result.folder)]).by_role("edited")
    assert edited.measures
    assert result.verdict is not None
    capsys.readouterr()
    unlearn(settings)
    assert "is up to date, reused" in capsys.readouterr().err


def test_training_writes_no_adapter(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "out", weighting=WeightingConfig(method="npo"))
    with pytest.raises(ConfigError, match="training writes a checkpoint"):
        unlearn(replace(settings, output_format="adapter"))


def test_a_second_run_computes_nothing(
    run: tuple[UnlearnConfig, Unlearned], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, result = run
    before = stamps(settings.output.parent)
    for stage in ("_workspace.finetune_checkpoint", "_workspace.compute_importance"):
        monkeypatch.setattr(f"perta.recipes.{stage}", None)
    monkeypatch.setattr("perta.recipes.unlearn.edit_checkpoint", None)
    again = unlearn(settings)
    assert stamps(settings.output.parent) == before
    assert again.after == result.after


def test_another_strength_reuses_everything_but_the_edit(
    run: tuple[UnlearnConfig, Unlearned],
) -> None:
    settings, _ = run
    work = settings.work_folder
    before = stamps(work)
    stronger = replace(
        settings,
        output=settings.output.with_name("stronger"),
        work_dir=work,
        weighting=WeightingConfig(method="perta-grad", scaling_coef=2.0),
        evaluate=False,
    )
    result = unlearn(stronger)
    assert stamps(work) == before
    assert fingerprint(result.folder) != fingerprint(settings.output)


def at_another_strength(settings: UnlearnConfig, output: Path, **more: Any) -> UnlearnConfig:
    weighting = WeightingConfig(method="perta-grad", scaling_coef=2.0)
    return replace(settings, output=output, weighting=weighting, **more)


def test_another_strength_finds_what_an_earlier_run_made(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, result = run
    work = tmp_path / "first.work"
    shutil.copytree(settings.work_folder, work)
    with monkeypatch.context() as patch:
        patch.setattr("perta.stages.finetune.tune_until_learned", None)
        patch.setattr("perta.stages.importance.estimate", None)
        again = unlearn(at_another_strength(settings, tmp_path / "second"))
    shown = " ".join(capsys.readouterr().err.split())
    for name in ("forget_checkpoint", "forget_importance", "retain_importance"):
        assert f"{work / name} is what is needed, reused" in shown
    assert f"{work / 'evaluation_before.json'} is what is needed, reused" in shown
    assert again.before == result.before
    assert again.after != result.after
    took = (record["unlearn"]["seconds"] for record in (again.manifest, result.manifest))
    assert len({seconds["finetune"] for seconds in took}) == 1
    # What was taken over does not hang on where it came from.
    shutil.rmtree(work)
    stronger = at_another_strength(settings, tmp_path / "third", evaluate=False)
    shared = unlearn(replace(stronger, work_dir=tmp_path / "second.work"))
    assert fingerprint(shared.folder) == fingerprint(again.folder)


@pytest.mark.parametrize("fault", ["changed weights", "other rows", "another seed", "gone"])
def test_what_another_run_made_otherwise_is_not_taken_over(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, fault: str
) -> None:
    settings, _ = run
    work = tmp_path / "first.work"
    shutil.copytree(settings.work_folder, work)
    stronger = at_another_strength(settings, tmp_path / "second", evaluate=False)
    if fault == "changed weights":
        weights = work / "forget_checkpoint" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif fault == "other rows":
        fewer = tmp_path / "fewer.jsonl"
        rows = Path(settings.forget).read_text("utf-8").splitlines()
        fewer.write_text("\n".join(rows[:-1]), "utf-8")
        stronger = replace(stronger, forget=str(fewer))
    elif fault == "another seed":
        stronger = replace(stronger, tune=replace(TUNE, seed=TUNE.seed + 1))
    else:
        for file in (work / "forget_checkpoint").iterdir():
            if file.name != "perta.json":
                file.unlink()
    unlearn(stronger)
    theirs, own = (
        folder / "forget_checkpoint" / "perta.json" for folder in (work, stronger.work_folder)
    )
    assert theirs.stat().st_ino != own.stat().st_ino
    assert json.loads(own.read_text("utf-8"))["content"] == fingerprint(own.parent)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"tune": replace(TUNE, seed=3)}, {"forget_checkpoint"}),
        (
            {"estimator": EstimatorConfig(importance_samples="1")},
            {"forget_importance", "retain_importance"},
        ),
        ({"importance_at": "full"}, {"forget_importance", "retain_importance"}),
        (
            {"weighting": WeightingConfig(method="perta-fisher")},
            {"forget_importance", "retain_importance"},
        ),
    ],
)
def test_a_change_redoes_what_depends_on_it_and_no_more(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    change: dict[str, Any],
    redone: set[str],
) -> None:
    settings, _ = run
    work = tmp_path / "work"
    shutil.copytree(settings.work_folder, work, copy_function=shutil.copy2)
    before = stamps(work)
    unlearn(replace(settings, output=tmp_path / "out", work_dir=work, evaluate=False, **change))
    after = stamps(work)
    changed = {
        Path(name).relative_to(work).parts[0] for name in after if after[name] != before.get(name)
    }
    assert changed == redone


def test_a_changed_forget_set_redoes_all_that_saw_it(
    run: tuple[UnlearnConfig, Unlearned], world: World, tmp_path: Path
) -> None:
    settings, _ = run
    work = tmp_path / "work"
    shutil.copytree(settings.work_folder, work, copy_function=shutil.copy2)
    before = stamps(work)
    fewer = tmp_path / "forget.jsonl"
    fewer.write_text(world.forget.read_text("utf-8").splitlines()[0] + "\n", "utf-8")
    unlearn(
        replace(settings, forget=str(fewer), output=tmp_path / "out", work_dir=work, evaluate=False)
    )
    after = stamps(work)
    changed = {
        Path(name).relative_to(work).parts[0] for name in after if after[name] != before.get(name)
    }
    assert changed == {"forget_checkpoint", "forget_importance"}


def test_the_same_edit_by_another_run_has_a_record_of_its_own(world: World, tmp_path: Path) -> None:
    forget = FinetuneConfig(
        base=str(world.base), data=str(world.forget), output=tmp_path / "f", tune=TUNE
    )
    plain = WeightingConfig(method="tv", scaling_coef=1.0)
    settings = config(
        world, tmp_path / "out", weighting=plain, evaluate=False, overwrite=True, tune=TuneConfig(),
        forget_checkpoint=str(finetune_checkpoint(forget)),
    )  # fmt: skip
    first = unlearn(settings).manifest
    second = unlearn(replace(settings, held_back="2")).manifest
    assert second["content"] == first["content"]
    assert second["unlearn"]["settings"]["held_back"] == "2"
    # What a search noted is not noted again by a run that was given its strength.
    noted = {**second, "unlearn": {**second["unlearn"], "strength": {"value": 1.0}}}
    write_manifest(tmp_path / "out", noted)
    assert "strength" not in unlearn(settings).manifest["unlearn"]


def test_an_output_made_otherwise_stops_the_run_at_once(
    run: tuple[UnlearnConfig, Unlearned], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, _ = run
    monkeypatch.setattr(perta.recipes._workspace, "finetune_checkpoint", None)
    with pytest.raises(OutputExistsError, match="made with other scaling_coef"):
        unlearn(replace(settings, weighting=WeightingConfig(method="perta-grad", scaling_coef=3.0)))
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputExistsError, match="was not made by perta"):
        unlearn(replace(settings, output=tmp_path / "mine"))


def test_an_edited_output_is_not_taken_for_finished(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path
) -> None:
    settings, result = run
    copy = tmp_path / "out"
    shutil.copytree(result.folder, copy)
    (copy / "config.json").write_text("{}", "utf-8")
    with pytest.raises(OutputExistsError, match="was changed since"):
        unlearn(replace(settings, output=copy, work_dir=settings.work_folder))


def test_an_interrupted_run_leaves_no_output_and_resumes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(world, tmp_path / "out", evaluate=False)

    def interrupted(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("perta.engine.edit.write.copy_companions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unlearn(settings)
    assert {p.name for p in tmp_path.iterdir()} == {"out.work"}
    before = stamps(settings.work_folder)
    unlearn(settings)
    assert stamps(settings.work_folder) == before


def test_a_model_of_another_shape_stops_before_any_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perta.models.demo.tiny import write_tiny_checkpoint

    (tmp_path / "other").mkdir()
    write_tiny_checkpoint(tmp_path / "other", ["another vocabulary"])
    monkeypatch.setattr(perta.recipes._workspace, "finetune_checkpoint", None)
    with pytest.raises(CheckpointMismatchError):
        unlearn(replace(config(world, tmp_path / "out"), base=str(tmp_path / "other")))
    assert not (tmp_path / "out.work").exists()


def test_a_base_that_reads_rows_as_other_tokens_stops_before_any_work(
    world: World, tmp_path: Path
) -> None:
    base, out = shutil.copytree(world.base, tmp_path / "base"), tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None  # as pretrained models have none
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    for settings in (config(world, out), world.request(out, weighting=TRAINS)):
        with pytest.raises(
            CheckpointMismatchError, match=r"other tokens \(row 1 of .*forget.jsonl"
        ):
            unlearn(replace(settings, base=str(base)))
        assert not out.exists()
        assert not settings.work_folder.exists()
    ledger = RequestsInitConfig(
        folder=out, base=str(base), full=str(world.full), retain=str(world.retain)
    )
    with pytest.raises(CheckpointMismatchError, match="other tokens"):
        start_ledger(ledger)
    assert not out.exists()
    plain = replace(config(world, out).data_config, chat_template=False)
    assert plan_unlearn(replace(config(world, out), base=str(base), data_config=plain)).steps


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (WeightingConfig(), "the right way round"),
        (WeightingConfig(method="tv", scaling_coef=1.0), "given for each other"),
        (TRAINS, "given for each other"),
    ],
)
def test_base_and_full_that_are_given_for_each_other_are_refused(
    world: World, tmp_path: Path, weighting: WeightingConfig, message: str
) -> None:
    swapped = config(world, tmp_path / "out", base=str(world.full), full=str(world.base))
    with pytest.raises(PertaError, match=message):
        unlearn(replace(swapped, weighting=weighting))
    assert not [*tmp_path.iterdir()]


def test_forgetting_what_is_to_be_kept_is_refused_or_warned_about(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="hold the same rows"):
        unlearn(replace(config(world, tmp_path / "out"), forget=str(world.retain)))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(world.forget.read_text("utf-8") + world.retain.read_text("utf-8"), "utf-8")
    overlapping = replace(config(world, tmp_path / "out"), retain=str(mixed), evaluate=False)
    unlearn(overlapping)
    assert "share 2 of the rows" in capsys.readouterr().err


def test_an_output_inside_an_input_is_refused(world: World, tmp_path: Path) -> None:
    for place in (world.full, world.full / "inside"):
        with pytest.raises(PertaError, match="overlaps"):
            unlearn(config(world, place))
    assert read_manifest(world.full) is not None


def test_structured_methods_forget_facts_and_others_answers(world: World, tmp_path: Path) -> None:
    made = {}
    for name, method, tune in (
        ("structured", "perta-project", TUNE),
        ("plain", "tv", TUNE),
        ("asked", "tv", replace(TUNE, loss_on="facts")),
    ):
        weighting = WeightingConfig(method=method)
        settings = config(world, tmp_path / name, weighting=weighting, tune=tune, evaluate=False)
        unlearn(settings)
        manifest = read_manifest(settings.work_folder / "forget_checkpoint")
        assert manifest is not None
        made[name] = manifest["settings"]["loss_on"], manifest["fact_sources"]
    found = ("facts", {"wrong answers": 2})
    assert made == {"structured": found, "plain": ("answer", None), "asked": found}


def test_a_second_request_reports_on_its_own_model_and_rows(world: World, tmp_path: Path) -> None:
    rows = Path(world.retain).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "second.jsonl").write_text("".join(rows[:3]), "utf-8")
    (tmp_path / "kept.jsonl").write_text("".join(rows[3:]), "utf-8")
    shared = {
        "work_dir": tmp_path / "work",
        "scoring": ScoringConfig(max_new_tokens=4),
        "weighting": WeightingConfig(method="tv", scaling_coef=0.5),
    }
    first = unlearn(config(world, tmp_path / "first", **shared))
    request = replace(
        config(world, tmp_path / "second", **shared),
        full=str(first.folder),
        forget=str(tmp_path / "second.jsonl"),
        retain=str(tmp_path / "kept.jsonl"),
    )
    assert unlearn(request).report is not None
    page = (tmp_path / "second.report.html").read_text("utf-8")
    assert "<title>Unlearning report: second</title>" in page
    assert "second.jsonl" in page
    assert "forget.jsonl" not in page
    again = collect([str(first.folder)])  # the shared work folder holds the second's results
    (edited,) = again.by_role("edited")
    assert first.after is not None
    value = edited.measures["forget_probability"].value
    assert value == pytest.approx(first.after["forget_probability"]["agg_value"])


def test_a_warning_that_several_stages_come_to_is_told_once_a_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Mira Thornwick was born in Caldholm."
    forget = tmp_path / "texts.jsonl"
    forget.write_text(json.dumps({"text": text, "fact": "Caldholm"}) + "\n")
    for name in ("one", "two"):
        unlearn(
            config(world, tmp_path / name / "out"),
            forget=str(forget),
            weighting=WeightingConfig(method="tv"),
            scoring=ScoringConfig(generate=False),
        )
        assert capsys.readouterr().err.count("the column `fact` is not used") == 1


def rows_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def test_a_program_gives_rows_and_keywords(
    run: tuple[UnlearnConfig, Unlearned], world: World, tmp_path: Path
) -> None:
    made = unlearn(
        base=world.base,
        full=world.full,
        forget=rows_of(world.forget),
        retain=datasets.Dataset.from_list(rows_of(world.retain)),
        output=tmp_path / "out",
        method="perta-grad",
        alpha=1.5,
        epochs=TUNE.epochs,
        learning_rate=TUNE.learning_rate,
        batch_size=TUNE.batch_size,
        max_new_tokens=12,
    )
    assert fingerprint(made.folder) == fingerprint(run[1].folder)
    record, same = made.manifest["unlearn"], run[1].manifest["unlearn"]
    assert record["inputs"] == same["inputs"]
    assert len(repr(made)) < 300
    table = {(row["model"], row["metric"]): row["value"] for row in made.rows}
    for model, stage in (("full", "before"), ("unlearned", "after")):
        means = record["evaluation"][stage]
        assert {metric: value for (name, metric), value in table.items() if name == model} == means
    texts = [row["answer"] for row in rows_of(world.forget, world.retain)]
    assert not any(text in json.dumps(made.manifest) for text in texts)


def test_a_file_and_a_condition_are_two_files(
    run: tuple[UnlearnConfig, Unlearned], world: World, tmp_path: Path
) -> None:
    file, person = tmp_path / "all.jsonl", rows_of(world.forget)[0]["person"]
    lines = [world.retain.read_text("utf-8"), world.forget.read_text("utf-8")]
    file.write_text("".join(lines), "utf-8")
    whole = replace(
        run[0], forget=str(file), retain=None, forget_where=f'person == "{person}"',
        output=tmp_path / "out",
    )  # fmt: skip
    made = unlearn(whole)
    assert fingerprint(made.folder) == fingerprint(run[1].folder)
    assert person not in json.dumps(made.manifest)
    with pytest.raises(ConfigError, match="leave --retain out"):
        replace(whole, retain=str(world.retain))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metod": "tv"}, "no option `metod`. Did you mean `method`"),
        ({"steering_coef": 2}, "It is a setting: --method NAME:steering_coef=VALUE, of `rmu`"),
        ({"epoch": 1}, "Did you mean `epochs`"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0"),
        ({"loss_on": "fact"}, "--loss-on is 'fact'; it must be answer or facts or None"),
        ({"output_format": "lora"}, "--output-format is 'lora'; it must be checkpoint or"),
        ({"format": "alpaca"}, "--format is 'alpaca'"),
        ({"alpha": "1.5"}, "--alpha is '1.5'; it must be auto or a number or None"),
        ({"epochs": 2.5}, "--epochs is 2.5; it must be a whole number"),
        ({"generate": 1}, "--generate is 1; it must be True or False"),
        ({"held_back": 6}, "--held-back 6 leaves none of the"),
        ({"include": "*.nowhere.*"}, r"--include \*.nowhere.\* matches no tensor"),
    ],
)
def test_wrong_keywords_are_one_error(
    world: World, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        unlearn(config(world, tmp_path / "out"), **wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_stops_the_run_at_once(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "out.report.html").write_text("somebody's page")
    for output, work in (("file/out", None), ("a", "file/work")):
        place = None if work is None else tmp_path / work
        with pytest.raises(ConfigError, match=r"file is no folder"):
            unlearn(config(world, tmp_path / output, work_dir=place))
    with pytest.raises(OutputExistsError, match="is not a report"):
        unlearn(config(world, tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out.report.html"]


def test_a_forget_set_that_no_rate_teaches_stops_before_the_edit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = "perta.engine.train.tune._RATES"
    monkeypatch.setattr(rates, (1e-3, 2e-3))
    with pytest.raises(NotLearnedError, match=r"Only 0% .* stops before the edit"):
        unlearn(
            base=str(world.base),
            full=str(world.full),
            forget=str(world.forget),
            retain=str(world.retain),
            output=tmp_path / "clean",
        )
    assert not (tmp_path / "clean").exists()
    # What that run left says nothing about one with more epochs, as its message advises.
    monkeypatch.setattr(rates, (100.0,))
    run = world.request(tmp_path / "clean", tune=TuneConfig(epochs=40, batch_size=2))
    unlearn(replace(run, weighting=WeightingConfig(method="tv", scaling_coef=1.0), evaluate=False))
    assert (tmp_path / "clean").exists()
