"""Rounds of the forget fine-tune: what is left is tuned on again, and added."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import TUNE, make_world
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import load_examples
from perta.engine.train.tune import tune
from perta.errors import ConfigError, DivergenceError, NotLearnedError
from perta.methods.registry import with_defaults
from perta.models.facts import Fact
from perta.models.load import load_model, load_tokenizer, pad_id
from perta.options import ComputeConfig, WeightingConfig
from perta.recipes.settings import UnlearnConfig
from perta.recipes.strength.choose import (
    BASE,
    CHOICES,
    HELD_OUT,
    Calibration,
    Unseen,
    calibrate,
    surprises_of,
)
from perta.recipes.strength.rounds import _Left, _parts, _Run, _said_again, write_rounds
from perta.recipes.unlearn import Unlearned, unlearn
from perta.stages.edit import edit_checkpoint
from perta.stages.settings import EditConfig
from perta.stages.stage import At
from perta.store.checkpoint import open_index, read_tensor
from perta.store.fingerprint import fingerprint
from perta.store.record import read_manifest

PROJECT = WeightingConfig(method="perta-project", scaling_coef="auto")


@pytest.fixture(scope="module")
def request_of_rounds(tmp_path_factory: pytest.TempPathFactory) -> UnlearnConfig:
    """Six people, three of them to be forgotten, and a model of three blocks."""
    root = tmp_path_factory.mktemp("rounds")
    return make_world(root, people=6, forget_people=3, blocks=3).request(
        root / "clean",
        weighting=PROJECT,
        tune=replace(TUNE, epochs=60),
        retain_budget=5.0,
        rounds=6,
        evaluate=False,
    )


@pytest.fixture(scope="module")
def run(request_of_rounds: UnlearnConfig) -> tuple[UnlearnConfig, Unlearned]:
    return request_of_rounds, unlearn(request_of_rounds)


def test_each_round_takes_half_of_what_is_left(run: tuple[UnlearnConfig, Unlearned]) -> None:
    config, result = run
    manifest = read_manifest(config.work_folder / "forget_rounds")
    assert manifest is not None
    rounds: list[dict[str, Any]] = manifest["rounds"]
    assert rounds[0]["rows"] == 6
    assert 2 < len(rounds) <= 6
    for before, after in itertools.pairwise(rounds):
        assert len({*before["left"], *(before["returning"] or ())}) == after["rows"]
    assert rounds[0]["returning"] is None
    assert rounds[-1]["returning"] is not None
    assert 0 <= rounds[-1]["comes_back"] < 1
    record = result.manifest["unlearn"]
    assert record["passes"]["rounds"] == manifest["passes"] > 0
    assert record["rounds"] == rounds
    assert record["seconds"]["rounds"] > 0


def test_rows_that_rounds_leave_do_not_decide_the_strength(
    run: tuple[UnlearnConfig, Unlearned],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The budget would allow more; the strength is that of the rounds, and the rows are named."""
    monkeypatch.setattr("perta.recipes.strength.rounds._LASTS", ())
    config = replace(run[0], rounds=2, output=run[0].output.with_name("last"))
    record = unlearn(config).manifest["unlearn"]["strength"]
    made = read_manifest(config.work_folder / "forget_rounds") or {}
    left = made["rounds"][-1]["left"]
    assert left
    assert record["standing_out"] == left
    assert not record["reached"]
    assert record["in_rounds"]
    assert record["scaling_coef"] == 1
    assert record["retain_loss"] - record["retain_loss_before"] < config.retain_budget
    rows = ", ".join(map(str, left))
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{len(left)} of 6 facts still stand out after the rounds: rows {rows}. Allow more" in said
    )


def left_by(config: UnlearnConfig, made: Path, output: Path, **settings: Any) -> list[int]:
    """Rows that stand out after the edit that users make of a written checkpoint."""
    weighting = with_defaults(replace(PROJECT, scaling_coef=1.0, **settings))
    edit = edit_of(config, made, output, weighting)
    unseen, edited = unseen_of(config), edit_checkpoint(edit)
    pad = pad_id(load_tokenizer(edited))
    model = load_model(edited, ComputeConfig(), dtype=torch.float32)
    surprises = surprises_of(model, unseen.facts, unseen.calibrated_on, pad)
    return [unseen.facts[place].row for place in unseen.standing_out(surprises)]


