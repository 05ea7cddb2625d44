"""The conversation in a row: which columns hold it, and who says what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perta.options import DataConfig

PROMPTS = ("question", "prompt", "instruction", "input")
ANSWERS = ("answer", "completion", "response", "output")
_FURTHER = ("input", "context")
"""Columns whose text follows the prompt's, as in the rows of Alpaca and Dolly."""

_SYSTEM = ("system", "system_prompt")
_CHATS = ("messages", "conversations")
_UNREAD = ("tools", "functions", "images", "videos", "audios", "history")
_UNREAD_IN_MESSAGES = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "audio",
    "refusal",
)
_ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant")},
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    "human": "user",
}
READ = {*PROMPTS, *ANSWERS, *_FURTHER, *_SYSTEM, *_CHATS, *_UNREAD}
"""Names of columns that are looked for."""
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_EMPTY: tuple[Any, ...] = (None, "", "[]", "null", [], {}, ())


class RowError(Exception):
    """What is wrong with a row."""


def require_whole(text: str) -> None:
    """Refuse text that was cut inside a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"half a character ({text[error.start]!a}), as in text that was cut inside an emoji"
        ) from error


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str = field(repr=False)


def chat_column(row: Mapping[str, Any], config: DataConfig) -> str:
    """The column with messages: the one that is named, else `conversations` where it is there."""
    usual = config.messages_column in _CHATS and config.messages_column not in row
    return next((name for name in _CHATS if usual and name in row), config.messages_column)


def conversation(
    row: Mapping[str, Any], kind: str, config: DataConfig
) -> tuple[str, tuple[Message, ...]]:
    """A row's messages, read by its kind; first the kind: `qa`, `completion`, `chat` or `text`."""
    if kind == "text":
        return kind, (Message("assistant", _text(row.get(config.text_column), config.text_column)),)
    for name in _UNREAD:
        if row.get(name) not in _EMPTY and (name != "history" or isinstance(row[name], list)):
            raise RowError(
                f"column {name!r} is not read. Leave the row out, or the column where the "
                "conversation is whole without it"
            )
    if kind == "chat":
        messages = _turns(row, chat_column(row, config))
    else:
        prompt, answer = _columns(row, config)
        if isinstance(row[prompt], list) or isinstance(row[answer], list):
            kind = "chat"
        messages = [*_side(row, prompt, "user"), *_side(row, answer, "assistant")]
        if kind == "qa" and not config.prompt_column:
            messages[0] = Message("user", "\n\n".join([messages[0].content, *_more(row, prompt)]))
    if kind != "completion":
        messages = [*_system(row, messages), *messages]
    _check(messages)
    return kind, tuple(messages)


def _columns(row: Mapping[str, Any], config: DataConfig) -> tuple[str, str]:
    """The columns with the prompt and the answer."""
    found = []
    for flag, named, usual in (
        ("prompt-column", config.prompt_column, PROMPTS),
        ("answer-column", config.answer_column, ANSWERS),
    ):
        columns = [named] if named else [name for name in usual if name in row]
        if not columns or columns[0] not in row:
            wanted = f"{named!r} for --{flag}" if named else " or ".join(usual)
            raise RowError(
                f"no column {wanted}; the row has {', '.join(row) or 'no columns'}. "
                f"Name the column with --{flag}"
            )
        first, *others = columns
        for name in others:
            if name not in _FURTHER and row[name] not in (*_EMPTY, row[first]):
                raise RowError(f"both {first!r} and {name!r} are there. Name one with --{flag}")
        found.append(first)
    return found[0], found[1]


def _side(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    """Messages of the prompt's or the answer's column."""
    if isinstance(row[column], list):
        return _turns(row, column)
    return [Message(role, _text(row[column], column, answer=role == "assistant"))]


def _more(row: Mapping[str, Any], prompt: str) -> list[str]:
    """Text of the columns that follow the prompt."""
    names = [n for n in _FURTHER if n != prompt and row.get(n) not in _EMPTY]
    return [_text(row[n], n) for n in names if not isinstance(row[n], str) or row[n].strip()]


def _system(row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The system message of a column of its own."""
    own = [Message("system", _text(row[n], n)) for n in _SYSTEM if row.get(n) not in _EMPTY]
    if own and messages[0].role == "system":
        if messages[0] != own[0]:
            raise RowError("the system message in its column is not the one among the messages")
        return []
    return own[:1]


def _turns(row: Mapping[str, Any], column: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(f"column {column!r} is not a list of messages ({_what(value)})")
    return [_turn(turn, f"message {n} of column {column!r}") for n, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{place} is {_what(turn)}, not an object with role and content")
    for name in _UNREAD_IN_MESSAGES:
        if turn.get(name) not in _EMPTY:
            raise RowError(f"{place} has {name!r}, which is not read")
    for name in ("weight", "train"):
        if turn.get(name) is not None and not turn[name]:
            raise RowError(f"{place} has {name!r} of {turn[name]}, which is not read")
    said = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = str(said).lower()
    if role in _TOOL_ROLES:
        raise RowError(f"{place} has the role {said!r}; calls of tools and results are not read")
    if role not in _ROLES:
        raise RowError(f"{place} has the role {said!r}; roles are system, user and assistant")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise RowError(f"{place} has no text content ({_what(content)})")
    return Message(_ROLES[role], content)


def _part(part: Any, place: str) -> str:
    """Text of one part of a message's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        extra = [name for name, value in part.items() if value not in _EMPTY]
        if part.get("type") in (None, "text") and not {*extra} - {"type", "text"}:
            return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _what(part)
    raise RowError(f"{place} has a part that is no text ({kind}), which is not read")


def _check(messages: Sequence[Message]) -> None:
    if messages[-1].role != "assistant":
        raise RowError("the last message is not the assistant's")
    if len(messages) < 2:
        raise RowError("no message before the assistant's")
    if any(m.role == "assistant" and not m.content.strip() for m in messages):
        raise RowError("empty answer (an assistant message without text)")


def _text(value: Any, column: str, *, answer: bool = False) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(
            f"empty answer (column {column!r})" if answer else f"column {column!r} is empty"
        )
    if not isinstance(value, str):
        raise RowError(f"column {column!r} is {_what(value)}, not text. Write it as text")
    return value


def _what(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return f"{value!r}" if isinstance(value, bool) else "a number"
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    return f"of the type {type(value).__name__}"
