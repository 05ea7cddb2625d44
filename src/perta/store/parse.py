"""Bytes from outside as plain values: one way in, with limits, and one kind of error.

Everything that others may have written, JSON and YAML alike, comes through here, so that no depth,
size, number or text makes a library fail in a way of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from perta.errors import PertaError, first_line

NUMBERS = (int, float)
_DEEPEST = 64
_LONGEST = 1 << 30  # bytes of a file; results of the largest benchmarks are a tenth of it
_LARGEST = 1 << 64


def read_json(
    file: Path, error: type[PertaError], *, nan: bool = False, limit: int = _LONGEST
) -> dict[str, Any]:
    """The JSON object that a file of at most `limit` bytes holds; see `parse_json`."""
    value = parse_json(read_bytes(file, error, limit), str(file), error, nan=nan)
    if not isinstance(value, dict):
        raise error(f"{file}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_bytes(file: Path, error: type[PertaError], limit: int = _LONGEST) -> bytes:
    """What a regular file of at most `limit` bytes holds; what is wrong with it raises `error`."""
    try:
        if file.exists() and not file.is_file():
            raise error(f"{file} is not a regular file.")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as reason:
        raise error(f"{file} cannot be read: {reason.strerror or reason}.") from reason
    if len(content) > limit:
        raise error(f"{file} is longer than {limit} bytes, which no such file should be.")
    return content


def parse_json(
    text: str | bytes, where: str, error: type[PertaError], *, nan: bool = False, free: bool = False
) -> Any:
    """Parse JSON; text that is damaged, too deep, or names a key twice raises `error`.

    `where` is file and place, for the message. With `nan`, NaN and infinity may stand in it; with
    `free`, large numbers and broken characters, as in a user's rows.
    """
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(plain, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} cannot be read as JSON: {first_line(reason)}.") from reason
    _refuse_odd(value, where, error, nan=nan, free=free)
    return value


def parse_yaml(text: str | bytes, where: str, error: type[PertaError]) -> Any:
    """Parse YAML of plain values as `parse_json` does JSON; every key must be a text."""
    import yaml

    try:
        value = yaml.load(text, _plain_loader())
    except Exception as reason:  # constructors of dates and numbers raise what they like
        said = " ".join(str(reason).split()) or repr(reason)
        raise error(f"{where} cannot be read as YAML: {said}") from reason
    _refuse_odd(value, where, error, nan=True)
    return value


@cache
def _plain_loader() -> Any:
    import yaml

    class Plain(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]!r} occurs twice")
            return super().construct_mapping(node, deep)

    return Plain


def fits(value: Any, form: Any) -> bool:
    """Whether a parsed value has the form that its readers rely on.

    A form is a type, or types, where `NUMBERS` leaves out true and false; `[form]` for a list of
    such; `{str: form}` for an object of such; `{"key": form, "other?": form}` for an object with
    these keys, those that end in `?` being optional.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(fits(item, form[str]) for item in value.values())
        return all(
            fits(value[key], part) if (key := name.removesuffix("?")) in value else key != name
            for name, part in form.items()
        )
    return isinstance(value, form) and not (form == NUMBERS and isinstance(value, bool))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice in an object")
    return result


def _refuse_odd(
    value: Any, where: str, error: type[PertaError], *, nan: bool, free: bool = False
) -> None:
    """Stop at what parses and would make trouble later, level by level."""
    level, seen, depth = [value], set[int](), 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise error(f"{where}: more than {_DEEPEST} lists and objects inside each other.")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                # Of YAML one list may stand in many places; it is looked at once.
                if id(item) not in seen:
                    seen.add(id(item))
                    inner += item if isinstance(item, list) else _parts(item, where, error)
            elif why := _oddity(item, nan, free):
                raise error(f"{where}: {why}.")
        level = inner


def _parts(item: dict[Any, Any], where: str, error: type[PertaError]) -> Iterable[Any]:
    for key in item:
        if not isinstance(key, str):
            raise error(f"{where}: the key {key!r} is not a text; write it in quotes.")
    return [*item.keys(), *item.values()]


def _oddity(item: Any, nan: bool, free: bool) -> str | None:
    if isinstance(item, float) and not nan and not math.isfinite(item):
        return f"{item} stands where a number should"
    if free:
        return None
    if isinstance(item, int) and abs(item) >= _LARGEST:
        return "a number has more digits than any that is used here"
    if isinstance(item, str) and not item.isascii():
        try:
            item.encode()
        except UnicodeEncodeError:
            return f"{item!a} is not valid Unicode"
    return None
