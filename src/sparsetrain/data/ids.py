"""Token ids that a model has no row for, found in a batch before it is sent to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import Collate


class CheckedIds:
    """A collator whose batches hold no id beyond the embedding; its attributes are those of the one inside."""

    def __init__(self, inner: Collate, rows: int, name: str) -> None:
        self.inner, self.rows, self.name = inner, rows, name

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        batch = self.inner(features)
        check_ids(batch, self.rows, self.name)
        return batch

    def __getattr__(self, key: str) -> Any:
        if key in ("inner", "rows", "name"):  # a copy under construction has none yet
            raise AttributeError(key)
        return getattr(self.inner, key)


def check_ids(batch: Mapping[str, Tensor], rows: int, name: str) -> None:
    """Raise ValueError if a batch holds a token that the model has no row for."""
    for key in ("input_ids", "input_ids_b"):
        ids = batch.get(key)
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(
                f"a row has the token id {bad:,}, and {quoted(name)} has {rows:,} rows of embedding. Use the model's "
                "own tokenizer, or resize the embedding (resize_token_embeddings)."
            )
