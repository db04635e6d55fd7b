"""What the tasks return, and how rows become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from sparsetrain.hf.data.bundle import Collator, DataBundle

BYTES = 257
"""Ids of byte-valued tokens: 0 is padding, byte b is b + 1."""


@dataclass(frozen=True, kw_only=True)
class TaskBundle(DataBundle):
    """A `DataBundle` whose tokens are 0 … `vocab_size` - 1, 0 being padding.

    `kind` is `tokens` (rows of `input_ids` and a class) or `pairs` (also `input_ids_b`).
    """

    vocab_size: int
    kind: Literal["tokens", "pairs"] = "tokens"


@dataclass(frozen=True)
class PairCollator:
    """Rows of two sequences -> `input_ids`, `attention_mask`, the same with `_b`, and `labels`."""

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        collate = Collator(self.pad_token_id)
        batch = collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        other = collate([{"input_ids": row["input_ids_b"]} for row in rows])
        return batch | {f"{name}_b": tensor for name, tensor in other.items()}


@dataclass(frozen=True)
class Rows:
    """Sequences with their labels; `second` holds the other sequences of pairs."""

    ids: Sequence[Sequence[int]] | np.ndarray
    labels: Sequence[int]
    second: Sequence[Sequence[int]] | None = None

    def dataset(self) -> Dataset:
        columns: dict[str, Any] = {"input_ids": self.ids, "labels": [int(label) for label in self.labels]}
        return Dataset.from_dict(columns | ({} if self.second is None else {"input_ids_b": self.second}))


def make_bundle(
    name: str, train: Rows, held_out: Rows, *, vocab_size: int, label_names: Sequence[str], **counts: int
) -> TaskBundle:
    """The bundle of two sides, with the classes of both counted in its description."""
    balance = {
        side: " ".join(f"{Counter(map(int, rows.labels))[label]}" for label in range(len(label_names)))
        for side, rows in (("train", train), ("held out", held_out))
    }
    lines = [f"{side}: {sum(map(int, text.split())):,} rows, by class {text}" for side, text in balance.items()]
    lines += [f"{what.replace('_', ' ')}: {count:,}" for what, count in counts.items() if count]
    return TaskBundle(
        train=train.dataset(),
        eval=held_out.dataset(),
        collate_fn=Collator(0) if train.second is None else PairCollator(),
        description=f"{name}: {'; '.join(lines)}",
        counts={"train_rows": len(train.labels), "eval_rows": len(held_out.labels), **counts},
        label_names=tuple(label_names),
        vocab_size=vocab_size,
        kind="tokens" if train.second is None else "pairs",
    )


def byte_ids(text: str, length: int) -> list[int]:
    """The first `length` bytes of a text, as tokens."""
    return [byte + 1 for byte in text.encode("utf-8", "replace")[:length]]


def chosen(count: int, limit: int | None, generator: np.random.Generator) -> np.ndarray:
    """Indices of at most `limit` of `count` rows, in a seeded order."""
    return generator.permutation(count)[:limit]
