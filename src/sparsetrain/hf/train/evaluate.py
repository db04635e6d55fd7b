"""Quality on held-out rows: the mean loss, and what the task is judged by (perplexity, accuracy, …)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from sparsetrain.core.errors import NotFinite
from sparsetrain.core.modes import evaluating
from sparsetrain.data.collate import Collate
from sparsetrain.hf.train.tasks import Scores
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import named, task_of
from sparsetrain.runs.quality import Quality, columns_of, metrics_of


def evaluate(
    model: Any,
    rows: Dataset,
    collate_fn: Collate,
    *,
    task: str = "lm",
    batch_size: int = 1,
    max_tokens: int | None = None,
    autocast: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Quality:
    """Run `model` in evaluation mode on the first rows; each module is left in the mode it was in.

    Args:
        task: of `recipes.tasks`: lm and sft give perplexity over the tokens with a label, tasks with a label a row
            accuracy.
        batch_size: rows in a forward; it changes the result by rounding only.
        max_tokens: stop after this many input tokens, padding not counted; at least one row is used.
        autocast: compute in bf16, as a run whose fp32 weights train so (`assemble.autocasts`). A Trainer leaves its
            autocast on a model that it trained, and a model that was loaded has none.
        progress: called with the share done.

    Raises:
        ValueError: no such task, no rows, or no target among them.
        NotFinite: the loss is infinite or not a number.
    """
    row = task_of(task)
    scores: Callable[[Any, dict[str, Tensor]], Scores] = named(row.scores)
    if len(rows) == 0:
        raise ValueError("there are no held-out rows to evaluate on. Give more data.")
    device = next(model.parameters()).device
    total, sums, by_row = 0.0, dict[str, float](), list[dict[str, list[float]] | None]()
    targets = tokens = num_rows = 0
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for batch in _batches(rows, collate_fn, batch_size, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found = scores(model, batch)
            size = len(next(iter(batch.values())))
            if not math.isfinite(found.loss):
                raise NotFinite(
                    f"the held-out loss is {found.loss} in rows {num_rows + 1} to {num_rows + size}: the model's "
                    "weights or what it computes from them are not finite."
                )
            total, targets = total + found.loss, targets + found.count
            sums = {name: sums.get(name, 0.0) + value for name, value in found.sums.items()}
            by_row.append(found.by_row)
            num_rows += size
            tokens += _num_tokens(batch)
            if progress is not None:
                progress(min(1.0, max(num_rows / len(rows), tokens / max_tokens if max_tokens else 0.0)))
    if targets == 0:
        raise ValueError(f"none of the {num_rows} held-out rows has a target token. Use longer rows or more data.")
    loss = total / targets
    metrics = metrics_of(row, loss, {name: value / targets for name, value in sums.items()})
    return Quality(
        loss=loss, metrics=metrics, metric=row.metric, tokens=tokens, rows=num_rows, by_row=columns_of(by_row)
    )


def held_out_tokens(recipe: RunRecipe) -> int | None:
    """Where an evaluation of this recipe stops; images are all read, as `eval_tokens` was counted out in rows."""
    return None if task_of(recipe.task).images else recipe.eval_tokens


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
    first = next(tensor for name, tensor in batch.items() if name != "labels")
    return batch.get("input_ids", first).numel()
