"""Saying once that a converted model is trained and nothing drives its schedules.

Warm-ups, refreshes, switches and draws follow `handle.step`, which a Trainer calls by itself. A loop of one's own that
doesn't would go on as at step 0, and nobody would know.
"""

from __future__ import annotations

import logging
import weakref
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

ALLOWED = 2
"""Optimizer steps between two calls of `handle.step` that say nothing yet: trainers differ in when they call."""


_WATCHED: weakref.WeakSet[Unattended] = weakref.WeakSet()


class Unattended:
    """Counts a model's optimizer steps since the last `handle.step`, until it has spoken.

    Args:
        model: the converted model; it keeps this object alive, and this object does not keep the model.
        methods: their names, for the message.
    """

    def __init__(self, model: nn.Module, methods: list[str]) -> None:
        self._model = weakref.ref(model)
        self._methods = methods
        self._steps = 0
        self._ours: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        vars(model)["_unattended"] = self
        _begin_watching()
        _WATCHED.add(self)

    def attended(self) -> None:
        """`handle.step` was called."""
        self._steps = 0

    def close(self) -> None:
        """Nothing is to be watched any more."""
        _WATCHED.discard(self)
        if (model := self._model()) is not None:
            vars(model).pop("_unattended", None)

    def stepped(self, optimizer: Optimizer) -> None:
        """Some optimizer has made a step."""
        model = self._model()
        if model is None or not self._ours.setdefault(optimizer, _trains(optimizer, model)):
            return
        self._steps += 1
        if self._steps > ALLOWED:
            logging.getLogger("sparsetrain").warning(
                "%s: %d optimizer steps, and nothing calls handle.step: warm-ups, refreshes and draws stand still. "
                "Call handle.step(step, total) before each step of your loop. A Trainer that is made after the "
                "conversion calls it by itself.",
                " + ".join(self._methods),
                self._steps,
            )
            self.close()

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copy of the model is watched by nobody


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


@cache
def _begin_watching() -> None:
    """Register with torch, once a process: its hooks cannot be removed while they run."""

    def stepped(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for watch in list(_WATCHED):
            watch.stepped(optimizer)

    register_optimizer_step_post_hook(stepped)
