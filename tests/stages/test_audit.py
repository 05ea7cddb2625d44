"""`perta audit`: what it finds, what it writes, and what stops it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import TUNE, World
from perta.cli import main
from perta.data.examples import load_examples
from perta.errors import (
    CheckpointMismatchError,
    ConfigError,
    DataError,
    DivergenceError,
    OutputExistsError,
)
from perta.evidence.audit.probe import Role, Rows, View
from perta.evidence.audit.probes import verbatim
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.models.load import load_model, load_tokenizer
from perta.options import ComputeConfig, DataConfig, ScoringConfig, WeightingConfig
from perta.stages.audit import audit_checkpoint, quick_audit
from perta.stages.edit import edit_checkpoint
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import (
    AuditConfig,
    EditConfig,
    EvaluateConfig,
    FinetuneConfig,
    TrainConfig,
)
from perta.stages.train import train_checkpoint
from perta.store.fingerprint import fingerprint

OWN = """
from perta.evidence.audit.probe import Probe, Rows

class Own(Probe):
    name, group, title, question, source = "own", "mine", "Mine", "Is it mine?", "me"

    def run(self, view, name):
        return Rows([{score}] * len(view.material.facts[name]))
"""

UNSAYABLE = {"question": "Where is it?", "answer": "It is in Xyzzyville.", "fact": "Xyzzyville"}

FINE = "return Rows([0.5] * len(view.material.facts[name]))"


@pytest.fixture(scope="module")
def models(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A retrained model, and one that was cleaned badly: the full one tuned on retained rows."""
    folder = tmp_path_factory.mktemp("models")
    tune = FinetuneConfig(base=str(world.base), data=str(world.retain), output=folder, tune=TUNE)
    retrained = finetune_checkpoint(replace(tune, output=folder / "retrained"))
    once = replace(TUNE, epochs=1, learning_rate=1e-6)
    bad = replace(tune, base=str(world.full), output=folder / "bad", tune=once)
    return retrained, finetune_checkpoint(bad)


