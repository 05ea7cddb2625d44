"""One data file as two sets: rows that a condition picks, and the others.

person == "Mira Thornwick"                 one value
person == "Mira Thornwick", "Odo Birch"    any of several
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from perta.data.rows import Rows, numbered_rows
from perta.errors import ConfigError, DataError, nearest
from perta.progress import warn

_FORM = "Write a column and a value, such as 'person == \"Mira Thornwick\"'; several with commas."
_SHOWN = 5


def split_by(source: str, condition: str, split: str) -> tuple[Rows, Rows]:
    """The rows of a file or `datasets` id that have one of a condition's values, and the others.

    Values are compared as text, so that a number in quotes finds a number. Neither set's name
    tells the values, which may be what is to be forgotten.

    Raises:
        ConfigError: no such condition.
        DataError: no such column or value, or one that all rows have.
    """
    column, values = _parse(condition)
    rows = numbered_rows(source, split)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    if column not in columns:
        raise DataError(f"{source} has no column {column!r}.{nearest(column, columns)}")
    told = [_text(row.get(column)) for _, row in rows]
    for value in values:
        if value not in told:
            hint = nearest(value, set(told), listed=False)
            raise DataError(f"{source}: no row has {value!r} in column {column!r}.{hint}")
    silent = [str(number) for (number, _), text in zip(rows, told, strict=True) if not text]
    if silent:
        shown = ", ".join(silent[:_SHOWN]) + (", …" if len(silent) > _SHOWN else "")
        warn(f"{source}: {len(silent)} rows have nothing in {column!r} and are kept (rows {shown})")
    picked = [row for row, text in zip(rows, told, strict=True) if text in values]
    others = [row for row, text in zip(rows, told, strict=True) if text not in values]
    if not others:
        raise DataError(
            f"{source}: every row has that in column {column!r}, so none would be kept. Leave "
            "--forget-where out and give what is to be kept with --retain."
        )
    return (
        Rows.of(picked, f"{source} (rows picked by {column!r})"),
        Rows.of(others, f"{source} (rows not picked by {column!r})"),
    )


def _parse(condition: str) -> tuple[str, frozenset[str]]:
    """Column and values of a condition."""
    found = re.fullmatch(
        r"\s*(\"[^\"]+\"|'[^']+'|[^=!<>]+?)\s*==?(?!=)\s*(.*\S)\s*", condition, re.S
    )
    if found is None:
        raise ConfigError(f"--forget-where {condition!r} is no condition. {_FORM}")
    column, right = found[1].strip("\"'"), found[2]
    try:
        value = ast.literal_eval(right)
    except (ValueError, SyntaxError):
        if right[0] in "\"'([{=" or right[-1] in "\"'":
            raise ConfigError(
                f"--forget-where {condition!r}: quotes or brackets do not fit. {_FORM}"
            ) from None
        value = right  # a word or several, without quotes
    values = value if isinstance(value, (tuple, list, set)) else (value,)
    if not values or not all(isinstance(one, (str, int, float)) and _text(one) for one in values):
        raise ConfigError(f"--forget-where {condition!r}: an empty or nested value. {_FORM}")
    return column, frozenset(map(_text, values))


def _text(value: Any) -> str:
    """A value as text that compares; nothing is empty."""
    if value is None:
        return ""
    if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return unicodedata.normalize("NFC", text).strip()
