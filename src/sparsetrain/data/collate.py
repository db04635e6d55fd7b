"""Rows -> batches of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORED_LABEL = -100

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

_PADDING = {"labels": IGNORED_LABEL, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch of tensors; lists of unequal length are padded on the right.

    Args:
        pad_token_id: fills `input_ids`.
        attention_mask: whether to add the mask of real tokens. Packed rows are full and must go without: a 2-D mask
            keeps transformers from seeing the document boundaries in `position_ids`.
        multiple_of: lengths are padded to a multiple of this.
    """

    pad_token_id: int
    attention_mask: bool = True
    multiple_of: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {}
        for key in rows[0]:
            values = [row[key] for row in rows]
            if isinstance(values[0], Sequence) or getattr(values[0], "ndim", 0):
                fill = self.pad_token_id if key == "input_ids" else _PADDING[key]
                values = [[*value, *[fill] * (length - len(value))] for value in values]
            batch[key] = torch.as_tensor(values, dtype=torch.long)
        if self.attention_mask:
            lengths_b = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(length) < lengths_b[:, None]).long()
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows (those with `position_ids`) without a mask, which would hide their boundaries; others with one. Each
    token of a packed row's padding stands at place 0, so that nothing sees it."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return Collator(self.pad_token_id, attention_mask="position_ids" not in rows[0])(rows)


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
class ImageCollator:
    """uint8 images (b, height, width) or (b, height, width, c) -> `pixel_values` (b, 1 or c, height, width), `labels`
    (b,), and what else a row has (b,).

    Args:
        mean, std: of each channel, in [0, 1], subtracted and divided by; not given: pixels are in [-1, 1].
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.as_tensor(np.asarray([row["pixel_values"] for row in rows], dtype=np.uint8))
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        others = {name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name != "pixel_values"}
        if (self.mean, self.std) == ((0.5,), (0.5,)):
            return {"pixel_values": pixels.float().div_(127.5).sub_(1), **others}
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return {"pixel_values": (pixels.float().div_(255) - mean) / std, **others}


def check_length(length: int, argument: str, max_position_embeddings: int | None) -> None:
    """A row length a model can take.

    Raises:
        ValueError: shorter than 2 tokens, or longer than the model's context.
    """
    if length < 2:
        raise ValueError(f"{argument}={length}: a row needs at least 2 tokens, one to predict the other. Raise it.")
    if max_position_embeddings is not None and length > max_position_embeddings:
        raise ValueError(
            f"{argument}={length} is longer than the model's context: max_position_embeddings="
            f"{max_position_embeddings}. Use at most that, or a model with a longer context."
        )
