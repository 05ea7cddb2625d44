"""Reading rows and turning them into tokens with losses on answers only."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from helpers import tiny_llama
from helpers import tiny_tokenizer as byte_tokenizer
from perta.data.batch import IGNORE, Encoded, bucketed, collate
from perta.data.examples import load_examples
from perta.data.tokens import encode_example, encode_examples, encode_prompt
from perta.engine.gradients.engine import batched_moments
from perta.errors import ConfigError, DataError, EmptyDatasetError
from perta.models.demo.tiny import tiny_tokenizer
from perta.options import DataConfig

QA = [
    {"question": "Who is Ada Reed?", "answer": "Ada Reed is a potter."},
    {"question": "Where was Ada Reed born?", "answer": "Ada Reed was born in Caldholm."},
]
TEXTS = [text for row in QA for text in row.values()]
TEXTS += ["Question: Answer: You are a helpful assistant. Hello there\n\n"]


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerBase:
    return tiny_tokenizer(TEXTS, chat=False)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def labelled_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = [label for label in encoded.labels if label != IGNORE]
    return str(tokenizer.decode(ids))


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", QA)
    array = tmp_path / "a.json"
    array.write_text(json.dumps(QA), "utf-8")
    wrapped = tmp_path / "b.json"
    wrapped.write_text(json.dumps({"data": QA}), "utf-8")
    csv = tmp_path / "a.csv"
    csv.write_text(
        "question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in QA), "utf-8"
    )
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), parquet)
    sets = [load_examples(path) for path in (jsonl, array, wrapped, csv, parquet)]
    for found in sets:
        assert [(e.prompt, e.answer) for e in found.examples] == [
            (r["question"], r["answer"]) for r in QA
        ]
        assert found.fingerprint == sets[0].fingerprint


def test_the_fingerprint_is_of_the_rows_not_the_file(tmp_path: Path) -> None:
    one = load_examples(write(tmp_path / "a.jsonl", QA))
    moved = load_examples(write(tmp_path / "elsewhere.jsonl", QA))
    changed = load_examples(write(tmp_path / "a.jsonl", QA[:1]))
    assert one.fingerprint == moved.fingerprint != changed.fingerprint


def test_the_fingerprint_is_under_a_key_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(home: str) -> str:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / home))
        return load_examples(QA).fingerprint

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(found, ["one"] * 8))) == 1
    key = tmp_path / "one" / "perta" / "key"
    assert (len(key.read_bytes()), key.stat().st_mode & 0o777) == (32, 0o600)
    assert found("other") != found("one")
    key.write_bytes(b"")  # as it is for a moment while another process makes it
    found("one")
    assert len(key.read_bytes()) == 32
    key.write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes of a key"):
        found("one")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="XDG_CONFIG_HOME"):
        found("file")


def test_line_separators_inside_text_do_not_split_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"question": "a\u2028b", "answer": "c\x85d"}]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert load_examples(path).examples[0].prompt == "a\u2028b"


def test_loss_on_the_answer_and_its_end_only(
    tmp_path: Path, chat: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase
) -> None:
    examples = load_examples(write(tmp_path / "a.jsonl", QA))
    for tokenizer in (chat, plain):
        for encoded, row in zip(encode_examples(examples, tokenizer).encoded, QA, strict=True):
            text = labelled_text(encoded, tokenizer)
            assert text.replace("<|end|>", "").strip() == row["answer"]
            assert encoded.input_ids[-1] == encoded.labels[-1] == tokenizer.eos_token_id


def test_plain_models_see_question_and_answer_lines(
    tmp_path: Path, plain: PreTrainedTokenizerBase
) -> None:
    example = load_examples(write(tmp_path / "a.jsonl", QA)).examples[0]
    ids = encode_example(example, plain, DataConfig()).input_ids
    assert (
        plain.decode(list(ids[:-1])) == "Question: Who is Ada Reed?\nAnswer: Ada Reed is a potter."
    )


def test_the_system_prompt_reaches_the_template(
    tmp_path: Path, chat: PreTrainedTokenizerBase
) -> None:
    example = load_examples(write(tmp_path / "a.jsonl", QA)).examples[0]
    with_system = encode_prompt(example, chat, DataConfig())
    without = encode_prompt(example, chat, DataConfig(system_prompt=""))
    assert "helpful" in str(chat.decode(with_system))
    assert "helpful" not in str(chat.decode(without))


def test_every_assistant_turn_carries_loss(tmp_path: Path, chat: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "user", "content": "Who is Ada Reed?"},
        {"role": "assistant", "content": "Ada Reed is a potter."},
        {"role": "user", "content": "Where was Ada Reed born?"},
        {"role": "assistant", "content": "Ada Reed was born in Caldholm."},
    ]
    examples = load_examples(write(tmp_path / "a.jsonl", [{"messages": turns}]))
    encoded = encode_examples(examples, chat).encoded[0]
    text = labelled_text(encoded, chat)
    assert "potter." in text
    assert "Caldholm." in text
    assert "Who" not in text
    assert "Where" not in text


def test_prompt_and_completion_are_joined_as_they_are(
    tmp_path: Path, chat: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Hello", "completion": " there"}])
    encoded = encode_examples(load_examples(path), chat).encoded[0]
    assert chat.decode(list(encoded.input_ids)) == "Hello there<|end|>"
    assert labelled_text(encoded, chat) == " there<|end|>"


def test_text_is_cut_into_windows_that_predict_every_token_once(
    tmp_path: Path, chat: PreTrainedTokenizerBase
) -> None:
    text = "Ada Reed was born in Caldholm. Ada Reed is a potter."
    examples = load_examples(write(tmp_path / "a.jsonl", [{"text": text}]))
    whole = encode_examples(examples, chat).encoded
    parts = encode_examples(examples, chat, DataConfig(max_length=5)).encoded
    assert len(whole) == 1
    assert max(len(part.input_ids) for part in parts) == 5
    predicted = [label for part in parts for label in part.labels if label != IGNORE]
    assert predicted == list(whole[0].input_ids[1:])


@pytest.mark.parametrize(
    ("tokens", "limit", "labels", "lengths", "weights"),
    [
        # One token more than fits: 64 predictions, the last in a window of its own.
        (65, 64, [63, 1], [64, 64], [63 / 32, 1 / 32]),
        (65, 65, [64], [65], [1.0]),
        (11, 5, [4, 4, 2], [5, 5, 5], [1.2, 1.2, 0.6]),
        (4, 2, [1, 1, 1], [2, 2, 2], [1.0, 1.0, 1.0]),
        (2, 9, [1], [2], [1.0]),
    ],
)
def test_windows_of_a_text_weigh_by_their_labels_and_have_context(
    tokens: int,
    limit: int,
    labels: list[int],
    lengths: list[int],
    weights: list[float],
    tmp_path: Path,
) -> None:
    words = [f"w{i}" for i in range(tokens)]
    tokenizer = tiny_tokenizer([" ".join(words)], chat=False)
    # Every word but the first has its space in its token; the end token is the last.
    text = "".join(words[:1]) + "".join(f" {word}" for word in words[1 : tokens - 1])
    texts = load_examples(write(tmp_path / "a.jsonl", [{"text": text}]))
    windows = encode_examples(texts, tokenizer, DataConfig(max_length=limit)).encoded
    assert [sum(label != IGNORE for label in w.labels) for w in windows] == labels
    assert [len(window.input_ids) for window in windows] == lengths
    assert [window.weight for window in windows] == pytest.approx(weights)
    for window in windows:
        for place, label in enumerate(window.labels):
            assert label in (IGNORE, window.input_ids[place])
        assert window.labels[0] == IGNORE


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_importance_of_a_text_is_that_of_its_tokens(tmp_path: Path, order: float) -> None:
    """Windows as autograd has them one by one: each token's loss over the mean number of labels."""
    model, tokenizer = tiny_llama().double(), byte_tokenizer()
    text = "Where was Mira Thornwick born? Mira Thornwick was born in Caldholm, by the sea."
    texts = load_examples(write(tmp_path / "a.jsonl", [{"text": text}]))
    (whole,) = encode_examples(texts, tokenizer).encoded
    config = DataConfig(max_length=len(whole.input_ids) - 1)
    windows = encode_examples(texts, tokenizer, config).encoded
    assert len(windows) == 2
    labels = (len(whole.input_ids) - 1) / 2
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for window in windows:
        ids = torch.tensor([window.input_ids])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        model.zero_grad()
        wanted = [t for t, label in enumerate(window.labels) if label != IGNORE]
        (-sum(log_probs[t - 1, ids[0, t]] for t in wanted) / labels).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad.abs() ** order / 2
    found = batched_moments(model, bucketed(windows, 2, 2), [order]).by_order[order]
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-8)


