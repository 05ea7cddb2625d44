"""Rows of other data sets' shapes: read whole, or refused by the name of what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perta.data.examples import load_examples
from perta.errors import DataError
from perta.options import DataConfig

Turn = tuple[str, str]


def turns(folder: Path, row: dict[str, Any], **config: Any) -> list[Turn]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    (example,) = load_examples(path, DataConfig(**config)).examples
    return [(m.role, m.content) for m in example.messages]


ASK, SAY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}
QA = [("user", "Who?"), ("assistant", "Ann.")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Who?", "answer": "Ann."}, QA),
        ({"instruction": "Translate.", "input": "Good evening", "output": "Bonsoir"},
         [("user", "Translate.\n\nGood evening"), ("assistant", "Bonsoir")]),
        ({"instruction": "Who?", "input": " ", "output": "Ann."}, QA),
        ({"instruction": "Who?", "context": "By Ann.", "response": "Ann."},
         [("user", "Who?\n\nBy Ann."), ("assistant", "Ann.")]),
        ({"instruction": "Who?", "context": "", "response": "Ann.", "category": "qa"}, QA),
        ({"system_prompt": "Be brief.", "question": "Who?", "response": "Ann."},
         [("system", "Be brief."), *QA]),
        ({"messages": [ASK, SAY]}, QA),
        ({"messages": [ASK, SAY], "system": "Be brief."}, [("system", "Be brief."), *QA]),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]},
         QA),
        ({"conversations": [ASK, SAY], "id": 7}, QA),
        ({"prompt": [ASK], "completion": [SAY]}, QA),
        ({"prompt": [ASK], "response": "Ann."}, QA),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": "Wh"}, "o?"]}, SAY]}, QA),
        ({"messages": [{**ASK, "tool_calls": None}, SAY], "tools": "[]"}, QA),
        ({"messages": [SAY, ASK, SAY]}, [("assistant", "Ann."), *QA]),
    ],
)  # fmt: skip
def test_rows_of_known_shapes_are_read_whole(
    tmp_path: Path, row: dict[str, Any], expected: list[Turn]
) -> None:
    assert turns(tmp_path, row) == expected


def test_a_column_that_is_named_is_the_whole_prompt(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": "By Ann.", "answer": "Ann."}
    assert turns(tmp_path, row, prompt_column="question") == QA


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "answer": 1964}, "column 'answer' is a number, not text"),
        ({"question": "Who?", "answer": True}, "column 'answer' is True, not text"),
        ({"question": "Who?", "answer": ["Ann."]}, "message 1 of column 'answer' is text"),
        ({"question": "Who?", "answer": None}, r"empty answer \(column 'answer'\)"),
        ({"question": 7, "answer": "Ann."}, "column 'question' is a number, not text"),
        ({"question": "Who?", "context": ["x"], "answer": "Ann."}, "'context' is a list"),
        ({"question": "Who?", "prompt": "What?", "answer": "Ann."},
         "both 'question' and 'prompt' are there. Name one with --prompt-column"),
        ({"question": "Who?", "answer": "Ann.", "response": "Bob."},
         "both 'answer' and 'response' are there. Name one with --answer-column"),
        ({"text": ["x"]}, "column 'text' is a list, not text"),
        ({"messages": "[]"}, "is not a list of messages .text"),
        ({"messages": [SAY]}, "no message before the assistant's"),
        ({"messages": [ASK, SAY, ASK]}, "the last message is not the assistant's"),
        ({"messages": [ASK, {"role": "assistant", "content": 5}]}, r"message 2 .* \(a number\)"),
        ({"messages": [{"content": "Who?"}, SAY]}, "message 1 .* has the role None"),
        ({"messages": [{**ASK, "role": "critic"}, SAY]}, "has the role 'critic'"),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}, SAY]},
         "message 2 .* has 'tool_calls', which is not read"),
        ({"messages": [ASK, {"role": "tool", "content": "7"}, SAY]}, "has the role 'tool'"),
        ({"messages": [ASK, {**SAY, "reasoning_content": "Hm"}]}, "has 'reasoning_content'"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "has 'weight' of 0"),
        ({"messages": [{**ASK, "content": [{"type": "image", "image": "a.png"}]}, SAY]},
         r"a part that is no text \(image\)"),
        ({"messages": [ASK, SAY], "tools": [{"name": "f"}]}, "column 'tools' is not read"),
        ({"messages": [ASK, SAY], "images": ["a.png"]}, "column 'images' is not read"),
        ({"instruction": "Who?", "output": "Ann.", "history": [["a", "b"]]}, "column 'history'"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"},
                            {"from": "gpt", "value": "c"}]}, "has the role 'observation'"),
        ({"question": "Who?", "answer": "A poet \ud83d"}, r"half a character \('\\ud83d'\)"),
        ({"question": "Who?", "answer": "Ann.", "note": "\udc00"}, "half a character"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        turns(tmp_path, row)
