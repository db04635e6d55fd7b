"""A converted model in any Trainer: our callback takes part by itself, and gives way to one that was asked for.

transformers gives every Trainer its default callbacks, TRL's among them. One of ours is added to these at the first
conversion: it looks for conversions on the model that it is shown, and does nothing where there are none.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import transformers
import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.surgery.record import handles_of

_DRIVERS = "_sparsity_drivers"


@cache
def take_part() -> None:
    """Let every Trainer that is made from now on in this process drive the converted model that it trains, and spare
    from weight decay what a method asks to."""
    defaults: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    defaults.append(TakesPart)
    kind: Any = transformers.Trainer
    kind.get_decay_parameter_names = _without_ours(kind.get_decay_parameter_names)


def _without_ours(plain: Any) -> Any:
    @wraps(plain)
    def get_decay_parameter_names(self: Any, model: Any) -> list[str]:
        sites = [site for handle in handles_of(model) for _, site in handle.installed]
        spared = {id(parameter) for site in sites for parameter in site.undecayed()}
        kept = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
        return [name for name in plain(self, model) if name not in kept]

    return get_decay_parameter_names


def drives(control: TrainerControl, handle: Any, callback: Any, *, asked_for: bool) -> bool:
    """Is it this callback that drives a handle in the trainer of this control? One that was asked for comes first."""
    drivers = vars(control).setdefault(_DRIVERS, {})
    if asked_for or id(handle) not in drivers:
        drivers[id(handle)] = callback
    return drivers[id(handle)] is callback


class TakesPart(TrainerCallback):
    """Does what `handle.callback()` does, for every conversion of the trainer's model whose callback isn't there."""

    def __init__(self) -> None:
        self._own: list[Any] = []

    def _look(self, model: Any) -> None:
        found = handles_of(model) if model is not None else []
        kept = [own for own in self._own if any(own.handle is handle for handle in found)]
        new = [handle for handle in found if not any(own.handle is handle for own in kept)]
        self._own = kept + [handle.callback(asked_for=False) for handle in new]

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        for own in self._own:
            if drives(control, own.handle, own, asked_for=False):
                getattr(own, event)(args, state, control, **kwargs)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(kwargs.get("model"))
        self._pass_on("on_init_end", args, state, control, kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look(kwargs.get("model"))  # it may have been converted, or made anew, since the trainer was made
        self._pass_on("on_train_begin", args, state, control, kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_on("on_step_begin", args, state, control, kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_on("on_pre_optimizer_step", args, state, control, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pass_on("on_save", args, state, control, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_on("on_train_end", args, state, control, kwargs)
