"""The generator of fictitious people: unique, stable, and right about right and wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from perta.data.examples import load_examples
from perta.data.rows import write_jsonl
from perta.errors import ConfigError
from perta.evidence.people import _TOPICS, generate_people, split_people

COLUMNS = {
    "person",
    "question",
    "answer",
    "paraphrased_answer",
    "paraphrased_question",
    "perturbed_answer",
}


def test_rows_have_tofu_columns_and_name_the_person() -> None:
    rows = generate_people(people=5, questions=len(_TOPICS), seed=0)
    assert len(rows) == 5 * len(_TOPICS)
    for row in rows:
        assert set(row) == COLUMNS
        texts = [v for k, v in row.items() if k not in ("person", "perturbed_answer")]
        assert all(row["person"] in text for text in [*texts, *row["perturbed_answer"]])


def test_wrong_answers_are_wrong_and_of_the_same_form() -> None:
    for row in generate_people(people=20, questions=len(_TOPICS), seed=1):
        wrong = row["perturbed_answer"]
        assert len(set(wrong)) == 5
        assert row["paraphrased_answer"] not in wrong


def test_questions_about_a_person_differ() -> None:
    rows = generate_people(people=1, questions=len(_TOPICS), seed=0)
    assert len(_TOPICS) >= 20
    assert len({row["question"] for row in rows}) == len(_TOPICS)


def test_names_are_unique_in_thousands() -> None:
    rows = generate_people(people=20_000, questions=1, seed=0)
    assert len({row["person"] for row in rows}) == 20_000


def test_larger_sets_extend_smaller_ones() -> None:
    small = generate_people(people=4, questions=3, seed=2)
    more_people = generate_people(people=9, questions=3, seed=2)
    more_questions = generate_people(people=4, questions=8, seed=2)
    assert more_people[: len(small)] == small
    assert [r for i, r in enumerate(more_questions) if i % 8 < 3] == small
    assert generate_people(people=4, questions=3, seed=3) != small


def test_same_bytes_on_every_platform() -> None:
    rows = generate_people(people=50, questions=len(_TOPICS), seed=0)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == "90269a8c80285d299df22dd0f8aee44da399d030ba8a22edabdfcb52c5af6db4"


def test_facts_are_independent_enough_to_be_unguessable() -> None:
    """The commonest fact of a question type fits few people."""
    rows = generate_people(people=400, questions=len(_TOPICS), seed=0)
    for t in range(len(_TOPICS)):
        facts = [row["answer"].replace(row["person"], "") for row in rows[t :: len(_TOPICS)]]
        assert max(facts.count(fact) for fact in set(facts)) < 30


def test_split_keeps_people_together() -> None:
    rows = generate_people(people=10, questions=3, seed=0)
    forget, retain = split_people(rows, forget_people=2, seed=1)
    assert len(forget) == 6
    assert len(retain) == 24
    assert not {r["person"] for r in forget} & {r["person"] for r in retain}
    assert [r for r in rows if r in forget] == forget
    assert split_people(rows, forget_people=2, seed=2)[0] != forget


def test_split_refuses_an_empty_side() -> None:
    rows = generate_people(people=3, questions=1, seed=0)
    with pytest.raises(ConfigError, match="both sets need"):
        split_people(rows, forget_people=3)


@pytest.mark.parametrize(("people", "questions"), [(0, 1), (1, 0), (1, len(_TOPICS) + 1)])
def test_counts_out_of_range(people: int, questions: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        generate_people(people=people, questions=questions, seed=0)


def test_written_rows_load_as_examples(tmp_path: Path) -> None:
    rows = generate_people(people=3, questions=4, seed=0)
    loaded = load_examples(write_jsonl(rows, tmp_path / "new" / "people.jsonl"))
    assert [e.answer for e in loaded.examples] == [row["answer"] for row in rows]
    assert loaded.examples[0].fields["perturbed_answer"] == rows[0]["perturbed_answer"]
