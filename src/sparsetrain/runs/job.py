"""What a kind of job is: what trains its recipes, and what can be said of one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report
from sparsetrain.surgery.method import Grown


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job.

    recipe: the class of its recipes. train: trains one. title: what is trained, in a line.
    open_parts: (recipe, report) -> everything but the weights.
    empty_models: (config, recipe) -> its models without weights, one a stage, with what a stage installs in its own.
    adapted: (one of them, recipe) -> as it is trained.
    row_tokens: (config, recipe) -> tokens of a row.
    dense: recipe keys that a dense counterpart has in place of its own, beside `methods`.
    """

    recipe: type[RunRecipe]
    train: Callable[..., Any]
    title: Callable[[Any], str]
    open_parts: Callable[[Any, Report], Any]
    empty_models: Callable[[Any, Any], list[Grown]]
    adapted: Callable[[Any, Any], Any]
    row_tokens: Callable[[Any, Any], int]
    dense: dict[str, Any] = field(default_factory=dict)
