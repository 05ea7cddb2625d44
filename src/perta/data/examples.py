"""Examples: questions and answers, chats or plain text, from files and `datasets` ids.

    rows of a file -> `load_examples` -> Example

A row that cannot be used is reported with its number; none disappears in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from perta.data._conversation import (
    ANSWERS,
    PROMPTS,
    READ,
    RowError,
    chat_column,
    conversation,
    require_whole,
)
from perta.data._conversation import Message as Message
from perta.data.rows import as_source, column_like, numbered_rows
from perta.errors import ConfigError, DataError, EmptyDatasetError, PertaError
from perta.options import DataConfig
from perta.progress import warn
from perta.store.fingerprint import own_key

FACT_COLUMN, SUBJECT_COLUMNS = "fact", ("subject", "person")
PARAPHRASED, WRONG = "paraphrased_answer", "perturbed_answer"

_SHOWN_ROWS = 10
_Numbered = list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Example:
    """One row."""

    row: int  # 1-based row in its file
    kind: str  # `qa`, `completion`, `chat` or `text`
    # The conversation; `qa` and `completion` hold one user and one assistant turn (`qa` a system
    # message before them where the row has one), `text` one assistant turn and no prompt.
    messages: tuple[Message, ...]
    # Every column of the row, for benchmarks that need more than prompt and answer.
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def prompt(self) -> str:
        """Text of the last turn before the answer; empty for plain text."""
        return self.messages[-2].content if len(self.messages) > 1 else ""

    @property
    def answer(self) -> str:
        """Text of the last assistant turn."""
        return self.messages[-1].content

    @property
    def as_text(self) -> str:
        """Its messages as JSON, by which the same row is known wherever it stands."""
        return json.dumps([[message.role, message.content] for message in self.messages])

    def with_answer(self, answer: str) -> Example:
        """The same prompt with another answer."""
        last = replace(self.messages[-1], content=answer)
        return replace(self, messages=(*self.messages[:-1], last))


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one source, a path or id as the user gave it."""

    source: str
    examples: tuple[Example, ...] = field(repr=False)
    skipped: tuple[str, ...] = field(repr=False)  # what was left out and why, one line a row
    fingerprint: str  # `rows_fingerprint` of all rows

    def __len__(self) -> int:
        return len(self.examples)


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]], config: DataConfig | None = None
) -> ExampleSet:
    """Read every row of a file or `datasets` id, in its order.

    Files are JSONL, JSON, CSV, TSV or Parquet; in a program rows may be given themselves, as
    dictionaries, a `datasets` table or a pandas frame. DataError where the source is missing,
    undecodable, or has rows without a usable answer; EmptyDatasetError without rows.
    """
    config = config or DataConfig()
    source = as_source(source, "the data")
    numbered = numbered_rows(source, config.split)
    if not numbered:
        raise EmptyDatasetError(f"{source} has no rows. Give at least one example.")
    try:
        fingerprint = rows_fingerprint([row for _, row in numbered])
    except RecursionError:
        raise DataError(f"{source}: lists or objects are nested too deeply.") from None
    numbered = _renamed(numbered, config)
    kind = _detect_kind(source, [row for _, row in numbered], config)
    examples, bad = [], []
    for number, row in numbered:
        try:
            require_whole(json.dumps(row, ensure_ascii=False, default=str))
            examples.append(Example(number, *conversation(row, kind, config), row))
        except RowError as error:
            bad.append(f"row {number}: {error}")
    report_bad_rows(source, bad, config.skip_bad_rows, left=len(examples))
    return ExampleSet(source, tuple(examples), tuple(bad), fingerprint)


def _renamed(numbered: _Numbered, config: DataConfig) -> _Numbered:
    """Rows whose columns have the names that are looked for, where case or spaces were others."""
    own = {value for name, value in vars(config).items() if name.endswith("_column") and value}
    wanted = {*own, *READ, *SUBJECT_COLUMNS, FACT_COLUMN, PARAPHRASED, WRONG}

    @cache
    def names(columns: tuple[str, ...]) -> list[str]:
        # Of names that mean one column the last counts: a given one before a usual one.
        ranked = sorted(wanted, key=lambda name: (name in own, name not in columns, name))
        meant = {column_like(name, columns): name for name in ranked}
        return [meant.get(column, column) for column in columns]

    return [
        (number, dict(zip(names(tuple(row)), row.values(), strict=True)))
        for number, row in numbered
    ]


def general_config(source: str, config: DataConfig) -> DataConfig:
    """How to read general text: by the usual column names, else by those of the other sets."""
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
    ("forget", "world"): "What is to be forgotten cannot be kept",
    ("forget", "holdout"): "What is to be forgotten was seen",
    ("retain", "holdout"): "What is kept was seen",
}
"""Options whose sets must have no row in common, and why."""


def check_apart(sets: Mapping[str, ExampleSet]) -> None:
    """Warn of rows in two sets that must have none in common; stop where they are the same rows."""
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


def rows_fingerprint(rows: Sequence[Mapping[str, Any]], key: bytes | None = None) -> str:
    """BLAKE3 of rows as canonical JSON, one line each, under 32 bytes: by default `own_key`."""
    digest = blake3(key=key or own_key())
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _detect_kind(source: str, rows: Sequence[Mapping[str, Any]], config: DataConfig) -> str:
    if config.format != "auto":
        if config.format in ("chat", "text"):
            column = chat_column(rows[0], config) if config.format == "chat" else config.text_column
            _require_column(source, rows, column, config.format)
        return config.format
    row = rows[0]
    if config.prompt_column or config.answer_column:
        return "qa"
    if chat_column(row, config) in row:
        return "chat"
    if "completion" in row and "prompt" in row:
        return "completion"
    if not row.keys().isdisjoint(PROMPTS) and not row.keys().isdisjoint(ANSWERS):
        return "qa"
    if config.text_column in row:
        return "text"
    raise DataError(
        f"{source}: cannot tell what its rows are from the columns {', '.join(row) or '(none)'}. "
        "Expected question and answer, prompt and completion, messages, or text; name yours with "
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


def subjects(rows: Sequence[Mapping[str, Any]], column: str | None = None) -> list[int] | None:
    """Whom or what each row is about, as numbers from 0 in order of first appearance.

    `column` says so (DataError where no row has it), or `subject` or `person`; None without any.
    Rows without a value are a subject each.
    """
    names = (column,) if column else SUBJECT_COLUMNS
    name = next((n for n in names if any(row.get(n) not in (None, "") for row in rows)), None)
    if name is None and column:
        raise DataError(
            f"No row has a value in column {column!r}, which --subject-column names. The columns "
            f"are {', '.join(rows[0]) if rows else 'none'}."
        )
    if name is None:
        return None
    numbers: dict[str, int] = {}
    values = [row.get(name) for row in rows]
    keys = [f"row {i}" if v in (None, "") else f"value {v}" for i, v in enumerate(values)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]
