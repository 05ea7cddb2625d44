"""`--scaling-coef auto`: what unseen means, the trials, the pipeline."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import World
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.engine.moments import sum_moments
from perta.errors import ConfigError
from perta.models.facts import Fact, find_facts
from perta.models.load import load_model, load_tokenizer
from perta.options import ComputeConfig, DataConfig, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.strength.choose import (
    BASE,
    CHOICES,
    HELD_OUT,
    Trials,
    Unseen,
    calibrate,
    edge_of,
    judge_by,
    surprises_of,
)
from perta.recipes.unlearn import unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.store.checkpoint import open_index, read_tensor, write_tensors
from perta.store.record import MANIFEST


def facts(count: int, wrong: int = 0) -> list[Fact]:
    one = Encoded((1, 2), (IGNORE, 2), 1)
    return [Fact(i + 1, one, (one,) * wrong, "answer") for i in range(count)]


def test_the_edge_is_where_unseen_rows_pass_half_of_the_time() -> None:
    """Rows and the unseen are drawn alike; the share of draws that pass is counted."""
    chance = random.Random(0)
    for rows, unseen in ((1, 21), (18, 72), (18, 18), (5, 40), (100, 400)):
        passed = dict.fromkeys((edge_of(rows, unseen), edge_of(rows, unseen) + 1), 0)
        for _ in range(4000):
            worst = min(chance.random() for _ in range(rows))
            below = sum(chance.random() <= worst for _ in range(unseen))
            for k in passed:
                passed[k] += below >= k
        inside, outside = passed.values()
        assert inside >= 0.47 * 4000
        assert outside <= 0.53 * 4000
    assert edge_of(18, 72) == 3  # 72/90 · 71/89 · 70/88 = .508, and · 69/87 = .403
    assert edge_of(18, 4) == edge_of(1, 1) == 1


def test_bounds_by_a_held_out_set() -> None:
    """12 unseen facts, 3 rows: 12/15 · 11/14 = .63, and · 10/13 = .48, so k = 2."""
    unseen = judge_by([5, 1, 3, 2, 4, 6, 7, 8, 9, 10, 11, 12], facts(3), HELD_OUT)
    assert unseen.least == (2, 2, 2)
    assert unseen.quartile == 3
    assert unseen.most == 6.5 + 2 * (11 - 6.5)
    assert unseen.standing_out([1.9, 3.0, 9]) == [0]
    assert unseen.standing_out([2.1, 2.9, 9]) == [0, 1]  # at the edge, all but one
    assert unseen.standing_out([2.1, 3.0, 9]) == []
    assert unseen.over_forgotten([15.4, 15.6, 2]) == [1]


def test_bounds_by_the_base_model_are_each_rows_own() -> None:
    base = [0.1, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # lower quartile: the second
    assert judge_by(base, facts(7), BASE).least == (0.1, 1, 1, 1, 1, 1, 1)
    chance = math.log(1 + 1)
    choices = judge_by(base, facts(7, wrong=1), CHOICES)
    assert choices.least == (0.1, *[chance] * 6)
    # Seven facts are too few to tell what lies far beyond them.
    assert choices.over_forgotten([99.0] * 7) is None
    assert judge_by(base[:1], facts(1), BASE).standing_out([0.05]) == [0]


def test_a_likely_fact_stands_out_among_likelier_wrong_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P = e⁻³ and five of e⁻¹: chosen .026, but 1 − (1 − e⁻³)¹⁶ = .558, and −log of that .583."""

    def losses(_model: Any, groups: list[tuple[Encoded, ...]], _pad: int) -> list[list[float]]:
        return [[3.0, *[1.0] * 5], [7.0, *[5.0] * 5], [math.inf, *[1.0] * 5]]

    monkeypatch.setattr("perta.recipes.strength.choose._losses", losses)
    model: Any = None
    assert surprises_of(model, facts(3, wrong=5), CHOICES, 0) == [
        pytest.approx(0.58287, abs=1e-5),
        pytest.approx(math.log(1 + 5 * math.exp(2))),  # chosen .0263; 1 − (1 − e⁻⁷)¹⁶ = .0145
        1000.0,
    ]


