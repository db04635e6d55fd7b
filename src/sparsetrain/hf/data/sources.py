"""Rows and documents of a source, whatever it is: an embedded set, local files, a saved `Dataset` or the hub."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from sparsetrain.core.quote import quoted
from sparsetrain.data.documents import Documents, document_of, file_documents, row_as_text, texts_as_documents
from sparsetrain.data.embedded import EMBEDDED, stdlib_documents
from sparsetrain.data.files import find_files, kind_of, path_of, shown
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import Row, read_rows
from sparsetrain.data.split import check_ratio
from sparsetrain.hf.assets import ASSETS, embedded_name, resolve_data
from sparsetrain.hf.data.tables import PARQUET, HubChoice, Table, hub_table, is_saved, parquet_table, saved_table

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class EvalChoice:
    """What to evaluate on: a source or a split of its own, else a share of the training source (0 for none)."""

    source: Source | None
    split: str | None
    ratio: float

    def part(self, hub: HubChoice) -> HubChoice:
        """Which part is held out, where `hub` is trained on; a revision is of the training source alone."""
        revision = hub.revision if self.source is None else None
        return replace(hub, split=self.split or hub.split, revision=revision)


def source_name(source: Source) -> str:
    """A source as one short string for descriptions and errors."""
    return embedded_name(source) or shown(source) if isinstance(source, str | Path) else f"{len(source)} sources"


def load_rows(source: Source, choice: HubChoice, remarks: Remarks) -> list[Row]:
    """All rows of a source as dictionaries, each with its place, in the order of the files.

    Raises:
        ValueError: the source does not exist, is empty, holds no rows or a malformed one.
    """
    embedded = embedded_name(source)
    if embedded is not None:
        refuse_revision(source, choice)
        return _embedded_rows(embedded)
    opened = open_source(source, choice, remarks)
    if not isinstance(opened, list):
        return list(table_rows(opened, source_name(source)))
    return [row for path in opened for row in read_rows(path, remarks)]


def table_rows(table: Table, name: str) -> Iterator[Row]:
    """The rows of a table, each with its place.

    Raises:
        ValueError: a row cannot be read.
    """
    return ((_without_nulls(row), f"{name}[{i}]") for i, row in enumerate(_rows_of(table, name)))


def _rows_of(table: Table, name: str) -> Iterator[dict[str, Any]]:
    count = 0
    try:
        for row in table:
            yield cast(dict[str, Any], row)
            count += 1
    except Exception as error:  # Arrow's errors, and those of decoders of pictures and sounds
        raise unreadable_row(f"{name}[{count}]", error) from error


def unreadable_row(place: str, error: Exception) -> ValueError:
    """What to raise where a row of a table fails to be decoded."""
    return ValueError(
        f"{place} cannot be read: {type(error).__name__}: {quoted(str(error))}. Leave its column out, or save it again."
    )


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nested nulls: there, all rows have the keys of any (tools, arguments of a call)."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(inner) for key, inner in value.items() if inner is not None}
        return [cleared(inner) for inner in value] if isinstance(value, list) else value

    return {key: cleared(value) for key, value in row.items()}


Read = Callable[[Source, HubChoice, Remarks], list[Row]]


def load_sides(
    source: Source, hub: HubChoice, choice: EvalChoice, read: Read = load_rows
) -> tuple[list[Row], list[Row] | None, Remarks]:
    """All rows of the source, those of a source or split of its own for evaluation (None: still to be divided), and
    what there is to say on their reading.

    Raises:
        ValueError: a source cannot be read, or the held-out share is not one.
    """
    check_ratio(choice.ratio)
    remarks = Remarks()
    rows = read(source, hub, remarks)
    if choice.source is None and choice.split is None:
        return rows, None, remarks
    other = source if choice.source is None else choice.source
    return rows, read(other, choice.part(hub), remarks), remarks


def load_documents(source: Source, choice: HubChoice, text_column: str, remarks: Remarks) -> Documents:
    """The texts of a source: one a file, or one a row for JSONL, JSON, CSV, embedded and hub sets.

    Raises:
        ValueError: see `load_rows`; a row without `text_column`.
    """
    embedded = embedded_name(source)
    if embedded is not None:
        refuse_revision(source, choice)
    if embedded == "python-stdlib":
        return stdlib_documents(Path(resolve_data(embedded)))
    if embedded is not None:
        return texts_as_documents([row_as_text(row) for row in _embedded_rows(embedded)], "rows")
    opened = open_source(source, choice, remarks)
    if not isinstance(opened, datasets.Dataset):
        assert isinstance(opened, list)
        return file_documents(opened, text_column, remarks)
    name = source_name(source)
    document_of((dict.fromkeys(opened.column_names, ""), name), text_column)
    table = opened.select_columns([text_column])
    sizes = _text_sizes(table, text_column)
    return Documents(
        count=len(table),
        read=lambda i: document_of((table[i], f"{name}[{i}]"), text_column),
        size=sizes.__getitem__,
        unit="rows",
    )


def _text_sizes(table: datasets.Dataset, column: str) -> list[int]:
    """Bytes of each text, from its offsets alone; 1 for what is no text, which reading will refuse."""
    texts = cast(Any, table.with_format("arrow")[:])[column]
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        return [1] * len(table)
    lengths = pc.call_function("binary_length", [texts])
    return pc.fill_null(lengths, 0).to_pylist()


def open_source(source: Source, choice: HubChoice, remarks: Remarks, streaming: bool = False) -> Table | list[Path]:
    """The files of a local source, or its table: Parquet, a folder written by `save_to_disk`, or of the hub.

    Args:
        streaming: tables are read row by row, where they are not mapped from disk already.
    """
    if isinstance(source, str | Path) and os.path.isdir(folder := path_of(source)):
        if is_saved(folder):
            refuse_revision(source, choice)
            return saved_table(folder, choice, source_name(source))
        source = folder / (choice.config or "")  # as the hub lays its subsets out
    files = find_files(source, remarks)
    if files is None:
        return hub_table(str(source), choice, streaming)
    refuse_revision(source, choice)
    if any(kind_of(path) == PARQUET for path in files):
        return parquet_table(files, source, choice, remarks, streaming)
    if choice.split != HubChoice().split:
        raise ValueError(
            f"{source_name(source)} is text files, which have no split {choice.split!r}. Name the files of that part."
        )
    return files


def refuse_revision(source: Source, choice: HubChoice) -> None:
    """Raise ValueError if a revision is asked for of a source that is not the hub's."""
    if choice.revision is not None:
        raise ValueError(
            f"dataset_revision={quoted(choice.revision)}: {source_name(source)} is on this machine, and revisions are "
            "of data sets on the hub. Leave it out."
        )


def _embedded_rows(name: str) -> list[Row]:
    if name not in EMBEDDED:
        raise ValueError(
            f"The embedded {ASSETS[name].kind} {name!r} has no rows of text: {ASSETS[name].description}. "
            f"Use one of {', '.join(EMBEDDED)}, or the loader for its kind."
        )
    return EMBEDDED[name](Path(resolve_data(name)))
