"""Rows of files and of `datasets` ids, as they stand there; `examples` makes examples of them."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perta.errors import DataError, first_line
from perta.store.atomic import write_text

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Read every row of a file or of a `datasets` id.

    Args:
        source: path with one of `_SUFFIXES`, or owner/name, or owner/name:subset.
        split: split of a `datasets` id.

    Returns:
        One dictionary per row, column -> value.

    Raises:
        DataError: it is not there, or cannot be read; the message says where.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        raise DataError(f"{source} is a folder; give one data file ({', '.join(_SUFFIXES)}).")
    if path.suffix.lower() in _SUFFIXES or source.startswith((".", "/", "~")):
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1
        )
        hint = f" Did you mean {path.parent / near[0]}?" if near else " Check the path."
        raise DataError(f"There is no data file {source}.{hint}")
    return _read_hub(source, split)


def _read_file(path: Path) -> list[dict[str, Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            return _read_jsonl(path)
        if suffix == ".json":
            return _read_json(path)
        if suffix in (".csv", ".tsv"):
            return _read_csv(path, "\t" if suffix == ".tsv" else _delimiter(path))
        if suffix == ".parquet":
            return _read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error
    raise DataError(f"{path}: unknown kind of file. Use one of {', '.join(_SUFFIXES)}.")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}). "
                "Each line must be one JSON object."
            ) from error
        rows.append(_object(row, path, f"line {number}"))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). "
            "Expected a list of objects; for one object a line name the file .jsonl."
        ) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    return [_object(row, path, f"entry {number}") for number, row in enumerate(value, start=1)]


def _object(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}, {where}: expected an object, found {type(value).__name__}.")
    return value


def _delimiter(path: Path) -> str:
    """What stands between the columns of a CSV file: spreadsheets of many countries write `;`."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    only = header[0] if len(header) == 1 else ""
    return next((mark for mark in (";", "\t") if mark in only), ",")


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV ({error}).") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                f"{path}, row {number}: more fields than the header names. "
                "Quote fields that hold the delimiter."
            )
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}).") from error
    return rows


def _read_hub(source: str, split: str) -> list[dict[str, Any]]:
    import datasets

    name, _, subset = source.partition(":")
    try:
        table = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the library raises a dozen unrelated classes here
        raise DataError(
            f"{source} is no file here, and could not be loaded as a `datasets` id (split "
            f"{split!r}): {first_line(error)} Check the path; ids are written owner/name or "
            "owner/name:subset and need the hub."
        ) from error
    return [dict(row) for row in table]


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write one JSON object per line, UTF-8, creating the folder where needed."""
    path = Path(path)
    write_text(path, jsonl(rows))
    return path


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object per line; what JSON does not know, such as dates, as text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