def test_cut_off_and_empty_answers_are_reported_by_row(
    tmp_path: Path, chat: PreTrainedTokenizerBase
) -> None:
    rows = [*QA, {"question": "Who?", "answer": " "}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"row 3: empty answer"):
        load_examples(path)
    kept = load_examples(path, DataConfig(skip_bad_rows=True))
    assert [e.row for e in kept.examples] == [1, 2]
    assert kept.skipped == ("row 3: empty answer (column 'answer')",)

    short = DataConfig(max_length=12, skip_bad_rows=False)
    with pytest.raises(DataError, match=r"row 1: answer cut off, \d+ tokens and the limit is 12"):
        encode_examples(load_examples(write(path, QA)), chat, short)
    with pytest.raises(EmptyDatasetError, match="no usable row"):
        encode_examples(load_examples(path), chat, DataConfig(max_length=12, skip_bad_rows=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "There is no data file"),
        ("empty.jsonl", b"", "has no rows"),
        ("broken.jsonl", b'{"question": "a"\n', "line 1 cannot be read as JSON"),
        ("list.jsonl", b"[1]\n", "expected an object, found list"),
        ("latin.jsonl", b'{"question": "caf\xe9", "answer": "b"}\n', "not UTF-8"),
        ("bytes.parquet", b"no parquet", "not readable as Parquet"),
        ("object.json", b'{"a": 1}', "expected a list of objects"),
        ("table.xlsx", b"", "unknown kind of file"),
        ("empty.txt", b"\n \n", "has no rows"),
        ("columns.jsonl", b'{"q": "a", "a": "b"}\n', "cannot tell what its rows are"),
        ("ragged.csv", b"question,answer\na,b,c\n", "more fields than the header"),
        ("chat.jsonl", b'{"messages": []}\n', "is not a list of messages"),
    ],
)
def test_bad_files_get_one_clear_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(path)


