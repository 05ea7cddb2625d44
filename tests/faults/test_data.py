"""Rows, files and chat templates made at random: read whole and labelled rightly, or one error.

`PERTA_FUZZ_CASES` is the number of cases of each test [default: 100].
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perta.data.batch import IGNORE
from perta.data.examples import Example, Message, load_examples
from perta.data.tokens import encode_example, encode_prompt
from perta.errors import DataError, PertaError
from perta.options import DataConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from families import FAMILIES, SPECIALS, byte_tokenizer

CASES = settings(
    max_examples=int(os.environ.get("PERTA_FUZZ_CASES", "100")),
    deadline=None,
    derandomize="PERTA_FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["Who?", "Ann.", "", " ", '"', "a,b", "<|im_end|>", "\ud83d"]
)
PROMPTS = ("question", "prompt", "instruction", "input", "context", "system")
ANSWERS = ("answer", "completion", "response", "output")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", None]),
        "content": TEXTS | VALUES,
    },
    optional={"weight": st.sampled_from([0, 1]), "tool_calls": VALUES},
)
ROWS = st.dictionaries(st.sampled_from([*PROMPTS, *ANSWERS, "text", "tools"]), TEXTS | VALUES) | (
    st.fixed_dictionaries({"messages": st.lists(TURNS, max_size=4) | VALUES})
)


@CASES
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_rows_are_read_whole_or_refused(rows: list[dict[str, Any]]) -> None:
    try:
        examples = load_examples(rows).examples
    except PertaError:
        return
    for example, row in zip(examples, rows, strict=True):
        said = "\n".join(message.content for message in example.messages)
        if example.kind == "qa":
            assert all(row[n].strip() in said for n in (*PROMPTS, *ANSWERS) if row.get(n))
        assert example.answer.strip()


@CASES
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_tables_give_back_what_was_written(
    rows: list[tuple[str, str]], delimiter: str, quoting: Any
) -> None:
    rows = [(q, a) for q, a in rows if q.strip() and a.strip() and not {*q + a} & {"\0", "\ud83d"}]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(
        [("question", "answer"), *rows]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        path.write_bytes(file.getvalue().encode("utf-8"))
        if rows:
            assert [(e.prompt, e.answer) for e in load_examples(path).examples] == rows
        flat = [r for r in rows if not {*"\t\n\r\ufeff"} & {*"".join(r)} and '""' not in "".join(r)]
        path = Path(folder, "rows.tsv")
        lines = ["question\tanswer", *("\t".join(row) for row in flat)]
        path.write_bytes("\n".join(lines).encode("utf-8"))
        if flat:
            assert [(e.prompt, e.answer) for e in load_examples(path).examples] == flat


@CASES
@given(
    st.sampled_from(["rows.csv", "rows.tsv", "rows.jsonl", "rows.json"]),
    st.lists(
        st.tuples(
            st.integers(0, 90),
            st.sampled_from(
                [b'"', b",", b"\t", b";", b"\n", b"\r", b"{", b"]", b"\0", b"\xff", b""]
            ),
        ),
        max_size=3,
    ),
)
def test_damaged_files_give_one_error_or_all_rows(
    name: str, damage: list[tuple[int, bytes]]
) -> None:
    rows = [{"question": f'Who "{i}", x?', "answer": f"Ann {i}."} for i in range(3)]
    if name.endswith("l"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif name.endswith("n"):
        text = json.dumps(rows)
    else:
        file = io.StringIO()
        table = csv.DictWriter(file, ["question", "answer"], dialect="excel")
        table.writeheader()
        table.writerows(rows)
        text = file.getvalue() if name.endswith("csv") else 'question\tanswer\na\t"b"\nc\td\n'
    content = text.encode()
    for place, piece in damage:
        content = content[:place] + piece + content[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            found = load_examples(path)
        except PertaError:
            return
    assert found.examples


OF_ROLES = st.sampled_from(["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content.strip() }}",
                            "{{ m.content.split('</think>')[-1] }}", "{{ m['content'] ~ '' }}",
                            "{% generation %}{{ m.content }}{% endgeneration %}",
                            "{% if m.content is string %}{{ m.content }}{% else %}"
                            "{{ m.content[0].text }}{% endif %}",
                            "{% for p in m.content %}{{ p.text }}{% endfor %}",
                            "{{ m.content[:4] }}", ""])  # fmt: skip
AROUND = st.sampled_from(["", " ", "\n", "<s>", "</s>", "<|im_end|>\n", "<|eot|>",
                          "[INST] ", "### ", "Ann.", "<|{{ m.role }}|>\n",
                          "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}",
                          "{% if loop.first %}<s>{% endif %}"])  # fmt: skip


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A template that writes users' and assistants' turns in ways of their own."""
    user, assistant = (
        f"{draw(AROUND)}{draw(AROUND)}{draw(OF_ROLES)}{draw(AROUND)}{draw(AROUND)}"
        for _ in range(2)
    )
    prompt = draw(st.sampled_from(["", "<|assistant|>", "<|im_start|>assistant\n"]))
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + assistant + "{% else %}" + user
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


ANSWER = st.text(min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["Ann.", "Who?", " Ann. ", "</s>", "Ann<|im_end|>", "<think>\nHm\n</think>\n\nAnn.", "a"]
)
CHATS = st.lists(st.tuples(TEXTS, ANSWER), min_size=1, max_size=3)


@CASES
@given(templates() | st.sampled_from(sorted(FAMILIES.values())), CHATS, st.booleans())
def test_every_answer_is_labelled_or_the_row_is_refused(
    template: str, chat: list[tuple[str, str]], opens: bool
) -> None:
    pairs = [(("user", question), ("assistant", answer)) for question, answer in chat]
    turns = [Message(role, text) for pair in pairs for role, text in pair][opens:]
    if opens and not turns[:-1]:
        return
    tokenizer: Any = byte_tokenizer(template)
    config = DataConfig(system_prompt="")
    example = Example(1, "chat", tuple(turns), {})
    try:
        encoded = encode_example(example, tokenizer, config)
        encode_prompt(example, tokenizer, config)
    except DataError:
        return
    assert encoded.labels[-1] == encoded.input_ids[-1]
    runs: list[list[int]] = [[]]
    for i, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORE, i)
        runs[-1].append(i) if label == i else runs.append([])
    labelled = "\n".join(str(tokenizer.decode(run)) for run in runs)
    first = tokenizer.decode(list(encoded.input_ids[:1]))
    place, skipped = 0, len(first)  # nothing predicts the first token
    for turn in turns:
        if turn.role == "assistant":
            core = turn.content.strip()[skipped:]
            place = labelled.index(core, place) + len(core)
            skipped = 0
    steering = {*tokenizer.convert_tokens_to_ids([*SPECIALS])}
    neutral = tuple(Message(m.role, "x" if m.content.strip() else m.content) for m in turns)
    try:
        plain = encode_example(Example(1, "chat", neutral, {}), tokenizer, config)
    except DataError:
        return
    assert [i for i in encoded.input_ids if i in steering] == [
        i for i in plain.input_ids if i in steering
    ]


def test_the_strategies_reach_their_properties() -> None:
    """A template without tricks and an ordinary chat are not refused."""
    example = Example(1, "chat", (Message("user", "Who?"), Message("assistant", "Ann.")), {})
    for template in FAMILIES.values():
        tokenizer = byte_tokenizer(template)
        assert encode_example(example, tokenizer, DataConfig(system_prompt="")).labels
    with pytest.raises(DataError):
        load_examples([{"question": "Who?"}])
