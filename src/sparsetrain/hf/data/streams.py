"""Sources read row by row, for data too large to hold (`data.streams`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets

from sparsetrain.data.documents import Documents, document_of, texts_as_documents
from sparsetrain.data.files import kind_of, shown
from sparsetrain.data.packing import sections
from sparsetrain.data.reading import read_lines
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import ROW_SUFFIXES, Row, read_rows
from sparsetrain.data.streams import Stream
from sparsetrain.hf.assets import embedded_name
from sparsetrain.hf.data.bundle import Progress
from sparsetrain.hf.data.sources import Source, load_documents, load_rows, open_source, source_name, table_rows
from sparsetrain.hf.data.tables import HubChoice, Table


@dataclass(frozen=True)
class Ahead:
    """How much of a source is read at once: so many rows (of text: documents), and others follow; None: all."""

    count: int | None

    def rows(self, source: Source, choice: HubChoice, remarks: Remarks) -> list[Row]:
        """Those that are read at once; errors as of `load_rows` and `stream_rows`."""
        if self.count is None:
            return load_rows(source, choice, remarks)
        return list(islice(stream_rows(source, choice, remarks), self.count))

    def documents(self, source: Source, choice: HubChoice, text_column: str, remarks: Remarks) -> Documents:
        """The same for texts; errors as of `load_documents` and `stream_texts`."""
        if self.count is None:
            return load_documents(source, choice, text_column, remarks)
        if not (found := list(islice(stream_texts(source, choice, text_column, remarks), self.count))):
            raise ValueError(f"{source_name(source)} has no rows. Give other data.")
        return texts_as_documents(found, "first documents")

    def later_rows(self, source: Source, choice: HubChoice) -> Iterator[Row]:
        """The rows behind them."""
        return islice(stream_rows(source, choice, Remarks()), self.count, None)

    def later_texts(self, source: Source, choice: HubChoice, text_column: str) -> Iterator[str]:
        """The texts behind them."""
        return islice(stream_texts(source, choice, text_column, Remarks()), self.count, None)

    def stream(
        self, head: datasets.Dataset, rest: Callable[[], Iterator[Any]], seed: int, say: Progress | None
    ) -> Stream | None:
        """Training rows without an end, where not all were read."""
        return None if self.count is None else Stream(head, rest, seed, say)

    def says(self, found: int) -> str:
        """To follow a description: that these rows are the first of a stream."""
        if self.count is None:
            return ""
        follow = "others follow" if found == self.count else "there are no more"
        return f"; streamed: these are the first {found:,}, and {follow}"


def stream_rows(source: Source, choice: HubChoice, remarks: Remarks) -> Iterator[Row]:
    """The rows of a source, read as they are asked for; as `load_rows` else.

    Raises:
        ValueError: see `load_rows`; or a file that can only be read whole.
    """
    opened = _opened(source, choice, remarks)
    if isinstance(opened, list):
        return (row for path in opened for row in _file_rows(path, remarks))
    return table_rows(opened, source_name(source))


def stream_texts(source: Source, choice: HubChoice, text_column: str, remarks: Remarks) -> Iterator[str]:
    """The texts of a source, read as they are asked for: rows' texts, or sections of text files (`sections`).

    Raises:
        ValueError: see `stream_rows`; a row without `text_column`.
    """
    opened = _opened(source, choice, remarks)
    if not isinstance(opened, list):
        return (document_of(row, text_column) for row in table_rows(opened, source_name(source)))
    return chain.from_iterable(_file_texts(path, text_column, remarks) for path in opened)


def _opened(source: Source, choice: HubChoice, remarks: Remarks) -> Table | list[Path]:
    if (embedded := embedded_name(source)) is not None:
        raise ValueError(f"streaming: {embedded} comes with the package and fits into memory. Leave streaming out.")
    return open_source(source, choice, remarks, streaming=True)


def _file_rows(path: Path, remarks: Remarks) -> Iterator[Row]:
    if kind_of(path) == ".json":
        raise ValueError(
            f"streaming: {shown(path)} is one JSON value, which is read whole. Write it as .jsonl, an object a line, "
            "or leave streaming out."
        )
    return read_rows(path, remarks)


def _file_texts(path: Path, text_column: str, remarks: Remarks) -> Iterator[str]:
    if kind_of(path) in ROW_SUFFIXES:
        return (document_of(row, text_column) for row in _file_rows(path, remarks))
    return sections(line + "\n" for _, line in read_lines(path))
