"""The classes that models are loaded with, and their weights: which class a task has, and which task a class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.four_bit import keep_unpacked
from sparsetrain.hf.model.opening import code_of, model_not_found, open_config, quiet, told
from sparsetrain.hf.model.whole import check_layers, check_loaded, check_stored
from sparsetrain.planner.config_values import refuse_foreign
from sparsetrain.recipes.tasks import TASKS, Task, named, task_of
from sparsetrain.runs.folders import check_model_folder


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


@quiet()
def load_weights(
    path: str,
    model_class: str,
    dtype: torch.dtype,
    config: Any = None,
    *,
    name: str | None = None,
    new_head: bool = False,
    cut: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Any, list[str]]:
    """(a transformers model by the name of its class, in evaluation mode, with SDPA attention and the weights that its
    files hold, all of them; the names of its new modules). The one way in which weights are loaded.

    Args:
        path: a folder, or a name on the hub.
        config: the model's, where it was read or changed already.
        name: what the user called it, for messages.
        new_head: a head that the files lack, or have in another size, is new, with random weights.
        cut: the config was cut to fewer layers than the files hold.
        options: further ones of `from_pretrained`.

    Raises:
        CheckpointError: transformers has no such class, or it is no class for this family.
        ValueError: the model cannot be found or read; its files lack weights, hold others, or ones that are not finite.
    """
    name = name or path
    config = open_config(path, name) if config is None else config
    kind = fitting_class(model_class, config, name)
    refuse_foreign(config.to_dict(), name)
    if Path(path).is_dir():
        stored = check_model_folder(path)
        check_layers(stored, config, name)
        check_stored(stored, empty_of(kind, config, name), name)
    try:
        model, info = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention_of(kind, config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **options,
            **code_of(config),
        )
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        if "memory" in str(error):  # the machine's fault, not the model's
            raise
        raise ValueError(model_not_found(name, error)) from None
    new = check_loaded(model, info, name, new_head=new_head, cut=cut)
    keep_unpacked(model)
    return model, new


@quiet()
def empty_of(kind: Any, config: Any, name: str) -> Any:
    """The model of a class and a config on the meta device, in fp32: its modules and shapes, without its weights.

    Raises:
        ValueError: it cannot be built of this config.
    """
    config = copy.deepcopy(config)  # building sets its dtype
    build = getattr(kind, "from_config", None) or kind._from_config
    options = {} if issubclass(kind, PreTrainedModel) else code_of(config)
    try:
        with torch.device("meta"):
            # a config names the dtype that its weights were stored in, which is not the one they are trained in
            return build(config, dtype=torch.float32, **options)
    except Exception as error:  # every family fails in its own way at values that do not fit each other
        raise ValueError(
            f"no model can be built from the config of {quoted(name)} ({quoted(config.model_type)}): {told(error)}"
        ) from None


def attention_of(kind: Any, config: Any) -> str | None:
    """SDPA, or None where a family has attention of its own alone: transformers then takes that."""
    known = getattr(kind, "_model_mapping", None)
    if known is not None and type(config) not in known:  # of code that came with the model: it says itself what it has
        return None
    found = kind if known is None else known[type(config)]
    found = found[0] if isinstance(found, (list, tuple)) else found
    return "sdpa" if getattr(found, "_supports_sdpa", True) else None


def fitting_class(model_class: str, config: Any, name: str) -> Any:
    """The class of that name, if it is one for the family of the config."""
    kind = _class_named(model_class)
    if not (isinstance(kind, type) and (issubclass(kind, PreTrainedModel) or model_class.startswith("AutoModel"))):
        raise CheckpointError(
            f"model_class {quoted(repr(model_class))} is not a model of transformers {transformers.__version__}."
        )
    known: Any = getattr(kind, "_model_mapping", None)
    own = getattr(kind, "config_class", None)
    if known is not None and kind.__name__ in (getattr(config, "auto_map", None) or ()):
        return kind  # by code that came with the model, which may run: no other config has an auto_map
    if (known is not None and type(config) not in known) or (own is not None and not isinstance(config, own)):
        raise ValueError(
            f"{quoted(name)} is a model of the family {quoted(config.model_type)}, which has no "
            f"{model_class.removeprefix('AutoModelFor')}: it cannot be loaded as {model_class}. Name a model that can."
        )
    return kind


def _class_named(name: str) -> Any:
    """The class of a task's model, or one of transformers; None for any other name."""
    own = (place for task in TASKS.values() for place in task.classes if _class_name(place) == name)
    place = next(own, None)
    if place is not None:
        return named(place)
    return getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None


def _class_name(place: str) -> str:
    return place.rpartition(":")[2]
