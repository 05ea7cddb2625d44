"""Rows of files, `datasets` ids and programs, as they are; `examples` makes examples of them."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from perta.errors import ConfigError, DataError, first_line, nearest
from perta.options import Paths, at_home
from perta.progress import visible, warn
from perta.store.atomic import write_text
from perta.store.parse import parse_json
from perta.temporary import temporarily

_SHOWN = 5


class Rows(str):
    """Rows given by a program or picked from a file, wherever the name of a file may stand.

    As text it is what messages and records call them. `numbered` has the rows with their numbers.
    """

    numbered: tuple[tuple[int, dict[str, Any]], ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Mapping[str, Any]]], name: str) -> Rows:
        """Rows, each with its number, from 1 where it came from, under a name."""
        made = cls(name)
        made.numbered = tuple((number, _plain(dict(row))) for number, row in rows)
        return made


def column_like(name: str, columns: Iterable[str]) -> str:
    """The one column that a name means but for case and spaces around, else the name itself."""
    columns, plain = list(columns), name.strip().casefold()
    alike = [column for column in columns if column.strip().casefold() == plain]
    return alike[0] if name not in columns and len(alike) == 1 else name


def as_source(given: Any, name: str) -> str:
    """What a set of examples, `name`, is read from: a place or id as text, or `Rows`.

    `given` is that, a path, or rows: dictionaries, a `datasets` table or a pandas frame; anything
    else is a DataError.
    """
    if isinstance(given, (str, Path)):
        return given if isinstance(given, str) else str(given)
    if hasattr(given, "iloc") and hasattr(given, "columns"):
        _refuse_twice([*given.columns], name)
        given = given.to_dict("records")
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise DataError(
            f"{name} is a {type(given).__name__}; give a file, an id or a list of rows."
        )
    rows = list(given)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name}, row {number}: expected column -> value, found {type(row).__name__}. Give "
                "dictionaries, or one split of a `datasets` table."
            )
        if odd := [column for column in row if not isinstance(column, str)]:
            raise DataError(f"{name}, row {number}: the column {odd[0]!r} is named by no text.")
    return Rows.of(enumerate(rows, start=1), f"{name} (given as rows)")


_SETS = ("data", "forget", "retain", "holdout", "general", "world")


class Sets(Paths):
    """Options of which some name examples; for these a program may give rows: see `as_source`."""

    def __post_init__(self) -> None:
        """Take rows as what they are read from, so that no record holds their texts."""
        super().__post_init__()
        for name in vars(self).keys() & {*_SETS}:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_source(given, name))


def numbered_rows(source: str, split: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of `read_rows` with their numbers, from 1 where they came from."""
    if isinstance(source, Rows):
        return list(source.numbered)
    return list(enumerate(read_rows(source, split), start=1))


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Every row of a file, or of an id, owner/name or owner/name:subset; else a DataError."""
    path = at_home(source)
    if path.is_file():
        if read := _READERS.get(path.suffix.lower()):
            return read(path)
        raise DataError(f"{path}: unknown kind of file. Use one of {', '.join(_READERS)}.")
    if path.is_dir():
        raise DataError(f"{source} is a folder; give one data file ({', '.join(_READERS)}).")
    if path.exists():
        raise DataError(
            f"{source} is a pipe or a device, which no run can read twice. Save its rows in a file."
        )
    if path.suffix.lower() in _READERS or source.startswith((".", "/", "~")):
        beside = [p.name for p in path.parent.glob("*")]
        hint = nearest(path.name, beside, listed=False, where=f"{path.parent}/")
        raise DataError(f"There is no data file {source}.{hint or ' Check the path.'}")
    return _read_hub(source, split)


_MARKS = (  # a mark of UTF-32 begins with one of UTF-16
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
"""Byte order marks, and what they say of the text behind them."""


def _read_text(path: Path) -> str:
    """The file's text, line ends as they are: UTF-8, or what its byte order mark says."""
    content = path.read_bytes()
    mark, coding = next((m for m in _MARKS if content.startswith(m[0])), (b"", "UTF-8"))
    try:
        text = content[len(mark) :].decode(coding)
    except UnicodeDecodeError as error:
        says = ", as its byte order mark says" if mark else ""
        raise DataError(
            f"{path} is not {coding} text{says} (byte {len(mark) + error.start}). Save it as UTF-8."
        ) from error
    if joined := re.search(r"(?:\A|[\r\n])\ufeff", text):
        line = len(text[: joined.end()].splitlines())
        raise DataError(
            f"{path}, line {line} begins with a byte order mark, as where files were joined. Take "
            "it out, and any header that came with it."
        )
    if "\0" in text:
        place = len(text[: text.index("\0")].encode())
        raise DataError(
            f"{path} is not UTF-8 text (a zero byte at {place}, as in UTF-16). Save it as UTF-8."
        )
    return text


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            value = _parse(line, f"{path}, line {number}", "Each line must be one JSON object.")
            rows.append(_object(value, path, f"line {number}"))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    hint = "Expected a list of objects; for one object a line name the file .jsonl."
    value = _parse(_read_text(path), str(path), hint)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        more = {k: v for k, v in value.items() if k != "data" and isinstance(v, list)}
        others = [name for name, rows in more.items() if any(isinstance(row, dict) for row in rows)]
        if others:
            raise DataError(
                f"{path}: rows under 'data' are read, and there are more under "
                f"{', '.join(map(repr, others))}. Put them into a list, or into files of their own."
            )
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    return [_object(row, path, f"entry {number}") for number, row in enumerate(value, start=1)]


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return parse_json(text, where, DataError, free=True)
    except DataError as error:
        raise DataError(f"{error} {hint}") from error


