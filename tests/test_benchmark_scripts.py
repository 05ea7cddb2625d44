"""The benchmark scripts' own arithmetic and pictures; what they measure is not tested."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import tiny_llama
from perta.data.batch import Encoded, bucketed
from perta.methods.directions import projected_direction

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("perta.progress._quiet", False)  # put back when scripts have their silence


def test_models_on_paper_have_the_published_sizes() -> None:
    from paper import MODELS

    published = {"1B": 1_235_814_400, "8B": 8_030_261_248}
    published |= {"70B": 70_553_706_496, "405B": 405_853_388_800}
    # Two norms a layer and one at the end are left out on paper.
    counts = {m.name: m.parameters + (2 * m.layers + 1) * m.width for m in MODELS}
    assert counts == published


def test_the_busiest_resource_is_named() -> None:
    from paper import Node, Stage, times

    node = Node(gpus=2, tensor=100, double=50, utilisation=0.5, bandwidth=10, disk=4)
    stage = Stage("any", operations=1000, traffic=60, disk=20, memory=0, double=100)
    assert times(stage, node) == {"arithmetic": 12.0, "GPU memory": 3.0, "disk": 5.0}


def test_requests_are_averaged_over_seeds() -> None:
    from many_requests import table

    rows = {"full, 1": {"p": 1.0}, "in turn, 1": {"p": 0.5, "seconds": 2.0}}
    more = {"full, 1": {"p": 0.5}, "in turn, 1": {"p": 0.0, "seconds": 4.0}}
    lines = table({"0": rows, "1": more}).splitlines()
    assert lines[0] == "| model, requests | p | seconds |"
    assert lines[2:] == ["| full, 1 | 0.750 | – |", "| in turn, 1 | 0.250 | 3.000 |"]


def test_tables_on_the_page_are_those_of_the_script() -> None:
    from paper import MODELS, Node, Work, by_gpus, table

    page = (SCRIPTS.parent / "docs" / "scale.md").read_text("utf-8")
    for model in MODELS:
        assert table(model, Work(), Node()) in page
    assert by_gpus(MODELS[:3], Work(), Node()) in page


def test_passes_on_paper_are_as_large_as_the_package_makes_them() -> None:
    from paper import MODELS, Work, stages

    rows = [Encoded((3,) * 64, (3,) * 64, row) for row in range(1, 200)]
    assert bucketed(rows, 128, 0)[0].input_ids.numel() == Work().at_once
    # Two bytes a weight, read twice, and a sum in float32, read and written, for each pass.
    work, size = Work(forget=4096, sample=2), MODELS[0].parameters
    (importance,) = (s for s in stages(MODELS[0], work) if s.name.startswith("importance"))
    assert importance.traffic == 3 * (4 + 8) * size


def test_a_split_is_refused_without_the_files_it_splits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import rivals

    given = ["rivals.py", "run", str(tmp_path / "work"), "--base", "b", "--split", "forget10"]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr(rivals, "run", print)
    with pytest.raises(SystemExit):
        rivals.main()
    assert "give --tofu as well" in capsys.readouterr().err


def test_memory_is_counted_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import scale

    # A tied model of one block: embedding, four of attention, three of the MLP, three norms.
    monkeypatch.setitem(scale.MODELS, "small", (64, 128, 1, 8, True))
    count = 128_256 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64
    sums_here = scale.measuring_peak("small", {})
    sums_there = scale.measuring_peak("small", {"accumulate_on": "cpu"})
    assert sums_here - sums_there == 4 * count  # float32 sums
    sums_here = scale.measuring_peak("small", {}, 4)
    part_there = scale.measuring_peak("small", {"accumulate_on": "cpu"}, 4)
    assert sums_here - part_there == 4 * count / 4  # of each sum a quarter of the rows
    assert sums_there > 2 * count  # bfloat16 weights
    tuned = scale.tuning_peak("small", scale.TUNINGS["all weights"], batch=1, length=8)
    assert tuned > 16 * count  # weights, gradients and AdamW's two moments
    quarter = scale.tuning_peak("small", scale.TUNINGS["all weights"], 4, batch=1, length=8)
    whole = 2 * 4 * (count - 128_256 * 64)  # of a layer at a time, weights and gradients
    assert 16 * count / 4 + whole < quarter < tuned


def test_a_record_is_drawn_as_it_was_saved(tmp_path: Path) -> None:
    from plots import draw
    from records import Record, read, save

    record = Record("A claim", "ratio", "two repeats", {"one": [1.0, 3.0], "two": [5.0]}, 1.0)
    save(record, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == record
    axes = draw(record).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


def test_all_that_needs_a_gpu_runs_at_toy_size_without(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, about a name of transformers
        assert gpu.main(["--cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["section"] for line in lines} == {"machine", *gpu.SECTIONS}
    same = [line for line in lines if line.get("what") == "importance, again"]
    assert [(line["order_1"], line["order_2"]) for line in same] == [(0, 0)]


def test_a_section_that_takes_too_long_is_named_and_the_others_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    def forever(_run: gpu.Run) -> None:
        while True:
            pass

    monkeypatch.setitem(gpu.SECTIONS, "correct", forever)
    assert gpu.main(["--cpu", "--minutes", "0.01", "correct", "solve"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["failed"] for line in lines if "failed" in line] == [
        "TimeoutError: over 0.01 minutes"
    ]
    assert any("outputs" in line for line in lines)


def test_rivals_see_no_row_that_they_are_judged_by() -> None:
    from rivals import draw

    rows = draw(1)
    texts = {name: {row["question"] for row in part} for name, part in rows.items()}
    sizes = {name: len(texts[name]) for name in ("forget", "protected", "new people", "new rows")}
    assert sizes == {"forget": 18, "protected": 70, "new people": 42, "new rows": 14}
    assert not texts["protected"] & (texts["new people"] | texts["new rows"] | texts["forget"])
    assert texts["retain"] == texts["protected"] | texts["new people"] | texts["new rows"]
    assert not texts["full"] & texts["holdout"]
    people = {name: {row["person"] for row in part} for name, part in rows.items()}
    assert not people["new people"] & people["protected"]
    assert people["new rows"] == people["protected"]


def test_rivals_on_tofu_see_no_row_that_they_are_judged_by() -> None:
    from rivals import draw

    tofu = Path(__file__).parents[2] / "shared" / "data" / "tofu"
    if not tofu.exists():
        pytest.skip(f"TOFU's files are not at {tofu}")
    rows = draw(1, tofu)
    texts = {name: {row["question"] for row in part} for name, part in rows.items()}
    sizes = {name: len(part) for name, part in rows.items()}
    assert sizes == {
        **{"forget": 20, "paraphrased": 20, "protected": 64, "new people": 20, "new rows": 16},
        **{"retain": 100, "full": 120, "holdout": 40},
    }
    assert not texts["protected"] & (texts["new people"] | texts["new rows"] | texts["forget"])
    assert not texts["full"] & texts["holdout"]


def test_a_weight_is_kept_where_the_loss_is_steep() -> None:
    """Against a loop over pairs, from the largest product of eigenvalues on."""
    from rival_edits import steep_part

    torch.manual_seed(0)
    weight, x, y = (
        torch.randn(3, 4).double(),
        torch.randn(9, 4).double(),
        torch.randn(9, 3).double(),
    )
    inputs, outputs = x.T @ x, y.T @ y
    (a, v), (g, u) = torch.linalg.eigh(inputs), torch.linalg.eigh(outputs)
    pairs = sorted(((float(g[i] * a[j]), i, j) for i in range(3) for j in range(4)), reverse=True)
    wanted, seen = torch.zeros(3, 4).double(), 0.0
    for product, i, j in pairs:
        if seen >= 0.8 * float(inputs.trace() * outputs.trace()):
            break
        seen += product
        wanted += (u[:, i] @ weight @ v[:, j]) * torch.outer(u[:, i], v[:, j])
    torch.testing.assert_close(steep_part(weight, inputs, outputs, 0.8), wanted)
    torch.testing.assert_close(steep_part(weight, inputs, outputs, 1.0), weight)


def test_a_gradient_is_collapsed_on_both_sides() -> None:
    """Along each large pair of singular vectors it is left with s · (s_k / s)²."""
    from rival_edits import collapsed

    torch.manual_seed(1)
    gradient = torch.randn(4, 5).double()
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    left = [s[i] * (s[2] / s[i]) ** 2 if i < 3 else s[i] for i in range(4)]
    wanted = sum(left[i] * torch.outer(u[:, i], vt[i]) for i in range(4))
    torch.testing.assert_close(collapsed(gradient, 3), wanted)


def test_the_step_of_a_collapsed_gradient_goes_up_the_loss() -> None:
    from perta.data.batch import Encoded, bucketed
    from perta.models.loss import losses_of
    from rival_edits import PROJECTIONS, collapsed_ascent

    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [Encoded(tuple(range(3 + i, 9 + i)), (-100, *range(4 + i, 9 + i)), i) for i in range(4)]
    losses = losses_of(model, rows, batch_size=4, pad=0)
    collapsed_ascent(model, bucketed(rows, 2, 0))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        name for name in before if name.removesuffix(".weight").endswith(PROJECTIONS)
    }
    assert sum(losses_of(model, rows, batch_size=4, pad=0)) > sum(losses)
    squares = [
        sum(float((p - start).detach().square().sum()) for p, start in pairs)
        for pairs in (
            [(p, before[name]) for name, p in model.named_parameters()],
            [(before[name], torch.zeros(())) for name in changed],
        )
    ]
    # However small the gradient: a step of the weights' last bits is no direction.
    assert math.sqrt(squares[0] / squares[1]) == pytest.approx(0.01, rel=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_a_task_vector_is_split_by_what_retained_rows_use() -> None:
    """All parts are the whole; those at their shares, one direction each, are the projection."""
    from learned import RHO, split_by_use

    torch.manual_seed(0)
    vector, inputs = torch.randn(3, 5), torch.randn(9, 5) * torch.tensor([9.0, 3, 1, 0.3, 0.1])
    moment = inputs.T @ inputs / 9
    for bins in (1, 2, 5):
        parts, shares = split_by_use(vector, moment, bins)
        torch.testing.assert_close(parts.sum(0), vector)
        assert shares.tolist() == sorted(shares.tolist())
        used = [float((inputs @ part.T).norm() / part.norm()) for part in parts]
        assert used == sorted(used, reverse=True)
    wanted = projected_direction(vector, moment, RHO).delta.float()
    torch.testing.assert_close(split_by_use(vector, moment, 0)[0][0], wanted)
    torch.testing.assert_close((shares[:, None, None] * parts).sum(0), wanted, rtol=1e-4, atol=1e-5)


def test_shares_are_learned_down_the_loss() -> None:
    """A step goes against the slope that differences of the loss have."""
    import learned
    from perta.data.batch import Encoded, collate
    from perta.models.loss import example_losses

    model = tiny_llama()
    rows = [Encoded(tuple(range(3 + i, 9 + i)), (-100, *range(4 + i, 9 + i)), i) for i in range(4)]
    encoded = {"forget": rows[:2], "protected": rows[2:]}
    seed: Any = SimpleNamespace(encoded=encoded, pad=0, products=nullcontext, model=model)
    weight = model.model.layers[0].mlp.up_proj.weight
    part = learned.Parts(
        weight, weight.detach().clone(), 0.1 * torch.randn(3, *weight.shape), torch.ones(3)
    )

    def loss() -> float:
        forget, retain = (collate(seed.encoded[name], 0) for name in ("forget", "protected"))
        with torch.no_grad():
            known = (-example_losses(model, forget)).exp().mean()
            return float(known + 2 * example_losses(model, retain).mean())

    logs = [torch.zeros(3)]
    found = []
    for place in range(3):  # central differences
        ends = []
        for step in (1e-2, -1e-2):
            moved = logs[0].clone()
            moved[place] += step
            learned.put([part], [moved])
            ends.append(loss())
        found.append((ends[0] - ends[1]) / 2e-2)
    learned.learn(seed, [part], logs, 1, 2.0)
    # The first step of Adam has the sign of the gradient.
    assert min(map(abs, found)) > 1e-4
    assert logs[0].sign().tolist() == [-math.copysign(1, slope) for slope in found]


def test_rivals_are_told_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from rivals import table

    lines = [
        {"seed": 1, "method": "retrained", "asked rate": None, "operations": 200, "hit": 0.1},
        {"seed": 1, "method": "tv", "asked rate": None, "operations": 50, "alpha": 1.5},
        {"seed": 1, "method": "kl", "asked rate": 1e-3, "rate": 1e-3, "diverged": "in epoch 2"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_text(text, "utf-8")
    table(Namespace(work=tmp_path, seeds=[1]))
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| `retrained` | – | 1.000 |")
    assert rows[3].startswith("| `tv` | 1.500 | 0.250 |")
    assert rows[4].startswith("| `kl`, 0.001 | diverged | – |")


def test_the_simulation_of_the_audit_runs_at_toy_size(capsys: pytest.CaptureFixture[str]) -> None:
    import audit

    audit.main(["--quick"])
    told = capsys.readouterr().out
    assert "| `fact` | 0 of 1 |" in told
    assert "| not sure (?) | " in told
    assert told.count("Student's, 3") == sum(draw.tail == 3 for draw in audit.DRAWS)


def test_a_stored_audit_is_judged_as_it_was(tmp_path: Path) -> None:
    import audit

    audit.make_world(1, tmp_path, 1, ("fact", "choice", "loss", "frames"))
    for file in sorted(tmp_path.glob("*.json")):
        made = json.loads(file.read_text("utf-8"))
        again = {name: (j.verdict, j.reason) for name, j in audit.judge_again(made).items()}
        assert again == {p["name"]: (p["verdict"], p["reason"]) for p in made["probes"]}
        beside = audit.judge_again(made, "base")["fact"].yardstick
        assert beside is not None
        assert beside[0] == "base"


def test_audits_in_folders_of_one_name_are_judged_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import audit

    def write(place: str, last: float) -> Path:
        """Eight rows about nobody in particular, all unknown but the last."""
        scores = {"full": [1.0] * 8, "retrained": [1e-4] * 8, "cleaned": [1e-4] * 7 + [last]}
        probe = {"name": "fact", "group": "verbatim", "scores": scores, "other_scores": {}}
        numbers = {"row_numbers": {"forget": [*range(1, 9)]}, "subject_numbers": {"forget": []}}
        file = tmp_path / place / "audit.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"probes": [{**probe, "more": {}}], **numbers}), "utf-8")
        return file

    mine, other = write("1/mine", 1e-4), write("1/other", 1e-4)
    audit.print_again([mine, other])
    # Of eight rows of which none is left up to 1 - .025^(1/8) = .37 may be, of sixteen .21.
    assert "| `fact` | ? | ? |" in capsys.readouterr().out
    worse = write("2/other", 0.9)
    audit.print_again([mine, other, write("2/mine", 1e-4), worse])
    assert capsys.readouterr().out.splitlines() == [
        "| probe | `mine` | `other` |",
        "| --- | --- | --- |",
        "| `fact` | + | **L** 0.90 |",
        "| passed (+) | 1 | 0 |",
        "| not sure (?) | 0 | 0 |",
        "| leaks (L) | 0 | 1 |",
        "| harmed (H) | 0 | 0 |",
    ]
    both = audit.pooled([json.loads(file.read_text("utf-8")) for file in (other, worse)])
    (found,) = audit.judge_again(both).values()
    assert found.value is not None
    assert (found.value.n, found.worst_row) == (16, (1008, 0.9))
