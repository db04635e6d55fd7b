"""Texts of files and rows, each read when it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsetrain.data.files import ROW_SUFFIXES, Row, decode, read_rows, read_text, text_of


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts, each read when it is asked for; `read(i)` gives the i-th. `counts` tells what was left out."""

    count: int
    read: Callable[[int], str]
    unit: str
    counts: Mapping[str, int] = field(default_factory=dict)


def file_documents(files: Sequence[Path], text_column: str) -> Documents:
    """The texts of files: one a file, or one a row for JSONL, CSV and TSV.

    Raises:
        ValueError: see `read_rows`; a row without `text_column`.
    """
    entries: list[str | Path] = []
    for path in files:
        if path.suffix.lower() in ROW_SUFFIXES:
            entries += [text_of(row, text_column, "text_column") for row in read_rows(path)]
        else:
            entries.append(path)
    # An empty file among many (an __init__.py) is counted as an empty document; one asked for alone is an error.
    open_text = read_text if len(entries) == 1 else lambda path: decode(path.read_bytes(), path)
    return Documents(
        count=len(entries),
        read=lambda i: open_text(entry) if isinstance(entry := entries[i], Path) else entry,
        unit="files" if all(isinstance(entry, Path) for entry in entries) else "rows",
    )


def row_as_text(row: Row) -> str:
    """A row of an embedded set as one text."""
    values, _ = row
    if "messages" in values:
        return "\n\n".join(message["content"] for message in values["messages"])
    if "prompt" in values:
        return f"{values['prompt']}\n{values['completion']}"
    return values["text"]