def _object(value: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}, {where}: expected an object, found {type(value).__name__}.")
    return value


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """CSV by RFC 4180, where a cell may be quoted and then may hold line breaks."""
    text = _read_text(path)
    mark = _delimiter(text)
    table = _table(text, path, delimiter=mark, strict=True)
    joined = [
        number
        for number, cells in table
        if any(_looks_like_rows(cell, mark, len(table[0][1])) for cell in cells)
    ]
    if joined:
        lines = ", ".join(map(str, joined[:_SHOWN])) + (" …" if len(joined) > _SHOWN else "")
        warn(
            f"{path}: in {len(joined)} rows a quoted cell has line breaks, with what could be rows "
            f"of their own (lines {lines}). Look for a quote that is not closed there."
        )
    return _named(table, path, "Quote fields that hold the delimiter.")


def _read_tsv(path: Path) -> list[dict[str, Any]]:
    """TSV, in which a quote is text like any other."""
    cure = "In a TSV file quotes are text; if cells are quoted as in CSV, name the file .csv."
    table = _table(_read_text(path), path, delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, cells in table:
        if any(_QUOTED.fullmatch(cell) for cell in cells):
            raise DataError(f"{path}, line {number}: a cell looks quoted. {cure}")
    return _named(table, path, cure)


_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A cell that was written with its quotes doubled."""


def _looks_like_rows(cell: str, delimiter: str, width: int) -> bool:
    """Whether a cell holds lines that have as many fields as a row."""
    lines = cell.splitlines()[1:]
    return any(line.strip() and line.count(delimiter) >= width - 1 for line in lines)


def _delimiter(text: str) -> str:
    """What stands between the columns of a CSV file: spreadsheets of many countries write `;`."""
    with _cells_of_any_length(text):
        header = next(csv.reader(io.StringIO(text, newline="")), [])
    only = header[0] if len(header) == 1 else ""
    return next((mark for mark in (";", "\t") if mark in only), ",")


def _cells_of_any_length(text: str) -> AbstractContextManager[None]:
    return temporarily(csv.field_size_limit, len(text) + 1, csv.field_size_limit())


def _table(text: str, path: Path, **dialect: Any) -> list[tuple[int, list[str]]]:
    """Number of the first line, and the cells, of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    table, first = [], 1
    try:
        with _cells_of_any_length(text):
            for cells in reader:
                if cells:
                    table.append((first, cells))
                first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {first}: not readable as CSV ({error}). Look for a quote that is not "
            "closed, or not doubled within a quoted cell."
        ) from error
    return table