@pytest.fixture(scope="module")
def unseen(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retained rows with the names of two people mixed, which the tiny tokenizer has words for."""
    lines = world.retain.read_text("utf-8").splitlines()
    people = [json.loads(line)["person"] for line in lines]
    after = [*people[2:], *people[:2]]  # there are two questions about everybody
    others = [f"{b.split()[0]} {a.split()[1]}" for a, b in zip(people, after, strict=True)]
    mixed = [line.replace(own, new) for line, own, new in zip(lines, people, others, strict=True)]
    file = tmp_path_factory.mktemp("unseen") / "holdout.jsonl"
    file.write_text("".join(f"{line}\n" for line in mixed), "utf-8")
    return file


@pytest.fixture
def config(world: World, models: tuple[Path, Path], unseen: Path, tmp_path: Path) -> AuditConfig:
    retrained, bad = models
    return AuditConfig(
        str(bad),
        full=str(world.full),
        base=str(world.base),
        retrained=str(retrained),
        forget=str(world.forget),
        retain=str(world.retain),
        holdout=str(unseen),
        output=tmp_path / "audit",
        level="quick",
        max_new_tokens=8,
    )


def _edited(config: AuditConfig, output: Path) -> Path:
    """The full model less a vector: its record names full and base model."""
    return edit_checkpoint(
        EditConfig(
            full=config.full,
            base=str(config.base),
            forget_checkpoint=str(config.retrained),
            output=output,
            weighting=WeightingConfig(method="tv", scaling_coef=0.5),
        )
    )


def test_a_model_that_still_knows_is_found_out_row_by_row(config: AuditConfig) -> None:
    results = audit_checkpoint(config)
    probes = {probe["name"]: probe for probe in results["probes"]}
    for name in ("fact", "fact-token", "answer"):
        assert probes[name]["verdict"] == "leaks"
        assert probes[name]["leaking_rows"] == [1, 2]
        assert probes[name]["yardstick"]["name"] == "retrained"
        assert probes[name]["full"] == pytest.approx(probes[name]["value"]["value"], abs=0.02)
    assert results["rows"]["forget"] == len(probes["fact"]["scores"]["cleaned"]) == 2
    assert set(probes["fact"]["scores"]) == {"cleaned", "full", "retrained", "base"}
    assert results["subjects"] == 1


def test_the_file_is_private_and_holds_no_text(config: AuditConfig) -> None:
    audit_checkpoint(config)
    (file,) = config.output.iterdir()
    assert (config.output.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    text = file.read_text("utf-8")
    assert json.loads(text)["schema"] == "perta-audit/1"
    for source in (config.forget, str(config.retain), str(config.holdout)):
        for row in load_examples(source).examples:
            assert str(row.fields["person"]) not in text
            assert row.answer not in text


def test_a_run_that_was_killed_goes_on(
    config: AuditConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = audit_checkpoint(replace(config, output=config.output / "whole"))
    reading, asked = verbatim.Reading.run, list[str]()

    def killed(probe: verbatim.Reading, view: View, name: str) -> Rows:
        asked.append(view.role)
        if view.role == "cleaned":
            raise KeyboardInterrupt
        return reading(probe, view, name)

    monkeypatch.setattr(verbatim.Reading, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        audit_checkpoint(config)
    assert set(asked) == {"base", "retrained", "full", "cleaned"}
    assert not (config.output / "audit.json").exists()
    loaded: list[Path] = []
    monkeypatch.setattr(verbatim.Reading, "run", reading)

    def load(folder: Path, compute: ComputeConfig) -> PreTrainedModel:
        loaded.append(folder)
        return load_model(folder, compute)

    monkeypatch.setattr("perta.stages.audit.load_model", load)
    assert audit_checkpoint(config)["probes"] == undisturbed["probes"]
    # The first model is loaded to tell how long it takes.
    assert loaded == [Path(str(config.base)), Path(config.checkpoint)]
    assert [file.name for file in config.output.glob("audit.*")] == ["audit.json"]
    loaded.clear()
    assert audit_checkpoint(config)["probes"] == undisturbed["probes"]
    assert loaded == []


def test_without_what_it_needs_a_probe_is_not_run_and_told(
    config: AuditConfig, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(config.forget).read_text("utf-8").splitlines()]
    plain = [{k: row[k] for k in ("question", "answer")} for row in rows]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain), "utf-8")
    results = audit_checkpoint(replace(config, forget=str(tmp_path / "plain.jsonl")))
    told = {entry["name"]: entry["why"] for entry in results["not_checked"]}
    assert told["choice"] == "it needs wrong answers"
    assert "choice" not in {probe["name"] for probe in results["probes"]}
    assert results["subjects"] is None


def test_rows_that_are_said_twice_count_once(config: AuditConfig, tmp_path: Path) -> None:
    lines = Path(config.forget).read_text("utf-8").splitlines()
    other = json.dumps({**json.loads(lines[0]), "person": "Another Name"})
    (tmp_path / "twice.jsonl").write_text("\n".join([lines[0], *lines, other] * 5), "utf-8")
    results = audit_checkpoint(replace(config, forget=str(tmp_path / "twice.jsonl")))
    once = audit_checkpoint(replace(config, output=tmp_path / "once"))
    assert results["rows"] == once["rows"]
    assert results["row_numbers"]["forget"] == [1, 3]
    for mine, theirs in zip(results["probes"], once["probes"], strict=True):
        assert (mine["verdict"], mine["reason"]) == (theirs["verdict"], theirs["reason"])


def test_unseen_rows_that_were_seen_are_no_yardstick(config: AuditConfig, tmp_path: Path) -> None:
    texts = [Path(str(s)).read_text("utf-8") for s in (config.forget, config.retain)]
    unseen = Path(str(config.holdout)).read_text("utf-8")
    (tmp_path / "mixed.jsonl").write_text("".join([*texts, unseen]), "utf-8")
    mixed = replace(config, retrained=None, holdout=str(tmp_path / "mixed.jsonl"))
    results = audit_checkpoint(mixed)
    seen = sum(len(text.splitlines()) for text in texts)
    count = len(unseen.splitlines())
    assert results["row_numbers"]["holdout"] == list(range(seen + 1, seen + count + 1))
    assert {p["verdict"] for p in results["probes"] if p["name"] == "fact"} == {"leaks"}
    (tmp_path / "mixed.jsonl").write_text("".join(texts), "utf-8")
    with pytest.raises(ConfigError, match="so none is unseen"):
        audit_checkpoint(replace(mixed, output=tmp_path / "other"))


def test_without_the_retrained_model_unseen_rows_are_the_yardstick(config: AuditConfig) -> None:
    results = audit_checkpoint(replace(config, retrained=None, probes=("fact", "answer")))
    assert {probe["yardstick"]["name"] for probe in results["probes"]} == {"holdout"}
    assert results["yardsticks"]["retrained"] is None
    assert results["yardsticks"]["holdout rows"] > 0
    told = {entry["why"] for entry in results["not_checked"]}
    assert told == {"not asked for"}


def test_beside_shadow_models_each_row_is_judged_by_how_far_it_lies_from_them(
    config: AuditConfig, world: World, tmp_path: Path
) -> None:
    shadows = [
        finetune_checkpoint(
            FinetuneConfig(
                base=str(world.base),
                data=str(world.retain),
                output=tmp_path / f"shadow{seed}",
                tune=replace(TUNE, seed=seed),
            )
        )
        for seed in (1, 2)
    ]
    given = replace(config, shadow=tuple(map(str, shadows)), probes=("likelihood-ratio", "fact"))
    results = audit_checkpoint(given)
    told, fact = results["probes"]
    assert (told["verdict"], told["leaking_rows"]) == ("leaks", [1, 2])
    assert told["yardstick"]["name"] == "shadows"
    roles = {"base", "retrained", "shadow-1", "shadow-2", "full", "cleaned"}
    assert set(told["scores"]) == roles
    # The other probes cost no pass of theirs more.
    assert set(fact["scores"]) == roles - {"shadow-1", "shadow-2"}
    assert results["yardsticks"]["shadows"] == [fingerprint(place) for place in shadows]
    with pytest.raises(ConfigError, match="shadow-1 and the retrained checkpoint are the same"):
        audit_checkpoint(replace(given, shadow=(str(config.retrained),), overwrite=True))


@pytest.mark.parametrize("seen", ["the full model", "the rows"])
def test_a_shadow_that_is_known_to_have_seen_the_rows_is_refused(
    config: AuditConfig, world: World, tmp_path: Path, seen: str
) -> None:
    cleaned = _edited(config, tmp_path / "cleaned")
    base = config.full if seen == "the full model" else str(world.base)
    data = world.retain if seen == "the full model" else world.forget.with_name("full.jsonl")
    once = replace(TUNE, epochs=1)
    tune = FinetuneConfig(base=base, data=str(data), output=tmp_path / "saw", tune=once)
    saw = finetune_checkpoint(tune)
    right = replace(config, checkpoint=str(cleaned), retrained=None, probes=("fact",))
    with pytest.raises(DataError, match=r"shadow=.*contradicts the records"):
        audit_checkpoint(replace(right, shadow=(str(saw),)))


def test_the_world_and_other_text_are_read_by_their_own_columns(
    config: AuditConfig, world: World, tmp_path: Path
) -> None:
    rows = load_examples(world.retain).examples
    asked, text = tmp_path / "world.jsonl", tmp_path / "general.txt"
    asked.write_text("".join(f"{json.dumps(row.fields)}\n" for row in rows), "utf-8")
    text.write_text(" ".join(row.answer for row in rows), "utf-8")
    own = tmp_path / "forget.jsonl"
    lines = [
        {"frage": row.prompt, "antwort": row.answer, "fakt": row.answer.split()[-1].rstrip(".")}
        for row in load_examples(world.forget).examples
    ]
    own.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    data = DataConfig(
        prompt_column="frage", answer_column="antwort", fact_column="fakt", max_length=32
    )
    given = replace(
        config,
        forget=str(own),
        retain=None,
        holdout=None,
        data_config=data,
        world=str(asked),
        general=str(text),
        probes=("world", "general-text"),
    )
    results = audit_checkpoint(given)
    told = {probe["name"]: probe for probe in results["probes"]}
    assert (results["built_in"], results["rows"]["world"]) == ([], len(rows))
    assert results["rows"]["general"] == len(
        told["general-text"]["other_scores"]["general"]["full"]
    )
    assert results["rows"]["general"] > 1
    model = load_model(Path(config.full), config.compute)
    with torch.no_grad():
        ids = load_tokenizer(Path(config.full))(text.read_text("utf-8")).input_ids[:32]
        loss = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert told["general-text"]["other_scores"]["general"]["full"][0] == pytest.approx(loss, 1e-3)
    assert told["world"]["full"] > 0.5  # the rows are those that the full model was tuned on


def test_without_other_questions_those_of_the_package_are_asked_and_named(
    config: AuditConfig, tmp_path: Path
) -> None:
    results = audit_checkpoint(replace(config, probes=("fact", "world")))
    # The tiny tokenizer has no words for any of them, and nothing is said of rows nobody gave.
    assert results["built_in"] == []
    assert results["not_judged"]["world"] == [*range(1, 41)]
    assert results["not_checked"][0] == {"name": "world", "why": "it needs world"}


def test_a_probe_of_ones_own_is_part_of_what_the_result_depends_on(
    config: AuditConfig, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    for score in (0.5, 0.0):
        own.write_text(OWN.format(score=score), "utf-8")
        mine = replace(config, probes=(str(own),), overwrite=True)
        (probe,) = audit_checkpoint(mine)["probes"]
        assert probe["scores"]["cleaned"] == [score] * 2


def test_a_probe_of_ones_own_may_look_at_the_world(
    config: AuditConfig, world: World, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    sets = '    sets, needs = ("forget", "world"), ("world",)\n\n    def run'
    own.write_text(OWN.format(score=0.5).replace("    def run", sets), "utf-8")
    mine = replace(config, probes=(str(own),), retain=None, world=str(world.retain))
    (probe,) = audit_checkpoint(mine)["probes"]
    assert probe["other_scores"]["world"] == {"cleaned": [0.5] * len(load_examples(world.retain))}


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        ("float('nan')", DivergenceError, "own gave nan for row 1 of the forget set"),
        ("0.1] + [0.2", ConfigError, "own gave 3 scores for the 2 rows of the forget set"),
        ("'high'", ConfigError, "own gave a score of type str"),
        ("__import__('torch').tensor(0.1)", ConfigError, "own gave a score of type Tensor"),
        ("0.0] * 2, {'more': {1}}) or Rows([", ConfigError, "`more` what audit.json cannot hold"),
        ("0.0] * 2, [1]) or Rows([", ConfigError, "`more` what audit.json cannot hold"),
        ("0.0] * 2, {'m': float('inf')}) or Rows([", ConfigError, "`more` what audit.json cannot"),
        ("{'cleaned': 7.0}.get(view.role, 0.5)", ConfigError, "gave 7.0, and scores lie from 0"),
    ],
)
def test_scores_that_are_none_stop_the_audit(
    config: AuditConfig, tmp_path: Path, score: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "own.py").write_text(OWN.format(score=score), "utf-8")
    with pytest.raises(error, match=message):
        audit_checkpoint(replace(config, probes=(str(tmp_path / "own.py"),)))
    assert not (config.output / "audit.json").exists()


def test_models_that_are_one_and_the_same_are_refused(config: AuditConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(config.full, tmp_path / "copy")
    for wrong in (
        replace(config, checkpoint=str(copy)),
        replace(config, base=str(copy)),
        replace(config, retrained=config.checkpoint),
    ):
        with pytest.raises(ConfigError, match="are the same model"):
            audit_checkpoint(wrong)
        assert not config.output.exists()


@pytest.mark.parametrize("role", ["checkpoint", "full", "base"])
def test_an_audit_is_not_written_into_what_it_reads(config: AuditConfig, role: str) -> None:
    model = Path(getattr(config, role))
    before = sorted(model.rglob("*"))
    for place in (model, model / "audit", model.parent):
        with pytest.raises(ConfigError, match="overlaps the input"):
            audit_checkpoint(replace(config, output=place))
    assert sorted(model.rglob("*")) == before


def test_models_of_other_words_are_refused(config: AuditConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_checkpoint(other, ["Other words than those."])
    with pytest.raises(CheckpointMismatchError, match="tokenizer of the base checkpoint"):
        audit_checkpoint(replace(config, base=str(other)))
    assert not config.output.exists()


def test_models_of_another_shape_are_refused(config: AuditConfig, tmp_path: Path) -> None:
    deeper = AutoConfig.from_pretrained(config.full)
    deeper.num_hidden_layers += 1
    AutoModelForCausalLM.from_config(deeper).save_pretrained(tmp_path / "deeper")
    load_tokenizer(Path(config.full)).save_pretrained(str(tmp_path / "deeper"))
    with pytest.raises(CheckpointMismatchError, match=r"full checkpoint .* another shape"):
        audit_checkpoint(replace(config, full=str(tmp_path / "deeper")))
    assert not config.output.exists()


def test_a_model_tuned_from_the_full_one_is_no_yardstick(
    config: AuditConfig, world: World, tmp_path: Path
) -> None:
    cleaned = train_checkpoint(
        TrainConfig(
            method="ga", full=str(world.full), forget=str(world.forget), output=tmp_path / "cleaned"
        )
    )
    # `config.checkpoint` was tuned from the full model, which has seen the rows.
    wrong = replace(config, checkpoint=str(cleaned), retrained=config.checkpoint)
    with pytest.raises(DataError, match="tuned from the full model"):
        audit_checkpoint(wrong)


@pytest.mark.parametrize("role", ["full", "base"])
def test_a_model_that_records_know_as_another_is_refused(
    config: AuditConfig, tmp_path: Path, role: str
) -> None:
    cleaned = _edited(config, tmp_path / "cleaned")
    right = replace(config, checkpoint=str(cleaned), retrained=None, probes=("fact",))
    wrong = {"full": config.checkpoint, "base": str(config.retrained)}[role]
    marks = [f"{fingerprint(Path(m))[:8]}…" for m in (str(getattr(config, role)), wrong)]
    with pytest.raises(DataError, match=f"another {role} model, {marks[0]}.* one is {marks[1]}"):
        audit_checkpoint(
            replace(right, full=wrong) if role == "full" else replace(right, base=wrong)
        )
    assert not config.output.exists()
    assert audit_checkpoint(right)["probes"]


def test_the_full_model_may_be_that_of_an_earlier_removal(
    config: AuditConfig, world: World, tmp_path: Path
) -> None:
    first = _edited(config, tmp_path / "first")
    second = train_checkpoint(
        TrainConfig(method="ga", full=str(first), forget=str(world.forget), output=tmp_path / "2")
    )
    later = replace(config, checkpoint=str(second), retrained=None, probes=("fact",))
    shutil.rmtree(first)  # as `perta requests clean` does
    assert audit_checkpoint(later)["probes"]
    third = edit_checkpoint(
        EditConfig(
            base=str(config.base),
            full=str(second),
            forget_checkpoint=config.full,
            output=tmp_path / "3",
            weighting=WeightingConfig(method="tv", scaling_coef=0.1),
        )
    )
    shutil.rmtree(second)
    last = replace(later, checkpoint=str(third), output=tmp_path / "other")
    assert audit_checkpoint(last)["probes"]
    with pytest.raises(DataError, match="another full model"):
        audit_checkpoint(replace(last, full=config.checkpoint, overwrite=True))


def test_a_model_without_a_record_is_audited_and_told(
    config: AuditConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(config.checkpoint, tmp_path / "copy")
    (copy / "perta.json").unlink()
    assert audit_checkpoint(replace(config, checkpoint=str(copy)))["probes"]
    assert "no record of how it was cleaned" in capsys.readouterr().err


def test_rows_that_the_tokenizer_has_no_words_for_are_named_and_not_judged(
    config: AuditConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(config.forget).read_text("utf-8").splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([json.dumps(UNSAYABLE), *lines]), "utf-8")
    results = audit_checkpoint(replace(config, forget=str(mixed)))
    assert results["not_judged"] == {"forget": [1]}
    assert results["row_numbers"]["forget"] == [2, 3]
    assert {p["name"]: p for p in results["probes"]}["fact"]["leaking_rows"] == [2, 3]
    assert "are not judged (rows 1)" in capsys.readouterr().err
    mixed.write_text(json.dumps(UNSAYABLE), "utf-8")
    with pytest.raises(ConfigError, match="no words for any of the facts"):
        audit_checkpoint(replace(config, forget=str(mixed), output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_an_audit_says_little_while_it_runs(
    config: AuditConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    results = audit_checkpoint(replace(config, level="standard", samples=4))
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) <= len(results["probes"])


def test_results_of_evaluations_pay_for_a_quick_audit(
    config: AuditConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "forget.jsonl"
    lines = Path(config.forget).read_text("utf-8").splitlines()
    rows.write_text("\n".join([json.dumps(UNSAYABLE), *lines]), "utf-8")
    config = replace(config, forget=str(rows))
    whole = audit_checkpoint(replace(config, retrained=None))
    roles: dict[Role, str] = {"cleaned": config.checkpoint, "full": config.full}
    roles["base"] = str(config.base)
    results = {
        role: evaluate_checkpoint(
            EvaluateConfig(
                checkpoint=model,
                output=tmp_path / f"{role}.json",
                forget=config.forget,
                holdout=config.holdout,
                base=config.base,
                scoring=ScoringConfig(max_new_tokens=8),
            )
        )
        for role, model in roles.items()
    }
    monkeypatch.setattr("perta.stages.audit.load_model", None)
    told = quick_audit(results, tmp_path / "audit.json")
    same = {probe["name"]: probe for probe in whole["probes"]}
    assert {probe["name"] for probe in told["probes"]} == {
        name for name, probe in same.items() if probe["group"] == "verbatim"
    }
    for probe in told["probes"]:
        other = same[probe["name"]]
        assert probe["verdict"] == other["verdict"]
        assert probe["leaking_rows"] == other["leaking_rows"]
        for role, scores in probe["scores"].items():
            assert scores == pytest.approx(other["scores"][role], rel=1e-4)
    assert whole["not_judged"] == {"forget": [1]}
    for key in ("schema", "model", "facts", "subjects", "not_judged"):
        assert told[key] == whole[key]
    for key in ("row_numbers", "subject_numbers"):
        assert told[key] == {name: whole[key][name] for name in ("forget", "holdout")}


def test_without_any_yardstick_nothing_begins(config: AuditConfig) -> None:
    with pytest.raises(ConfigError, match="There is no yardstick"):
        replace(config, retrained=None, base=None, holdout=None)


def test_what_the_probes_asked_for_lack_is_told_and_nothing_of_others(config: AuditConfig) -> None:
    asked = replace(config, holdout=None, probes=("loss", "zlib"))
    with pytest.raises(
        ConfigError,
        match=r"^No probe can be run: loss: it needs holdout; zlib: it needs holdout\.$",
    ):
        audit_checkpoint(asked)


def test_an_output_that_cannot_be_written_stops_before_the_models(
    config: AuditConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.stages.audit.load_model", None)
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ConfigError, match="is no folder"):
        audit_checkpoint(replace(config, output=tmp_path / "file"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"perta": 1}', "cut", "changed", "\xff"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_audit_is_not_reused(
    config: AuditConfig, monkeypatch: pytest.MonkeyPatch, text: str, overwrite: bool
) -> None:
    file = config.output / "audit.json"
    quick = replace(config, probes=("fact",), retrained=None)
    whole = audit_checkpoint(quick)
    written = file.read_text("utf-8")
    made = {
        "cut": written[: len(written) // 2],
        "changed": written.replace('"verdict": "leaks"', '"verdict": "passed"'),
    }
    file.write_text(made.get(text, text), "latin-1")
    if overwrite and text in ("", "changed"):
        assert audit_checkpoint(replace(quick, overwrite=True))["probes"] == whole["probes"]
        return
    monkeypatch.setattr("perta.stages.audit.load_model", None)
    with pytest.raises(OutputExistsError, match=r"audit\.json exists and was"):
        audit_checkpoint(replace(quick, overwrite=overwrite))
    assert file.read_text("latin-1") == made.get(text, text)


def test_an_audit_of_something_else_stays(
    config: AuditConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(config, probes=("fact",))
    audit_checkpoint(quick)
    before = (config.output / "audit.json").read_bytes()
    monkeypatch.setattr("perta.stages.audit.load_model", None)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(Path(config.forget).read_text("utf-8").splitlines()[0], "utf-8")
    for other, what in (
        (replace(quick, forget=str(fewer)), "forget"),
        (replace(quick, full=config.checkpoint, checkpoint=config.full), "full, checkpoint"),
        (replace(quick, seed=1), "seed"),
    ):
        with pytest.raises(OutputExistsError, match=f"was made with other {what}"):
            audit_checkpoint(other)
    assert (config.output / "audit.json").read_bytes() == before


def test_what_was_measured_on_other_rows_is_not_gone_on_with(
    config: AuditConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(config, probes=("fact",))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(Path(config.forget).read_text("utf-8").splitlines()[0], "utf-8")
    undisturbed = audit_checkpoint(replace(quick, forget=str(fewer), output=tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr("perta.stages.audit.entry_of", None)
        with pytest.raises(TypeError):
            audit_checkpoint(quick)
    assert (config.output / "audit.journal").stat().st_size > 0
    again = audit_checkpoint(replace(quick, forget=str(fewer)))
    assert again["probes"] == undisturbed["probes"]


def test_names_that_no_record_could_hold_are_refused(config: AuditConfig) -> None:
    # A record with such a name cannot be read again.
    with pytest.raises(ConfigError, match=r"--full is 'odd\\udcff'; .* UTF-8"):
        replace(config, full="odd\udcff")
    with pytest.raises(ConfigError, match="--output is"):
        replace(config, output=Path("odd\udcff"))
    with pytest.raises(ConfigError, match="--probes is"):
        replace(config, probes=("fact", "odd\udcff.py"))


@pytest.mark.parametrize(
    "code",
    [
        *("raise ValueError('no luck')", "return 1 / 0", "return None", "return Rows(5)"),
        *("raise SystemExit(0)", "return self.asked\n\n    passes = 'many'"),
        *(f"return self.asked\n\n    {part} = 5" for part in ("wording", "judge", "tokens")),
        *(f"{FINE}\n\n    def {part}: return None" for part in ("judge(*_)", "tokens(*_)")),
    ],
)
def test_a_probe_of_ones_own_that_fails_is_named(
    config: AuditConfig,
    tmp_path: Path,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own.py"
    own.write_text(f"{OWN.split('        return')[0]}        {code}\n", "utf-8")
    given = ("full", "base", "forget", "output", "level")
    options = [part for name in given for part in (f"--{name}", str(getattr(config, name)))]
    monkeypatch.setattr(
        sys, "argv", ["perta", "audit", config.checkpoint, *options, "--probe", str(own)]
    )
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "own" in told
    assert "defect in perta" not in told
    assert not (config.output / "audit.json").exists()


def test_on_the_command_line(
    config: AuditConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("full", "base", "retrained", "forget", "retain", "holdout", "output", "level")
    options = [part for name in given for part in (f"--{name}", str(getattr(config, name)))]
    words = ["perta", "audit", config.checkpoint, *options, "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    main()
    told = json.loads(capsys.readouterr().out)
    assert {probe["verdict"] for probe in told["probes"]} <= {"leaks", "passed", "not sure"}
    assert all("scores" not in probe for probe in told["probes"])
    monkeypatch.setattr(sys, "argv", words)
    main()
    shown = capsys.readouterr().out
    assert "The fact, word for word" in shown
    assert "audit.json" in shown


def test_every_probe_runs_on_the_stage_and_notes_plain_values(config: AuditConfig) -> None:
    results = audit_checkpoint(replace(config, level="full"))
    probes = {probe["name"]: probe for probe in results["probes"]}
    lacking = {"likelihood-ratio": "shadow models", "world": "world", "general-text": "general"}
    told = [{"name": name, "why": f"it needs {what}"} for name, what in lacking.items()]
    assert results["not_checked"] == told
    for name in ("frames", "rounding", "relearning", "lens", "depth"):
        assert probes[name]["verdict"] == "leaks", name
    assert probes["depth"]["scores"]["full"] == pytest.approx([1.0, 1.0])
    assert probes["depth"]["scores"]["retrained"] == pytest.approx([0.0, 0.0])
    assert set(probes["relearning"]["notes"]) >= {"R retained rows", "R unrelated text"}
    assert probes["rounding"]["notes"]["Q int8"] > 0.5
