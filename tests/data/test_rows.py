"""Files as they are written by spreadsheets, databases and by hand: every row arrives, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from perta.data.examples import load_examples, rows_fingerprint
from perta.data.rows import read_rows
from perta.errors import DataError
from perta.options import DataConfig


def table(folder: Path, name: str, content: str | bytes) -> list[tuple[str, str]]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(e.prompt, e.answer) for e in load_examples(path).examples]


LONG = "long, " * 30_000


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", 'question,answer\n"a, b","say ""c"""\n', [("a, b", 'say "c"')]),
        ("a.csv", 'question,answer\nWho?,He said "hi"\n', [("Who?", 'He said "hi"')]),
        ("a.csv", "\ufeffquestion,answer\r\na,b\r\n\r\nc,d\r\n", [("a", "b"), ("c", "d")]),
        ("a.csv", "question,answer\ra,b\rc,d", [("a", "b"), ("c", "d")]),
        ("a.csv", 'question;answer\n"a; b";"c, d"\n', [("a; b", "c, d")]),
        ("a.csv", 'question\tanswer\n"a\tb"\tc\n', [("a\tb", "c")]),
        ("a.csv", f'question,answer\na,"{LONG}"\n', [("a", LONG)]),
        ("a.csv", ",question,answer,,\n0,a,b,,\n1,c,d,,\n", [("a", "b"), ("c", "d")]),
        ("a.csv", 'question,answer\na,"two\nlines"\n', [("a", "two\nlines")]),
        ("a.tsv", 'question\tanswer\nWho?\t"Tis Ann\nWhen?\t"Now"\nWhy?\tLove\n',
         [("Who?", '"Tis Ann'), ("When?", '"Now"'), ("Why?", "Love")]),
        ("a.tsv", f"question\tanswer\na\t{LONG}\n", [("a", LONG)]),
    ],
)  # fmt: skip
def test_rows_of_tables(
    tmp_path: Path, name: str, content: str, rows: list[tuple[str, str]]
) -> None:
    assert table(tmp_path, name, content) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'question,answer\na,"b\nc,d\n', "line 2: not readable as CSV"),
        ("a.csv", 'question,answer\na,"b\nc,"d"\n', "line 2: not readable as CSV"),
        ("a.csv", 'question,answer\na,"b"c\n', "line 2: not readable as CSV"),
        ("a.csv", "question,answer\na\n", "line 2: fewer fields than the header names"),
        ("a.csv", 'question,answer\na,"b\nc"\nd\n', "line 4: fewer fields"),
        ("a.csv", "question,answer,answer\na,b,c\n", "more than one column is named 'answer'"),
        ("a.csv", "question,answer,,\na,b,c,d\n", "more than one column is named ''"),
        ("a.csv", "question,answer\na,b\n".encode("utf-16")[:-1], "is not UTF-16-LE text, as its"),
        ("a.csv", b"\xff\xfea,b\nc", "is not UTF-16-LE text"),
        ("a.csv", b"\xff\xfe\x00\xd8a\0", "is not UTF-16-LE text.*byte 2"),
        ("a.csv", b"\xef\xbb\xbfquestion,answer\na,\xe9\n", "is not UTF-8 text, as its.*byte 21"),
        ("a.csv", b"\xff\xfea\0\0\0", "zero byte"),
        (
            "a.csv",
            "question,answer\na,b\n\ufeffquestion,answer\nc,d\n",
            "line 3 begins with a byte",
        ),
        ("a.jsonl", '\ufeff\ufeff{"question": "a", "answer": "b"}', "line 1 begins with a byte"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b"}\n\ufeff{"question": "a", "answer": "b"}'.encode(
                "utf-16"
            ),
            "line 2 begins with a byte",
        ),
        ("a.csv", "question,answer\na,b\n".encode("utf-16-le"), "zero byte at 1, as in UTF-16"),
        ("a.tsv", 'question\tanswer\na\t"say ""b"""\n', "line 2: a cell looks quoted"),
        ("a.tsv", 'question\tanswer\na\t"b\nc"\n', "line 3: fewer fields"),
        ("a.tsv", 'question\tanswer\na\t"b\tc"\n', "line 2: more fields"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b", "answer": "c"}',
            "line 1 .*'answer' occurs twice in an object",
        ),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b", "n": NaN}',
            "line 1: nan stands where a number should",
        ),
        ("a.jsonl", '{"n": -Infinity}', "line 1: -inf stands where"),
        (
            "a.jsonl",
            '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 1 cannot be read as JSON",
        ),
        ("a.jsonl", '{"n": ' + "[" * 99 + "]" * 99 + "}", "more than 64 lists and objects"),
        ("a.jsonl", '{"n": ' + "1" * 5_000 + "}", "line 1 .* Exceeds the limit"),
        ("a.json", '[{"a": 1},\n{"a": 2,}]', "cannot be read as JSON.* line 2 column"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.json", '{"data": [{"a": 1}], "more": [{"a": 2}]}', "there are more under 'more'"),
    ],
)
def test_files_that_would_lose_something_are_refused(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        table(tmp_path, name, content)


def test_rows_that_a_quote_may_have_swallowed_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swallowed = 'question,answer\na,b\nc,"Tis d\ne,f\ng,he said "\nh,i\n'
    assert [q for q, _ in table(tmp_path, "a.csv", swallowed)] == ["a", "c", "h"]
    assert "in 1 rows a quoted cell has line breaks" in capsys.readouterr().err
    table(tmp_path, "a.csv", 'question,answer\na,"first line\nsecond line"\n')
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl"])
def test_a_byte_order_mark_says_what_the_text_is(tmp_path: Path, name: str, kind: str) -> None:
    mark = "\ufeff" if kind.endswith("be") else ""  # Python writes those of its own order alone
    said = "Wér? 😀 a\ufeffb"
    row = json.dumps({"question": said, "answer": "Añn"}, ensure_ascii=False)
    text = {
        "a.csv": f"question,answer\r\n{said},Añn\r\n",
        "a.tsv": f"question\tanswer\n{said}\tAñn\n",
        "a.json": f"[{row}]",
        "a.jsonl": f"{row}\n",
    }[name]
    assert table(tmp_path, name, (mark + text).encode(kind)) == [(said, "Añn")]


@pytest.mark.parametrize(
    ("columns", "config"),
    [
        ({"Question": "a", " Answer ": "b"}, {}),
        ({"PROMPT": "a", "Completion": "b"}, {}),
        ({"Frage ": "a", "ANTWORT": "b"}, {"prompt_column": "frage", "answer_column": "Antwort"}),
        ({"question": "a", "Question": "x", "answer": "b"}, {}),
        ({"Question": "x", "frage": "a", "answer": "b"}, {"prompt_column": "frage"}),
        ({"question": "x", "Question": "a", "answer": "b"}, {"prompt_column": "Question"}),
        (
            {"question": "a", "answer": "b"},
            {"prompt_column": "Question", "answer_column": "Answer"},
        ),
        ({"text": "a", "answer": "b"}, {"prompt_column": "Text", "answer_column": "answer"}),
        ({"QUESTION": "a", "Answer": "b", "Person": "p", "ID": "7"}, {}),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_columns_are_known_whatever_their_case_and_spaces_around(
    tmp_path: Path, name: str, columns: dict[str, str], config: dict[str, str]
) -> None:
    texts = {
        "a.csv": ",".join(columns) + "\n" + ",".join(columns.values()) + "\n",
        "a.jsonl": json.dumps(columns) + "\n",
    }
    (tmp_path / name).write_text(texts[name], "utf-8")
    found = load_examples(tmp_path / name, DataConfig(**config))  # type: ignore[arg-type]
    (example,) = found.examples
    assert (example.prompt, example.answer) == ("a", "b")
    if "Person" in columns:
        assert (example.fields["person"], example.fields["ID"]) == ("p", "7")
    # The rows are known by what the file says.
    assert found.fingerprint == rows_fingerprint([columns])


def test_rows_may_write_their_columns_in_several_ways(tmp_path: Path) -> None:
    text = '{"Question": "a", "answer": "b"}\n{"question": "c", "ANSWER": "d"}\n'
    assert table(tmp_path, "a.jsonl", text) == [("a", "b"), ("c", "d")]
    with pytest.raises(DataError, match=r"cannot tell what .* Question, QUESTION"):
        table(tmp_path, "a.csv", "Question,QUESTION,answer\na,b,c\n")
    with pytest.raises(DataError, match=r"row 1: column 'tools' is not read"):
        table(tmp_path, "b.jsonl", '{"question": "a", "answer": "b", "Tools": ["x"]}')


class Frame:
    """What of a pandas frame is looked at."""

    iloc = None

    def __init__(self, columns: list[str], *rows: dict[str, Any]) -> None:
        self.columns, self.rows = columns, rows

    def to_dict(self, _orient: str) -> list[dict[str, Any]]:
        return list(self.rows)


class Column(list[Any]):
    """One column of a pandas frame."""

    iloc = None


def test_rows_of_programs_are_plain_too() -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
    row = {"messages": numpy.array(turns, dtype=object), "score": float("nan")}
    (example,) = load_examples(Frame(["messages", "score"], row)).examples  # type: ignore[arg-type]
    assert (example.prompt, example.answer) == ("Who?", "Ann.")
    assert example.fields == {"messages": turns, "score": None}
    with pytest.raises(DataError, match="more than one column is named 'answer'"):
        load_examples(Frame(["question", "answer", "answer"], row))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 1: expected column -> value, found str"):
        load_examples(Column(["Ann."]))
    with pytest.raises(DataError, match="row 1: the column 0 is named by no text"):
        load_examples([{0: "Who?", 1: "Ann."}])  # type: ignore[dict-item]


def test_parquet_holds_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"question": ["a"], "answer": ["b"], "score": [float("nan")]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read_rows(str(path), "train") == [{"question": "a", "answer": "b", "score": None}]
    twice = pyarrow.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="more than one column is named 'answer'"):
        load_examples(path)
    raw = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": raw}), path)
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(path)
