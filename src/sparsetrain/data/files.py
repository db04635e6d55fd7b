"""Reading local sources: which files a source means, and their text, JSONL or CSV content, checked as they are read."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
# A row and where it stands ("file:line"), for errors that can be acted on.
Row = tuple[dict[str, Any], str]


def find_files(source: str | Path | Sequence[str | Path]) -> list[Path] | None:
    """The files of a source in sorted order: a file, a folder (all below it), a glob, or a list of these.

    Hidden files and folders and `__pycache__` below a folder are not part of it. None when the source is one name
    that is neither a path nor looks like one: it may be a data set of the hub.

    Raises:
        ValueError: a path does not exist, or a folder, glob or list holds no file.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise ValueError("The list of sources is empty. Name at least one file, folder or glob.")
        return [file for part in source for file in _files_of(part, must_exist=True) or []]
    return _files_of(source, must_exist=False)


def _files_of(source: str | Path, must_exist: bool) -> list[Path] | None:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = list(walk_files(path))
        if not files:
            raise ValueError(f"The folder {path} holds no files. Put the data there or name another folder.")
        return files
    if glob.has_magic(str(path)):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise ValueError(f"No file matches {str(path)!r}. Correct the pattern ('**' reaches sub-folders).")
        return files
    if must_exist or _looks_like_path(source):
        nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
        found = ", ".join(sorted(entry.name for entry in nearest.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} does not exist. Found in {nearest}: {found}. Correct the path.")
    return None


def walk_files(root: Path, leave_out: Collection[str] = ()) -> Iterator[Path]:
    """All files below a folder in sorted order, without hidden ones, `__pycache__` and folders named in `leave_out`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name not in ("__pycache__", *leave_out)
        )
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _looks_like_path(source: str | Path) -> bool:
    """Hub names are 'name' or 'owner/name'; everything else that does not exist is a mistyped path."""
    text = str(source)
    known = (*ROW_SUFFIXES, ".txt", ".md", ".json", ".py")
    return (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or "\\" in text
        or text.endswith(("/", *known))
    )


def read_text(path: Path) -> str:
    """The whole file as text, with "\\n" line ends.

    Raises:
        ValueError: the file is empty, binary or not UTF-8; the byte is named.
    """
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty. Remove it from the source or fill it.")
    return decode(content, path)


def decode(content: bytes, path: Path) -> str:
    """Bytes of a file as text; a NUL byte or invalid UTF-8 is an error that names the byte."""
    zero = content.find(b"\0")
    if zero >= 0:
        raise ValueError(
            f"{path} is binary: byte {zero} is NUL. Name the text files alone, for instance with a glob like '*.txt'."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} (0x{content[error.start]:02x}): {error.reason}. "
            "Convert it to UTF-8 or leave it out of the source."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL, CSV or TSV file.

    Raises:
        ValueError: another kind of file, no rows, or a malformed line, named by number.
    """
    suffix = path.suffix.lower()
    if suffix not in ROW_SUFFIXES:
        raise ValueError(f"{path} has no rows: its name ends in {suffix!r}. Use one of {', '.join(ROW_SUFFIXES)}.")
    text = read_text(path)
    rows = _csv_rows(text, path, "\t" if suffix == ".tsv" else ",") if "sv" in suffix else _json_rows(text, path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} has no rows. Fill it or leave it out of the source.")


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    # Neither here nor for CSV splitlines(): it takes U+0085, U+2028 and the like inside a text for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number} is not JSON: {error.msg} at column {error.colno}: {line[:60]!r}. "
                "Each line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}:{number} is a JSON {type(row).__name__}, not an object like {{"text": ...}}.')
        yield row, f"{path}:{number}"


def _csv_rows(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    # The limit of 131,072 characters a field is process-wide: it is lifted for one row at a time and put back.
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(sys.maxsize)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line} is not CSV: {error}. Quote fields with commas, quotes or breaks."
            ) from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise ValueError(f"{path}:1 names a column twice: {', '.join(header)}. Rename one.")
        elif cells:
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}:{line} has {len(cells)} fields; the header names {len(header)}: {', '.join(header)}. "
                    "Quote fields with commas or line breaks."
                )
            yield dict(zip(header, cells)), f"{path}:{line}"


def field_of(row: Row, key: str, argument: str) -> Any:
    """One field of a row.

    Raises:
        ValueError: the row lacks it; the keys it has are listed.
    """
    values, origin = row
    if key not in values or values[key] is None:
        raise ValueError(
            f"{origin} has no {key!r}. Found: {', '.join(map(str, values))}. Name the field with {argument}."
        )
    return values[key]


def text_of(row: Row, key: str, argument: str) -> str:
    """One field of a row that must be text."""
    value = field_of(row, key, argument)
    if not isinstance(value, str):
        raise ValueError(f"{row[1]}: {key!r} is {type(value).__name__} ({str(value)[:40]}), not text. Correct the row.")
    return value
