"""The Trainer's arguments that a recipe passes on, checked before any weight is read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from sparsetrain.core.config import suggest
from sparsetrain.core.fields import shown
from sparsetrain.hf.model.opening import told
from sparsetrain.hf.model.passed import typed
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.surgery.method import growth_of

_NO_OPTIMIZERS = {
    "lomo": "it updates weights in the backward pass, where no gradient is left to clip or check",
    "adalomo": "it updates weights in the backward pass, where no gradient is left to clip or check",
    "schedule_free": "its weights are others in training than in evaluation, which only a Trainer's own evaluation "
    "would switch",
    "layerwise": "it steps in the backward pass, and has no state that a run could go on with",
}
_NO_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_REFUSED = (*_NO_OPTIMIZERS, *_NO_SCHEDULES)


def passed_on(recipe: RunRecipe) -> dict[str, Any]:
    """A recipe's `training` as the Trainer's arguments take it.

    Raises:
        ValueError: transformers has no such key, or one of another type.
    """
    return typed("training", TrainingArguments, recipe.training)


def check_passed(recipe: RunRecipe, device: torch.device) -> None:
    """Raise ValueError if the Trainer cannot be made with what the recipe passes on: a value or library that is not
    there, or something that it would leave out without a word."""
    values = passed_on(recipe)
    if not values:
        return
    _check_report(values.get("report_to"))
    for key, known in (("optim", optimizers()), ("lr_scheduler_type", schedules())):
        if (name := values.get(key)) is not None and not any(part in name for part in _REFUSED) and name not in known:
            raise ValueError(f"training.{key}={shown(name)} is unknown.{suggest(name, known)} Give {', '.join(known)}.")
    _check_schedule(recipe, values.get("lr_scheduler_type"))
    if values.get("label_smoothing_factor") and task_of(recipe.task).loss is not None:
        raise ValueError(f"training.label_smoothing_factor: task={recipe.task} has a loss of its own. Leave it out.")
    try:
        arguments = TrainingArguments(**{"report_to": "none", "use_cpu": device.type == "cpu", **values})
        if values.get("use_liger_kernel"):
            import liger_kernel  # type: ignore[import-not-found]  # noqa: F401
        if "optim" in values:
            _check_optimizer(recipe, arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if type(error) is ValueError and str(error).startswith(("training.", "optim")):
            raise
        raise ValueError(f"transformers does not take training={shown(recipe.training)}: {told(error)}") from None


def _check_report(asked: Any) -> None:
    """Raise ValueError for a dashboard that is unknown, or whose library is not installed."""
    known, there = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in asked if isinstance(asked, list) else [asked]:
        if name in (None, "none", "all"):
            continue
        if name not in known:
            raise ValueError(
                f"report_to={shown(name)} is unknown.{suggest(name, known)} Give none, {', '.join(known)}."
            )
        if name not in there:
            have = f"Installed: {', '.join(there)}" if there else "None is installed"
            raise ValueError(f"report_to={name}: its library is not installed (pip install {name}). {have}.")


def _check_schedule(recipe: RunRecipe, name: Any) -> None:
    if name in _NO_SCHEDULES:
        raise ValueError(f"training.lr_scheduler_type={name} goes by the Trainer's own evaluations, and has none here.")
    if name is not None and getattr(recipe, "min_lr_ratio", 0.0):
        raise ValueError(f"training.lr_scheduler_type={name} and min_lr_ratio are both given. Leave one out.")


def _check_optimizer(recipe: RunRecipe, arguments: TrainingArguments) -> None:
    """Raise ValueError, or what transformers does, for an optimizer that cannot be made or cannot train a run."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    for part, why in _NO_OPTIMIZERS.items():
        if part in name:
            raise ValueError(f"optim={name} is not taken: {why}.")
    growth = growth_of(recipe.configs)
    if growth is not None and not name.startswith("adamw"):
        raise ValueError(f"optim={name}: {growth.method} carries AdamW's state from model to model. Give an adamw.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise ValueError(f"optim={name} cannot be made here: {told(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        if "model" not in str(error):  # those that are made for the layers of a model get it later
            raise ValueError(f"optim={name} cannot be made: {told(error)}") from None


def optimizers() -> list[str]:
    """The names that `optim` takes, whether or not their libraries are installed."""
    return [each.value for each in OptimizerNames if not any(part in each.value for part in _NO_OPTIMIZERS)]


def schedules() -> list[str]:
    """The names that `lr_scheduler_type` takes."""
    return [each.value for each in SchedulerType if each.value not in _NO_SCHEDULES]
