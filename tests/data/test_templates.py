"""Chat templates: every answer is labelled, nothing else is, and rows cannot steer the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from families import CHATML, FAMILIES, SPECIALS, byte_tokenizer
from transformers import ByT5Tokenizer

from perta.data import _renderer
from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet, Message
from perta.data.tokens import encode_example, encode_examples, encode_prompt, text_ids
from perta.errors import DataError
from perta.options import DataConfig

NONE = DataConfig(system_prompt="")
Turn = tuple[str, str]


def example(turns: Sequence[Turn], kind: str = "chat") -> Example:
    return Example(1, kind, tuple(Message(*turn) for turn in turns), {})


def chat(*texts: str, opens: str = "user") -> list[Turn]:
    roles = ["user", "assistant"] if opens == "user" else ["assistant", "user"]
    return [(roles[i % 2], text) for i, text in enumerate(texts)]


def labelled(encoded: Encoded, tokenizer: Any) -> list[str]:
    """Text of each run of labelled tokens."""
    runs = itertools.groupby(
        zip(encoded.labels, encoded.input_ids, strict=True), lambda pair: pair[0] != IGNORE
    )
    return [tokenizer.decode([i for _, i in run]) for is_labelled, run in runs if is_labelled]


def text_of(encoded: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(encoded.input_ids)))


def ids_of(names: Sequence[str], tokenizer: Any) -> set[int]:
    return {*tokenizer.convert_tokens_to_ids([*names])}


LONG = chat("Who is Ann?", "A cook from Oslo.", "And Bob?", "A poet. ", "Eve?", "She is 9.")
SPANS = {
    "chatml": ["A cook from Oslo.<|im_end|>", "A poet. <|im_end|>", "She is 9.<|im_end|>"],
    "llama3": ["A cook from Oslo.<|eot|>", "A poet.<|eot|>", "She is 9.<|eot|>"],
    # Without a generation prompt what stands before an answer is the model's to write.
    "llama2": [" A cook from Oslo. </s>", " A poet. </s>", " She is 9. </s>"],
    "strict": ["A cook from Oslo.</s>", "A poet. </s>", "She is 9.</s>"],
    "system last": ["A cook from Oslo.</s>", "A poet. </s>", " She is 9.</s>"],
    "gemma": ["A cook from Oslo.<end_of_turn>", "A poet.<end_of_turn>", "She is 9.<end_of_turn>"],
    "qwen3": [
        "A cook from Oslo.<|im_end|>",
        "A poet. <|im_end|>",
        "<think>\n\n</think>\n\nShe is 9.<|im_end|>",
    ],
    "deepseek": ["A cook from Oslo.</s>", "A poet. </s>", "She is 9.</s>"],
    "harmony": [
        "<|message|>A cook from Oslo.<|end|>",
        "<|message|>A poet. <|end|>",
        "<|message|>She is 9.<|return|>",
    ],
    "headers": ["\nA cook from Oslo.", "\nA poet.", "\nShe is 9.</s>"],
    "lines": ["A cook from Oslo.\n\n", "A poet.", "She is 9.\n\n</s>"],
    "marked": ["A cook from Oslo.<|im_end|>", "A poet. <|im_end|>", "She is 9.<|im_end|>"],
    "parts": ["A cook from Oslo.<|im_end|>", "A poet. <|im_end|>", "She is 9.<|im_end|>"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_its_end_are_labelled_and_nothing_else(family: str) -> None:
    tokenizer = byte_tokenizer(FAMILIES[family])
    system: list[Turn] = [] if family in ("strict", "gemma") else [("system", "Be brief.")]
    encoded = encode_example(example([*system, *LONG]), tokenizer, NONE)
    assert labelled(encoded, tokenizer) == SPANS[family]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama3", "parts")])
def test_tokens_are_those_of_the_template(family: str) -> None:
    """The oracle is transformers, which renders with today's date and takes texts alone."""
    tokenizer = byte_tokenizer(FAMILIES[family])
    messages = [{"role": role, "content": text} for role, text in LONG]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    encoded = encode_example(example(LONG), tokenizer, NONE)
    text = text_of(encoded, tokenizer)
    assert f"{whole}</s>".startswith(text)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert encode_prompt(example(LONG), tokenizer, NONE) == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_texts_are_text(family: str) -> None:
    tokenizer = byte_tokenizer(FAMILIES[family])
    names = "".join([*SPECIALS, "<|User|>", "<|Assistant|>"])
    plain = chat("Who?", "Ann.", "And?", "Bob.")
    hostile = chat(f"Who{names}?", f"Ann{names}.", f"{names}And?", f"Bob{names}")
    control = ids_of([*SPECIALS, "<|User|>", "<|Assistant|>"], tokenizer)
    if family != "deepseek":  # only there the template makes these two steer
        control -= ids_of(["<|User|>", "<|Assistant|>"], tokenizer)
    meant = [i for i in encode_example(example(plain), tokenizer, NONE).input_ids if i in control]
    encoded = encode_example(example(hostile), tokenizer, NONE)
    assert [i for i in encoded.input_ids if i in control] == meant
    runs = labelled(encoded, tokenizer)
    assert f"Ann{names}." in runs[0]
    assert f"Bob{names}" in runs[1]
    prompt = encode_prompt(example(hostile), tokenizer, NONE)
    # DeepSeek's prompt opens a thought.
    assert tuple(prompt) == encoded.input_ids[: len(prompt)] or family == "deepseek"


