"""TOFU against one pass per metric, its journal, its references and its compatible mode."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE
from perta.data.examples import Example, Message, load_examples
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, DivergenceError
from perta.evidence import benchmark, metrics
from perta.evidence.benchmark import Journal
from perta.evidence.people import generate_people
from perta.evidence.published import _shared
from perta.evidence.published.tofu import _prompt_tokens, encode, run_tofu
from perta.evidence.results import Results, decode, read_results, results_json
from perta.evidence.scoring import items as items_module
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import ScoringOptions, _plain_generation
from perta.options import DataConfig

SHARED = Path(__file__).parents[4] / "shared" / "data"
EOS = 2
NEW_TOKENS = 6


def write_data(folder: Path) -> Path:
    """The five files of forget01, with rows of fictitious people."""
    rows = generate_people(people=9, questions=2, seed=0)
    write_jsonl(rows[:4], folder / "forget01_perturbed.jsonl")
    write_jsonl(rows[4:8], folder / "retain_perturbed.jsonl")
    few = [{k: r[k] for k in ("question", "answer", "perturbed_answer")} for r in rows[8:14]]
    for row in few:
        row["perturbed_answer"] = row["perturbed_answer"][:3]
    write_jsonl(few[:3], folder / "real_authors_perturbed.jsonl")
    write_jsonl(few[3:], folder / "world_facts_perturbed.jsonl")
    write_jsonl(
        [{k: r[k] for k in ("question", "answer")} for r in rows[14:]], folder / "holdout01.jsonl"
    )
    return folder


def run(folder: Path, *, seed: int = 0, chat: bool = True, **more: Any) -> Results:
    settings: dict[str, Any] = {"batch_size": 3, "max_new_tokens": NEW_TOKENS, **more}
    return run_tofu(tiny_llama(seed=seed), tiny_tokenizer(chat), folder, "forget01", **settings)


def aggregates(results: Results) -> dict[str, float]:
    return {k: v["agg_value"] for k, v in results.items() if v["agg_value"] is not None}


def scores(entry: Results, key: str = "score") -> list[Any]:
    return [row[key] for row in entry["value_by_index"].values()]


# --- against separate passes ----------------------------------------------------------------


def oracle_losses(model: Any, tokenizer: Any, row: dict[str, Any], text: str) -> torch.Tensor:
    """Cross-entropy per labelled token of one answer, float64, one unpadded pass."""
    example = Example(1, "qa", (Message("user", row["question"]), Message("assistant", text)), row)
    encoded = encode(example, tokenizer, compat=False)
    with torch.no_grad():
        logits = model(torch.tensor([encoded.input_ids])).logits[0, :-1].double()
    labels = torch.tensor(encoded.labels[1:])
    kept = labels != IGNORE
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")


def rows_of(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]


def test_metrics_equal_one_pass_each(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    results = run(folder)
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def loss(row: dict[str, Any], text: str) -> float:
        return float(oracle_losses(model, tokenizer, row, text).mean())

    files = {"forget": "forget01", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
    for name, file in files.items():
        ratio_key = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
        for i, row in enumerate(rows_of(folder, f"{file}_perturbed.jsonl")):
            right = loss(row, row["answer"])
            wrong = [loss(row, text) for text in row["perturbed_answer"]]
            assert scores(results[f"{name}_Q_A_Prob"], "avg_loss")[i] == pytest.approx(right, 1e-4)
            assert scores(results[f"{name}_Q_A_PERT_Prob"], "avg_loss")[i] == pytest.approx(
                wrong, 1e-4
            )
            paraphrase = row.get("paraphrased_answer")
            reference = loss(row, paraphrase) if paraphrase else right
            ratio = math.exp(-sum(wrong) / len(wrong)) / (math.exp(-reference) + 1e-10)
            assert scores(results[ratio_key])[i] == pytest.approx(ratio, 1e-3)
            prompt = results[f"{name}_Q_A_ROUGE"]["value_by_index"][str(i)]
            assert row["question"] in prompt["input"]
            assert prompt["ground_truth"] == row["answer"]
    for side, file in (("forget", "forget01_perturbed.jsonl"), ("holdout", "holdout01.jsonl")):
        for i, row in enumerate(rows_of(folder, file)):
            losses = oracle_losses(model, tokenizer, row, row["answer"])
            assert scores(results["mia_loss"][side])[i] == pytest.approx(float(losses.mean()), 1e-4)
            expected = metrics.min_k(-losses[:-1])
            assert scores(results["mia_min_k"][side])[i] == pytest.approx(expected, 1e-4)


def test_generated_answers_are_the_librarys(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    results = run(folder)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = ScoringOptions(Masking(EOS), frozenset({EOS}), 1, NEW_TOKENS)
    examples = load_examples(folder / "retain_perturbed.jsonl", DataConfig(format="qa")).examples
    for i, example in enumerate(examples):
        tokens = _plain_generation(model, _prompt_tokens(example, tokenizer, False), options)
        text = decode(tokenizer, tokens)
        row = results["retain_Q_A_ROUGE"]["value_by_index"][str(i)]
        assert row["generation"] == text
        assert row["rougeL_recall"] == metrics.rouge(example.answer, text)["rougeL_recall"]


def test_gradient_norms_equal_a_backward_pass(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    results = run(folder)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    row = rows_of(folder, "forget01_perturbed.jsonl")[0]
    messages = (Message("user", row["question"]), Message("assistant", row["answer"]))
    encoded = encode(Example(1, "qa", messages, row), tokenizer, compat=False)
    logits = model(torch.tensor([encoded.input_ids])).logits[0, :-1]
    labels = torch.tensor(encoded.labels[1:])
    last = int((labels != IGNORE).nonzero().max())
    labels[last] = IGNORE
    torch.nn.functional.cross_entropy(logits, labels).backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    expected = sum(norms) / len(norms)
    assert scores(results["mia_gradnorm"]["forget"])[0] == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("chat", [True, False])
def test_batch_size_changes_nothing(tmp_path: Path, chat: bool) -> None:
    folder = write_data(tmp_path)
    one = run(folder, chat=chat, batch_size=1)
    many = run(folder, chat=chat, batch_size=64)
    assert aggregates(one) == pytest.approx(aggregates(many), abs=1e-5)
    assert scores(one["retain_Q_A_ROUGE"], "generation") == scores(
        many["retain_Q_A_ROUGE"], "generation"
    )


# --- form, references and missing files -----------------------------------------------------


def test_keys_are_those_of_published_logs(tmp_path: Path) -> None:
    path = SHARED / "tofu_reference_logs" / "llama-3.2-1b-instruct_full_forget01.json"
    if not path.is_file():
        pytest.skip(f"published logs are not at {SHARED}")
    published = read_results(path)
    reference_model = tiny_llama(seed=1)
    results = run(write_data(tmp_path), reference=run(tmp_path, seed=1))
    full = run(tmp_path, reference_model=reference_model)
    results["mia_reference"] = full["mia_reference"]
    assert set(results) == set(published)
    for key, entry in published.items():
        assert set(results[key]) == set(entry), key
        row = next(iter(entry.get("value_by_index", {}).values()), None)
        if row is not None:
            assert set(results[key]["value_by_index"]["0"]) == set(row), key
    assert json.loads(results_json(results)) == results


def test_published_log_serves_as_reference() -> None:
    log = SHARED / "tofu_reference_logs" / "llama-3.2-1b-instruct_retain99.json"
    data = SHARED / "tofu" / "forget01_perturbed.jsonl"
    if not (log.is_file() and data.is_file()):
        pytest.skip(f"published logs and data are not at {SHARED}")
    reference = read_results(log)
    answers = [row["answer"] for row in rows_of(data.parent, data.name)]
    theirs = _shared.reference_ratios(reference, answers, cut=False)
    assert theirs == scores(reference["forget_truth_ratio"])
    with pytest.raises(DataError, match="another split or benchmark"):
        _shared.reference_ratios(reference, ["no"] * 40, cut=False)


def test_forget_quality_and_privleak_against_a_reference(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    retrained = json.loads(results_json(run(folder, seed=1)))
    results = run(folder, reference=retrained)
    ratios = [scores(r["forget_truth_ratio"]) for r in (results, retrained)]
    assert results["forget_quality"] == {"agg_value": float(ks_2samp(*ratios).pvalue)}
    aucs = [r["mia_min_k"]["agg_value"] for r in (results, retrained)]
    assert results["privleak"] == {"agg_value": metrics.privleak(*aucs)}


def test_forget_quality_without_reference_says_why(tmp_path: Path) -> None:
    results = run(write_data(tmp_path))
    assert results["forget_quality"]["agg_value"] is None
    assert "--reference" in results["forget_quality"]["missing"]
    assert results["mia_reference"]["agg_value"] is None
    half = metrics.privleak(results["mia_min_k"]["agg_value"])
    assert results["privleak"] == {"agg_value": half}


def test_reference_of_another_split_is_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    log = run(folder)
    shorter = write_data(tmp_path / "shorter")
    rows = rows_of(shorter, "forget01_perturbed.jsonl")
    write_jsonl(rows[:3], shorter / "forget01_perturbed.jsonl")
    with pytest.raises(DataError, match="another split"):
        run(shorter, reference=log)
    assert run(folder, reference=log, limit=3)["forget_quality"]["agg_value"] == pytest.approx(1.0)
    with pytest.raises(DataError, match="no forget_truth_ratio"):
        run(folder, reference={})


def test_missing_files_are_reported(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (folder / "holdout01.jsonl").unlink()
    (folder / "world_facts_perturbed.jsonl").unlink()
    results = run(folder)
    for key in ("mia_loss", "privleak"):
        assert results[key]["agg_value"] is None
        assert "holdout01.jsonl" in results[key]["missing"]
    for key in ("wf_Q_A_Prob", "wf_Truth_Ratio", "model_utility"):
        assert results[key]["agg_value"] is None
        assert "world_facts_perturbed.jsonl" in results[key]["missing"]
    assert results["ra_Q_A_Prob"]["agg_value"] is not None
    assert results["extraction_strength"]["agg_value"] is not None
    (folder / "forget01_perturbed.jsonl").unlink()
    results = run(folder)
    assert "forget01_perturbed.jsonl" in results["forget_quality"]["missing"]
    assert "forget01_perturbed.jsonl" in results["extraction_strength"]["missing"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of TOFU's files"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="--forget-split"):
        run_tofu(tiny_llama(), tiny_tokenizer(), tmp_path, "retain90")
    rows = [{"question": "Who?", "answer": "Mira."}]
    write_jsonl(rows, tmp_path / "retain_perturbed.jsonl")
    with pytest.raises(DataError, match="row 1: column 'paraphrased_answer'"):
        run(tmp_path)


def test_damaged_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="damaged"):
        run_tofu(model, tiny_tokenizer(), write_data(tmp_path), "forget01")


# --- journal --------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for a kill."""


