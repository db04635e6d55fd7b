"""Training as one of a launcher's ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from accelerate.state import AcceleratorState

from sparsetrain.runs.launch import asked_ranks, joined

P = ParamSpec("P")
R = TypeVar("R")


def on_ranks(train: Callable[P, R]) -> Callable[P, R]:
    """Let what trains a recipe, its first argument, do so as one of the launcher's ranks (`runs.launch.joined`)."""

    @wraps(train)
    def trains(*args: P.args, **kwargs: P.kwargs) -> R:
        recipe: Any = args[0]
        try:
            with joined(recipe.device):
                return train(*args, **kwargs)
        finally:
            if asked_ranks() > 1:  # it remembers a process group that is no more
                AcceleratorState._reset_state(reset_partial_state=True)

    return trains