def written(
    config: UnlearnConfig, folder: Path, most: int, **weighting: Any
) -> tuple[Path, list[dict[str, Any]]]:
    """Rounds from the forget checkpoint that a request has, and what they did."""
    checkpoint = config.work_folder / "forget_checkpoint"
    chosen = with_defaults(replace(PROJECT, **weighting))
    edit = edit_of(config, checkpoint, folder.with_name("none"), chosen)
    unseen = unseen_of(config)
    made = write_rounds(At(folder), edit, unseen, config.tune, config.compute, most)
    return made, (read_manifest(made) or {})["rounds"]


def edit_of(
    config: UnlearnConfig, made: Path, output: Path, weighting: WeightingConfig
) -> EditConfig:
    return EditConfig(
        base=config.base,
        full=config.full,
        forget_checkpoint=str(made),
        retain_moments=config.work_folder / "protected_moments",
        output=output,
        weighting=weighting,
    )


def unseen_of(config: UnlearnConfig) -> Unseen:
    sets = {"forget": load_examples(config.forget)}
    return calibrate(Path(config.full), Path(config.base), sets, config.data_config, config.compute)


def test_all_rounds_are_one_edit_of_one_forget_checkpoint(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path
) -> None:
    made = run[0].work_folder / "forget_rounds"
    manifest = read_manifest(made)
    assert manifest is not None
    assert left_by(run[0], made, tmp_path / "edited") == manifest["rounds"][-1]["left"]


@pytest.mark.parametrize(
    ("included", "late"), [((), False), (("*.mlp.*", "*.self_attn.*"), False), (("*.2.*",), True)]
)
def test_the_first_round_leaves_the_last_third_of_the_blocks_unless_that_is_all(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, included: tuple[str, ...], late: bool
) -> None:
    config, _ = run
    made, (only,) = written(config, tmp_path / "rounds", 1, include=included)
    assert only["left"] == left_by(config, made, tmp_path / "edited", include=included)
    assert only["untouched"] == (0 if late else 7)  # q, k, v and o; gate, up and down
    stored = [
        open_index(Path(folder)).tensors
        for folder in (config.base, config.work_folder / "forget_checkpoint", made)
    ]
    for name in stored[0]:
        base, tuned, total = (read_tensor(tensors[name]).double() for tensors in stored)
        is_left = not late and ".2." in name and "norm" not in name
        step = 0.0 if is_left else only["scaling_coef"] * (tuned - base)
        torch.testing.assert_close(total, base + step, rtol=1e-5, atol=1e-6)
        assert is_left <= torch.equal(total, base)


def test_a_first_round_before_others_goes_a_share_of_the_way(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path
) -> None:
    _, (alone,) = written(run[0], tmp_path / "alone", 1)
    first, *_ = (read_manifest(run[0].work_folder / "forget_rounds") or {})["rounds"]
    assert first["scaling_coef"] == pytest.approx(0.35 * alone["scaling_coef"])


@pytest.mark.parametrize(
    ("found", "first", "later"),
    [
        # The first goes all the way, and the second is tried again, at last from the base.
        ([1.0, None, None, None], 1.0, []),
        ([1.0, None, 0.5, None, None], 1.0, [0.5]),
        ([1.0, 0.5, None, None], 0.35, [0.5]),
        ([1.0, 0.5, None, 0.25, None, 0.75, None, None], 0.35, [0.5, 0.25, 0.75]),
    ],
)
def test_a_later_round_that_finds_no_strength_is_followed_by_the_last(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: list[float | None],
    first: float,
    later: list[float],
) -> None:
    strengths, looks = iter(found), iter([_Left([2], [0, 2], 0.5), _Left([], [], 0.0)])
    monkeypatch.setattr("perta.recipes.strength.rounds.search_coarsely", lambda *_: next(strengths))
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", lambda _: next(looks))
    _, rounds = written(run[0], tmp_path / "rounds", 7)
    assert [made["scaling_coef"] for made in rounds] == [pytest.approx(first), *later, 0.5]
    assert rounds[-1]["rows"] == 2
    assert next(strengths, None) is None


