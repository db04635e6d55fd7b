"""Tables of `datasets`: Parquet files, what `save_to_disk` wrote, and the hub's. They are mapped, not read into memory.

Parquet is left to the library; text formats are not (docs/decisions/0011-data-files.md).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import check_regular, kind_of, shown, walk_files
from sparsetrain.data.reading import BadJson, parse_json, read_text
from sparsetrain.data.remarks import Remarks
from sparsetrain.hf.assets import ASSETS

PARQUET = ".parquet"
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes into the folder of a table, or of several."""
_ABOUT = ("readme", "license", "licence", "dataset_info", "dataset_infos")
"""Names of the files that a copy of a hub data set has beside its tables."""


@dataclass(frozen=True, kw_only=True)
class HubChoice:
    """Which part of a hub or saved data set to read: its configuration ("subset"), its split, and of the hub which
    revision (a branch, tag or commit)."""

    config: str | None = None
    split: str = "train"
    revision: str | None = None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any(os.path.lexists(folder / name) for name in _SAVED)


Table = datasets.Dataset | datasets.IterableDataset


def hub_table(name: str, choice: HubChoice, streaming: bool = False) -> Table:
    """A data set of the hub; streaming: read from there row by row, without a copy here.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    try:
        how: dict[str, Any] = {"streaming": True} if streaming else {}
        how |= {} if choice.revision is None else {"revision": choice.revision}
        return cast(Table, datasets.load_dataset(name, choice.config, split=choice.split, **how))
    except Exception as error:  # the hub client raises a dozen kinds, from offline to unknown split
        at = "" if choice.revision is None else f", revision {quoted(choice.revision)!r}"
        raise ValueError(
            f"'{quoted(name)}' is no local file, folder or glob, no embedded set ({', '.join(ASSETS)}), and as a "
            f"data set of the hub (split {choice.split!r}{at}) it cannot be loaded: {_told(error)}. Correct the name, "
            "or give a local path."
        ) from error


def parquet_table(
    files: list[Path], source: object, choice: HubChoice, remarks: Remarks, streaming: bool = False
) -> Table:
    """Parquet files as one table; of a folder those of the split, as the hub tells splits apart: by their names.

    Args:
        streaming: read them row by row, without a copy in the cache.

    Raises:
        ValueError: a file that is none or has other columns, other files among them, no such split, no rows.
    """
    found = [path for path in files if kind_of(path) == PARQUET]
    for path in files:
        if kind_of(path) != PARQUET and path.name.partition(".")[0].lower() not in _ABOUT:
            raise ValueError(f"{shown(path)} lies among Parquet files, which are one table. Name one kind alone.")
    footers = {path: _footer(path) for path in found}
    name = choice.split.partition("[")[0]
    splits: Mapping[str, list[str]] = {"train": [str(path.absolute()) for path in found]}
    if isinstance(source, Path) and source.is_dir():
        splits = _splits(source)
    if name not in splits:
        raise ValueError(f"{shown(found[0].parent)} has no split {name!r}. Found: {', '.join(splits)}. Name one.")
    chosen = [path for path in found if str(path.absolute()) in splits[name]]
    for path in found:
        if not any(str(path.absolute()) in part for part in splits.values()):
            remarks.add("Parquet files of no split not read", path)
    _check_footers({path: footers[path] for path in chosen})
    asked = {name: [glob.escape(str(path.absolute())) for path in chosen]}
    table = _loaded(asked, choice.split, chosen[0], streaming)
    rows = sum(footers[path].num_rows for path in chosen)
    if isinstance(table, datasets.Dataset) and choice.split == name and len(table) != rows:
        raise ValueError(f"{shown(chosen[0])}: {len(table):,} rows were loaded, of {rows:,}. Name the files singly.")
    return table


def _footer(path: Path) -> Any:
    check_regular(path)
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shown(path)} is no whole Parquet file: {quoted(str(error))}. Get it again.") from None


def _splits(folder: Path) -> dict[str, list[str]]:
    """Split -> its files."""
    try:
        found = datasets.load_dataset_builder("parquet", data_dir=glob.escape(str(folder.absolute())))
    except Exception as error:  # of its patterns, a dozen kinds
        raise ValueError(f"{shown(folder)}: its splits cannot be told apart: {_told(error)}. Name the files.") from None
    return {str(name): list(map(str, files)) for name, files in cast(Any, found.config.data_files).items()}


def _check_footers(footers: Mapping[Path, Any]) -> None:
    """The library leaves out, without a word, files whose columns differ from the first one's."""
    (first, one), *others = footers.items()
    for path, other in others:
        if (names := other.schema.to_arrow_schema().names) != one.schema.to_arrow_schema().names:
            columns = ", ".join(one.schema.to_arrow_schema().names)
            raise ValueError(
                f"{shown(path)} has the columns {quoted(', '.join(names))}; {shown(first)} has {quoted(columns)}. Name "
                "files of one table."
            )
    if not any(footer.num_rows for footer in footers.values()):
        raise ValueError(f"{shown(first)} has no rows. Fill it or leave it out of the source.")


def _loaded(files: dict[str, list[str]], split: str, first: Path, streaming: bool) -> Table:
    try:
        return cast(Table, datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming))
    except Exception as error:  # Arrow's and the library's own, a dozen kinds
        raise ValueError(f"{shown(first)} cannot be read as a Parquet table: {_told(error)}. Get it again.") from error


def saved_table(folder: Path, choice: HubChoice, name: str) -> datasets.Dataset:
    """The table, or a split of the tables, that `save_to_disk` wrote.

    Raises:
        ValueError: it is damaged, refers to files that are not in it, or has no such split.
    """
    for path in walk_files(folder):
        check_regular(path)
        if path.name == "state.json":
            _check_state(path)
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow's and Python's own errors, a dozen kinds
        raise ValueError(
            f"{shown(folder)} has a {' or '.join(_SAVED)} as `save_to_disk` writes it, and cannot be loaded: "
            f"{_told(error)}. Save it again, or name the files in it."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if choice.split not in loaded:
            raise ValueError(
                f"{name} has no split {choice.split!r}. Found: {', '.join(map(str, loaded))}. Name one of these."
            )
        loaded = loaded[choice.split]
    return loaded.with_format(None)


def _check_state(path: Path) -> None:
    try:
        state = parse_json(read_text(path))
    except BadJson as error:
        raise ValueError(f"{shown(path)} {error}. Save the data set again.") from error
    entries = state.get("_data_files") if isinstance(state, dict) else None
    if entries == []:
        raise ValueError(f"{shown(path.parent)} is a saved data set without rows. Save one that has some.")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if entries is None or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(
            f"{shown(path)} does not list the files of its folder as `save_to_disk` does. Save the data set again."
        )


def _told(error: Exception) -> str:
    """A library's error in a line; what it says of itself is often only that there is a cause."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{type(cause).__name__}: {quoted(str(cause))}"
