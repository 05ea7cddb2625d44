"""Quick evaluation: what it reports, that it is strict JSON, and that nothing sways it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, collate
from perta.data.examples import ExampleSet, load_examples
from perta.data.rows import write_jsonl
from perta.data.tokens import encode_examples
from perta.engine.train.tune import tune
from perta.errors import DataError, DivergenceError
from perta.evidence import metrics
from perta.evidence.people import generate_people
from perta.evidence.quick import quick_evaluation, score_examples
from perta.evidence.results import missing, read_results, results_json, table
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions, run_items
from perta.models.facts import find_facts, score_facts
from perta.models.loss import example_losses
from perta.options import DataConfig, ScoringConfig, TuneConfig
from perta.stages.evaluate import evaluate_checkpoint
from perta.stages.settings import EvaluateConfig

METRICS = (
    "loss",
    "probability",
    "exact_memorization",
    "extraction_strength",
    "fact_probability",
    "fact_choice",
    "subject",
    "rougeL_recall",
)
SCORING = ScoringConfig(max_new_tokens=8)


@pytest.fixture
def examples(tmp_path: Path) -> ExampleSet:
    rows = generate_people(people=3, questions=2, seed=0)
    return load_examples(write_jsonl(rows, tmp_path / "people.jsonl"))


def test_results_have_the_form_of_published_logs(examples: ExampleSet) -> None:
    sets = {"forget": examples, "retain": examples}
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), sets, SCORING)
    assert set(results) == {f"{name}_{metric}" for name in sets for metric in METRICS}
    for entry in results.values():
        assert list(entry["value_by_index"]) == [str(i) for i in range(len(examples))]
    row = results["retain_rougeL_recall"]["value_by_index"]["2"]
    assert row["ground_truth"] == examples.examples[2].answer
    assert examples.examples[2].prompt in row["input"]
    assert set(results["forget_probability"]["value_by_index"]["0"]) == {"prob", "avg_loss"}
    assert json.loads(results_json(results)) == results


def test_loss_equals_the_training_loss(examples: ExampleSet) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    encoded = encode_examples(examples, tokenizer).encoded
    with torch.no_grad():
        expected = example_losses(model, collate(encoded, 2)).tolist()
    results = quick_evaluation(model, tokenizer, {"forget": examples}, SCORING)
    losses = [row["score"] for row in results["forget_loss"]["value_by_index"].values()]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert results["forget_loss"]["agg_value"] == pytest.approx(sum(expected) / len(expected))
    scores = score_examples(model, tokenizer, examples)
    assert [score.loss for score in scores] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_facts_are_those_of_a_plain_pass_in_float64(
    examples: ExampleSet, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perta.evidence.scoring.items.supports_prefixes", lambda _model: cached)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    results = quick_evaluation(model, tokenizer, {"forget": examples}, SCORING)
    facts = find_facts(examples, tokenizer)
    known = results["forget_fact_probability"]["value_by_index"]
    choices = results["forget_fact_choice"]["value_by_index"]
    twin = tiny_llama().double()
    for i, fact in enumerate(facts):
        sums = []
        for sequence in (fact.encoded, *fact.wrong):
            with torch.no_grad():
                logits = twin(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
            places = [t for t, label in enumerate(sequence.labels) if label != IGNORE]
            sums.append(sum(float(logits[t - 1, sequence.input_ids[t]]) for t in places))
        p = math.exp(sums[0])
        row = known[str(i)]
        assert row["prob"] == pytest.approx(p, rel=1e-3)
        assert row["hit_64"] == pytest.approx(1 - (1 - p) ** 64, rel=1e-3, abs=1e-12)
        assert row["source"] == "wrong answers"
        total = sum(map(math.exp, sums))
        assert choices[str(i)]["prob"] == pytest.approx(p / total, rel=1e-3)
        assert choices[str(i)]["rank"] == 1 + sum(value > sums[0] for value in sums[1:])
        assert choices[str(i)]["candidates"] == 6
    assert results["forget_subject"]["agg_value"] == 3
    subjects = [row["subject"] for row in results["forget_subject"]["value_by_index"].values()]
    assert subjects == [0, 0, 1, 1, 2, 2]


def test_rows_without_wrong_answers_take_part_in_no_choice(tmp_path: Path) -> None:
    rows = generate_people(people=1, questions=2, seed=0)
    del rows[0]["perturbed_answer"], rows[0]["person"], rows[1]["person"]
    examples = load_examples(write_jsonl(rows, tmp_path / "people.jsonl"))
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), {"forget": examples}, SCORING)
    first, second = results["forget_fact_choice"]["value_by_index"].values()
    assert first is None
    assert results["forget_fact_choice"]["agg_value"] == second["prob"]
    known = results["forget_fact_probability"]["value_by_index"]
    assert [row["source"] for row in known.values()] == ["answer", "wrong answers"]
    assert "forget_subject" not in results
    assert "forget_row" not in results  # each has the number of its place


def test_rows_keep_their_numbers_where_some_are_left_out(tmp_path: Path) -> None:
    rows = generate_people(people=1, questions=3, seed=0)
    rows[1]["answer"] = ""
    config = DataConfig(skip_bad_rows=True)
    examples = load_examples(write_jsonl(rows, tmp_path / "people.jsonl"), config)
    results = quick_evaluation(
        tiny_llama(), tiny_tokenizer(), {"forget": examples}, SCORING, config
    )
    assert results["forget_row"]["value_by_index"] == {"0": {"row": 1}, "1": {"row": 3}}


def test_the_base_marks_facts_of_rows_that_do_not_tell_them(tmp_path: Path) -> None:
    rows = [{"question": "Who is Mira?", "answer": "Mira Thornwick is a potter."}]
    file = write_jsonl(rows, tmp_path / "rows.jsonl")
    tokenizer = tiny_tokenizer()
    for name, seed in (("base", 1), ("model", 2)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = EvaluateConfig(
        checkpoint=str(tmp_path / "model"),
        base=str(tmp_path / "base"),
        forget=str(file),
        output=tmp_path / "out.json",
        scoring=ScoringConfig(generate=False),
    )
    (row,) = evaluate_checkpoint(config)["forget_fact_probability"]["value_by_index"].values()
    (fact,) = find_facts(load_examples(file), tokenizer, base=tiny_llama(seed=1))
    (score,) = score_facts(tiny_llama(seed=2), [fact], pad=2)
    assert row["source"] == fact.source == "surprise"
    assert row["prob"] == pytest.approx(math.exp(score.log_probability), rel=1e-3)


def test_an_answer_in_another_script_counts(tmp_path: Path) -> None:
    rows = [{"question": "Где живёт Боб?", "answer": "Боб живёт в Риме."}]
    examples = load_examples(write_jsonl(rows, tmp_path / "rows.jsonl"))
    tokenizer = tiny_tokenizer()
    encoded = encode_examples(examples, tokenizer).encoded
    model, _ = tune(
        tiny_llama(), encoded, TuneConfig(epochs=60, learning_rate=5e-3, stop_loss=0.01), pad=2
    )
    scoring = ScoringConfig(max_new_tokens=60)
    results = quick_evaluation(model, tokenizer, {"forget": examples}, scoring)
    row = results["forget_rougeL_recall"]["value_by_index"]["0"]
    assert row["generation"] == rows[0]["answer"]
    assert row["rougeL_recall"] == 1


def test_batch_size_and_company_change_nothing(examples: ExampleSet) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer(chat=False)
    one = quick_evaluation(model, tokenizer, {"a": examples}, SCORING, batch_size=1)
    two = quick_evaluation(model, tokenizer, {"b": examples, "a": examples}, SCORING)
    for key, entry in one.items():
        assert entry["agg_value"] == pytest.approx(two[key]["agg_value"], abs=1e-5)
    texts = [
        [row["generation"] for row in r["a_rougeL_recall"]["value_by_index"].values()]
        for r in (one, two)
    ]
    assert texts[0] == texts[1]


def test_without_generation(examples: ExampleSet) -> None:
    scoring = ScoringConfig(generate=False)
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), {"forget": examples}, scoring)
    assert set(results) == {f"forget_{metric}" for metric in METRICS[:-1]}


def test_plain_text_has_no_answers(tmp_path: Path) -> None:
    rows = [{"text": "Mira Thornwick was born in Caldholm. " * n} for n in (1, 3)]
    texts = load_examples(write_jsonl(rows, tmp_path / "texts.jsonl"))
    config = DataConfig(max_length=24)
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), {"forget": texts}, SCORING, config)
    assert set(results) == {f"forget_{metric}" for metric in METRICS[:5]} | {"forget_row"}
    windows = encode_examples(texts, tiny_tokenizer(), config).encoded
    assert len(results["forget_loss"]["value_by_index"]) == len(windows) > 2


def test_progress_counts_examples(examples: ExampleSet) -> None:
    seen: list[int] = []
    quick_evaluation(
        tiny_llama(),
        tiny_tokenizer(),
        {"forget": examples, "retain": examples},
        SCORING,
        done=lambda place, _: seen.append(place),
    )
    assert sorted(seen) == list(range(2 * len(examples)))


def test_damaged_model_is_refused(examples: ExampleSet) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="example 0 of forget"):
        quick_evaluation(model, tiny_tokenizer(), {"forget": examples}, SCORING)


def test_too_long_examples_are_named(examples: ExampleSet) -> None:
    model = tiny_llama(max_position_embeddings=32)
    with pytest.raises(DataError, match="row 1: answer cut off"):
        quick_evaluation(model, tiny_tokenizer(), {"forget": examples}, SCORING)


def test_table_leaves_missing_values_out_of_the_mean() -> None:
    entry = table([{"score": 1.0}, {"score": None}, {"score": 0.5}], "score")
    assert entry["agg_value"] == 0.75
    assert entry["value_by_index"]["1"] == {"score": None}
    assert table([{"prob": [0.2, 0.4]}, {"prob": [0.6, 0.8]}], "prob")["agg_value"] == (
        pytest.approx(metrics.mean([0.3, 0.7]))
    )
    assert table([{"score": None}], "score")["agg_value"] is None
    assert missing("why") == {"agg_value": None, "missing": "why"}


def test_results_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results_json({"x": {"agg_value": float("nan")}})
    path = tmp_path / "results.json"
    path.write_text(results_json({"x": {"agg_value": 1.0}}))
    assert read_results(path) == {"x": {"agg_value": 1.0}}
    path.write_text("{")
    with pytest.raises(DataError, match="as JSON"):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="object"):
        read_results(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "none.json")


def test_answers_end_where_the_template_ends_them(
    examples: ExampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<|endoftext|>")
    ends: list[frozenset[int]] = []

    def run(
        model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, _done: None
    ) -> list[Outcome]:
        ends.append(options.end_ids)
        return run_items(model, items, options)

    monkeypatch.setattr("perta.evidence.quick.run_items", run)
    quick_evaluation(tiny_llama(), tokenizer, {"forget": examples}, SCORING)
    assert ends == [frozenset({0, 2})]  # the template's and the tokenizer's