def _named(
    table: Sequence[tuple[int, Sequence[str]]], path: Path, cure: str
) -> list[dict[str, Any]]:
    """Cells by the columns' names; unnamed columns may be left out if they are empty."""
    if not table:
        return []
    names, rows = list(table[0][1]), table[1:]
    for number, cells in rows:
        if len(cells) != len(names):
            much = "more" if len(cells) > len(names) else "fewer"
            raise DataError(
                f"{path}, line {number}: {much} fields than the header names ({len(cells)} and "
                f"{len(names)}). {cure}"
            )
    used = [i for i, name in enumerate(names) if name.strip() or any(cells[i] for _, cells in rows)]
    _refuse_twice([names[i] for i in used], path)
    return [{names[i]: cells[i] for i in used} for _, cells in rows]


def _refuse_twice(names: Sequence[Any], path: Path | str) -> None:
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: more than one column is named {', '.join(map(repr, twice))}. Rename them."
        )


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        _refuse_twice(table.column_names, path)
        rows: list[dict[str, Any]] = [_plain(row) for row in table.to_pylist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8. Write it anew.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({first_line(error)}).") from error
    return rows


def _read_paragraphs(path: Path) -> list[dict[str, Any]]:
    """What stands between blank lines, each a row of plain text."""
    parts = re.split(r"\n\s*\n", _read_text(path))
    return [{"text": part.strip()} for part in parts if part.strip()]


_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}


def _plain(value: Any) -> Any:
    """The same as lists and dictionaries, without NaN, which tables write where a value lacks."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # arrays, as pandas has them in its cells
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    return [_plain(dict(row)) for row in table]


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write one JSON object per line, UTF-8, creating the folder where needed."""
    path = Path(path)
    write_text(path, jsonl(rows))
    return path


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object per line; what JSON does not know, such as dates, as text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


# --- one source as two sets ----------------------------------------------------------------------
#
#     person == "Mira Thornwick"                 one value
#     person == "Mira Thornwick", "Odo Birch"    any of several

_FORM = "Write a column and a value, such as 'person == \"Mira Thornwick\"'; several with commas."


def split_by(source: str, condition: str, split: str) -> tuple[Rows, Rows]:
    """The rows of a file or `datasets` id that have one of a condition's values, and the others.

    Values are compared as text. Neither set's name tells them, for they may be what is to be
    forgotten. ConfigError where there is no such condition, DataError where a column or value is
    missing or all rows have it.
    """
    column, values = _condition(condition)
    rows = numbered_rows(source, split)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    column = column_like(column, columns)
    if column not in columns:
        raise DataError(f"{source} has no column {column!r}.{nearest(column, columns)}")
    told = [_as_text(row.get(column)) for _, row in rows]
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


def _condition(condition: str) -> tuple[str, frozenset[str]]:
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
    if not values or not all(
        isinstance(one, (str, int, float)) and _as_text(one) for one in values
    ):
        raise ConfigError(f"--forget-where {condition!r}: an empty or nested value. {_FORM}")
    return column, frozenset(map(_as_text, values))


def _as_text(value: Any) -> str:
    """A value as text that compares; nothing is empty."""
    if value is None:
        return ""
    if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return unicodedata.normalize("NFC", text).strip()


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """Lines of cells as CSV, texts such that no spreadsheet runs one as a formula."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerows([_inert(cell) for cell in line] for line in lines)
    return target.getvalue()


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    line = visible(cell.replace("\r", "\n"))  # unquoted, it would end the row for many readers
    return f"'{line}" if line.startswith(tuple("=+-@\t\n＝＋－＠")) else line
