"""The rows of JSONL, JSON, CSV and TSV files, packed by gzip or not, and their fields."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import kind_of, shown
from sparsetrain.data.reading import (
    MOST_JSON_BYTES,
    MOST_LINE_BYTES,
    BadJson,
    may_hold_surrogates,
    parse_json,
    read_lines,
    read_text,
    without_surrogates,
)
from sparsetrain.data.remarks import Remarks

ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
# A row and where it stands ("file:line"), for errors that can be acted on.
Row = tuple[dict[str, Any], str]


class NoRows(ValueError):
    """A .json file that holds something else than rows."""


def read_rows(path: Path, remarks: Remarks | None = None) -> Iterator[Row]:
    """The rows of a JSONL, JSON, CSV or TSV file.

    A .json file holds an array of objects, {"data": [...]} around one, columns of equal length, or a row a line.

    Raises:
        ValueError: another kind of file, no rows, or a malformed one, named by number.
    """
    suffix = kind_of(path)
    if suffix not in ROW_SUFFIXES:
        raise ValueError(
            f"{shown(path)} has no rows: its name ends in {suffix!r}. Use one of {', '.join(ROW_SUFFIXES)}."
        )
    remarks = remarks or Remarks()
    if suffix == ".json":
        rows = _json_rows(path, remarks)
    elif "sv" in suffix:
        rows = _csv_rows(path, "\t" if suffix == ".tsv" else ",")
    else:
        rows = _json_lines(path, remarks)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{shown(path)} has no rows. Fill it or leave it out of the source.")


def _json_lines(path: Path, remarks: Remarks) -> Iterator[Row]:
    name = shown(path)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        try:
            row = parse_json(line)
        except BadJson as error:
            raise ValueError(f"{origin} {error}: '{quoted(line, 60)}'. Each line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise ValueError(f'{origin} is a JSON {type(row).__name__}, not an object like {{"text": ...}}.')
        yield _cleaned(row, origin, remarks) if may_hold_surrogates(line) else row, origin


def _cleaned(row: dict[str, Any], origin: str, remarks: Remarks) -> dict[str, Any]:
    cleaned, count = without_surrogates(row)
    if count:
        remarks.add("rows with lone surrogates, replaced by U+FFFD", origin)
    return cleaned


def _json_rows(path: Path, remarks: Remarks) -> Iterator[Row]:
    text = read_text(path, MOST_JSON_BYTES)
    try:
        value = parse_json(text)
    except BadJson as error:
        if "Extra data" not in str(error):
            raise NoRows(f"{shown(path)} {error}. Correct it there.") from error
        yield from _json_lines(path, remarks)
        return
    rows = _rows_in(value)
    if rows is None:
        keys = f" with the keys {', '.join(value)}" if isinstance(value, dict) and value else ""
        raise NoRows(
            f"{shown(path)} holds a JSON {type(value).__name__}{quoted(keys)}, and no rows. Give an array of objects, "
            'columns of equal length, {"data": [...]} around one of these, or a .jsonl file with an object a line.'
        )
    dirty, name = may_hold_surrogates(text), shown(path)
    for i, row in enumerate(rows):
        origin = f"{name}[{i}]"
        if not isinstance(row, dict):
            raise ValueError(f'{origin} is a JSON {type(row).__name__}, not an object like {{"text": ...}}.')
        yield _cleaned(row, origin, remarks) if dirty else row, origin


def _rows_in(value: Any) -> list[Any] | None:
    """The rows that a JSON value stands for, None if for none."""
    if isinstance(value, list):
        return value if not value or isinstance(value[0], dict) else None
    if not isinstance(value, dict):
        return None
    inner = value.get("data")
    if isinstance(inner, list) and inner and isinstance(inner[0], dict):
        return inner
    if list(value) == ["data"] and isinstance(inner, dict):
        return _columns_as_rows(inner)
    return _columns_as_rows(value)


def _columns_as_rows(table: dict[str, Any]) -> list[Any] | None:
    """Rows of {"text": ["a", "b"]}, or of {"text": {"0": "a", "1": "b"}}, as pandas writes it; None for the rest."""
    columns = list(table.values())
    if columns and all(isinstance(column, dict) for column in columns):
        indices = list(columns[0])
        if any(list(column) != indices for column in columns) or not all(map(str.isdecimal, indices)):
            return None
        columns = [list(column.values()) for column in columns]
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return None
    if any(_is_message(entry) for column in columns for entry in column):  # one conversation, not a column of them
        return None
    return [dict(zip(table, entries)) for entries in zip(*columns)]


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and ("role" in entry or "from" in entry)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    # The limit of 131,072 characters a field is process-wide: it is lifted for one row at a time and put back.
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    name = shown(path)
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(MOST_LINE_BYTES)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{name}:{line} is not CSV: {error}. Quote fields with commas, quotes or breaks."
            ) from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(header, name, delimiter)
        else:
            if len(cells) != len(header):
                raise ValueError(
                    f"{name}:{line} has {len(cells)} fields; the header names {len(header)}: "
                    f"{quoted(', '.join(header))}. Quote fields with commas or line breaks."
                )
            yield dict(zip(header, cells)), f"{name}:{line}"


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    columns = quoted(", ".join(header))
    if len(set(header)) != len(header):
        raise ValueError(f"{name}:1 names a column twice: {columns}. Rename one.")
    other = next((mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise ValueError(
            f"{name}:1 has the one column '{columns}'; its fields seem to be separated by {other!r}. Separate them by "
            "commas in a .csv file, by tabs in a .tsv file."
        )


def field_of(row: Row, key: str, argument: str) -> Any:
    """One field of a row.

    Raises:
        ValueError: the row lacks it, and the keys it has are listed; or it is null.
    """
    values, origin = row
    if key not in values:
        found = quoted(", ".join(map(str, values)))
        raise ValueError(f"{origin} has no '{quoted(key)}'. Found: {found}. Name the field with {argument}.")
    if values[key] is None:
        raise ValueError(f"{origin}: '{quoted(key)}' is null. Fill it or remove the row.")
    return values[key]


def text_of(row: Row, key: str, argument: str) -> str:
    """One field of a row that must be text."""
    value = field_of(row, key, argument)
    if not isinstance(value, str):
        raise ValueError(
            f"{row[1]}: '{quoted(key)}' is {type(value).__name__} ({quoted(value, 40)}), not text. Correct the row."
        )
    return value
