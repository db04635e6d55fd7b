"""Does a tokenizer fit a model? An id beyond the embedding is an index error on a CPU and a dead process on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import Collate

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
            "mask_token_id")  # fmt: skip


def check_vocabulary(tokenizer: Any, config: Any, name: str) -> None:
    """Raise ValueError if a tokenizer has tokens that the model has no row for.

    Tokens that were added to it and that no text needs may lie beyond (Gemma 3 has one, for images); `check_ids` stops
    at the first that is used.
    """
    rows = vocabulary_rows(config)
    if rows is None:
        return
    ids = [getattr(tokenizer, key, None) for key in _SPECIAL]
    largest = max([tokenizer.vocab_size - 1, *(number for number in ids if isinstance(number, int))])
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {quoted(name)} has ids up to {largest:,}, and the model {rows:,} rows of embedding: they "
            "are not of one model. Use its own tokenizer, or resize its embedding (resize_token_embeddings) and save it."
        )


def vocabulary_rows(config: Any) -> int | None:
    """Rows of the embedding that a config names; None for a model without one."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


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
            bad = int(torch.where(ids < 0, rows - ids, ids).max())
            raise ValueError(
                f"a row has the token id {bad:,}, and {quoted(name)} has {rows:,} rows of embedding. Use the model's own "
                "tokenizer, or resize its embedding (resize_token_embeddings) and save it."
            )
