"""Training as one of a launcher's ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from accelerate.state import AcceleratorState

from sparsetrain.core import ranks
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.launch import asked_ranks, joined

P = ParamSpec("P")
R = TypeVar("R")

RECIPES = {"ACCELERATE_MIXED_PRECISION": "dtype", "ACCELERATE_DYNAMO_BACKEND": "training.torch_compile"}
"""Variables by which `accelerate launch` and its config file change what is trained -> what of a recipe says that."""


def on_ranks(train: Callable[P, R]) -> Callable[P, R]:
    """Let what trains a recipe, its first argument, do so as one of the launcher's ranks (`runs.launch.joined`)."""

    @wraps(train)
    def trains(*args: P.args, **kwargs: P.kwargs) -> R:
        recipe: Any = args[0]
        report: Any = kwargs.get("report", silent)
        try:
            with joined(recipe.device), by_recipe_alone(report):
                return train(*args, **kwargs)
        finally:
            if asked_ranks() > 1:  # it remembers a process group that is no more
                AcceleratorState._reset_state(reset_partial_state=True)

    return trains


@contextmanager
def by_recipe_alone(report: Report) -> Iterator[None]:
    """Inside, accelerate's variables for what a recipe says are not there: a config file made for another run would
    train this one in bf16, or compiled, and the recipe would not say so. The first rank says what is passed over."""
    before = {name: os.environ.pop(name) for name in RECIPES if name in os.environ}
    passed_over = [f"{name}={value}" for name, value in before.items() if value.lower() not in ("no", "")]
    if passed_over and ranks.is_first():
        keys = " and ".join(RECIPES[each.partition("=")[0]] for each in passed_over)
        report({"event": "note", "text": f"{', '.join(passed_over)} is passed over: the recipe says {keys}."})
    try:
        yield
    finally:
        os.environ.update(before)
