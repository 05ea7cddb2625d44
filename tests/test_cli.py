"""The command line: every subcommand in its help and in one real run; errors as one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import World
from perta.cli import main
from perta.evidence.settings import MuseConfig
from perta.methods.method import KNOWN, Method
from perta.methods.registry import get_method, known
from perta.progress import say, warn
from perta.recipes.compare.settings import CompareConfig
from perta.recipes.settings import UnlearnConfig
from perta.report.settings import ReportConfig
from perta.stages.settings import EditConfig, EvaluateConfig
from perta.terminal import method_cards, print_comparison, print_json, print_metrics, print_samples

TUNE = ("--epochs", "30", "--learning-rate", "5e-3", "--batch-size", "2")


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its status."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def perta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["perta", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
        return Ran(status, *capsys.readouterr())

    return run


def test_help_lists_every_command_and_its_options(perta: Run) -> None:
    commands = (
        "unlearn", "finetune", "importance", "edit", "train", "evaluate", "methods", "people",
        "demo", "moments", "merge-moments", "repair", "clean", "report", "bench",
    )  # fmt: skip
    top = perta("--help").out
    for command in commands:
        assert command in top
        assert perta(command, "--help").status == 0
    assert "--scaling-coef" in perta("unlearn", "--help").out
    assert perta("--version").out.strip() != ""


def test_a_run_has_no_more_options_than_one_can_read(perta: Run) -> None:
    lines = perta("unlearn", "--help").out.splitlines()
    options = [line for line in lines if re.match(r"│ (?: {0,3}|\* +)--(?!no-)[a-z]", line)]
    assert 65 < len(options) <= 75


def test_one_option_of_a_comparison_leaves_the_others_alone(
    perta: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[CompareConfig] = []

    def compare(config: CompareConfig, *, shows: bool) -> list[Any]:
        assert shows
        given.append(config)
        return []

    monkeypatch.setattr("perta.recipes.compare.study.bench_compare", compare)
    arguments = ("bench", "compare", "--base", "b", "--output", tmp_path)
    assert perta(*arguments).status == 0
    assert perta(*arguments, "--learning-rate", "3e-4").status == 0
    plain, other = (config.tune for config in given)
    assert replace(other, learning_rate=plain.learning_rate) == plain
    assert other.learning_rate == 3e-4
    # A draw's seed is one of --seeds; another would be ignored.
    refused = perta(*arguments, "--seed", 3)
    assert refused.status == 2
    assert "--seeds" in refused.err


def test_methods_lists_the_table(perta: Run) -> None:
    out = perta("methods").out
    assert all(name in out for name in known(Method))


def test_one_method_is_shown_with_its_settings(perta: Run) -> None:
    out = perta("methods", "perta_project").out
    assert "(I + rho C_r / c)^-1" in out
    assert "rho = 3.0, in [0, inf)" in out
    npo = perta("methods", "npo").out
    assert "beta = 0.1, in (0, inf)" in npo
    assert "10 epochs at learning rate 1e-05" in npo
    cards = json.loads(perta("methods", "--json").out)
    assert set(cards) == {*known(Method)}
    assert [s["name"] for s in cards["perta-project"]["settings"]] == ["rho"]
    wrong = perta("methods", "perta-projekt")
    assert wrong.status == 1
    assert "Did you mean `perta-project`?" in wrong.err


def test_stage_by_stage_equals_the_pipeline(perta: Run, world: World, tmp_path: Path) -> None:
    stages = (
        ("finetune", "--base", world.base, "--data", world.forget,
         "--output", tmp_path / "f", *TUNE),
        *(
            ("importance", "--checkpoint", world.base, "--data", data, "--order", 1, "--order", 2,
             "--output", tmp_path / name)
            for name, data in (("if", world.forget), ("ir", world.retain))
        ),
        ("edit", "--full", world.full, "--base", world.base, "--forget-checkpoint", tmp_path / "f",
         "--forget-importance", tmp_path / "if", "--retain-importance", tmp_path / "ir",
         "--method", "perta-fisher", "--scaling-coef", 1.5, "--output", tmp_path / "staged"),
    )  # fmt: skip
    for stage in stages:
        assert perta(*stage).status == 0, stage
    whole = perta(
        "unlearn", "--base", world.base, "--full", world.full, "--forget", world.forget,
        "--retain", world.retain, "--method", "perta-fisher", "--scaling-coef", 1.5,
        "--output", tmp_path / "whole", "--max-new-tokens", 8, *TUNE,
    )  # fmt: skip
    assert whole.status == 0, whole.err
    assert "forget set" in whole.out
    assert "perta clean" in " ".join(whole.out.split())
    files = [tmp_path / name / "model.safetensors" for name in ("staged", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()

    done = perta(
        "evaluate", "--checkpoint", tmp_path / "whole", "--forget", world.forget,
        "--holdout", world.retain, "--output", tmp_path / "results.json", "--no-generate",
    )  # fmt: skip
    assert done.status == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["holdout_probability"]["agg_value"] <= 1
    assert "forget_rougeL_recall" not in results
    assert results["perta"]["inputs"]["checkpoint"]


def test_a_dry_run_prints_the_plan_alone(perta: Run, world: World, tmp_path: Path) -> None:
    asked = ("unlearn", "--base", world.base, "--full", world.full, "--forget", world.forget,
             "--retain", world.retain, "--output", tmp_path / "out", *TUNE)  # fmt: skip
    plan = json.loads(perta(*asked, "--dry-run", "--json").out)
    shown = perta(*asked, "--dry-run")
    assert shown.status == 0
    assert all(step["title"] in shown.out for step in plan["steps"])
    assert shown.out.rstrip().endswith("Nothing was written.")
    assert shown.err == ""
    assert list(tmp_path.iterdir()) == []
    named = [step["name"] for step in plan["steps"]]
    assert named[:2] == ["calibrate", "finetune"]
    assert plan["operations"] == sum(step["operations"] for step in plan["steps"]) > 0
    refused = perta(*asked, "--dry-run", "--method", "tv", "--tokens", "answer")
    assert refused.status == 1
    assert "--tokens has no effect" in refused.err


def test_a_whole_run_as_json(perta: Run, world: World, tmp_path: Path) -> None:
    ran = perta(
        "unlearn", "--base", world.base, "--full", world.full, "--forget", world.forget,
        "--retain", world.retain, "--method", "tv", "--output", tmp_path / "out",
        "--max-new-tokens", 8, "--json", *TUNE,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert Path(found["output"]) == tmp_path / "out"
    assert Path(found["report"]).is_file()
    manifest = json.loads((tmp_path / "out" / "perta.json").read_text("utf-8"))
    results = manifest["unlearn"]["evaluation"]["after"]
    shown = found["evaluation"]["unlearned"]
    assert {name: value["agg_value"] for name, value in shown.items()} == results
    assert found["verdict"]["forgetting"]
    assert "value_by_index" not in ran.out
    assert "step 1 of " in ran.err


def test_every_command_that_prints_results_takes_json(
    perta: Run, world: World, tmp_path: Path
) -> None:
    made = perta(
        "people", "--output", tmp_path / "p", "--people", 4, "--forget-people", 1, "--json"
    )
    assert all(Path(file).is_file() for file in json.loads(made.out)["files"])
    tuned = perta(
        "finetune", "--base", world.base, "--data", world.forget, "--output", tmp_path / "f",
        "--epochs", 1, "--json",
    )  # fmt: skip
    assert json.loads(tuned.out) == {"output": str(tmp_path / "f")}
    edited = perta(
        "edit", "--full", world.full, "--base", world.base, "--forget-checkpoint", tmp_path / "f",
        "--method", "tv", "--output", tmp_path / "e", "--json",
    )  # fmt: skip
    assert json.loads(edited.out) == {"output": str(tmp_path / "e"), "direction": None}
    for command in ("importance", "moments", "merge-moments", "train", "demo", "bench compare"):
        assert "--json" in perta(*command.split(), "--help").out, command


def test_the_shell_completes_commands_and_options(
    perta: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.delenv("BASH_COMPLETION_USER_DIR", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert perta("--install-completion").status == 0
    (script,) = [p for p in tmp_path.rglob("*perta*") if p.is_file()]
    asked = f"""
        source {script}
        COMP_WORDS=(perta unlearn --forget-w); COMP_CWORD=2
        $(complete -p perta | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert "--forget-where" in done.stdout


def test_options_from_yaml_with_flags_on_top(perta: Run, world: World, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {world.base}\ndata: {world.forget}\noutput: {tmp_path / 'f'}\n"
        "epochs: 2\nlearning-rate: 0.001\nbatch_size: 1\n"
    )
    assert perta("finetune", "--config", file, "--epochs", 1).status == 0
    settings = json.loads((tmp_path / "f" / "perta.json").read_text())["settings"]
    assert (settings["epochs"], settings["learning_rate"], settings["batch_size"]) == (1, 1e-3, 1)
    file.write_text("learning_rat: 1\n")
    failed = perta("finetune", "--config", file, "--base", "b", "--data", "d", "--output", "o")
    assert failed.status != 0
    assert "learning" in failed.err


def test_a_file_of_options_can_ask_for_silence(
    perta: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.progress._quiet", False)
    file = tmp_path / "run.yaml"
    lines = f"base: {world.base}\ndata: {world.forget}\noutput: {tmp_path / 'f'}\nepochs: 1\n"
    file.write_text(f"{lines}quiet: true\n")
    done = perta("finetune", "--config", file)
    assert done.status == 0
    assert "to do" not in done.err
    monkeypatch.setattr("perta.progress._quiet", False)
    loud = perta("finetune", "--config", file, "--no-quiet", "--output", tmp_path / "g")
    assert "to do" in loud.err
    for wrong, message in (("quiet: 3", "true or false"), ("traceback: true", "command line")):
        file.write_text(f"{lines}{wrong}\n")
        failed = perta("finetune", "--config", file)
        assert (failed.status, message in failed.err) == (1, True)


def test_a_tilde_in_yaml_is_the_home_folder(
    perta: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(f"base: {world.base}\ndata: {world.forget}\noutput: ~/tuned\nepochs: 1\n")
    assert perta("finetune", "--config", file).status == 0
    assert (tmp_path / "home" / "tuned" / "perta.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run.yaml"]


@pytest.mark.parametrize(
    "made",
    [
        EditConfig(full="f", base="b", output=Path("~/out"), direction=Path("~/d")),
        EvaluateConfig(checkpoint="c", forget="f", output=Path("~/out")),
        ReportConfig(output=Path("~/out")),
        MuseConfig(checkpoint="c", output=Path("~/out")),
        UnlearnConfig(
            full="f", base="b", forget="f", retain="r", output=Path("~/out"), work_dir=Path("~/w")
        ),
    ],
    ids=lambda made: type(made).__name__,
)
def test_no_path_keeps_a_tilde(made: object) -> None:
    paths = {name: value for name, value in vars(made).items() if isinstance(value, Path)}
    assert paths["output"] == Path.home() / "out"
    assert not [path for path in paths.values() if "~" in str(path)]


def test_alpha_is_the_strength(perta: Run, world: World, tmp_path: Path) -> None:
    tuned = ("finetune", "--base", world.base, "--data", world.forget, "--output", tmp_path / "f")
    made = ("edit", "--full", world.full, "--base", world.base, "--forget-checkpoint",
            tmp_path / "f", "--method", "tv", "--alpha", 0.25,
            "--output", tmp_path / "out")  # fmt: skip
    assert perta(*tuned, *TUNE).status == 0
    assert perta(*made).status == 0
    settings = json.loads((tmp_path / "out" / "perta.json").read_text())["settings"]
    assert settings["scaling_coef"] == 0.25


@pytest.mark.parametrize("given", [("--steering-coef", 2), ("--steering-coef=2",)])
def test_a_setting_of_a_method_is_no_option(perta: Run, given: tuple[object, ...]) -> None:
    there = ("--base", "b", "--full", "f", "--forget", "r", "--output", "o")
    ran = perta("unlearn", *there, *given)
    assert ran.status == 2
    assert "It is a setting: --method NAME:steering_coef=VALUE, of `rmu`" in ran.err


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "perta", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()


def test_tables_in_a_pipe_are_not_cut(perta: Run) -> None:
    lines = perta("methods").out.splitlines()
    summary = get_method("perta-project").summary
    assert any("perta-project" in line and summary in line for line in lines)


def test_people_are_written_and_repeatable(perta: Run, tmp_path: Path) -> None:
    made = ("people", "--output", tmp_path / "p", "--people", 5, "--questions", 3)
    assert perta(*made, "--forget-people", 2).status == 0
    sizes = {
        p.stem: len(p.read_text("utf-8").splitlines()) for p in (tmp_path / "p").glob("*.jsonl")
    }
    assert sizes == {"forget": 6, "retain": 9, "full": 15, "holdout": 6}
    assert perta(*made, "--forget-people", 2).status == 0
    assert perta(*made, "--forget-people", 1).status == 1


def test_the_tiny_demo_shows_every_model(perta: Run, tmp_path: Path) -> None:
    asked = ("demo", "--tiny", "--output", tmp_path / "demo")
    plan = json.loads(perta(*asked, "--dry-run", "--json").out)
    assert list(tmp_path.iterdir()) == []
    assert not any(step["reused"] for step in plan["steps"])
    assert all(step["operations"] > 0 for step in plan["steps"])
    shown = perta(*asked)
    assert shown.status == 0, shown.err
    made = {p.parent.name for p in (tmp_path / "demo").glob("*/perta.json")}
    made |= {f"evaluate_{p.stem}" for p in (tmp_path / "demo" / "results").iterdir()}
    named = {step["name"].removeprefix("edit_") for step in plan["steps"]}
    named = {*named, "forget_checkpoint", "protected_moments"} - {"finetune", "merge_moments"}
    assert named == made - {"data", "others", "random", "perta-project_direction"}
    work = sum(p.stat().st_size for p in (tmp_path / "demo").rglob("*.safetensors"))
    assert plan["work"] == pytest.approx(work, rel=0.25)
    again = json.loads(perta(*asked, "--dry-run", "--json").out)
    assert [step["name"] for step in again["steps"]] == [step["name"] for step in plan["steps"]]
    assert all(step["reused"] for step in again["steps"])
    again = json.loads(perta("demo", "--tiny", "--output", tmp_path / "demo", "--json").out)
    assert again["evaluation"]["full"]["forget_probability"]["agg_value"] > 0.8
    for name in ("base", "full", "retrained", "tv", "perta-grad", "perta-fisher"):
        assert name in shown.out
    assert "share of retraining" in shown.out
    page = tmp_path / "again.html"
    assert perta("report", tmp_path / "demo", "--output", page, "--no-figures").status == 0
    assert "not a proof of erasure" in page.read_text("utf-8")
    assert (tmp_path / "demo" / "report.html").exists()
    results = {
        p.stem: json.loads(p.read_text("utf-8")) for p in (tmp_path / "demo/results").iterdir()
    }
    forget = {name: r["forget_probability"]["agg_value"] for name, r in results.items()}
    assert forget["full"] > 0.8
    for name in ("retrained", "tv", "perta-grad", "perta-fisher"):
        assert forget[name] < 0.5 * forget["full"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("unlern",), 2, "Did you mean"),
        (("finetune", "--bogus", "1"), 2, "--bogus"),
        (("finetune", "--base", "B"), 2, "--data is missing"),
        (("finetune", "--base", "B", "--data", "D", "--output", "O", "--epochs", "many"), 2,
         "--epochs"),
        (("edit", "--full", "{full}", "--base", "{base}", "--forget-checkpoint", "{full}",
          "--method", "perta-gard"), 1, "perta-grad"),
        (("edit", "--full", "{full}", "--base", "{base}", "--method", "ssd"), 1,
         "`ssd` needs --forget-importance"),
        (("edit", "--full", "{full}", "--base", "{base}", "--forget-checkpoint", "{base}"), 1,
         "`perta-project` needs --retain-moments"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}"), 1,
         "needs --retain"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}", "--retain",
          "{base}/none.jsonl", "--lora-targets", "q_proj"), 1, "--lora-rank is 0"),
        (("finetune", "--base", "{base}", "--data", "{forget}", "--warmup-ratio", "0.2"), 2,
         "--warmup-ratio"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}", "--method",
          "tv", "--unlearn-epochs", "2"), 1, "--unlearn-epochs has no effect with `tv`"),
        (("importance", "--checkpoint", "{base}", "--data", "{forget}", "--pass-batch-size", "0"),
         1, "--pass-batch-size is 0"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}", "--method",
          "npo", "--alpha", "2"), 1, "--scaling-coef has no effect with `npo`"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}", "--method",
          "tv", "--retain-budget", "0.2"), 1, "--scaling-coef auto"),
        (("unlearn", "--base", "{base}", "--full", "{full}", "--forget", "{forget}", "--method",
          "tv", "--tokens", "answer"), 1, "--tokens has no effect with `tv`"),
        (("edit", "--full", "{full}", "--base", "{base}", "--forget-checkpoint", "{base}",
          "--method", "tv"), 1, "forget checkpoint"),
        (("finetune", "--base", "./nowhere", "--data", "{forget}"), 1, "There is no checkpoint"),
        (("finetune", "--base", "{base}", "--data", "./no.jsonl"), 1, "There is no data file"),
        (("finetune", "--base", "{base}", "--data", "/dev/null"), 1, "a pipe or a device"),
        (("bench", "compare", "--base", "B", "--output", "O", "--methods", "tv", "npo", "rmu"), 2,
         "Not understood: npo rmu. Of several values each"),
        (("finetune", "--base", "{forget}", "--data", "{forget}"), 1, "is a file"),
        (("finetune", "--base", "{base}", "--data", "{forget}", "--epochs", "0"), 1, "--epochs"),
        (("finetune", "--base", "{base}", "--data", "{forget}", "--device", "cuda"), 1, "cuda"),
        (("importance", "--checkpoint", "{base}", "--data", "{forget}", "--order", "-1"), 1,
         "--order"),
        (("train", "--method", "nop", "--full", "{full}", "--forget", "{forget}"), 1,
         "Did you mean `npo`"),
        (("train", "--method", "npo", "--full", "{full}"), 1, "Give it with --forget"),
        (("train", "--method", "npo:beta=0", "--full", "{full}"), 1, "beta is 0"),
        (("evaluate", "--checkpoint", "{base}"), 1, "Nothing to evaluate on"),
        (("unlearn", "--config", "./none.yaml"), 1, "there is no such file"),
    ],
)  # fmt: skip
def test_mistakes_get_one_message(
    perta: Run,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"base": world.base, "full": world.full, "forget": world.forget}
    filled = [argument.format(**places) for argument in arguments]
    output = tmp_path / "out"
    ran = perta(*filled, *(() if status == 2 else ("--output", output)))
    assert ran.status == status, ran.err
    assert message in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert ran.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [("--moment-batch-size", "0"), ("--evaluation-batch-size=0",)])