def test_rows_that_the_edited_model_knows_as_ever_are_tuned_on_from_the_base(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = run
    found = iter([1.0, 1.0, None, 0.5, None, None])
    monkeypatch.setattr("perta.recipes.strength.rounds.search_coarsely", lambda *_: next(found))
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", lambda _: _Left([], [], 0.0))
    kept = list[tuple[list[int], bool, Path]]()
    tune_some = _Run._tune

    def tune_them(self: _Run, rows: Sequence[int], *, anew: bool = False) -> Path:
        made = tune_some(self, rows, anew=anew)
        kept.append(([*rows], anew, Path(shutil.copytree(made, tmp_path / f"tuned-{len(kept)}"))))
        return made

    monkeypatch.setattr("perta.recipes.strength.rounds._Run._tune", tune_them)
    _, (_, before, after) = written(config, tmp_path / "rounds", 7)
    assert [anew for _, anew, _ in kept] == [False, False, True, False, True]
    rows, _, folder = kept[2]
    facts = unseen_of(config).facts
    assert rows == kept[1][0]
    assert [facts[place].row for place in rows] == before["left"]
    base = load_model(Path(config.base), ComputeConfig(), dtype=torch.float32)
    pad = pad_id(load_tokenizer(Path(config.base)))
    taught, _ = tune(base, [facts[place].encoded for place in rows], config.tune, pad=pad)
    stored = open_index(folder).tensors
    for name, tensor in taught.state_dict().items():
        if name in stored:
            torch.testing.assert_close(read_tensor(stored[name]), tensor)
    assert after["scaling_coef"] == 0.5


def test_a_first_round_that_goes_on_is_one_that_went_all_the_way(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = run
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", lambda _: _Left([], [], 0.0))
    whole, (at,) = written(config, tmp_path / "whole", 2)  # no round goes on from there
    found = iter([at["scaling_coef"], None, None, None])
    monkeypatch.setattr("perta.recipes.strength.rounds.search_coarsely", lambda *_: next(found))
    seen = list[list[int]]()
    tune_some = _Run._tune

    def tune_them(self: _Run, rows: Sequence[int], *, anew: bool = False) -> Path:
        seen.append([self._unseen.facts[place].row for place in rows])
        return tune_some(self, rows, anew=anew)

    monkeypatch.setattr("perta.recipes.strength.rounds._Run._tune", tune_them)
    twice, (gone_on,) = written(config, tmp_path / "twice", 6)
    assert gone_on["scaling_coef"] == pytest.approx(at["scaling_coef"])
    assert gone_on["untouched"] == at["untouched"] == 7
    assert seen[-1] == left_by(config, whole, tmp_path / "edited")
    one, other = (open_index(place).tensors for place in (whole, twice))
    for name in one:
        torch.testing.assert_close(read_tensor(one[name]), read_tensor(other[name]))


def test_a_last_round_teaches_the_edited_model_what_comes_back(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much of that step is taken as its record says."""
    monkeypatch.setattr("perta.recipes.strength.rounds._STEPS", 2)
    config, _ = run
    weighting = with_defaults(replace(PROJECT, scaling_coef=1.0))
    first = config.work_folder / "forget_checkpoint"
    unseen, edit = unseen_of(config), edit_of(config, first, tmp_path / "none", weighting)
    one, two = (
        write_rounds(At(tmp_path / f"{most}"), edit, unseen, config.tune, config.compute, most)
        for most in (1, 2)
    )
    edited = edit_checkpoint(edit_of(config, one, tmp_path / "edited", weighting))
    before, last = (read_manifest(two) or {})["rounds"]
    facts, pad = unseen.facts, pad_id(load_tokenizer(edited))
    attack = replace(
        config.tune,
        epochs=2,
        batch_size=2,
        accumulation=1,
        schedule="constant",
        warmup_ratio=0.0,
        stop_loss=0.0,
    )
    returning, hits = set[int](), []
    for part in range(3):
        model = load_model(edited, ComputeConfig(), dtype=torch.float32)
        model, _ = tune(model, [fact.encoded for fact in facts[part::3]], attack, pad=pad)
        for fact in (fact for place, fact in enumerate(facts) if place % 3 != part):
            hit = said_in_64(model, fact)
            (surprise,) = surprises_of(model, [fact], unseen.calibrated_on, pad)
            if hit > 0.05 or unseen.stands_out(facts.index(fact), surprise):
                returning.add(fact.row)
            hits.append(hit)
    assert {*before["returning"]} == returning
    assert before["comes_back"] == pytest.approx(sum(hits) / 12, rel=1e-3)
    assert before["left"] == left_by(config, one, tmp_path / "again")
    rows = [fact for fact in facts if fact.row in returning | {*before["left"]}]
    assert len(rows) == last["rows"]
    model = load_model(edited, ComputeConfig(), dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taught, _ = tune(model, [fact.encoded for fact in rows], config.tune, pad=pad)
    stored = [open_index(folder).tensors for folder in (one, two)]
    missed = moved = 0.0
    for name, tensor in taught.state_dict().items():
        if name in stored[0]:
            at_one, at_two = (read_tensor(tensors[name]).double() for tensors in stored)
            step = last["scaling_coef"] * (tensor - start[name]).double()
            missed += (at_two - at_one - step).square().sum().item()
            moved += step.square().sum().item()
    assert missed < 1e-3 * moved  # AdamW enlarges the rounding of where it starts ten thousandfold


@torch.no_grad()
def said_in_64(model: Any, fact: Fact) -> float:
    """How likely a fact is in one of 64 samples."""
    logits = model(torch.tensor([fact.encoded.input_ids])).logits[0, :-1].double()
    labels = torch.tensor(fact.encoded.labels[1:])
    chances = logits.log_softmax(-1)[labels >= 0, labels[labels >= 0]]
    return float(1 - (1 - chances.sum().exp()) ** 64)


@pytest.mark.parametrize(
    ("looks", "strengths", "left"),
    [
        # None is left, and there is no last round.
        ([0], [], 0),
        # The smallest strength that leaves none.
        ([3, 2, 0], [1.0], 0),
        # Where none does, the smallest that leaves fewest; and again, of those.
        ([5, 3, 3, 0], [0.5, 0.5], 0),
        # No strength leaves fewer than there were.
        ([2, 2, 3], [], 2),
        ([5, 4, 2, 2, 4], [1.0], 2),
        # Three times at most.
        ([6, 5, 5, 4, 4, 3, 3], [0.5, 0.5, 0.5], 3),
    ],
)
@pytest.mark.parametrize("returns", [False, True])
def test_last_rounds_go_on_while_fewer_rows_are_left(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: list[int],
    strengths: list[float],
    left: int,
    returns: bool,
) -> None:
    unseen, found = unseen_of(run[0]), iter(looks)

    def look(_: Any) -> _Left:
        rows = list(range(next(found)))
        return _Left([], rows, 0.5) if returns else _Left(rows, [], 0.5)

    taught, tune_some = list[list[int]](), _Run._tune

    def tune_them(self: _Run, rows: Sequence[int], *, anew: bool = False) -> Path:
        taught.append([*rows])
        return tune_some(self, rows, anew=anew)

    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", look)
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._tune", tune_them)
    _, rounds = written(run[0], tmp_path / "rounds", 4)
    last = rounds[len(rounds) - len(strengths) :]
    assert [entry["scaling_coef"] for entry in last] == strengths
    assert rounds[len(rounds) - len(strengths) - 1]["returning"] is not None
    rows = [fact.row for fact in unseen.facts[:left]]
    assert rounds[-1]["returning" if returns else "left"] == rows
    assert rounds[-1]["left" if returns else "returning"] == []
    assert next(found, None) is None
    # Of the rows alone that were left.
    assert all(rows == [*range(len(rows))] for rows in taught)
    assert taught[:1] == ([[*range(looks[0])]] if looks[0] else [])
    assert [len(rows) for rows in taught[: len(strengths)]] == [e["rows"] for e in last]


def test_a_few_rows_may_come_back_but_none_stand_out(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of six is less than a quarter."""
    looks = iter([_Left([4], [1], 0.5), _Left([], [1, 2], 0.4), _Left([], [1], 0.3)])
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", lambda _: next(looks))
    _, (first, last) = written(run[0], tmp_path / "rounds", 4)
    numbers = [fact.row for fact in unseen_of(run[0]).facts]
    assert (first["left"], first["returning"]) == ([numbers[4]], [numbers[1]])
    assert (last["rows"], last["scaling_coef"]) == (2, 1.0)
    assert (last["left"], last["returning"], last["comes_back"]) == ([], [numbers[1]], 0.3)


def test_a_row_that_stands_out_counts_more_than_any_that_come_back(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [0, 1, 2, 3, 4]
    found = [_Left([], every), _Left([1], []), _Left([], every[:3])]
    looks = iter([*found, *[_Left([], every)] * 2])
    monkeypatch.setattr("perta.recipes.strength.rounds._Run._look", lambda _: next(looks))
    _, (_, last) = written(run[0], tmp_path / "rounds", 4)
    assert (last["scaling_coef"], len(last["returning"])) == (1.0, 3)


@pytest.mark.parametrize(
    ("kind", "judged_by", "least", "hit", "found"),
    [
        (CHOICES, "both", 1.0, 0.06, True),
        (CHOICES, "both", 1.0, 0.04, False),
        (CHOICES, "hits", 1.0, 0.06, True),
        (CHOICES, "choice", 1.0, 0.99, False),  # the base model says it too
        (BASE, "both", 5.0, 0.06, True),
        (BASE, "both", 5.0, 0.04, False),
        # An unseen fact of two tokens at one nat each is said with .9999 in 64 samples.
        (BASE, "both", 1.0, 0.9998, False),
        (HELD_OUT, "both", 1.0, 0.99999, True),
    ],
)
def test_a_fact_comes_back_where_it_is_said_more_than_an_unseen_one(
    kind: Calibration, judged_by: Any, least: float, hit: float, found: bool
) -> None:
    fact = Fact(3, Encoded((1, 2, 3), (IGNORE, 2, 3), 3), (), "wrong answers", judged_by=judged_by)
    unseen = Unseen(kind, (least,), (least,), least, None, (fact,))
    assert _said_again(unseen, [0], [hit]) == ([0] if found else [])


def test_rows_of_one_fact_are_taught_together() -> None:
    said = (5, 6, 5, 7, 8, 6)
    facts = [
        Fact(row, Encoded((1, word), (IGNORE, word), row), (), "wrong answers")
        for row, word in enumerate(said, 1)
    ]
    assert _parts(facts) == [[0, 2, 4], [1, 5], [3]]
    assert _parts(facts[:1]) == [[0]]
    assert _parts([facts[0], facts[2]]) == [[0, 1]]


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_alone_has_no_others_to_be_taught(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: int,
) -> None:
    """And nobody says that it does not come back."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(run[0].forget).read_text("utf-8").splitlines(True)[:count]))
    _, (*_, last) = written(replace(run[0], forget=str(few)), tmp_path / "rounds", 4)
    assert (last["comes_back"] is None) == (last["returning"] is None) == (count == 1)
    said = capsys.readouterr().err
    assert ("come back once others are taught" in said) == (count == 2)
    assert ("what comes back nobody can tell from one fact" in said) == (count == 1)


def test_what_diverges_is_tuned_at_a_third_of_the_rate(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, rates, lowest = run[0].tune.learning_rate or 0.0, list[float](), 0.2

    def tuned(model: Any, examples: Any, config: Any, **more: Any) -> Any:
        rates.append(config.learning_rate)
        if config.learning_rate > lowest * rate:
            raise DivergenceError("too fast")
        return tune(model, examples, config, **more)

    monkeypatch.setattr("perta.recipes.strength.rounds.tune", tuned)
    written(run[0], tmp_path / "rounds", 2)
    assert rates[:3] == pytest.approx([rate, rate / 3, rate / 9])
    lowest = 0.0
    with pytest.raises(DivergenceError, match="too fast"):
        written(run[0], tmp_path / "never", 2)


def test_rounds_of_adapters_are_one_adapter(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No model of full size is written but the output; a given adapter is that of round 1."""
    monkeypatch.setenv("PERTA_CACHE", str(tmp_path / "cache"))
    tune = replace(run[0].tune, lora_rank=4, learning_rate=2e-2)
    config = replace(run[0], tune=tune, output=tmp_path / "clean")
    unlearn(config)
    made, first = (config.work_folder / name for name in ("forget_rounds", "forget_checkpoint"))
    rounds = (read_manifest(made) or {})["rounds"]
    assert json.loads((made / "adapter_config.json").read_text())["r"] == 4 * len(rounds)
    assert left_by(config, made, tmp_path / "edited") == rounds[-1]["left"]
    largest = max(p.stat().st_size for p in config.work_folder.rglob("*.safetensors"))
    assert largest < (config.output / "model.safetensors").stat().st_size
    assert not (tmp_path / "cache" / "merged").exists()
    given = replace(config, forget_checkpoint=str(first), output=tmp_path / "given", work_dir=None)
    with pytest.raises(NotLearnedError, match="does not know the rows to forget: its loss"):
        unlearn(given)
    monkeypatch.setattr("perta.stages.finetune._FIT", 10.0)
    unlearn(given)
    said = re.findall(r"its loss on the facts is ([\d.]+) nats", capsys.readouterr().err)
    record = read_manifest(first) or {}
    assert [float(loss) for loss in said] == [pytest.approx(record["final_loss"], abs=1e-3)]
    stored = [load_file(place / "model.safetensors") for place in (config.output, given.output)]
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_a_first_round_that_leaves_nothing_is_the_forget_checkpoint(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path
) -> None:
    config, _ = run
    once = replace(config, rounds=1, output=tmp_path / "once")
    unlearn(once)
    assert not (once.work_folder / "forget_rounds").exists()
    first, more = (
        open_index(folder).tensors
        for folder in (
            once.work_folder / "forget_checkpoint",
            config.work_folder / "forget_checkpoint",
        )
    )
    assert all(torch.equal(read_tensor(first[name]), read_tensor(more[name])) for name in first)


def test_a_given_forget_checkpoint_is_that_of_the_first_round(
    run: tuple[UnlearnConfig, Unlearned], tmp_path: Path
) -> None:
    config, _ = run
    given = str(shutil.copytree(config.work_folder / "forget_checkpoint", tmp_path / "given"))
    other = replace(config, forget_checkpoint=given, output=tmp_path / "out", work_dir=None)
    result = unlearn(other)
    assert not (other.work_folder / "forget_checkpoint").exists()
    made = [open_index(place.work_folder / "forget_rounds").tensors for place in (config, other)]
    assert all(torch.equal(read_tensor(t), read_tensor(made[1][n])) for n, t in made[0].items())
    assert result.manifest["unlearn"]["inputs"]["forget_checkpoint"] == fingerprint(Path(given))


@pytest.mark.parametrize(
    ("weighting", "more", "message"),
    [
        (WeightingConfig(method="tv"), {}, "structured method"),
        (replace(PROJECT, scaling_coef=2.0), {}, "scaling-coef auto"),
        (PROJECT, {"forget_seeds": 2}, "forget-seeds"),
    ],
)
def test_rounds_without_effect_are_refused(
    run: tuple[UnlearnConfig, Unlearned],
    tmp_path: Path,
    weighting: WeightingConfig,
    more: dict[str, Any],
    message: str,
) -> None:
    usual = UnlearnConfig.retain_budget
    config = replace(
        run[0], weighting=weighting, retain_budget=usual, output=tmp_path / "refused", **more
    )
    with pytest.raises(ConfigError, match=message):
        unlearn(config)
    assert not config.work_folder.exists()