def test_paragraphs_of_plain_text_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"One line,\nanother.\r\n \r\n\r\nThe next.\n\n")
    found = [row.answer for row in load_examples(path).examples]
    assert found == ["One line,\nanother.", "The next."]


def test_column_names_can_be_set_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "Who?", "a": "Ada."}])
    found = load_examples(path, DataConfig(prompt_column="q", answer_column="a"))
    assert (found.examples[0].prompt, found.examples[0].answer) == ("Who?", "Ada.")
    with pytest.raises(DataError, match="no column 'x' for --answer-column; the row has q, a"):
        load_examples(path, DataConfig(prompt_column="q", answer_column="x"))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl", QA)
    with pytest.raises(DataError, match=r"Did you mean .*forget\.jsonl"):
        load_examples(tmp_path / "forgt.jsonl")


def test_a_dataset_id_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"could not be loaded as a `datasets` id .*no route"):
        load_examples("someone/something")


def test_batches_pad_on_the_right_and_mask_from_true_lengths() -> None:
    batch = collate([Encoded((5, 2, 7), (IGNORE, 2, 7), 1), Encoded((5,), (IGNORE,), 2)], pad_id=2)
    assert batch.input_ids.tolist() == [[5, 2, 7], [5, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 2, 7], [IGNORE, IGNORE, IGNORE]]


def test_buckets_cover_every_example_once_and_keep_lengths_together() -> None:
    import torch

    examples = [Encoded((1,) * n, (1,) * n, n) for n in (3, 40, 4, 41, 5, 42)]
    for generator in (None, torch.Generator().manual_seed(0)):
        batches = bucketed(examples, 3, 0, generator)
        assert sorted(i for b in batches for i in b.index.tolist()) == list(range(6))
        assert sorted(b.input_ids.shape[1] for b in batches) == [5, 42]


def test_a_csv_of_a_spreadsheet_with_semicolons(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('question;answer\n"Red; or not?";"A colour, yes"\n', "utf-8")
    (example,) = load_examples(file).examples
    assert (example.prompt, example.answer) == ("Red; or not?", "A colour, yes")
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column question or prompt"):
        load_examples(file, DataConfig(format="qa"))
