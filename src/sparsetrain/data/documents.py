"""Texts of files and rows, each read when it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsetrain.core.quote import quoted
from sparsetrain.data.conversations import is_conversation
from sparsetrain.data.files import check_regular, kind_of
from sparsetrain.data.reading import read_text, text_bytes
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import ROW_SUFFIXES, NoRows, Row, read_rows, text_of


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts, each read when it is asked for; `read(i)` gives the i-th.

    size: bytes or characters of the i-th, known without reading it. counts: what was left out.
    """

    count: int
    read: Callable[[int], str]
    size: Callable[[int], int]
    unit: str
    counts: Mapping[str, int] = field(default_factory=dict)


def texts_as_documents(texts: Sequence[str], unit: str, counts: Mapping[str, int] | None = None) -> Documents:
    """Documents of texts that are at hand."""
    return Documents(
        count=len(texts), read=texts.__getitem__, size=lambda i: len(texts[i]), unit=unit, counts=counts or {}
    )


def file_documents(files: Sequence[Path], text_column: str, remarks: Remarks | None = None) -> Documents:
    """The texts of files: one a file, or one a row for JSONL, JSON, CSV and TSV.

    A .json file that holds no rows is a text like any other among texts (sources of a program), which is remarked on.

    Raises:
        ValueError: see `read_rows`; a row without `text_column`.
    """
    remarks = remarks or Remarks()
    among_texts = any(kind_of(path) not in ROW_SUFFIXES for path in files)
    entries: list[str | Path] = []
    for path in files:
        if kind_of(path) not in ROW_SUFFIXES:
            entries.append(path)
            continue
        try:
            entries += [document_of(row, text_column) for row in read_rows(path, remarks)]
        except NoRows:
            if not among_texts:
                raise
            remarks.add("JSON files without rows read as texts", path)
            entries.append(path)
    # An empty file among many (an __init__.py) is counted as an empty document; one asked for alone is an error.
    open_text = read_text if len(entries) == 1 else _text_or_empty
    return Documents(
        count=len(entries),
        read=lambda i: open_text(entry) if isinstance(entry := entries[i], Path) else entry,
        size=lambda i: text_bytes(entry) if isinstance(entry := entries[i], Path) else len(entry),
        unit="files" if all(isinstance(entry, Path) for entry in entries) else "rows",
    )


def document_of(row: Row, text_column: str) -> str:
    """A row's text.

    Raises:
        ValueError: there is none; for conversations, with the task that reads them.
    """
    if text_column not in row[0] and (is_conversation(row[0].keys()) or {"prompt", "instruction"} & row[0].keys()):
        found = quoted(", ".join(map(str, row[0])))
        raise ValueError(
            f"{row[1]} has no {text_column!r} and holds a conversation or an instruction ({found}). Train on it with "
            "task=sft, or name the field with text_column."
        )
    return text_of(row, text_column, "text_column")


def row_as_text(row: Row) -> str:
    """A row of an embedded set as one text."""
    values, _ = row
    if "messages" in values:
        return "\n\n".join(message["content"] for message in values["messages"])
    if "prompt" in values:
        return f"{values['prompt']}\n{values['completion']}"
    return values["text"]


def _text_or_empty(path: Path) -> str:
    return read_text(path) if check_regular(path).st_size else ""