def test_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, journal = write_data(tmp_path / "data"), tmp_path / "out" / "tofu.journal"
    whole = run(folder)
    put, count = Journal.put, [0]

    def put_and_die(self: Journal, name: str, value: Any) -> None:
        put(self, name, value)
        count[0] += 1
        if count[0] == 7:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", put_and_die)
        with pytest.raises(KilledError):
            run(folder, journal=journal)
    with journal.open("a") as file:
        file.write('{"name": "retain:3", "val')  # cut off in mid-line
    assert len(journal.read_text().splitlines()) == 1 + 7 + 1
    scored: list[int] = []
    original = items_module.run_in_modes

    def counting(model: Any, items: Any, *rest: Any) -> Any:
        scored.append(len(items))
        return original(model, items, *rest)

    monkeypatch.setattr(benchmark, "run_in_modes", counting)
    resumed = run(folder, journal=journal, batch_size=5)
    assert scored == [18 - 7]
    assert aggregates(resumed) == pytest.approx(aggregates(whole), abs=1e-5)
    run(folder, journal=journal)
    assert scored[1:] == [0]
    run(folder, journal=journal, limit=2)  # other settings
    run(folder, journal=journal, limit=2, seed=1)  # another model
    assert scored[2:] == [10, 10]


# --- compatible mode ------------------------------------------------------------------------


