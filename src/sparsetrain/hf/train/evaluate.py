"""Quality on held-out rows: perplexity of a language model, accuracy of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.modes import evaluating
from sparsetrain.hf.data.bundle import IGNORED_LABEL

LABELLED = frozenset({"classify", "pairs", "image"})
"""Tasks with one label a row."""

PIECE = 2**22
"""Logits of which the loss is computed at once: small enough that a buffer is used again and not mapped anew."""

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """loss: mean negative log-likelihood in nats, over target tokens or over rows. perplexity is exp(loss)."""

    loss: float
    perplexity: float | None
    accuracy: float | None
    tokens: int
    rows: int

    @property
    def metric(self) -> str:
        return "perplexity" if self.accuracy is None else "accuracy"

    @property
    def value(self) -> float:
        found = self.perplexity if self.accuracy is None else self.accuracy
        assert found is not None
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Any,
    rows: Dataset,
    collate_fn: Collate,
    *,
    task: str = "lm",
    batch_size: int = 1,
    max_tokens: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Quality:
    """Run `model` in evaluation mode on the first rows; each module is left in the mode it was in.

    Args:
        task: one of `LABELLED` gives accuracy; `lm` and `sft` give perplexity over the tokens with a label.
        batch_size: rows in a forward; it changes the result by rounding only.
        max_tokens: stop after this many input tokens, padding not counted; at least one row is used.
        progress: called with the share done.

    Raises:
        ValueError: no rows, or no target token among them.
    """
    if len(rows) == 0:
        raise ValueError("there are no held-out rows to evaluate on. Give more data.")
    device = next(model.parameters()).device
    total = correct = 0.0
    targets = tokens = num_rows = 0
    with evaluating(model), torch.no_grad():
        for batch in _batches(rows, collate_fn, batch_size, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if task in LABELLED:
                total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
                correct += (logits.argmax(-1) == labels).sum().item()
                targets += len(labels)
            else:
                loss, count = _next_token_loss(logits, labels)
                total, targets = total + loss, targets + count
            num_rows += len(labels)
            tokens += _num_tokens(batch)
            if progress is not None:
                progress(min(1.0, max(num_rows / len(rows), tokens / max_tokens if max_tokens else 0.0)))
    if targets == 0:
        raise ValueError(f"none of the {num_rows} held-out rows has a target token. Use longer rows or more data.")
    loss = total / targets
    classify = task in LABELLED
    return Quality(
        loss=loss,
        perplexity=None if classify else math.exp(loss) if loss < 700 else math.inf,
        accuracy=correct / targets if classify else None,
        tokens=tokens,
        rows=num_rows,
    )


def _batches(rows: Dataset, collate_fn: Collate, size: int, max_tokens: int | None) -> Iterable[dict[str, Tensor]]:
    seen = 0
    for start in range(0, len(rows), size):
        if max_tokens is not None and seen >= max_tokens:
            return
        batch = collate_fn([rows[i] for i in range(start, min(start + size, len(rows)))])
        seen += _num_tokens(batch)
        yield batch


def _num_tokens(batch: dict[str, Tensor]) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids" if "input_ids" in batch else "pixel_values"].numel()


def _next_token_loss(logits_btv: Tensor, labels_bt: Tensor) -> tuple[float, int]:
    """(summed negative log-likelihood of the labelled tokens, their number); in pieces, as logits are large."""
    total, piece = 0.0, max(1, PIECE // logits_btv.shape[-1])
    for logits_tv, labels_t in zip(logits_btv[:, :-1], labels_bt[:, 1:], strict=True):
        for logits_pv, labels_p in zip(logits_tv.split(piece), labels_t.split(piece), strict=True):
            losses = F.cross_entropy(logits_pv.float(), labels_p, ignore_index=IGNORED_LABEL, reduction="sum")
            total += losses.item()
    return total, int((labels_bt[:, 1:] != IGNORED_LABEL).sum())