@pytest.mark.parametrize("kind", ["qa", "completion", "text"])
def test_control_tokens_are_text_without_a_template_too(kind: str) -> None:
    tokenizer = byte_tokenizer(None)
    control = ids_of(SPECIALS, tokenizer)
    turns = chat("Who</s>?", " Ann</s>.</s>") if kind != "text" else [("assistant", "</s> A<s>")]
    encoded = encode_example(example(turns, kind), tokenizer, NONE)
    assert [i for i in encoded.input_ids if i in control] == [tokenizer.eos_token_id]
    assert text_of(encoded, tokenizer).count("</s>") == (4 if kind != "text" else 2)
    assert text_ids("</s>", tokenizer) == tokenizer.convert_tokens_to_ids([*"</s>"])


@pytest.mark.parametrize("template", [None, CHATML])
def test_text_that_could_become_a_control_token_in_other_ways_is_text(template: str | None) -> None:
    """By merges, or where the end of a text is also what stands for the unknown, as in GPT-2."""
    tokenizer = byte_tokenizer(template, [("<", "/"), ("</", "s"), ("</s", ">")])
    tokenizer.unk_token = "</s>"
    turns = chat("Who</s>?", "Ann</s>.</s> ")
    encoded = encode_example(example(turns, "chat" if template else "completion"), tokenizer, NONE)
    pieces = tokenizer.convert_ids_to_tokens(list(encoded.input_ids))
    assert pieces.count("</s") == 3
    assert pieces.count("</s>") == (not template)


def test_marks_of_generation_say_where_an_answer_begins() -> None:
    tokenizer = byte_tokenizer(FAMILIES["marked"].split("{% if add_generation_prompt")[0])
    encoded = encode_example(example(LONG), tokenizer, NONE)
    assert labelled(encoded, tokenizer) == SPANS["marked"]


def test_a_template_that_looks_at_both_ends_of_a_text() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.content.startswith('Ann') and m.content.endswith('.') %}"
        "<s>{{ m.content }}</s>{% else %}{{ m.content }}: {% endif %}{% endfor %}"
    )
    encoded = encode_example(example(chat("Who?", "Ann is 9.")), tokenizer, NONE)
    assert labelled(encoded, tokenizer) == ["<s>Ann is 9.</s>"]


def test_rows_that_name_control_tokens_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows = (example(chat("Who?", "Ann.")), replace(example(chat("Who</s>?", "Ann.")), row=2))
    encode_examples(ExampleSet("named.jsonl", rows, (), ""), tokenizer, NONE)
    said = " ".join(capsys.readouterr().err.split())
    assert "named.jsonl: 1 rows name control tokens such as </s> (rows 2)" in said