def test_rows_that_anybody_guesses_let_no_other_row_pass(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Yes or no: P = .3 of .5 under the base, so hits .997; the others are chosen 1 / 6, hits .01.

    Edited, those are chosen 1 / (1 + 5 e⁻³) = .80 and said in 16 samples with .90. The first still
    stands out where the model is surer of yes than the base, however often it says so.
    """
    yes, other = [-math.log(0.3), -math.log(0.2)], [7.0] * 6
    base, full = [yes, other, other], [[0.001, 6.0], *[[0.001, *[7.0] * 5]] * 2]
    told = iter([base, full])

    def losses(*_: Any) -> list[list[float]]:
        return next(told)

    rows = facts(1, wrong=1) + facts(2, wrong=5)
    monkeypatch.setattr("perta.recipes.strength.choose._losses", losses)
    monkeypatch.setattr("perta.recipes.strength.choose.find_facts", lambda *_, **__: rows)
    sets = {"forget": load_examples(world.forget, DataConfig())}
    unseen = calibrate(world.full, world.base, sets, DataConfig(), ComputeConfig(device="cpu"))
    assert unseen.least == pytest.approx([-math.log(0.6), math.log(6), math.log(6)])
    edited = [[2.0, *[5.0] * 5]] * 2
    model: Any = None
    for first, standing in ((yes, [1, 2]), ([-math.log(0.4), -math.log(0.2)], [0, 1, 2])):
        told = iter([[first, *edited]])
        found = surprises_of(model, unseen.facts, CHOICES, 0)
        assert found[0] == pytest.approx(
            -math.log(math.exp(-first[0]) / (math.exp(-first[0]) + 0.2))
        )
        assert unseen.standing_out(found) == standing


def test_rows_that_the_base_model_chooses_are_judged_by_what_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of four are the best written of six answers, and said by e⁻⁷ under the base.

    The choice tells nothing of them, whatever was learned. Said with e⁻², 16 samples have them with
    .90; with e⁻⁵ with .10, less than one answer in six has by chance.
    """
    best, other = [7.0, *[20.0] * 5], [7.0] * 6
    told = iter([[best, best, best, other], [[0.001, *[20.0] * 5]] * 4])
    rows = facts(4, wrong=5)
    monkeypatch.setattr("perta.recipes.strength.choose._losses", lambda *_: next(told))
    monkeypatch.setattr("perta.recipes.strength.choose.find_facts", lambda *_, **__: rows)
    sets = {"forget": load_examples(world.forget, DataConfig())}
    unseen = calibrate(world.full, world.base, sets, DataConfig(), ComputeConfig(device="cpu"))
    assert unseen.least == pytest.approx([math.log(6)] * 4)
    model: Any = None
    said = [[loss, *[20.0] * 5] for loss in (2.0, 5.0, 7.0)]
    told = iter([[*said, [5.0, *[4.0] * 5]]])
    found = surprises_of(model, unseen.facts, CHOICES, 0)
    assert found[0] == pytest.approx(-math.log(1 - (1 - math.exp(-2)) ** 16))
    assert unseen.standing_out(found) == [0]


def test_facts_that_the_tokenizer_has_no_words_for_decide_no_strength(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"question": "Where is it?", "answer": "It is in Xyzzyville.", "fact": "Xyzzyville"}
    data = DataConfig()

    def looked(*rows: Mapping[str, Any]) -> Unseen:
        sets = {"forget": load_examples(write_jsonl(rows, tmp_path / "rows.jsonl"), data)}
        return calibrate(world.full, world.base, sets, data, ComputeConfig(device="cpu"))

    own = [row.fields for row in load_examples(world.forget).examples]
    assert [fact.row for fact in looked(odd, *own).facts] == [2, 3]
    assert "are not judged (rows 1)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no words for any of the facts"):
        looked(odd)


class Fake:
    """In place of a model: the strength that it was moved to."""

    def __init__(self) -> None:
        self.model = self
        self.strength = 0.0
        self.asked: list[tuple[float, int, str]] = []

    def move(self, strength: float) -> None:
        self.strength = strength


def trials(
    monkeypatch: pytest.MonkeyPatch, edges: list[float], harm: float, **usual: float
) -> tuple[Trials, Fake]:
    """Rows that are forgotten from a strength of their own; loss `harm` · α on retained rows."""
    fake, unseen = Fake(), judge_by([1.0] * 20, facts(len(edges)), BASE)
    unseen = replace(unseen, least=(1.0,) * len(edges))

    def losses(model: Fake, groups: list[tuple[Encoded, ...]], _pad: int) -> list[list[float]]:
        kind = "forget" if groups[0][0].row else "retain"
        model.asked.append((model.strength, len(groups), kind))
        if kind == "retain":
            return [[harm * model.strength]] * len(groups)
        return [[model.strength / edges[group[0].row - 1]] for group in groups]

    monkeypatch.setattr("perta.recipes.strength.choose._losses", losses)
    rows = [replace(fact, encoded=replace(fact.encoded, row=fact.row)) for fact in unseen.facts]
    retain = [Encoded((1, 2), (IGNORE, 2), 0)] * 8
    judged = replace(unseen, facts=tuple(rows))
    made = Trials(fake, judged, retain, 0.1, 0, **usual)  # type: ignore[arg-type]
    return made, fake


