"""Rows and documents of a source, whatever it is: an embedded set, local files, a saved `Dataset` or the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets

from sparsetrain.data.documents import Documents, file_documents, row_as_text
from sparsetrain.data.embedded import EMBEDDED, stdlib_documents
from sparsetrain.data.files import Row, field_of, find_files, read_rows, text_of
from sparsetrain.data.split import check_ratio
from sparsetrain.hf.assets import ASSETS, embedded_name, resolve_data

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class HubChoice:
    """Which part of a hub or saved data set to read: its configuration ("subset") and its split."""

    config: str | None = None
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class EvalChoice:
    """What to evaluate on: a source or a split of its own, else a share of the training source (0 for none)."""

    source: Source | None
    split: str | None
    ratio: float


def source_name(source: Source) -> str:
    """A source as one short string for descriptions and errors."""
    return embedded_name(source) or str(source) if isinstance(source, str | Path) else f"{len(source)} sources"


def load_rows(source: Source, choice: HubChoice) -> list[Row]:
    """All rows of a source as dictionaries, each with its place, in the order of the files.

    Raises:
        ValueError: the source does not exist, is empty, holds no rows or a malformed one.
    """
    embedded = embedded_name(source)
    if embedded is not None:
        return _embedded_rows(embedded)
    opened = _open(source, choice)
    if isinstance(opened, datasets.Dataset):
        name = source_name(source)
        return [(cast(dict[str, Any], row), f"{name}[{i}]") for i, row in enumerate(opened)]
    return [row for path in opened for row in read_rows(path)]


def load_sides(source: Source, hub: HubChoice, choice: EvalChoice) -> tuple[list[Row], list[Row] | None]:
    """All rows of the source, and those of a source or split of its own for evaluation (None: still to be divided).

    Raises:
        ValueError: a source cannot be read, or the held-out share is not one.
    """
    check_ratio(choice.ratio)
    rows = load_rows(source, hub)
    if choice.source is None and choice.split is None:
        return rows, None
    other = source if choice.source is None else choice.source
    return rows, load_rows(other, HubChoice(config=hub.config, split=choice.split or hub.split))


def load_documents(source: Source, choice: HubChoice, text_column: str) -> Documents:
    """The texts of a source: one a file, or one a row for JSONL, CSV, embedded and hub sets.

    Raises:
        ValueError: see `load_rows`; a row without `text_column`.
    """
    embedded = embedded_name(source)
    if embedded == "python-stdlib":
        return stdlib_documents(Path(resolve_data(embedded)))
    if embedded is not None:
        texts = [row_as_text(row) for row in _embedded_rows(embedded)]
        return Documents(count=len(texts), read=texts.__getitem__, unit="rows")
    opened = _open(source, choice)
    if isinstance(opened, datasets.Dataset):
        table, name = opened, source_name(source)
        field_of((dict.fromkeys(table.column_names, ""), name), text_column, "text_column")
        return Documents(
            count=len(table),
            read=lambda i: text_of((table[i], f"{name}[{i}]"), text_column, "text_column"),
            unit="rows",
        )
    return file_documents(opened, text_column)


def _open(source: Source, choice: HubChoice) -> datasets.Dataset | list[Path]:
    """The files of a local source, or the table of a folder written by `save_to_disk` or of a hub data set."""
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _pick_split(datasets.load_from_disk(str(folder)), choice, source_name(source))
    files = find_files(source)
    if files is not None:
        return files
    try:
        return cast(datasets.Dataset, datasets.load_dataset(str(source), choice.config, split=choice.split))
    except Exception as error:  # the hub client raises a dozen kinds, from offline to unknown split
        raise ValueError(
            f"{source!r} is no local file, folder or glob, no embedded set ({', '.join(ASSETS)}), and as a data set of "
            f"the hub (split {choice.split!r}) it cannot be loaded: {type(error).__name__}: {error}. "
            "Correct the name, or give a local path."
        ) from error


def _pick_split(loaded: Any, choice: HubChoice, name: str) -> datasets.Dataset:
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if choice.split not in loaded:
        raise ValueError(
            f"{name} has no split {choice.split!r}. Found: {', '.join(map(str, loaded))}. Name one of these."
        )
    return loaded[choice.split]


def _embedded_rows(name: str) -> list[Row]:
    if name not in EMBEDDED:
        raise ValueError(
            f"The embedded {ASSETS[name].kind} {name!r} has no rows of text: {ASSETS[name].description}. "
            f"Use one of {', '.join(EMBEDDED)}, or the loader for its kind."
        )
    return EMBEDDED[name](Path(resolve_data(name)))
