"""Quick evaluation: what it reports, that it is strict JSON, and that nothing sways it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from perta import metrics
from perta.batch import collate
from perta.config import DataConfig, ScoringConfig
from perta.data import ExampleSet, encode_examples, load_examples
from perta.errors import DataError, DivergenceError
from perta.evaluate import generate_answers, quick_evaluation, score_examples
from perta.objectives import example_losses
from perta.people import generate_people, write_jsonl
from perta.results import missing, read_results, require_finite, results_json, table

METRICS = ("loss", "probability", "exact_memorization", "extraction_strength", "rougeL_recall")
SCORING = ScoringConfig(max_new_tokens=8, evaluation_batch_size=3)


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
    scores = score_examples(model, tokenizer, examples, vocabulary_moments=True)
    assert [score.loss for score in scores] == pytest.approx(expected, abs=1e-5)
    assert all(score.min_k_plus_plus is not None for score in scores)


def test_batch_size_and_company_change_nothing(examples: ExampleSet) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer(chat=False)
    one = quick_evaluation(
        model, tokenizer, {"a": examples}, ScoringConfig(max_new_tokens=8, evaluation_batch_size=1)
    )
    two = quick_evaluation(model, tokenizer, {"b": examples, "a": examples}, SCORING)
    for key, entry in one.items():
        assert entry["agg_value"] == pytest.approx(two[key]["agg_value"], abs=1e-5)
    texts = [
        [row["generation"] for row in r["a_rougeL_recall"]["value_by_index"].values()]
        for r in (one, two)
    ]
    assert texts[0] == texts[1]
    answers = generate_answers(model, tokenizer, examples, batch_size=2, max_new_tokens=8)
    assert answers == texts[0]


def test_without_generation(examples: ExampleSet) -> None:
    scoring = ScoringConfig(generate=False)
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), {"forget": examples}, scoring)
    assert set(results) == {f"forget_{metric}" for metric in METRICS[:-1]}


def test_plain_text_has_no_answers(tmp_path: Path) -> None:
    rows = [{"text": "Mira Thornwick was born in Caldholm. " * n} for n in (1, 3)]
    texts = load_examples(write_jsonl(rows, tmp_path / "texts.jsonl"))
    config = DataConfig(max_length=24)
    results = quick_evaluation(tiny_llama(), tiny_tokenizer(), {"forget": texts}, SCORING, config)
    assert set(results) == {f"forget_{metric}" for metric in METRICS[:-1]}
    windows = encode_examples(texts, tiny_tokenizer(), config).encoded
    assert len(results["forget_loss"]["value_by_index"]) == len(windows) > 2


def test_progress_counts_examples(examples: ExampleSet) -> None:
    seen: list[None] = []
    quick_evaluation(
        tiny_llama(),
        tiny_tokenizer(),
        {"forget": examples, "retain": examples},
        SCORING,
        progress=lambda: seen.append(None),
    )
    assert len(seen) == 2 * len(examples)


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
    require_finite([], "nothing")


def test_results_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results_json({"x": {"agg_value": float("nan")}})
    path = tmp_path / "results.json"
    path.write_text(results_json({"x": {"agg_value": 1.0}}))
    assert read_results(path) == {"x": {"agg_value": 1.0}}
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="object"):
        read_results(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "none.json")
