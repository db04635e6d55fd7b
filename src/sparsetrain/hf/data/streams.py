"""Data too large to hold: its first rows are read as ever, all others when training comes to them.

The first `stream_rows` of a source (documents, for text) are in memory. Of them are the held-out rows, and what a
conversion, a choice or a plan looks at. Training takes the other rows of these, then the rest of the source in its
order, mixed by a buffer of as many rows; at the end it begins again, in another order. So a stream is a function of the
source and the seed, and a run goes on at its row by reading up to there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import datasets
from torch.utils.data import IterableDataset

from sparsetrain.data.documents import Documents, document_of, texts_as_documents
from sparsetrain.data.files import kind_of, shown
from sparsetrain.data.packing import sections
from sparsetrain.data.reading import read_lines
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import ROW_SUFFIXES, Row, read_rows
from sparsetrain.hf.assets import embedded_name
from sparsetrain.hf.data.sources import Source, open_source, source_name, table_rows
from sparsetrain.hf.data.tables import HubChoice, Table

Encoded = dict[str, Any]


class Stream(IterableDataset):
    """Training rows without an end: `head`, then what `rest()` gives, mixed; then both again.

    Args:
        head: rows in memory; so many are in the buffer from which the next one is drawn.
        rest: makes an iterator of the rows that follow, from their first.
        seed: of the order, with the number of the pass.
        say: told when a pass ends.
    """

    def __init__(
        self,
        head: datasets.Dataset,
        rest: Callable[[], Iterator[Encoded]],
        seed: int,
        say: Callable[[str], object] | None,
    ) -> None:
        self.head, self.rest, self.seed, self.say = head, rest, seed, say

    def __iter__(self) -> Iterator[Encoded]:
        passes = 0
        while True:
            rows = chain(cast(Iterable[Encoded], self.head), self.rest())
            count = 0
            for row in mixed(rows, len(self.head), random.Random(f"{self.seed}/{passes}")):
                yield row
                count += 1
            passes += 1
            if self.say is not None:
                self.say(f"The data ended after {count:,} training rows; pass {passes + 1} begins, in another order.")


def mixed(rows: Iterable[Encoded], size: int, draw: random.Random) -> Iterator[Encoded]:
    """Rows in an order drawn from a buffer of `size` of them: no row comes more than `size` - 1 places early."""
    waiting: list[Encoded] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        place = draw.randrange(size)
        yield waiting[place]
        waiting[place] = row
    draw.shuffle(waiting)
    yield from waiting


def stream_rows(source: Source, choice: HubChoice, remarks: Remarks) -> Iterator[Row]:
    """The rows of a source, read as they are asked for; as `load_rows` else.

    Raises:
        ValueError: see `load_rows`; or a file that can only be read whole.
    """
    opened = _opened(source, choice, remarks)
    if isinstance(opened, list):
        return (row for path in opened for row in _file_rows(path, remarks))
    return table_rows(opened, source_name(source))


def first_rows(source: Source, choice: HubChoice, remarks: Remarks, count: int) -> list[Row]:
    """The first rows of a source, in memory; errors as of `stream_rows`."""
    return list(islice(stream_rows(source, choice, remarks), count))


def ahead(asked: int | None, found: int) -> str:
    """To follow a description: that these rows are the first of a stream."""
    if asked is None:
        return ""
    return (
        f"; streamed: these are the first {found:,}, and {'others follow' if found == asked else 'there are no more'}"
    )


def stream_texts(source: Source, choice: HubChoice, text_column: str, remarks: Remarks) -> Iterator[str]:
    """The texts of a source, read as they are asked for: rows' texts, or sections of text files (`sections`).

    Raises:
        ValueError: see `stream_rows`; a row without `text_column`.
    """
    opened = _opened(source, choice, remarks)
    if not isinstance(opened, list):
        return (document_of(row, text_column) for row in table_rows(opened, source_name(source)))
    return chain.from_iterable(_file_texts(path, text_column, remarks) for path in opened)


def first_documents(source: Source, choice: HubChoice, text_column: str, remarks: Remarks, count: int) -> Documents:
    """The first texts of a source, in memory.

    Raises:
        ValueError: see `stream_texts`; or there is none.
    """
    if not (found := list(islice(stream_texts(source, choice, text_column, remarks), count))):
        raise ValueError(f"{source_name(source)} has no rows. Give other data.")
    return texts_as_documents(found, "first documents")


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
