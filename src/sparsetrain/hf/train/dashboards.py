"""How often dashboards are told of the loss: every `logging_steps` steps, while the run's records have each step."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


def tell_every(trainer: Trainer, every: float) -> None:
    """Let a Trainer's dashboards have the mean loss of each `every` steps (below 1: a share of all), and of the last.

    Evaluations are told at once.
    """
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks if every != 1 else ():
        if isinstance(callback, kinds):
            callback.on_log = _thinned(callback.on_log, every)  # type: ignore[method-assign]


def _thinned(tell: Any, every: float) -> Any:
    losses: list[float] = []

    def on_log(args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if "loss" in (logs or {}):
            losses.append(logs["loss"])  # type: ignore[index]
            step, most = state.global_step, state.max_steps
            steps = every if every >= 1 else math.ceil(every * most)
            if step % steps and step < most and not (step == 1 and args.logging_first_step):
                return None
            logs = {**(logs or {}), "loss": sum(losses) / len(losses)}
            losses.clear()
        return tell(args, state, control, logs=logs, **kwargs)

    return on_log