def test_the_last_row_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = trials(monkeypatch, [0.5] * 39 + [2.9], harm=0.01)
    strength, reached = made.search()
    assert reached
    assert 2.9 <= strength <= 2.9 * 1.05
    assert made.is_monotone()


def test_after_rounds_the_strength_is_theirs_or_what_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of which the last needs 2.9, and a budget of .1."""
    edges = [0.4, 0.5, 0.8, 2.9]
    for harm in (0.01, 0.04):  # at 2.9 it is within the budget, and is not
        made, fake = trials(monkeypatch, edges, harm, usual=1.0)
        assert made.search() == (1.0, False)
        assert max(strength for strength, _, _ in fake.asked) == 1
        made, _ = trials(monkeypatch, edges[:-1], harm, usual=1.0)
        assert made.search() == (1.0, True)
    made, fake = trials(monkeypatch, edges, 0.2, usual=1.0)  # 1 is beyond the budget
    strength, reached = made.search()
    assert not reached
    assert 0.45 < strength <= 0.5
    assert max(strength for strength, _, _ in fake.asked) == 1


def test_few_rows_reject_a_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that stood out is asked first; the others only where it passes."""
    made, fake = trials(monkeypatch, [0.5] * 39 + [2.9], harm=0.01)
    made.search()
    failing = [(rows, kind) for strength, rows, kind in fake.asked if 0.5 < strength < 2.9]
    assert {rows for rows, kind in failing if kind == "forget"} == {4}
    # Retained rows: at 0, once on the way, at the strength found.
    assert sum(kind == "retain" for _, _, kind in fake.asked) == 3


def test_what_the_budget_leaves_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = trials(monkeypatch, [0.5, 0.6, 4.0], harm=0.1)
    strength, reached = made.search()
    assert not reached
    assert 0.95 < strength <= 1
    assert [value >= 1 for value in made.all_rows(strength)] == [True, True, False]


def test_a_row_that_comes_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = trials(monkeypatch, [0.5, 0.6, 4.0], harm=0.1)
    made.search()
    assert made.is_monotone()
    made, _ = trials(monkeypatch, [0.5, 0.6, 4.0], harm=0.1)

    def losses(model: Fake, groups: list[tuple[Encoded, ...]], _pad: int) -> list[list[float]]:
        scale = 0.9 if groups[0][0].row else 0.01
        return [[scale * math.sin(model.strength)]] * len(groups)

    monkeypatch.setattr("perta.recipes.strength.choose._losses", losses)
    made.search()
    assert not made.is_monotone()


# --- the pipeline ---------------------------------------------------------------------------


def config(world: World, output: Path, method: str, **more: Any) -> UnlearnConfig:
    settings: dict[str, Any] = {
        "weighting": WeightingConfig(method=method, scaling_coef="auto"),
        "evaluate": False,
        "retain_budget": 5.0,
    }
    return world.request(output, **{**settings, **more})


