"""`perta bench`: files, reuse, references, the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import World
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, OutputExistsError
from perta.evidence.people import generate_people
from perta.evidence.settings import MuseConfig, TofuConfig
from perta.options import ComputeConfig
from perta.stages.bench import bench_muse, bench_tofu


@pytest.fixture
def tofu_folder(tmp_path: Path) -> Path:
    """A benchmark in TOFU's form, of fictitious people."""
    rows = generate_people(4, 2, seed=3)
    folder = tmp_path / "tofu"
    names = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "holdout01")
    for i, name in enumerate(names):
        write_jsonl(rows[2 * i : 2 * i + 2], folder / f"{name}.jsonl")
    return folder


def config(world: World, data: Path | str, output: Path, **more: Any) -> TofuConfig:
    return TofuConfig(
        checkpoint=str(world.full), data=str(data), forget_split="forget01", output=output, **more
    )


def test_results_serve_as_reference(world: World, tofu_folder: Path, tmp_path: Path) -> None:
    first = bench_tofu(config(world, tofu_folder, tmp_path / "a.json"))
    assert first["forget_quality"]["agg_value"] is None
    assert "retrained" in first["forget_quality"]["missing"]
    second = bench_tofu(
        config(world, tofu_folder, tmp_path / "b.json", reference=tmp_path / "a.json")
    )
    assert second["forget_quality"]["agg_value"] == pytest.approx(1.0)
    assert json.loads((tmp_path / "b.json").read_text())["perta"]["inputs"]["reference"]
    assert not list(tmp_path.glob("*.journal"))


def test_a_missing_file_leaves_its_metrics_out_with_the_reason(
    world: World, tofu_folder: Path, tmp_path: Path
) -> None:
    results = bench_tofu(config(world, tofu_folder, tmp_path / "a.json"))
    assert "world_facts" in results["wf_Q_A_Prob"]["missing"]
    assert results["model_utility"]["agg_value"] is None


