"""Quality on held-out rows: the mean loss, and what the task is judged by (perplexity, accuracy, …)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from datasets import Dataset
from torch import Tensor

from sparsetrain.core.metrics import METRICS
from sparsetrain.core.modes import evaluating
from sparsetrain.hf.train.tasks import Scores
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import Task, named, task_of

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is on held-out rows.

    loss: mean over targets (tokens or rows), in nats for a cross-entropy.
    metrics: name -> value, of `core.metrics`. metric: the one of them that the task is judged by.
    tokens: input tokens, padding not counted; for images, numbers.
    """

    loss: float
    metrics: Mapping[str, float]
    metric: str
    tokens: int
    rows: int

    @property
    def value(self) -> float:
        """The metric that the task is judged by."""
        return self.metrics[self.metric]

    @property
    def perplexity(self) -> float | None:
        """`metrics["perplexity"]`, None where there is none; to be dropped after 0.1."""
        return self.metrics.get("perplexity")

    @property
    def accuracy(self) -> float | None:
        """`metrics["accuracy"]`, None where there is none; to be dropped after 0.1."""
        return self.metrics.get("accuracy")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `perplexity` and `accuracy` are among them for readers of earlier results."""
        return {**asdict(self), "perplexity": self.perplexity, "accuracy": self.accuracy}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also before it had `metrics`."""
        metrics = values.get("metrics") or {
            name: values[name] for name in ("perplexity", "accuracy") if values.get(name) is not None
        }
        metric = values.get("metric") or next(iter(metrics))
        return cls(
            loss=values["loss"], metrics=dict(metrics), metric=metric, tokens=values["tokens"], rows=values["rows"]
        )


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
        task: of `recipes.tasks`: lm and sft give perplexity over the tokens with a label, tasks with a label a row
            accuracy.
        batch_size: rows in a forward; it changes the result by rounding only.
        max_tokens: stop after this many input tokens, padding not counted; at least one row is used.
        progress: called with the share done.

    Raises:
        ValueError: no such task, no rows, or no target among them.
    """
    row = task_of(task)
    scores: Callable[[Any, dict[str, Tensor]], Scores] = named(row.scores)
    if len(rows) == 0:
        raise ValueError("there are no held-out rows to evaluate on. Give more data.")
    device = next(model.parameters()).device
    total, sums = 0.0, dict[str, float]()
    targets = tokens = num_rows = 0
    with evaluating(model), torch.no_grad():
        for batch in _batches(rows, collate_fn, batch_size, max_tokens):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found = scores(model, batch)
            total, targets = total + found.loss, targets + found.count
            sums = {name: sums.get(name, 0.0) + value for name, value in found.sums.items()}
            num_rows += len(next(iter(batch.values())))
            tokens += _num_tokens(batch)
            if progress is not None:
                progress(min(1.0, max(num_rows / len(rows), tokens / max_tokens if max_tokens else 0.0)))
    if targets == 0:
        raise ValueError(f"none of the {num_rows} held-out rows has a target token. Use longer rows or more data.")
    loss = total / targets
    metrics = _metrics(row, loss, {name: value / targets for name, value in sums.items()})
    return Quality(loss=loss, metrics=metrics, metric=row.metric, tokens=tokens, rows=num_rows)


def held_out_tokens(recipe: RunRecipe) -> int | None:
    """Where an evaluation of this recipe stops; images are all read, as `eval_tokens` was counted out in rows."""
    return None if task_of(recipe.task).images else recipe.eval_tokens


def _metrics(task: Task, loss: float, means: dict[str, float]) -> dict[str, float]:
    """The means, and the metric that the task is judged by, where that follows from the loss."""
    of_loss = METRICS[task.metric].of_loss
    if task.metric not in means and of_loss is not None:
        means = {task.metric: of_loss(loss), **means}
    if task.metric not in means:
        raise ValueError(
            f"task={task.name} is judged by {task.metric}, and {task.scores} gave {', '.join(means) or 'no metric'}. "
            "Let it sum that too."
        )
    return means


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
