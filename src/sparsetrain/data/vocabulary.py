"""Does a tokenizer fit a model? An id beyond the embedding is an index error on a CPU and a dead process on a GPU."""

from __future__ import annotations

from typing import Any

from sparsetrain.core.quote import quoted

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
            f"the tokenizer of {quoted(name)} has ids up to {largest:,}, and the model {rows:,} rows of embedding: "
            "they are not of one model. Use its own tokenizer, or resize the embedding (resize_token_embeddings)."
        )


def vocabulary_rows(config: Any) -> int | None:
    """Rows of the embedding that a config names; None for a model without one."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None