def test_results_are_reused_until_something_changes(
    world: World, tofu_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(world, tofu_folder, tmp_path / "a.json")
    assert bench_tofu(settings) == bench_tofu(settings)
    assert "reused" in capsys.readouterr().err
    write_jsonl(generate_people(1, 2, seed=9), tofu_folder / "retain_perturbed.jsonl")
    with pytest.raises(OutputExistsError, match="made with other data"):
        bench_tofu(settings)


def test_a_killed_run_goes_on_where_it_stopped(
    world: World, tofu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(world, tofu_folder, tmp_path / "a.json")
    with monkeypatch.context() as patch:

        def killed(*_args: Any, **_more: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("perta.evidence.published.tofu.tofu_results", killed)
        with pytest.raises(KeyboardInterrupt):
            bench_tofu(settings)
    assert not settings.output.exists()
    lines = (tmp_path / "a.json.journal").read_text("utf-8").splitlines()
    assert len(lines) > 4
    with monkeypatch.context() as patch:

        def nothing_left(_model: Any, items: list[Any], *_more: Any) -> list[Any]:
            assert not items
            return []

        patch.setattr("perta.evidence.scoring.items.run_items", nothing_left)
        resumed = bench_tofu(settings)
    fresh = bench_tofu(config(world, tofu_folder, tmp_path / "b.json"))
    assert resumed["forget_Q_A_Prob"] == fresh["forget_Q_A_Prob"]


def test_files_come_from_the_hub_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    asked: list[tuple[str, str, str]] = []

    def load(name: str, subset: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        if "privleak" in (name, subset):
            return [{"text": "Ada Reed was born in Caldholm and Ada Reed is a potter."}] * 2
        if subset == "verbmem":
            return [{"prompt": "Ada Reed", "gt": "was born."}]
        return generate_people(1, 1, seed=len(asked))

    monkeypatch.setattr(datasets, "load_dataset", load)
    muse = MuseConfig(checkpoint=str(world.full), corpus="news", output=tmp_path / "muse.json")
    results = bench_muse(muse)
    assert ("muse-bench/MUSE-News", "knowmem", "forget_qa_icl") in asked
    assert results["forget_verbmem_ROUGE"]["agg_value"] is not None
    count = len(asked)
    bench_muse(MuseConfig(checkpoint=str(world.base), corpus="news", output=tmp_path / "b.json"))
    assert len(asked) == count
    changed = next((tmp_path / "cache").rglob("*.jsonl"))
    changed.write_text(changed.read_text().replace("a", "e"))
    bench_muse(MuseConfig(checkpoint=str(world.base), corpus="news", output=tmp_path / "c.json"))
    assert len(asked) == count + 1


def test_without_folder_and_hub_the_error_says_what_to_do(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_args: Any, **_more: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="Give a folder with the benchmark's JSONL files"):
        bench_tofu(TofuConfig(checkpoint=str(world.full), output=tmp_path / "a.json"))
    with pytest.raises(DataError, match="There is no folder"):
        bench_tofu(config(world, tmp_path / "none", tmp_path / "a.json"))


def local_task(folder: Path) -> Path:
    """A multiple-choice task with its data, both local files."""
    rows = [
        {"question": f"Who is number {i}?", "choices": ["Ada Reed", "nobody"], "answer": 0}
        for i in range(4)
    ]
    write_jsonl(rows, folder / "rows.jsonl")
    (folder / "people.yaml").write_text(
        "task: perta_people\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@pytest.mark.filterwarnings("default")
def test_general_ability_from_a_local_task(world: World, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from perta.evidence.settings import AbilityConfig
    from perta.stages.bench import bench_ability

    folder = local_task(tmp_path / "tasks")
    settings = AbilityConfig(
        checkpoint=str(world.full),
        output=tmp_path / "ability.json",
        tasks=("perta_people",),
        include_path=folder,
    )
    results = bench_ability(settings)
    assert 0 <= results["perta_people/acc"]["agg_value"] <= 1


@pytest.mark.parametrize(("given", "rows"), [(None, 16), (40, 40)])
def test_a_gpu_gets_no_more_rows_of_the_harness_which_bounds_no_tokens(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, rows: int
) -> None:
    import sys

    from perta.evidence.settings import AbilityConfig
    from perta.stages.bench import bench_ability

    asked: list[Any] = []

    def evaluate(**named: Any) -> None:
        asked.append(named["batch_size"])
        raise ValueError("enough")

    manager = SimpleNamespace(TaskManager=lambda *_, **__: SimpleNamespace(match_tasks=list))
    harness = SimpleNamespace(simple_evaluate=evaluate, tasks=manager, __version__="0")
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", manager)
    monkeypatch.setattr("perta.models.load.pick_device", lambda _: torch.device("cuda"))
    compute = ComputeConfig(dtype="float32", pass_batch_size=given)
    output = tmp_path / "b.json"
    settings = AbilityConfig(
        checkpoint=str(world.full), output=output, tasks=("a",), compute=compute
    )
    with pytest.raises(DataError, match="enough"):
        bench_ability(settings)
    assert asked == [rows]


def test_without_the_harness_the_error_says_how_to_get_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from perta.evidence.settings import AbilityConfig
    from perta.stages.bench import bench_ability

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        bench_ability(
            AbilityConfig(checkpoint=str(world.full), output=tmp_path / "b.json", tasks=("a",))
        )


OWN = """
from dataclasses import dataclass
from pathlib import Path

from perta.data.examples import load_examples
from perta.evidence.benchmark import Benchmark
from perta.evidence.quick import score_examples
from perta.evidence.results import table
from perta.evidence.settings import BenchmarkConfig
from perta.options import Flat


@Flat
@dataclass(frozen=True, kw_only=True)
class LossConfig(BenchmarkConfig):
    data: str
    scale: float = 1.0


class Loss(Benchmark[LossConfig]):
    name, summary, config = "loss", "Loss on the rows of a file.", LossConfig

    def run(self, model, tokenizer, config, given):
        scores = score_examples(model, tokenizer, load_examples(given.data))
        return {"rows_loss": table([{"score": config.scale * s.loss} for s in scores], "score")}
"""


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    from perta.cli import main

    monkeypatch.setattr("sys.argv", ["perta", *map(str, words)])
    main()


def test_a_benchmark_is_one_file(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, output = tmp_path / "own.py", tmp_path / "loss.json"
    own.write_text(OWN, "utf-8")
    rows = write_jsonl(generate_people(2, 2, seed=1), tmp_path / "rows.jsonl")
    words = ("bench", own, "--checkpoint", world.full, "--data", rows, "--output", output)
    run_command(monkeypatch, *words, "--scale", 2)
    assert "rows_loss" in capsys.readouterr().out
    results = json.loads(output.read_text("utf-8"))
    expected = 2 * mean_loss(world, rows)
    assert results["rows_loss"]["agg_value"] == pytest.approx(expected, rel=1e-6)
    assert results["perta"]["stage"] == "bench loss"
    run_command(monkeypatch, *words, "--scale", 2, "--json")
    printed = capsys.readouterr()
    assert "reused" in printed.err
    assert json.loads(printed.out) == {
        "rows_loss": {"agg_value": results["rows_loss"]["agg_value"]}
    }
    # Its code is part of what results depend on.
    own.write_text(OWN.replace("config.scale *", "3 * config.scale *"), "utf-8")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, *words, "--scale", 2)
    assert "other benchmark" in capsys.readouterr().err


def mean_loss(world: World, rows: Path) -> float:
    """Mean loss of the rows from a model's own loss, one row at a time."""
    from perta.data.examples import load_examples
    from perta.data.tokens import encode_examples
    from perta.models.load import load_model, load_tokenizer
    from perta.options import ComputeConfig, DataConfig

    model, tokenizer = load_model(world.full, ComputeConfig()), load_tokenizer(world.full)
    losses = []
    for row in encode_examples(load_examples(rows), tokenizer, DataConfig()).encoded:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        losses.append(float(model(input_ids=ids, labels=labels).loss.detach()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "it defines 0"),
        (OWN.replace("def run(", "def go("), "with a method `run`"),
        (OWN.replace("    name, summary, config =", "    name, label, config ="), "lacks summary"),
    ],
)
def test_a_file_without_a_benchmark_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own.py"
    own.write_text(text, "utf-8")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "bench", own, "--help")
    assert said in capsys.readouterr().err


def test_split_and_reference_are_checked_before_the_model_is_loaded(
    world: World, tofu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_args: Any) -> None:
        raise AssertionError("The model was loaded.")

    monkeypatch.setattr("perta.stages.bench.load_model", loaded)
    settings = config(world, tofu_folder, tmp_path / "a.json")
    with pytest.raises(ConfigError, match="must be forget01, 05 or 10"):
        bench_tofu(replace(settings, forget_split="forget02"))
    wrong = tmp_path / "reference.json"
    wrong.write_text('{"forget_truth_ratio": {"value_by_index": {"0": {"score": 1.0}}}}', "utf-8")
    with pytest.raises(DataError, match="of another split"):
        bench_tofu(replace(settings, reference=wrong))
    assert not settings.output.exists()
