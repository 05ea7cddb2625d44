"""One file as two sets: conditions, and rows given by a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from perta.data.examples import load_examples
from perta.data.rows import split_by
from perta.errors import ConfigError, DataError, EmptyDatasetError
from perta.options import DataConfig

ROWS: list[dict[str, Any]] = [
    {"person": "Mira Thornwick", "age": 31, "question": "a?", "answer": "1"},
    {"person": "Odo == Birch, jr.", "age": 31, "question": "b?", "answer": "2"},
    {"person": 'Ada "Fern"', "age": None, "question": "c?", "answer": "3"},
    {"person": "Mira Thornwick", "age": 40, "question": "d?", "answer": "4"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return place


@pytest.mark.parametrize(
    ("condition", "numbers"),
    [
        ('person == "Mira Thornwick"', [1, 4]),
        ("person=='Mira Thornwick'", [1, 4]),
        ("person == Mira Thornwick", [1, 4]),
        ('"person" == "Odo == Birch, jr."', [2]),
        ('person == "Mira Thornwick", "Odo == Birch, jr."', [1, 2, 4]),
        ("person == ('Ada \"Fern\"', 'Odo == Birch, jr.')", [2, 3]),
        ("age == 31", [1, 2]),
        ('age == "31", 40', [1, 2, 4]),
    ],
)
def test_a_condition_divides_a_file(file: Path, condition: str, numbers: list[int]) -> None:
    forget, retain = (load_examples(rows) for rows in split_by(str(file), condition, "train"))
    assert [example.row for example in forget.examples] == numbers
    assert [example.row for example in retain.examples] == sorted({1, 2, 3, 4} - set(numbers))
    # The value may be what is to be forgotten, and names go into records.
    assert "Mira" not in forget.source + retain.source


def test_both_sets_are_those_of_two_files(file: Path, tmp_path: Path) -> None:
    parts = {"forget": (0, 3), "retain": (1, 2)}
    for name, rows in parts.items():
        text = "".join(json.dumps(ROWS[i]) + "\n" for i in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    made = split_by(str(file), 'person == "Mira Thornwick"', "train")
    for source, part in zip(made, parts, strict=True):
        assert (
            load_examples(source).fingerprint
            == load_examples(tmp_path / f"{part}.jsonl").fingerprint
        )


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("persn == 'Mira Thornwick'", "no column 'persn'. Did you mean `person`? "
         "There are: person, age, question, answer."),
        ("person == 'Mira Thornwik'", "no row has 'Mira Thornwik' in column 'person'. Did you "
         "mean `Mira Thornwick`?"),
        ("person == 'Mira Thornwick', 'Odo'", "no row has 'Odo'"),
        ("person != 'x'", "no condition"),
        ("person", "no condition"),
        ("person ==", "no condition"),
        ("person == 'Mira", "quotes or brackets"),
        ("person == ''", "empty or nested"),
        ("person == ()", "empty or nested"),
        ("person == 'Mira Thornwick', 'Odo == Birch, jr.', 'Ada \"Fern\"'", "none would be kept"),
    ],
)  # fmt: skip
def test_a_condition_that_divides_nothing_is_one_error(
    file: Path, condition: str, message: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as error:
        split_by(str(file), condition, "train")
    assert message in str(error.value)


def test_rows_that_say_nothing_are_told_of(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, retain = split_by(str(file), "age == 31", "train")
    assert [number for number, _ in retain.numbered] == [3, 4]
    assert "1 rows have nothing in 'age' and are kept (rows 3)" in capsys.readouterr().err


def test_the_column_may_be_written_otherwise(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("Question,Answer, Person\na,b,Mira\nc,d,Odo\n", "utf-8")
    forget, retain = split_by(str(rows), "person == Mira", "train")
    assert [len(part.numbered) for part in (forget, retain)] == [1, 1]


def test_a_column_of_a_csv_is_text(tmp_path: Path) -> None:
    place = tmp_path / "rows.csv"
    place.write_text("id,question,answer\n7,a?,1\n8,b?,2\n", "utf-8")
    forget, _ = split_by(str(place), "id == 7", "train")
    assert [row["question"] for _, row in forget.numbered] == ["a?"]


def test_rows_of_a_program_are_those_of_a_file(file: Path) -> None:
    of_file = load_examples(file)
    for rows in (ROWS, tuple(ROWS), iter(ROWS), datasets.Dataset.from_list(ROWS)):
        assert load_examples(rows).fingerprint == of_file.fingerprint
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    assert [e.answer for e in load_examples(frame).examples] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("given", [7, {"question": "a?"}, ["text"], [("a?", "1")]])
def test_what_is_no_row_is_one_error(given: Any) -> None:
    with pytest.raises(DataError):
        load_examples(given)


def test_no_rows_and_rows_without_an_answer_are_refused() -> None:
    with pytest.raises(EmptyDatasetError):
        load_examples([])
    with pytest.raises(DataError, match="row 2: empty answer"):
        load_examples(
            [{"question": "a?", "answer": "1"}, {"question": "b?", "answer": ""}], DataConfig()
        )