def test_ordinary_text_next_to_a_control_token_has_its_usual_tokens() -> None:
    tokenizer = byte_tokenizer(CHATML, [("A", "n"), ("An", "n"), (".", "<")])
    usual = encode_example(example(chat("Who?", "Ann Ann.")), tokenizer, NONE)
    hostile = encode_example(example(chat("Who?", "Ann Ann.<|im_end|>")), tokenizer, NONE)
    pieces = tokenizer.convert_ids_to_tokens(list(hostile.input_ids))
    assert pieces.count("Ann") == 2
    assert ".<" in pieces  # one token spans text and the name, which is text as well
    assert hostile.input_ids[: len(usual.input_ids) - 2] == usual.input_ids[:-2]


def test_a_tokenizer_in_python_reads_control_tokens_as_text() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    encoded = encode_example(example(chat("Who</s>?", "Ann</s><pad>.")), tokenizer, NONE)
    byte = [i - 3 for i in encoded.input_ids if i >= 3]
    assert bytes(byte).decode() == "user: Who</s>?assistant: Ann</s><pad>."
    assert [i for i in encoded.input_ids if i < 3] == [1, 1]
    assert labelled(encoded, tokenizer) == ["assistant: Ann</s><pad>.</s>"]


def test_a_span_across_text_and_template_is_no_control_token() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}s>|{% endfor %}")
    encoded = encode_example(example(chat("Who?", "Ann.</")), tokenizer, NONE)
    assert text_of(encoded, tokenizer) == "Who?s>|Ann.</s>|</s>"
    assert [i for i in encoded.input_ids if i < len(SPECIALS)] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("strict", "gemma")])
def test_a_chat_that_the_assistant_opens(family: str) -> None:
    tokenizer = byte_tokenizer(FAMILIES[family])
    turns = chat("Hello.", "Who?", "Ann.", opens="assistant")
    runs = labelled(encode_example(example(turns), tokenizer, NONE), tokenizer)
    assert ["Hello." in runs[0], "Ann." in runs[-1]] == [True, True]
    assert not any("Who?" in run for run in runs)


def test_a_chat_that_the_assistant_opens_without_a_template() -> None:
    tokenizer = byte_tokenizer(None)
    turns = chat("Hello.", "Who?", "Ann.", opens="assistant")
    encoded = encode_example(example(turns), tokenizer, NONE)
    assert labelled(encoded, tokenizer) == ["Hello.", " Ann.</s>"]  # nothing predicts the space


@pytest.mark.parametrize("family", ["strict", "gemma"])
def test_a_template_without_system_messages(family: str) -> None:
    tokenizer = byte_tokenizer(FAMILIES[family])
    rows = example(chat("Who?", "Ann."))
    assert encode_example(rows, tokenizer, DataConfig()) == encode_example(rows, tokenizer, NONE)
    with pytest.raises(DataError, match='no system message; pass --system-prompt ""'):
        encode_example(rows, tokenizer, DataConfig(system_prompt="Be brief."))


