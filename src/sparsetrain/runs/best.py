"""Which evaluation of a run was its best, by the names that transformers' Trainer has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsetrain.core.metrics import METRICS
from sparsetrain.measure.curves import number
from sparsetrain.recipes.run import RunRecipe


@dataclass(frozen=True, kw_only=True)
class Best:
    """What evaluations are compared by.

    metric: `loss`, or that of the task. more_is_better: its direction.
    """

    metric: str
    more_is_better: bool

    def first(self, points: Sequence[Mapping[str, Any]]) -> int:
        """Index of the best point of the held-out curve, of equal ones the first."""
        values = [number(point[self.metric]) for point in points]
        return values.index(max(values) if self.more_is_better else min(values))

    def trained(self, points: Sequence[Mapping[str, Any]]) -> int | None:
        """The step of the best point after training began; None before the first."""
        after = [point for point in points if point["step"] > 0]
        return int(after[self.first(after)]["step"]) if after else None

    def text(self) -> str:
        """'lowest held-out loss'"""
        return f"{'highest' if self.more_is_better else 'lowest'} held-out {self.metric.replace('_', ' ')}"


def best_of(recipe: RunRecipe) -> Best:
    """What a recipe says of it."""
    metric = recipe.metric_for_best_model
    natural = metric in METRICS and METRICS[metric].more_is_better
    return Best(metric=metric, more_is_better=natural if recipe.greater_is_better is None else recipe.greater_is_better)


def kept_step(recipe: RunRecipe, points: Sequence[Mapping[str, Any]]) -> int | None:
    """The step whose checkpoint is kept until a better one is there; None where a run keeps its last weights."""
    return best_of(recipe).trained(points) if recipe.load_best_model_at_end else None
