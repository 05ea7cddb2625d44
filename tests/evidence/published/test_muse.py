"""MUSE: prompts, stops, privacy leakage, refusals and the journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE
from perta.data.rows import write_jsonl
from perta.errors import DataError
from perta.evidence import metrics
from perta.evidence.benchmark import Given, Journal
from perta.evidence.people import generate_people
from perta.evidence.published import muse
from perta.evidence.published.muse import Muse, _cut_answer
from perta.evidence.results import Results, results_json
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import ScoringOptions, _plain_generation
from perta.evidence.settings import MuseConfig
from perta.options import ComputeConfig
from perta.report.settings import ReportConfig
from perta.report.write import write_report

EOS = 2


def write_data(folder: Path, shots: int = 3) -> Path:
    """All files of a corpus, from fictitious people."""
    rows = generate_people(people=12, questions=2, seed=0)
    qa = [{"question": r["question"], "answer": r["answer"]} for r in rows]
    for i, split in enumerate(("forget", "retain")):
        write_jsonl(qa[4 * i : 4 * i + 3], folder / f"news_knowmem_{split}_qa.jsonl")
        write_jsonl(qa[10 : 10 + shots], folder / f"news_knowmem_{split}_qa_icl.jsonl")
    texts = [f"{r['answer']} {r['paraphrased_answer']}" for r in rows]
    verbatim = [{"prompt": r["question"], "gt": r["answer"]} for r in rows[:3]]
    write_jsonl(verbatim, folder / "news_verbmem_forget.jsonl")
    write_jsonl([{"text": t} for t in texts[:4]], folder / "news_privleak_forget.jsonl")
    write_jsonl([{"text": t} for t in texts[12:16]], folder / "news_privleak_holdout.jsonl")
    return folder


def run(
    folder: Path,
    model: Any = None,
    *,
    seed: int = 0,
    batch_size: int = 2,
    reference: Results | None = None,
    **more: Any,
) -> Results:
    config = MuseConfig(
        checkpoint="",
        output=Path(),
        corpus="news",
        compute=ComputeConfig(pass_batch_size=batch_size),
        **more,
    )
    given = Given(folder, reference, folder.with_suffix(".journal"))
    return Muse().run(model or tiny_llama(seed=seed), tiny_tokenizer(chat=False), config, given)


def rows_of(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]


def plain_answer(text: str, new_tokens: int) -> str:
    """The library's greedy continuation of a text, as it is."""
    tokenizer = tiny_tokenizer(chat=False)
    options = ScoringOptions(Masking(EOS), frozenset({EOS}), 1, new_tokens)
    tokens = _plain_generation(tiny_llama(), tokenizer(text)["input_ids"], options)
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def test_knowmem_and_verbmem_equal_plain_generation(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    results = run(folder)
    for split in ("forget", "retain"):
        shots = rows_of(folder, f"news_knowmem_{split}_qa_icl.jsonl")
        start = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shots)
        for i, row in enumerate(rows_of(folder, f"news_knowmem_{split}_qa.jsonl")):
            entry = results[f"{split}_knowmem_ROUGE"]["value_by_index"][str(i)]
            prompt = f"{start}Question: {row['question']}\nAnswer: "
            assert entry["input"] == prompt.strip()
            assert entry["generation"] == _cut_answer(plain_answer(prompt, 32))
            assert entry["ground_truth"] == row["answer"]
    rouges = []
    for i, row in enumerate(rows_of(folder, "news_verbmem_forget.jsonl")):
        entry = results["forget_verbmem_ROUGE"]["value_by_index"][str(i)]
        assert entry["generation"] == plain_answer(row["prompt"], 128).strip()
        rouges.append(metrics.rouge(row["gt"], entry["generation"])["rougeL_f1"])
    assert results["forget_verbmem_ROUGE"]["agg_value"] == pytest.approx(sum(rouges) / len(rouges))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris\n\nQuestion: Who?", "Paris"),
        ("Paris\nQuestion: Who?", "Paris"),
        ("ParisQuestion: Who?", "Paris"),
        ("\n\nParis", ""),
        ("Paris, France\nand more", "Paris, France\nand more"),
    ],
)
def test_answers_end_at_stops(text: str, answer: str) -> None:
    assert _cut_answer(text) == answer


