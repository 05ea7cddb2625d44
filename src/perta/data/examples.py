"""Examples: questions and answers, chats or plain text, from files and `datasets` ids.

    rows of a file -> `load_examples` -> Example

A row that cannot be used is reported with its number; none disappears in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta.data.rows import read_rows
from perta.errors import ConfigError, DataError, EmptyDatasetError, PertaError
from perta.options import DataConfig
from perta.progress import warn

_PROMPT_COLUMNS = ("question", "prompt", "instruction", "input")
_ANSWER_COLUMNS = ("answer", "completion", "response", "output")
_SHOWN_ROWS = 10


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        row: 1-based row in its file.
        kind: `qa`, `completion`, `chat` or `text`.
        messages: the conversation; `qa` and `completion` hold one user and one assistant turn,
            `text` one assistant turn and no prompt.
        fields: every column of the row, for benchmarks that need more than prompt and answer.
    """

    row: int
    kind: str
    messages: tuple[Message, ...]
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def prompt(self) -> str:
        """Text of the last turn before the answer; empty for plain text."""
        return self.messages[-2].content if len(self.messages) > 1 else ""

    @property
    def answer(self) -> str:
        """Text of the last assistant turn."""
        return self.messages[-1].content

    def with_answer(self, answer: str) -> Example:
        """The same prompt with another answer."""
        last = replace(self.messages[-1], content=answer)
        return replace(self, messages=(*self.messages[:-1], last))


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one source.

    Attributes:
        source: path or id, as the user gave it.
        examples: usable rows.
        skipped: what was left out and why, one line a row.
        fingerprint: BLAKE3 of all rows' content, whatever the file's name or place.
    """

    source: str
    examples: tuple[Example, ...] = field(repr=False)
    skipped: tuple[str, ...] = field(repr=False)
    fingerprint: str

    def __len__(self) -> int:
        return len(self.examples)


def load_examples(source: str | Path, config: DataConfig | None = None) -> ExampleSet:
    """Read every row of a file or `datasets` id.

    Args:
        source: JSONL, JSON, CSV, TSV or Parquet file, or a `datasets` id.
        config: column names and kind of rows.

    Returns:
        The examples in file order.

    Raises:
        DataError: the source is missing, undecodable, or has rows without a usable answer.
        EmptyDatasetError: no rows.
    """
    config = config or DataConfig()
    rows = read_rows(str(source), config.split)
    if not rows:
        raise EmptyDatasetError(f"{source} has no rows. Give a file with at least one example.")
    kind = _detect_kind(str(source), rows, config)
    examples, bad = [], []
    for number, row in enumerate(rows, start=1):
        messages, problem = _messages(row, kind, config, str(source), number)
        if problem:
            bad.append(f"row {number}: {problem}")
        else:
            examples.append(Example(number, kind, messages, row))
    report_bad_rows(str(source), bad, config.skip_bad_rows, left=len(examples))
    return ExampleSet(str(source), tuple(examples), tuple(bad), rows_fingerprint(rows))


def general_config(source: str, config: DataConfig) -> DataConfig:
    """How general text is read: by the usual column names, else by those of the other sets.

    Args:
        source: file or `datasets` id.
        config: how the other sets are read.

    Returns:
        The configuration to load and encode it with.
    """
    usual = config.with_usual_columns()
    try:
        load_examples(source, usual)
    except PertaError:
        return config
    return usual


_APART = {
    ("forget", "retain"): "What is to be forgotten cannot be kept",
    ("forget", "general"): "What is to be forgotten cannot be kept",
    ("retain", "general"): "What is kept would count twice",
    ("forget", "holdout"): "What is to be forgotten was seen",
    ("retain", "holdout"): "What is kept was seen",
}
"""Options whose sets must have no row in common, and why."""


def check_apart(sets: Mapping[str, ExampleSet]) -> None:
    """Warn of rows in two sets that must have none in common.

    Args:
        sets: option -> its set.

    Raises:
        ConfigError: two are the same rows.
    """
    for (one, other), why in _APART.items():
        if one not in sets or other not in sets:
            continue
        first, second = sets[one], sets[other]
        if first.fingerprint == second.fingerprint:
            raise ConfigError(
                f"--{one} {first.source} and --{other} {second.source} hold the same rows. {why}: "
                f"take those rows out of the {other} set."
            )
        seen = {example.messages for example in second.examples}
        both = [str(e.row) for e in first.examples if e.messages in seen]
        if both:
            rows = ", ".join(both[:5]) + (", …" if len(both) > 5 else "")
            warn(
                f"--{one} {first.source} and --{other} {second.source} share {len(both)} of the "
                f"rows (rows {rows} of the first). {why}."
            )


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """BLAKE3 of rows as canonical JSON, one line each."""
    digest = blake3()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _messages(
    row: Mapping[str, Any], kind: str, config: DataConfig, source: str, number: int
) -> tuple[tuple[Message, ...], str | None]:
    """The conversation of a row, or what is wrong with it."""
    if kind == "chat":
        return _chat_messages(row.get(config.messages_column), config.messages_column)
    if kind == "text":
        text = row.get(config.text_column)
        if not isinstance(text, str) or not text.strip():
            return (), f"column {config.text_column!r} is empty"
        return (Message("assistant", text),), None
    prompt_column, answer_column = _qa_columns(row, config, source, number)
    prompt, answer = row.get(prompt_column), row.get(answer_column)
    if not isinstance(prompt, str) or not prompt.strip():
        return (), f"column {prompt_column!r} is empty"
    if not isinstance(answer, str) or not answer.strip():
        return (), f"empty answer (column {answer_column!r})"
    return (Message("user", prompt), Message("assistant", answer)), None


def _chat_messages(value: Any, column: str) -> tuple[tuple[Message, ...], str | None]:
    if not isinstance(value, (list, tuple)) or not value:
        return (), f"column {column!r} is not a list of messages"
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            return (), f"a message in column {column!r} has no text content"
        messages.append(Message(str(turn.get("role")), turn["content"]))
    if messages[-1].role != "assistant":
        return (), "the last message is not the assistant's"
    if len(messages) < 2:
        return (), "no message before the assistant's"
    if any(m.role == "assistant" and not m.content.strip() for m in messages):
        return (), "empty answer (an assistant message without text)"
    return tuple(messages), None


def _qa_columns(
    row: Mapping[str, Any], config: DataConfig, source: str, number: int
) -> tuple[str, str]:
    prompt = config.prompt_column or _first(_PROMPT_COLUMNS, row)
    answer = config.answer_column or _first(_ANSWER_COLUMNS, row)
    for flag, column in (("prompt-column", prompt), ("answer-column", answer)):
        if column is None or column not in row:
            usual = _PROMPT_COLUMNS if flag == "prompt-column" else _ANSWER_COLUMNS
            wanted = f"{column!r} for --{flag}" if column else " or ".join(usual)
            raise DataError(
                f"{source}, row {number}: no column {wanted}; the row has "
                f"{', '.join(row) or 'no columns'}. Name the column with --{flag}."
            )
    return str(prompt), str(answer)


def _first(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _detect_kind(source: str, rows: Sequence[Mapping[str, Any]], config: DataConfig) -> str:
    if config.format != "auto":
        if config.format in ("chat", "text"):
            column = config.messages_column if config.format == "chat" else config.text_column
            _require_column(source, rows, column, config.format)
        return config.format
    row = rows[0]
    if config.prompt_column or config.answer_column:
        return "qa"
    if config.messages_column in row:
        return "chat"
    if "completion" in row and "prompt" in row:
        return "completion"
    if _first(_PROMPT_COLUMNS, row) and _first(_ANSWER_COLUMNS, row):
        return "qa"
    if config.text_column in row:
        return "text"
    raise DataError(
        f"{source}: cannot tell what its rows are from the columns {', '.join(row)}. Expected "
        "question and answer, prompt and completion, messages, or text; name yours with "
        "--prompt-column and --answer-column, --messages-column or --text-column."
    )


def _require_column(source: str, rows: Sequence[Mapping[str, Any]], column: str, kind: str) -> None:
    if not any(column in row for row in rows):
        raise DataError(
            f"{source} has no column {column!r}, which --format {kind} needs; it has "
            f"{', '.join(rows[0])}. Name the column with "
            f"--{'messages' if kind == 'chat' else 'text'}-column."
        )


def report_bad_rows(
    source: str, bad: Sequence[str], skip: bool, *, left: int, cure: str = ""
) -> None:
    """Say which rows could not be used, and why; stop where none is left."""
    if not bad:
        return
    shown = "\n  ".join(bad[:_SHOWN_ROWS])
    more = f"\n  and {len(bad) - _SHOWN_ROWS} more" if len(bad) > _SHOWN_ROWS else ""
    count = f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
    if skip and left:
        return
    if skip:
        raise EmptyDatasetError(f"{source}: no usable row is left.\n  {shown}{more}")
    raise DataError(
        f"{source}: {count} cannot be used:\n  {shown}{more}\n"
        f"Correct them, or pass --skip-bad-rows to go on without them.{cure}"
    )
