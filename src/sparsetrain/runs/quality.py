"""How good a model is on held-out rows, as a run records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from sparsetrain.core.metrics import METRICS
from sparsetrain.recipes.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is on held-out rows.

    loss: mean over targets (tokens or rows), in nats for a cross-entropy.
    metrics: name -> value, of `core.metrics`. metric: the one of them that the task is judged by.
    tokens: input tokens, padding not counted; for images, numbers.
    by_row: `count`, `loss` and metrics that are counted -> the sums of each row, in order; empty where a task's scores
        do not say them.
    """

    loss: float
    metrics: Mapping[str, float]
    metric: str
    tokens: int
    rows: int
    by_row: Mapping[str, list[float]] = field(default_factory=dict)

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
            loss=values["loss"],
            metrics=dict(metrics),
            metric=metric,
            tokens=values["tokens"],
            rows=values["rows"],
            by_row=values.get("by_row") or {},
        )


def columns_of(batches: Sequence[Mapping[str, list[float]] | None]) -> dict[str, list[float]]:
    """The rows of all batches, column by column; none if a batch has none."""
    known = [batch for batch in batches if batch is not None]
    if len(known) < len(batches):
        return {}
    # six decimals of a summed loss are more than its rounding leaves
    return {name: [round(x, 6) for batch in known for x in batch[name]] for name in (known[0] if known else {})}


def metrics_of(task: Task, loss: float, means: dict[str, float]) -> dict[str, float]:
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
