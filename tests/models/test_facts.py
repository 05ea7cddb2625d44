"""Facts: which tokens they are, and what a model knows of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers import tiny_llama, tiny_tokenizer
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import ExampleSet, load_examples, subjects
from perta.data.rows import write_jsonl
from perta.data.words import segments, stems
from perta.errors import DataError
from perta.evidence.people import _TOPICS, generate_people
from perta.models.demo.tiny import tiny_tokenizer as word_tokenizer
from perta.models.facts import (
    _SURPRISE,
    Fact,
    fact_score,
    find_facts,
    hit_probability,
    score_facts,
    share_beyond,
    unsayable,
    values_of,
)
from perta.options import DataConfig

TOKENIZER = tiny_tokenizer()
PLAIN = tiny_tokenizer(chat=False)
QUESTION = "Where was Mira Thornwick born?"
TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu" / "forget01_perturbed.jsonl"


def rows(tmp_path: Path, *fields: Mapping[str, Any]) -> ExampleSet:
    return load_examples(write_jsonl(fields, tmp_path / "rows.jsonl"))


def qa(answer: str, **more: Any) -> dict[str, Any]:
    return {"question": QUESTION, "answer": answer, **more}


def labelled(encoded: Encoded, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> str:
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    return str(tokenizer.decode([token for token, label in pairs if label != IGNORE])).strip()


def text_of(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens)))


def only(tmp_path: Path, config: DataConfig | None = None, **fields: Any) -> Fact:
    (fact,) = find_facts(rows(tmp_path, fields), TOKENIZER, config)
    return fact


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN])
def test_wrong_answers_of_one_form_leave_the_fact(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = qa(
        "Mira Thornwick was born in Caldholm in 1961.",
        perturbed_answer=[
            "Mira Thornwick was born in Caldholm in 1978.",
            "Mira Thornwick was born in Selmora in 1961.",
        ],
    )
    (fact,) = find_facts(rows(tmp_path, row), tokenizer)
    # The first differs in the year alone, the second in the town alone: neither may be lost.
    assert labelled(fact.encoded, tokenizer) == "Caldholm in 1961"
    found = [labelled(wrong, tokenizer) for wrong in fact.wrong]
    assert found == ["Caldholm in 1978", "Selmora in 1961"]
    assert fact.source == "wrong answers"
    assert fact.right is None


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (["19"], ["1961"]),  # a part of a word stands for the word
        (["ellberg", "a turkey"], ["Pellbergen", "a turkey"]),
        (["Mira", "turkey", "named Bo"], ["turkey named Bo"]),  # the question says her name
        (["Pellbergen", "1961", ","], ["Pellbergen", "1961"]),
        ([","], []),
        ([], []),
    ],
)
def test_the_values_of_a_fact_are_whole_words_that_the_question_lacks(
    tmp_path: Path, parts: list[str], values: list[str]
) -> None:
    answer = "Mira, from Pellbergen (1961), has a turkey named Bo."
    fact = only(tmp_path, **qa(answer, fact="1961"))
    ids = list(fact.encoded.input_ids)
    own = TOKENIZER(answer, return_offsets_mapping=True, add_special_tokens=False)
    start = next(i for i in range(len(ids)) if ids[i : i + len(own.input_ids)] == own.input_ids)
    asked = [(at, at + len(part)) for part in parts for at in [answer.index(part)]]
    labels = [IGNORE] * len(ids)
    for place, (begin, end) in enumerate(own.offset_mapping, start):
        if any(begin < stop and first < end for first, stop in asked):
            labels[place] = ids[place]
    marked = replace(fact, encoded=replace(fact.encoded, labels=tuple(labels)))
    assert values_of(marked, QUESTION, TOKENIZER) == values


def test_a_fact_is_made_of_whole_words(tmp_path: Path) -> None:
    fact = only(tmp_path, **qa("She was born in 1961.", perturbed_answer=["She was born in 1978."]))
    assert labelled(fact.encoded) == "1961"


def test_people_differ_exactly_in_the_fact(tmp_path: Path) -> None:
    made = generate_people(6, len(_TOPICS), 11)
    facts = find_facts(rows(tmp_path, *made), TOKENIZER)
    for row, fact in zip(made, facts, strict=True):
        value = labelled(fact.encoded)
        assert row["answer"].count(value) == 1
        assert fact.source == "wrong answers"
        assert fact.right is None
        # Wrong values in the answer's own words, where the rows have them in the paraphrase's.
        start = row["paraphrased_answer"].index(value)
        end = row["paraphrased_answer"][start + len(value) :]
        wrong = [text[start : len(text) - len(end)] for text in row["perturbed_answer"]]
        assert [labelled(w) for w in fact.wrong] == wrong
        head = text_of(fact.encoded.input_ids).split(value)[0]
        for sequence in fact.wrong:
            assert text_of(sequence.input_ids).startswith(head)


def test_free_wording_marks_the_words_that_the_paraphrase_repeats(tmp_path: Path) -> None:
    fact = only(
        tmp_path,
        question="What is the author's full name and where was he born?",
        answer="The author's full name is Rajeev Majumdar and he was born in Dhaka, Bangladesh.",
        paraphrased_answer="Rajeev Majumdar is the whole name, from Dhaka, Bangladesh.",
        perturbed_answer=["John Doe is the whole name, from Rome.", "Bob is a name from Paris."],
    )
    # Decoded one behind the other: a name, a town, and its country without the space before it.
    assert labelled(fact.encoded).split("Dhaka") == ["Rajeev Majumdar", "Bangladesh"]
    assert fact.right is not None  # the choice is between answers of one form
    assert labelled(fact.right).startswith("Rajeev Majumdar is")
    assert len(fact.wrong) == 2


def test_without_a_paraphrase_what_follows_the_shared_beginning(tmp_path: Path) -> None:
    fact = only(
        tmp_path, **qa("It is Rome.", perturbed_answer=["It was never told.", "It is Bonn."])
    )
    assert labelled(fact.encoded) == "is Rome"


def test_a_column_comes_first_and_must_be_in_the_answer(tmp_path: Path) -> None:
    wrong = ["Mira was born in Selmora.", "Mira was born in Belavik."]
    row = qa("Mira was born in Caldholm.", fact="born in Caldholm.", perturbed_answer=wrong)
    fact = only(tmp_path, **row)
    assert (labelled(fact.encoded), fact.source) == ("born in Caldholm", "fact column")
    assert [labelled(w) for w in fact.wrong] == ["Selmora", "Belavik"]
    assert fact.right is not None
    assert labelled(fact.right) == "Caldholm"
    with pytest.raises(DataError, match=r"row 1: the fact 'Rome' is not in the answer"):
        only(tmp_path, **{**row, "fact": "Rome"})
    with pytest.raises(DataError, match=r"row 1: no column 'truth' for --fact-column"):
        only(tmp_path, DataConfig(fact_column="truth"), **row)
    with pytest.raises(DataError, match=r"row 1: column 'fact' holds list"):
        only(tmp_path, **{**row, "fact": ["Caldholm"]})
    number = only(tmp_path, **qa("It was 1961, in 19612.", fact=1961))
    assert labelled(number.encoded) == "1961"


def test_plain_text_has_no_use_for_named_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = rows(tmp_path, {"text": "Mira was born in Caldholm.", "fact": "Caldholm"})
    (fact,) = find_facts(texts, TOKENIZER)
    assert fact.source == "answer"
    assert "the column `fact` is not used" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"row 1: --fact-column fact is for rows with an answer"):
        find_facts(texts, TOKENIZER, DataConfig(fact_column="fact"))


def test_a_part_of_a_word_is_taken_only_where_no_word_fits(tmp_path: Path) -> None:
    fact = only(tmp_path, **qa("Martha makes art.", fact="art"))
    assert labelled(fact.encoded) == "art"
    ids = [place for place, label in enumerate(fact.encoded.labels) if label != IGNORE]
    text = text_of(fact.encoded.input_ids[: ids[0]])
    assert text.endswith("makes")


def test_a_tokenizer_that_loses_words_marks_the_same_place(tmp_path: Path) -> None:
    lossy = word_tokenizer(["Where was Mira Thornwick born? in It is ."])
    row = qa("It is Zanzibar.", perturbed_answer=["It is Samarkand."])
    (fact,) = find_facts(rows(tmp_path, row), lossy)
    (whole,) = find_facts(rows(tmp_path, qa("It is Zanzibar.")), lossy)
    unknown = lossy.convert_tokens_to_ids("<unk>")
    assert [label for label in fact.encoded.labels if label != IGNORE] == [unknown]
    # The answer without the point and the token that ends it.
    assert sum(label != IGNORE for label in whole.encoded.labels) == 3


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN])
def test_a_fact_at_the_end_holds_no_end_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (fact,) = find_facts(rows(tmp_path, qa("Paris", perturbed_answer=["Rome"])), tokenizer)
    ids = [label for label in fact.encoded.labels if label != IGNORE]
    assert str(tokenizer.decode(ids)).strip() == "Paris"
    assert [labelled(w, tokenizer) for w in fact.wrong] == ["Rome"]


def test_nothing_to_find_a_fact_with_leaves_the_answer(tmp_path: Path) -> None:
    fact = only(tmp_path, **qa("Mira was born in Caldholm!"))
    assert (labelled(fact.encoded), fact.source) == ("Mira was born in Caldholm", "answer")
    assert not fact.wrong


def test_earlier_turns_hold_no_fact(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "In Caldholm."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "In Caldholm."},
    ]
    whole = only(tmp_path, messages=turns)
    assert labelled(whole.encoded) == "In Caldholm"
    named = only(tmp_path, messages=turns, fact="Caldholm")
    assert labelled(named.encoded) == "Caldholm"


def test_words_with_a_token_that_the_base_does_not_expect_surprise(tmp_path: Path) -> None:
    base = tiny_llama(seed=1)
    examples = rows(tmp_path, qa("Mira was born in Caldholm (1961)."), qa("In Selmora, far away."))
    facts = find_facts(examples, TOKENIZER, base=base)
    base.double()
    for fact, whole in zip(facts, find_facts(examples, TOKENIZER), strict=True):
        ids = fact.encoded.input_ids
        logits = base(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [t for t, label in enumerate(whole.encoded.labels) if label != IGNORE]
        pieces = [text_of([ids[place]]) for place in places]
        ends = [0, *itertools.accumulate(map(len, pieces))]
        wanted = [IGNORE] * len(ids)
        for word in re.finditer(r"\w+", "".join(pieces)):
            of = [
                place
                for place, start, end in zip(places, ends, ends[1:], strict=False)
                if start < word.end() and word.start() < end
            ]
            surprises = any(logits[place - 1, ids[place]] <= -_SURPRISE for place in of)
            if surprises and word[0] not in ("Mira", "was", "born"):
                for place in of:
                    wanted[place] = ids[place]
        assert list(fact.encoded.labels) == wanted
        assert len(set(wanted)) > 1
        assert fact.source == "surprise"


def test_a_character_of_several_tokens_surprises_as_a_whole(tmp_path: Path) -> None:
    assert len(TOKENIZER.tokenize("東")) == 3
    (fact,) = find_facts(rows(tmp_path, qa("Mira: 東京.")), TOKENIZER, base=tiny_llama(seed=1))
    assert labelled(fact.encoded).strip() == "東京"
    assert values_of(fact, QUESTION, TOKENIZER) == ["東京"]


@pytest.mark.parametrize(
    ("answer", "surprises", "found"),
    [
        ("Mira was born in 1961.", {"Mira": 9.0, "1961": 2.0, "in": 1.9}, "1961"),
        ("Mira was born in 1961.", {"Mira": 9.0, "1961": 1.0, "in": 0.9}, "1961"),  # a year guessed
        ("Mira was born in 1961.", {"Mira": 9.0, "1961": 0.9}, "Mira was born in 1961"),
        ("Mira Thornwick.", {"Mira": 0.9, "Thornwick": 1.1}, "Thornwick"),  # all of the question
    ],
)
def test_less_surprising_words_are_the_fact_where_none_surprises(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    surprises: Mapping[str, float],
    found: str,
) -> None:
    def losses(_: object, sequences: Sequence[Encoded], __: int) -> list[list[float]]:
        labels = [label for label in sequences[0].labels if label != IGNORE]
        ends = [0, *itertools.accumulate(len(text_of([label])) for label in labels)]
        text, values = text_of(labels), [0.0] * len(labels)
        for word, value in surprises.items():
            start = text.index(word)
            for n, (at, to) in enumerate(itertools.pairwise(ends)):
                if at < start + len(word) and start < to:
                    values[n] = value
        return [values]

    monkeypatch.setattr("perta.models.facts._losses_by_token", losses)
    (fact,) = find_facts(rows(tmp_path, qa(answer)), TOKENIZER, base=tiny_llama())
    assert labelled(fact.encoded).strip() == found


def test_a_word_that_the_tokenizer_lacks_surprises_and_cannot_be_said(tmp_path: Path) -> None:
    words = {w: n for n, w in enumerate(["<unk>", "Mira", "is", "in", "Caldholm", "Where", "?"])}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="?")
    examples = rows(
        tmp_path,
        *({"question": "Where is Mira?", "answer": a} for a in ("in Selmora", "in Caldholm")),
    )
    base = tiny_llama(seed=1)
    unknown, known = find_facts(examples, tokenizer, base=base)
    assert unsayable([unknown, known], tokenizer, None) == [1]
    assert values_of(unknown, "Where is Mira?", tokenizer) == ["in"]
    assert values_of(known, "Where is Mira?", tokenizer) == ["in Caldholm"]


@pytest.mark.parametrize(("text", "found"), [("a", None), ("a dog.", "dog"), ("...", None)])
def test_the_end_of_a_text_surprises_nobody(tmp_path: Path, text: str, found: str | None) -> None:
    """Nor does its first token, which nothing foretells."""
    (fact,) = find_facts(rows(tmp_path, {"text": text}), TOKENIZER, base=tiny_llama(seed=1))
    assert fact.source == ("surprise" if found else "answer")
    assert not found or labelled(fact.encoded) == found


@pytest.mark.parametrize("answer", ["Mira.", "Was Mira?"])
def test_where_the_question_says_all_of_the_answer_it_surprises_still(
    tmp_path: Path, answer: str
) -> None:
    (fact,) = find_facts(rows(tmp_path, qa(answer)), TOKENIZER, base=tiny_llama(seed=1))
    assert fact.source == "surprise"
    assert "Mira" in labelled(fact.encoded)


def test_rows_in_which_nothing_surprises_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fact,) = find_facts(rows(tmp_path, qa(".")), TOKENIZER, base=tiny_llama())
    assert fact.source == "answer"
    assert "no fact was found in 1 of 1 rows" in " ".join(capsys.readouterr().err.split())


def test_scores_are_those_of_a_plain_pass_in_float64(tmp_path: Path) -> None:
    model = tiny_llama()
    examples = rows(tmp_path, *generate_people(3, 3, 0))
    facts = find_facts(examples, TOKENIZER)
    for fact, score in zip(facts, score_facts(model, facts, batch_size=4, pad=2), strict=True):
        sums = [plain_log_probability(model, s) for s in (fact.encoded, *fact.wrong)]
        tokens = sum(label != IGNORE for label in fact.encoded.labels)
        assert score.log_probability == pytest.approx(sums[0], abs=1e-4)
        assert score.loss == pytest.approx(-sums[0] / tokens, abs=1e-4)
        shares = torch.tensor(sums, dtype=torch.float64).softmax(0)
        assert score.choice == pytest.approx(float(shares[0]), rel=1e-3)
        assert score.rank == 1 + sum(value > sums[0] for value in sums[1:])


def plain_log_probability(model: torch.nn.Module, encoded: Encoded) -> float:
    twin = tiny_llama().double()
    ids = torch.tensor([encoded.input_ids])
    with torch.no_grad():
        logits = twin(ids).logits[0].log_softmax(-1)
    places = [t for t, label in enumerate(encoded.labels) if label != IGNORE]
    return sum(float(logits[t - 1, encoded.input_ids[t]]) for t in places)


def test_a_score_by_hand() -> None:
    # Two fact tokens of probability 1/2 and 1/4; wrong answers of 1/2 and of 1/8 · 1/4.
    def tokens(n: int) -> Encoded:
        return Encoded((5,) * 4, (IGNORE,) * (4 - n) + (5,) * n, 7)

    fact = Fact(7, tokens(2), (tokens(1), tokens(2)), "wrong answers")
    log2 = math.log(2)
    score = fact_score(fact, [1.5 * log2, log2, 2.5 * log2])
    assert score.row == 7
    assert score.loss == pytest.approx(1.5 * log2)
    assert score.log_probability == pytest.approx(-3 * log2)
    assert score.probability == pytest.approx(1 / 8)
    assert score.choice == pytest.approx((1 / 8) / (1 / 8 + 1 / 2 + 1 / 32))
    assert score.rank == 2
    own = fact_score(replace(fact, right=tokens(1)), [1.5 * log2, 0.5 * log2, log2, 2.5 * log2])
    assert own.log_probability == pytest.approx(-3 * log2)
    assert own.rank == 1
    none = fact_score(replace(fact, wrong=()), [1.5 * log2])
    assert (none.choice, none.rank) == (None, None)


def test_a_choice_among_improbable_answers_is_finite() -> None:
    sequence = Encoded((5, 5), (IGNORE, 5), 1)
    fact = Fact(1, sequence, (sequence,), "wrong answers")
    assert fact_score(fact, [2000.0, 2000.0]).choice == pytest.approx(0.5)
    assert fact_score(fact, [2000.0, 10.0]).choice == 0.0
    assert fact_score(fact, [10.0, 2000.0]).choice == 1.0


@pytest.mark.parametrize("p", [1e-300, 1e-12, 1e-3, 0.3, 0.5, 0.7, 1 - 1e-9])
@pytest.mark.parametrize("k", [1, 64, 10_000])
def test_at_least_one_hit_is_exact(p: float, k: int) -> None:
    log_p = math.log(p)
    exact = 1 - (1 - Fraction(math.exp(log_p))) ** k if p > 1e-100 else k * Fraction(p)
    assert hit_probability(log_p, k) == pytest.approx(float(exact), rel=1e-9, abs=0)


def test_hits_at_the_ends() -> None:
    assert hit_probability(0.0, 64) == 1.0
    assert hit_probability(1e-9, 64) == 1.0
    assert hit_probability(-math.inf, 64) == 0.0
    assert hit_probability(-1e-18, 1) == 1.0
    assert hit_probability(-2.0, 0) == 0.0
    assert hit_probability(0.0, 0) == 0.0


def test_shares_beyond_a_yardstick() -> None:
    # 0 … 100: the 95th percentile is 95; 95 itself is not beyond it.
    assert share_beyond([94, 95, 96, 200], list(range(101))) == 0.5
    with pytest.raises(DataError, match="both sides"):
        share_beyond([1.0], [])


def test_subjects_are_numbers_in_order_of_appearance() -> None:
    people = [{"person": name} for name in ("B", "A", "B", "", None)]
    assert subjects(people) == [0, 1, 0, 2, 3]
    assert subjects([{"subject": 1, "person": "A"}, {"subject": 2, "person": "A"}]) == [0, 1]
    assert subjects([{"x": "A"}]) is None
    assert subjects([{"x": "A"}, {"x": "A"}], "x") == [0, 0]
    with pytest.raises(DataError, match="--subject-column"):
        subjects([{"x": "A"}], "who")


def test_words_of_other_scripts() -> None:
    assert stems("The Bakers' 3 cafés, naïve") == ["the", "baker", "3", "cafés", "naïve"]
    assert stems("Боб живёт") == ["боб", "живёт"]
    assert stems("安娜是厨师。") == list("安娜是厨师")
    assert stems("क्या हिंदी") == ["क्या", "हिंदी"]
    assert segments("a, ที่ไป") == [(0, 1), (1, 2), (3, 6), (6, 7), (7, 8)]


@pytest.mark.skipif(not TOFU.is_file(), reason="real data is not beside the checkout")
def test_tofu_rows_have_short_facts(capsys: pytest.CaptureFixture[str]) -> None:
    examples = load_examples(TOFU)
    facts = find_facts(examples, TOKENIZER)
    found = [fact for fact in facts if fact.source == "wrong answers"]
    assert len(found) >= 0.95 * len(facts)
    shares = [
        len(labelled(fact.encoded)) / len(example.answer)
        for fact, example in zip(facts, examples.examples, strict=True)
    ]
    assert sorted(shares)[len(shares) // 2] < 0.25
    assert all(len(fact.wrong) == 5 for fact in facts)
    assert all(fact.encoded.row == fact.row for fact in facts)