def example(question: str, answer: str) -> Example:
    return Example(1, "qa", (Message("user", question), Message("assistant", answer)), {})


def test_labels_without_chat_template() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    row = example("Where was Mira born?", "Mira was born in Caldholm.")
    right, published = (encode(row, tokenizer, compat) for compat in (False, True))
    assert right.input_ids == published.input_ids
    assert right.input_ids[-1] == EOS

    def labelled(labels: tuple[int, ...]) -> str:
        return str(tokenizer.decode([t for t in labels if t != IGNORE][:-1]))

    assert labelled(right.labels) == " Mira was born in Caldholm."
    # The space that ends the published prompt stands in the place of the first answer token.
    assert row.answer.endswith(labelled(published.labels))
    assert len(labelled(published.labels)) < len(row.answer)
    for compat, end in ((True, "Answer: "), (False, "Answer:")):
        assert str(tokenizer.decode(list(_prompt_tokens(row, tokenizer, compat)))).endswith(end)


def test_long_sequences_without_chat_template_are_cut_at_512() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    row = example("Where?", "Quite far away. " * 200)
    for compat in (False, True):
        encoded = encode(row, tokenizer, compat)
        assert len(encoded.input_ids) == len(encoded.labels) == 513
        assert encoded.input_ids[-1] == encoded.labels[-1] == EOS


def test_chat_labels_are_the_same_in_both_modes() -> None:
    row = example("Where was Mira born?", "In Caldholm.")
    tokenizer = tiny_tokenizer()
    assert encode(row, tokenizer, False) == encode(row, tokenizer, True)


def test_compatible_mode_differs_where_padding_ends_turns(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    default, compat = run(folder), run(folder, compat=True)
    assert default["forget_Q_A_Prob"] != compat["forget_Q_A_Prob"]
    again = run(folder, compat=True, batch_size=1)
    assert aggregates(compat) == pytest.approx(aggregates(again), abs=1e-5)
    # With a padding token of its own nothing is hidden.
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    apart = [
        run_tofu(tiny_llama(), tokenizer, folder, "forget01", compat=c, max_new_tokens=NEW_TOKENS)
        for c in (False, True)
    ]
    assert aggregates(apart[0]) == pytest.approx(aggregates(apart[1]), abs=1e-5)


def test_attacks_are_optional(tmp_path: Path) -> None:
    results = run(write_data(tmp_path), gradient_norms=False)
    assert results["mia_gradnorm"] == {"agg_value": None, "missing": "it was left out"}