@pytest.mark.parametrize("compat", [False, True])
def test_privleak_scores_every_token_of_plain_text(tmp_path: Path, compat: bool) -> None:
    folder = write_data(tmp_path)
    results = run(folder, compat=compat)
    model, tokenizer = tiny_llama(), tiny_tokenizer(chat=False)
    sides: dict[str, list[float | None]] = {}
    for side in ("forget", "holdout"):
        sides[side] = []
        for row in rows_of(folder, f"news_privleak_{side}.jsonl"):
            ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
            with torch.no_grad():
                every = model(ids).logits[0, :-1].double().log_softmax(-1)
            lp = every.gather(1, ids[0, 1:, None])[:, 0]
            # Published code drops the last token as if it were eos, which is not there.
            sides[side].append(metrics.min_k(lp[:-1] if compat else lp))
        scores = [r["score"] for r in results["mia_min_k"][side]["value_by_index"].values()]
        assert scores == pytest.approx(sides[side], rel=1e-4)
    auc = results["mia_min_k"]["agg_value"]
    assert results["privleak"]["agg_value"] == metrics.privleak(auc)


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    one, many = run(folder, batch_size=1), run(folder, batch_size=64)
    for key in one:
        assert one[key]["agg_value"] == pytest.approx(many[key]["agg_value"], abs=1e-5)
    assert json.loads(results_json(one)) == one


def test_long_prompts_are_refused_or_cut_in_compatible_mode(tmp_path: Path) -> None:
    folder = write_data(tmp_path, shots=14)
    model = tiny_llama(max_position_embeddings=2048)
    results = run(folder, model)
    for split in ("forget", "retain"):
        entry = results[f"{split}_knowmem_ROUGE"]
        assert entry["agg_value"] is None
        assert "row 1" in entry["missing"]
        assert "512" in entry["missing"]
    assert results["forget_verbmem_ROUGE"]["agg_value"] is not None
    compat = run(folder, model, compat=True)
    texts = [r["input"] for r in compat["forget_knowmem_ROUGE"]["value_by_index"].values()]
    assert len(texts) == 3
    assert len(set(texts)) == 1  # the question is what was cut


def test_missing_files_are_reported(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (folder / "news_verbmem_forget.jsonl").unlink()
    (folder / "news_privleak_holdout.jsonl").unlink()
    (folder / "news_knowmem_retain_qa_icl.jsonl").unlink()
    results = run(folder)
    for key, file in (
        ("forget_verbmem_ROUGE", "news_verbmem_forget.jsonl"),
        ("privleak", "news_privleak_holdout.jsonl"),
        ("retain_knowmem_ROUGE", "news_knowmem_retain_qa_icl.jsonl"),
    ):
        assert results[key]["agg_value"] is None
        assert file in results[key]["missing"]
    assert results["forget_knowmem_ROUGE"]["agg_value"] is not None
    with pytest.raises(DataError, match="No MUSE metric"):
        run(tmp_path / "nowhere")


def test_reference_gives_privleak(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    retrained = run(folder, seed=1)
    results = run(folder, reference=retrained)
    aucs = [r["mia_min_k"]["agg_value"] for r in (results, retrained)]
    assert results["privleak"] == {"agg_value": metrics.privleak(*aucs)}
    assert run(folder, reference={})["privleak"]["agg_value"] is None


def test_a_report_shows_the_metrics(tmp_path: Path) -> None:
    folder, results = write_data(tmp_path / "data"), tmp_path / "results"
    results.mkdir()
    retrained = run(folder, seed=1)
    for name, seed in (("full", 2), ("retrained", 1), ("tv", 0)):
        found = run(folder, seed=seed, reference=retrained)
        (results / f"{name}.json").write_text(results_json(found), "utf-8")
    page = write_report(
        ReportConfig(results=(str(results),), output=tmp_path / "r.html", figures=False)
    ).read_text("utf-8")
    for words in ("Verbatim", "Knowledge", "PrivLeak"):
        assert words in page, words
    value = found["privleak"]["agg_value"]
    assert f"{value:.1f}".replace("-", "−") in page


def test_journal_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_data(tmp_path)
    first = run(folder)
    monkeypatch.setattr(Journal, "put", None)
    assert run(folder) == first


def test_labels_of_plain_text() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    from perta.data.examples import Example, Message

    row = Example(1, "text", (Message("assistant", "Mira was born."),), {})
    item = muse._text_item(row, tokenizer, 2048, compat=False)
    ids, labels = item.answers[0].input_ids, item.answers[0].labels
    assert labels == (IGNORE, *ids[1:])
    assert ids[-1] == EOS
    assert len(muse._text_item(row, tokenizer, 3, compat=False).answers[0].input_ids) == 3