def test_reasoning_within_an_answer_is_part_of_it_where_the_template_writes_it() -> None:
    tokenizer = byte_tokenizer(FAMILIES["qwen3"])
    answer = "<think>\nAnn cooks.\n</think>\n\nAnn."
    encoded = encode_example(example(chat("Who?", answer)), tokenizer, NONE)
    assert labelled(encoded, tokenizer) == [f"{answer}<|im_end|>"]
    with pytest.raises(DataError, match="leaves out or changes message 2, the assistant's"):
        encode_example(example(chat("Who?", answer, "And?", "Bob.")), tokenizer, NONE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ eos_token }}{% endfor %}", "leaves out"),
        (CHATML.replace("m['content']", "m['content'][:3]"), "leaves out or changes message 1"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "leaves out or changes"),
        (CHATML.replace("m['content']", "m['content'] * 2"), "writes message 2 2 times"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
         "leaves out or changes message 1, the user's"),
        ("{{ raise_exception('Not today') }}", r"refuses it \(TemplateError: Not today\)"),
        ("{% for m in", "cannot be used: it is no template"),
        ("{{ 'a' * 10 ** 10 }}", "cannot be used: rendering one row took more than 1 GiB"),
        ("{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}xxxxxxxx{% endfor %}"
         "{% endfor %}", "cannot be used: it writes more than 10,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"refuses it \(RecursionError"),
        ("{{ messages | random }}", "No filter named 'random'"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_used_are_refused(template: str, message: str) -> None:
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match=message):
        encode_example(example(chat("Who?", "Ann.")), tokenizer, NONE)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer("{% set r = range(99999) %}{% for i in r %}{% for j in r %}"
                               "{% endfor %}{% endfor %}")  # fmt: skip
    with pytest.raises(DataError, match="rendering one row took more than 5 s or 1 GiB"):
        encode_example(example(chat("Who?", "Ann.")), tokenizer, NONE)
    tokenizer.chat_template = CHATML
    assert encode_example(example(chat("Who?", "Ann.")), tokenizer, NONE).labels


def test_a_row_is_rendered_once_and_again_in_another_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def noted(template: str, *args: Any, **how: Any) -> list[dict[str, Any]]:
        asked.append(template)
        return render(template, *args, **how)

    render = _renderer.render
    monkeypatch.setattr(_renderer, "render", noted)
    row, words = example(chat("Who is Ivo?", "A smith from Riga.")), byte_tokenizer(CHATML, [])
    first = encode_example(row, words, NONE)
    assert encode_example(row, words, NONE) == first
    assert len(asked) == 1
    words.chat_template = "Hello. " + CHATML
    assert encode_example(row, words, NONE) != first
    assert len(asked) == 2
    words.eos_token = "<|other|>"  # templates may write it
    encode_example(row, words, NONE)
    encode_example(row, words, replace(NONE, format="chat"))
    assert len(asked) == 3


def test_todays_date_is_always_the_same() -> None:
    tokenizer = byte_tokenizer(FAMILIES["llama3"])
    encoded = encode_example(example(chat("Who?", "Ann.")), tokenizer, NONE)
    assert "Today Date: 10 Apr 2025<" in text_of(encoded, tokenizer)


def test_a_row_that_the_template_refuses_is_named_and_can_be_skipped() -> None:
    tokenizer = byte_tokenizer(FAMILIES["strict"])
    good, bad = chat("Who?", "Ann."), chat("Hi.", "Who?", "Ann.", opens="assistant")
    rows = (example(good), replace(example(bad), row=2))
    examples = ExampleSet("rows.jsonl", rows, (), "")
    with pytest.raises(DataError, match=r"row 2: the chat template refuses it .*must alternate"):
        encode_examples(examples, tokenizer, NONE)
    kept = encode_examples(examples, tokenizer, DataConfig(system_prompt="", skip_bad_rows=True))
    assert [row.row for row in kept.encoded] == [1]
    assert "refuses it" in kept.skipped[0]


@pytest.mark.parametrize(("prompt", "answer"), [("W", "h"), ("W", "h is it")])
def test_an_answer_within_the_first_token_is_refused(prompt: str, answer: str) -> None:
    tokenizer = byte_tokenizer(None, [("W", "h")])
    rows = example([("user", prompt), ("assistant", answer)], "completion")
    with pytest.raises(DataError, match="the answer begins within the first token"):
        encode_example(rows, tokenizer, NONE)


def test_benchmarks_label_as_published() -> None:
    """All behind the prompt, and eos once more: 4 letters, the end, a newline and eos."""
    tokenizer = byte_tokenizer(CHATML)
    row = example(chat("Who?", "Ann."))
    ours, theirs = (
        encode_example(row, tokenizer, NONE, as_published=published) for published in (False, True)
    )
    assert labelled(ours, tokenizer) == ["Ann.<|im_end|>"]
    assert labelled(theirs, tokenizer) == ["Ann.<|im_end|>\n</s>"]
    assert theirs.input_ids[: len(ours.input_ids)] == ours.input_ids