def test_an_old_name_of_an_option_is_understood(
    perta: Run, world: World, given: tuple[str, ...], tmp_path: Path
) -> None:
    ran = perta(
        "unlearn", "--base", world.base, "--full", world.full, "--forget", world.forget,
        "--output", tmp_path / "out", *given,
    )  # fmt: skip
    assert ran.status == 1
    assert f"{given[0].partition('=')[0]} is called --pass-batch-size now." in ran.err
    assert "--pass-batch-size is 0" in ran.err


@pytest.mark.parametrize("given", [("--show-samples", "3"), ("--base", "x", "--show-samples=3")])
def test_samples_are_shown_by_evaluate(perta: Run, given: tuple[str, ...]) -> None:
    ran = perta("unlearn", *given)
    assert ran.status == 2
    (line,) = ran.err.splitlines()
    assert line.startswith("error: --show-samples is an option of `perta evaluate` alone")


def test_a_killed_run_leaves_nothing_half_written(world: World, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "perta", "finetune", "--base", str(world.base),
        "--data", str(world.retain), "--output", str(tmp_path / "f"), "--epochs", "100000",
        "--stop-loss", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_of_requests_from_its_first_entry_to_its_last(
    perta: Run, world: World, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"

    def step(name: str, *more: object) -> Ran:
        found = perta("requests", name, "--folder", ledger, *more)
        assert found.status == 0, found.err
        return found

    def entries() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (ledger / "ledger.jsonl").read_text().splitlines()]

    models = ("--base", world.base, "--full", world.full, "--retain", world.retain)
    assert "Ledger: " in step("init", *models).out
    added = step("add", "--forget", world.forget, "--name", "r1", "--operator", "A. Smith").out
    assert added.startswith("r1: 2 rows; head ")
    assert entries()[-1]["facts"]["operator"] == "A. Smith"
    applied = step("apply", "--method", "interpolate", "--alpha", 1, *TUNE).out
    assert "Applied: r1\nVerdict: " in applied
    assert f"Head: {entries()[-1]['hash']}" in applied
    assert "r1: 0 facts stand out" in step("recheck").out
    (told,) = json.loads(perta("requests", "status", ledger, "--json").out)["requests"]
    assert (told["name"], told["rows"], told["applied"], told["still_there"]) == ("r1", 2, 3, 0)
    (row,) = [r for r in perta("requests", "status", ledger).out.splitlines() if r[:5] == "│ r1 "]
    assert len(row) < 160
    assert told["verdict"].partition(".")[0] in row
    assert f"Deleted: {ledger}/rows/r1.jsonl" in step("clean").out
    checked = perta("requests", "verify", ledger, "--head", entries()[0]["hash"])
    assert f"5 entries fit, 0 of them signed; head {entries()[-1]['hash']}" in checked.out
    wrong = perta("requests", "add", "--folder", ledger, "--forget", "x", "--name", "../r1")
    assert (wrong.status, len(entries())) == (1, 5)


def test_clean_lists_what_it_deletes(perta: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    refused = perta("clean", tmp_path / "out")
    assert refused.status == 1
    assert "no run that can be cleaned" in " ".join(refused.err.split())
    shutil.copytree(world.full, tmp_path / "out.work" / "forget_checkpoint")
    planned = perta("clean", tmp_path / "out", "--dry-run")
    assert "Would be deleted:" in planned.out
    assert "forget_checkpoint" in planned.out
    assert (tmp_path / "out.work" / "forget_checkpoint").is_dir()
    assert perta("clean", tmp_path / "out").status == 0
    assert not (tmp_path / "out.work").exists()


def test_a_second_tuned_model_in_the_work_folder_is_named(
    perta: Run, world: World, tmp_path: Path
) -> None:
    asked = (
        "unlearn", "--base", world.base, "--full", world.full, "--forget", world.forget,
        "--method", "negmerge", "--alpha", 1, "--no-evaluate", *TUNE,
    )  # fmt: skip
    assert perta(*asked, "--output", tmp_path / "out").status == 0
    given = shutil.copytree(tmp_path / "out.work" / "forget_checkpoint", tmp_path / "given")
    ran = perta(*asked, "--output", tmp_path / "b", "--forget-checkpoint", given)
    assert ran.status == 0, ran.err
    assert [p.name for p in (tmp_path / "b.work").iterdir()] == ["forget_checkpoint_2"]
    assert "holds a model tuned on the forget set" in " ".join(ran.out.split())


ESCAPE = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202etxt"


def test_escape_sequences_of_files_do_not_reach_the_terminal(perta: Run, tmp_path: Path) -> None:
    rows = {"0": {"input": ESCAPE, "ground_truth": ESCAPE, "generation": ESCAPE}}
    told = {"agg_value": None, "missing": f"{ESCAPE}[/red]"}
    models = {ESCAPE: {"forget_rougeL_recall": {"agg_value": 0.5, "value_by_index": rows}}}

    def printed() -> dict[str, Any]:
        print_comparison(models)
        print_samples(models, 1)
        print_metrics({ESCAPE: told})
        print_json({ESCAPE: ESCAPE})
        say(ESCAPE)
        warn(ESCAPE)
        return method_cards()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perta.terminal.method_cards", printed)
        shown = perta("methods", "tv")
    (tmp_path / f"{ESCAPE}.yaml").write_text(f"? {ESCAPE}\n", "utf-8")
    failed = perta("unlearn", "--config", tmp_path / f"{ESCAPE}.yaml")
    traced = perta("unlearn", "--traceback", "--config", tmp_path / f"{ESCAPE}.yaml")
    assert (shown.status, failed.status, traced.status) == (0, 1, 1)
    assert "Traceback" in traced.err
    for text in (shown.out, shown.err, failed.err, traced.err):
        assert "red" in text
        assert not set(text) & {*"\x1b\x07\x9b\u202e"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Out of mem"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "Out of memory"),
        (OSError(28, "No space left on device", "x.json"), "The disk is full: x.json"),
        (Exception("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (Exception("I/O error: File too large (os error 27)"), "error: File too large. Check the"),
        (RuntimeError("shapes do not fit"), "a defect in perta"),
    ],
)
def test_what_ran_out_is_named_whichever_library_says_so(
    perta: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fails() -> str:
        raise error

    monkeypatch.setattr("perta.terminal.method_cards", fails)
    ran = perta("methods", "tv")
    assert ran.status == 1
    assert message in " ".join(ran.err.split())


def test_code_of_ones_own_that_fails_is_no_defect_of_ours(
    perta: Run, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "half.py"
    file.write_text(
        "from perta.methods.method import Block, Weighting\n"
        "class Half(Weighting):\n"
        "    name, summary, done = 'half-of-nothing', 'half', 'Half was taken off.'\n"
        "    formula, source = 'W = 1 / 0', 'this file'\n"
        "    def weigh(self, block: Block) -> float:\n"
        "        return 1 / 0\n"
    )
    tuned = ("finetune", "--base", world.base, "--data", world.forget, "--output", tmp_path / "f")
    assert perta(*tuned, "--epochs", "1").status == 0
    ran = perta(
        "edit", "--base", world.base, "--full", world.full, "--forget-checkpoint", tmp_path / "f",
        "--output", tmp_path / "out", "--method", "half-of-nothing", "--method-file", file,
    )  # fmt: skip
    KNOWN.pop("half-of-nothing")
    assert ran.status == 1
    assert f"{file}, line 6: ZeroDivisionError: division by zero" in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "half.py"]