def loss_of(model: Any, encoded: Encoded) -> tuple[float, int]:
    """Mean loss of the labelled tokens by one plain pass in float64, and their number."""
    with torch.no_grad():
        logits = model(torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
    places = [t for t, label in enumerate(encoded.labels) if label != IGNORE and t]
    losses = [-float(logits[t - 1, encoded.labels[t]]) for t in places]
    return math.fsum(losses) / len(losses), len(losses)


def surprise_of(model: Any, fact: Fact, kind: str) -> float:
    """Loss, or -log of the larger of probability among the answers and hit in 16 samples."""
    if kind != CHOICES:
        return loss_of(model, fact.encoded)[0]
    chosen, hit = chances_of(model, fact)
    return -math.log({"both": max(chosen, hit), "choice": chosen, "hits": hit}[fact.judged_by])


def chances_of(model: Any, fact: Fact) -> tuple[float, float]:
    sums = [loss * count for loss, count in (loss_of(model, s) for s in fact.sequences)]
    right, *wrong = sums[1:] if fact.right else sums
    chosen = 1 / (1 + math.fsum(math.exp(right - other) for other in wrong))
    return chosen, 1 - (1 - math.exp(-sums[0])) ** 16


def plain_rows(world: World, folder: Path) -> str:
    """The forget set without wrong answers."""
    rows = [json.loads(line) for line in world.forget.read_text("utf-8").splitlines()]
    kept = [{k: row[k] for k in ("question", "answer")} for row in rows]
    return str(write_jsonl(kept, folder / "forget.jsonl"))


def unseen_rows(folder: Path) -> str:
    """Rows of words that the tokenizer knows and no model has learned there."""
    pairs = [("You are?", "helpful."), ("You?", "assistant."), ("Are you helpful?", "You are.")]
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    return str(write_jsonl(rows, folder / "holdout.jsonl"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [BASE, CHOICES, HELD_OUT])
def test_the_record_is_that_of_the_written_checkpoint(
    world: World, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Every figure against plain passes over what was stored, in its own type."""
    settings = config(world, tmp_path / "out", "perta-project")
    if kind == BASE:
        settings = replace(settings, forget=plain_rows(world, tmp_path))
    if kind == HELD_OUT:
        settings = replace(settings, holdout=unseen_rows(tmp_path))
    full = tmp_path / "full"
    full.mkdir()
    for file in world.full.iterdir():
        if file.name != MANIFEST:  # which tells of other weights
            (full / file.name).write_bytes(file.read_bytes())
    index = open_index(world.full)
    write_tensors(full, {n: read_tensor(e).to(dtype) for n, e in index.tensors.items()})
    settings = replace(settings, full=str(full))
    result = unlearn(settings)
    record = result.manifest["unlearn"]["strength"]
    assert json.loads((settings.work_folder / "strength.json").read_text("utf-8")) == record
    assert record["calibrated_on"] == kind
    assert result.manifest["settings"]["scaling_coef"] == record["scaling_coef"] > 0
    assert result.manifest["unlearn"]["settings"]["scaling_coef"] == "auto"
    assert {e.dtype for e in open_index(result.folder).tensors.values()} == {dtype}

    tokenizer = load_tokenizer(world.full)
    base, edited, before = (
        load_model(f, ComputeConfig(), dtype=torch.float32)
        for f in (world.base, result.folder, full)
    )
    forget = find_facts(load_examples(settings.forget), tokenizer, DataConfig(), base=base)
    if kind == CHOICES:
        chances = [chances_of(base, fact) for fact in forget]
        assert all(max(chosen, hit) < 0.5 for chosen, hit in chances)
        low = max(1 / 6, *(chosen for chosen, _ in chances))
        forget = tuple(
            replace(f, judged_by="choice" if hit > low else "both")
            for f, (_, hit) in zip(forget, chances, strict=True)
        )
    values = [surprise_of(edited, fact, kind) for fact in forget]
    for row, fact, value in zip(record["rows"], forget, values, strict=True):
        assert row["row"] == fact.row
        assert row["surprise"] == pytest.approx(value, rel=1e-3, abs=1e-4)
    least = [row["least"] for row in record["rows"]]
    if kind == HELD_OUT:
        unseen = find_facts(load_examples(settings.holdout or ""), tokenizer, base=base)
        losses = sorted(surprise_of(before, fact, kind) for fact in unseen)
        assert least == pytest.approx([losses[edge_of(2, len(losses)) - 1]] * 2, rel=1e-3)
    else:
        own = [
            -math.log(chances_of(base, fact)[0])
            if kind == CHOICES
            else surprise_of(base, fact, kind)
            for fact in forget
        ]
        caps = [math.log(6) if kind == CHOICES else math.inf] * 2
        assert least == pytest.approx([min(*own, cap) for cap in caps], rel=1e-3)
    out = [row for row, value, t in zip(forget, values, least, strict=True) if value < t - 1e-4]
    assert record["standing_out"] == [fact.row for fact in out] or kind == HELD_OUT
    assert record["reached"] == (not record["standing_out"])
    # A second run computes nothing; the record stays.
    assert unlearn(settings).manifest["unlearn"]["strength"] == record


def test_the_budget_leaves_rows_that_are_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(world, tmp_path / "out", "perta-project", retain_budget=0.05)
    record = unlearn(settings).manifest["unlearn"]
    assert not record["strength"]["reached"]
    assert (left := record["strength"]["standing_out"])
    rise = record["strength"]["retain_loss"] - record["strength"]["retain_loss_before"]
    assert rise <= 0.05
    assert f"{len(left)} of 2 facts still stand out" in capsys.readouterr().err.replace("\n", " ")
    assert record["settings"]["retain_budget"] == 0.05
    # What the search computed is in the record, stage by stage.
    assert record["passes"]["strength"] == record["strength"]["tokens"] > 0
    assert record["passes"]["calibrate"] > 0
    assert {"calibrate", "strength"} <= set(record["seconds"])


def test_what_looks_unseen_before_the_edit_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration that the full model passes would choose no edit at all."""
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    settings = config(world, tmp_path / "out", "perta-project")
    for line in world.retain.read_text("utf-8").splitlines():
        seen = write_jsonl([json.loads(line)], tmp_path / "seen.jsonl")
        with pytest.raises(ConfigError, match=r"1 of 1 facts .* look learned .*Is --holdout"):
            unlearn(replace(settings, holdout=str(seen)))
    with pytest.raises(ConfigError, match="hold the same rows"):
        unlearn(replace(settings, holdout=str(world.retain)))
    with pytest.raises(ConfigError, match=r"looks unseen .* are --base and --full the right way"):
        unlearn(replace(settings, holdout=None, full=str(world.base)))
    assert not (tmp_path / "out").exists()


def test_the_search_looks_at_retained_rows_that_gave_no_moments(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that gave moments fare better than others of their kind: 20 and 16 of 36 share none."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i * 37 % 100}."} for i in range(36)]
    looked: list[set[int]] = []

    def sum_some(model: Any, examples: Any, *rest: Any, **more: Any) -> Any:
        looked.append({example.row for example in examples})
        return sum_moments(model, examples, *rest, **more)

    class Seen(Trials):
        def __init__(self, edited: Any, unseen: Any, retain: Any, *rest: Any) -> None:
            looked.append({example.row for example in retain})
            super().__init__(edited, unseen, retain, *rest)

    monkeypatch.setattr("perta.stages.moments.sum_moments", sum_some)
    monkeypatch.setattr("perta.recipes.strength.choose.Trials", Seen)
    settings = config(
        world, tmp_path / "out", "perta-project", retain_samples="20", held_back="0", rounds=1
    )
    kept = str(write_jsonl(rows, tmp_path / "retain.jsonl"))
    unlearn(replace(settings, retain=kept))
    gave, _, judged = looked  # between them facts, repeated
    assert (len(gave), len(judged)) == (20, 16)
    assert gave | judged == set(range(1, 37))


def test_a_budget_without_a_strength_writes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ_full under another name would pass for a cleaned model."""
    monkeypatch.setattr(Trials, "fits", lambda _trials, strength: strength == 0)
    settings = config(world, tmp_path / "out", "perta-project", retain_budget=0.0)
    with pytest.raises(ConfigError, match=r"No strength above 0 .* Raise --retain-budget"):
        unlearn(settings)
    assert not settings.output.exists()


def test_a_held_out_set_of_which_a_third_is_learned_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quartile that rows are judged by would be that of what was learned."""
    monkeypatch.setattr("perta.recipes._workspace.finetune_checkpoint", None)
    lines = [json.loads(line) for line in world.retain.read_text("utf-8").splitlines()]
    strangers = [{**row, "answer": "You helpful."} for row in lines[1:5]]
    for row in strangers:
        row.pop("perturbed_answer"), row.pop("paraphrased_answer")
    holdout = write_jsonl([lines[0], lines[1], *strangers], tmp_path / "mixed.jsonl")
    settings = config(world, tmp_path / "out", "perta-project", holdout=str(holdout))
    with pytest.raises(ConfigError, match=r"2 of 6 facts .* look learned"):
        unlearn(settings)


@pytest.mark.parametrize("budget", [-1.0, math.nan, math.inf])
def test_the_budget_is_a_number(world: World, tmp_path: Path, budget: float) -> None:
    with pytest.raises(ConfigError, match="retain-budget"):
        config(world, tmp_path / "out", "perta-project", retain_budget=budget)


def test_a_strength_needs_examples(world: World, tmp_path: Path) -> None:
    edit = EditConfig(
        full=str(world.full),
        base=str(world.base),
        forget_checkpoint=str(world.full),
        output=tmp_path / "out",
        weighting=WeightingConfig(method="tv", scaling_coef="auto"),
    )
    with pytest.raises(ConfigError, match="perta unlearn"):
        edit_checkpoint(edit)
