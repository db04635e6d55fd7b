"""The classes that models are loaded with, and their weights: which class a task has, and which task a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from sparsetrain.core.errors import CheckpointError
from sparsetrain.recipes.tasks import TASKS, Task, named, task_of


def auto_class(task: str) -> Any:
    """What loads the model of a task."""
    return named(task_of(task).model)


def new_class(task: str) -> Any:
    """What makes the model of a task with random weights."""
    row = task_of(task)
    return named(row.new_model or row.model)


def known_class(*names: str) -> tuple[Task, str]:
    """(task, name of the class that loads it) of a model whose own class has one of these names; else `lm`."""
    for task in TASKS.values():
        for found in map(_class_name, task.classes):
            if any(found.removeprefix("AutoModelFor") in name for name in names):
                return task, found
    return task_of("lm"), _class_name(task_of("lm").model)


def class_of_adapter(kind: str | None) -> str:
    """The name of the class that loads the model of an adapter, by PEFT's name of its task; else a language model's."""
    fitting = (task for task in TASKS.values() if task.adapter == kind)
    return _class_name(next(fitting, task_of("lm")).model)


def load_weights(path: str, model_class: str, dtype: torch.dtype, **options: Any) -> Any:
    """A transformers model by the name of its class, in evaluation mode, with SDPA attention.

    Raises:
        CheckpointError: transformers has no model of that name.
        ValueError: the model cannot be found or read.
    """
    kind = _class_named(model_class)
    if not (isinstance(kind, type) and (issubclass(kind, PreTrainedModel) or model_class.startswith("AutoModel"))):
        raise CheckpointError(f"model_class {model_class!r} is not a model of transformers {transformers.__version__}.")
    try:
        return kind.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", **options)  # type: ignore[attr-defined]
    except (OSError, SafetensorError) as error:
        raise ValueError(model_not_found(path, error)) from None


def model_not_found(name: str, error: Exception) -> str:
    """The message for a model that transformers could not load."""
    if Path(name).is_dir():
        return f"{name} holds no model that can be read: {str(error).splitlines()[0]}"
    return (
        f"model {name!r} is not an embedded asset, not a local folder, and could not be had from the hub "
        f"({str(error).splitlines()[0].rstrip('.')}). Check the name, or see `sparsetrain models list`."
    )


def _class_named(name: str) -> Any:
    """The class of a task's model, or one of transformers; None for any other name."""
    own = (place for task in TASKS.values() for place in task.classes if _class_name(place) == name)
    place = next(own, None)
    return getattr(transformers, name, None) if place is None else named(place)


def _class_name(place: str) -> str:
    return place.rpartition(":")[2]
