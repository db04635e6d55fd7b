"""What the tasks return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BYTES = 257
"""Ids of byte-valued tokens: 0 is padding, byte b is b + 1."""

Embedded = Callable[[str], str | Path]
"""Name of an embedded data set -> the folder that it lies in."""


@dataclass(frozen=True)
class Rows:
    """Sequences with their labels; `second` holds the other sequences of pairs."""

    ids: Sequence[Sequence[int]] | np.ndarray
    labels: Sequence[int]
    second: Sequence[Sequence[int]] | None = None

    def columns(self) -> dict[str, Any]:
        """Column -> values, one a row."""
        columns: dict[str, Any] = {"input_ids": self.ids, "labels": [int(label) for label in self.labels]}
        return columns | ({} if self.second is None else {"input_ids_b": self.second})


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """Rows of a task whose tokens are 0 … `vocab_size` - 1, 0 being padding.

    `counts` says how many rows there are, and what was cut; `description` is one line for a report.
    """

    train: Rows
    held_out: Rows
    description: str
    counts: dict[str, int]
    label_names: tuple[str, ...]
    vocab_size: int


def task_rows(
    name: str, train: Rows, held_out: Rows, *, vocab_size: int, label_names: Sequence[str], **counts: int
) -> TaskRows:
    """Two sides, with the classes of both counted in the description."""
    balance = {
        side: " ".join(f"{Counter(map(int, rows.labels))[label]}" for label in range(len(label_names)))
        for side, rows in (("train", train), ("held out", held_out))
    }
    lines = [f"{side}: {sum(map(int, text.split())):,} rows, by class {text}" for side, text in balance.items()]
    lines += [f"{what.replace('_', ' ')}: {count:,}" for what, count in counts.items() if count]
    return TaskRows(
        train=train,
        held_out=held_out,
        description=f"{name}: {'; '.join(lines)}",
        counts={"train_rows": len(train.labels), "eval_rows": len(held_out.labels), **counts},
        label_names=tuple(label_names),
        vocab_size=vocab_size,
    )


def byte_ids(text: str, length: int) -> list[int]:
    """The first `length` bytes of a text, as tokens."""
    return [byte + 1 for byte in text.encode("utf-8", "replace")[:length]]


def chosen(count: int, limit: int | None, generator: np.random.Generator) -> np.ndarray:
    """Indices of at most `limit` of `count` rows, in a seeded order."""
    return generator.permutation(count)[:limit]
