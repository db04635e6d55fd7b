"""Saving and loading by others: whatever calls `save_pretrained` of a converted model or its adapter writes the sidecar
too; an adapter that is loaded onto a converted model brings the patterns that it was trained with, and one that needs
them is not loaded onto a dense model.

Trainers, hub uploads and users call transformers' and PEFT's own methods, so these are where it is seen to.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin
from torch import nn
from transformers import PreTrainedModel

from sparsetrain.core.config import MethodConfig, plain_values
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.embedding_rows import vocabulary_of
from sparsetrain.hf.model.models import ATTENTION_DROPOUT
from sparsetrain.hf.model.weights import known_class
from sparsetrain.recipes.tasks import Task
from sparsetrain.runs.manifest import drop_manifest, read_json
from sparsetrain.runs.mark import check_mark, mark_of, plain_kind, refuse_lone_weights
from sparsetrain.runs.sidecar import SIDECAR, STATE, base_of, read_sidecar, read_state, write_sidecar
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import Edit
from sparsetrain.surgery.record import Record, joined, records_of
from sparsetrain.surgery.site import Site

_ADAPTER = "adapter_config.json"
_INSTEAD = (
    "On the dense model it would compute something else. Load it with load() of sparsetrain.hf.model.io, or convert "
    "the base model first, with the same configs."
)
_ALONE: ContextVar[bool] = ContextVar("saved without a sidecar", default=False)
_CONVERTED: ContextVar[bool] = ContextVar("loaded onto a converted model", default=False)


@cache
def keep_record() -> None:
    """Let transformers and PEFT take a converted model's sidecar along, from now on in this process."""
    for kind in (PreTrainedModel, PeftModel):
        kind.save_pretrained = _saving(kind.save_pretrained)
        kind.load_adapter = _loading(kind.load_adapter)
    reads: list[tuple[Any, str, Any]] = [
        (PeftModel, "from_pretrained", _from_pretrained),
        (PeftConfigMixin, "from_json_file", _reading),
    ]
    for owner, name, around in reads:
        setattr(owner, name, classmethod(around(getattr(owner, name).__func__)))


def save_alone(model: Any, folder: str, **options: Any) -> None:
    """`save_pretrained`, by a caller that writes the sidecar itself."""
    with _set(_ALONE, True):
        model.save_pretrained(folder, **options)


def write_along(model: Any, folder: Path, handle: Handle | None = None, **about: Any) -> None:
    """Write the sidecar of a model or adapter that has just been saved into a folder.

    Args:
        handle: of a converted model that carries no record.
        about: entries beside those that the record has.
    """
    record = conversion_of(model) or (handle if handle is not None and handle.active else None)
    entries: dict[str, Any] = {**(record.about if record is not None else {}), **about}
    if record is not None and record.deploys_dense:  # what was installed is no part of what is saved
        entries["trained_with"] = [plain_values(config) for config in record.configs]
        record = None
    state = record.state() if record is not None else {}
    if (folder / _ADAPTER).is_file():
        if not entries.get("base_model") and (base := read_json(folder / _ADAPTER).get("base_model_name_or_path")):
            entries["base_model"] = base
        inner = base_of(model)
        entries.setdefault("model_options", model_options(inner.config, known_class(type(inner).__name__)[0]))
        known, rows = vocabulary_of(inner, entries.get("base_model"))
        entries, state = entries | known, state | rows
    write_sidecar(folder, model, record, state=state, **entries)


def conversion_of(model: Any) -> Record | None:
    """Every conversion of a model, or of the model inside its adapter, as one; None for a dense one."""
    return joined(record for _, record in records_of(model))


def model_options(config: Any, task: Task) -> dict[str, Any]:
    """What `from_pretrained` must be told to make a model of this config again around its adapter."""
    options: dict[str, Any] = {name: 0.0 for name in ATTENTION_DROPOUT if getattr(config, name, None) == 0.0}
    if task.labelled:
        options |= {"id2label": config.id2label, "label2id": config.label2id, "ignore_mismatched_sizes": True}
        options |= {"pad_token_id": config.pad_token_id} if hasattr(config, "pad_token_id") else {}
    return options


def take_along(model: Any, folder: Path) -> list[str]:
    """Give a converted model what belongs to the weights that were just loaded from a folder; the sites that changed.

    Raises:
        CheckpointError: the folder's weights were trained by a converted model, and its sidecar is not there, not
            theirs, or of other methods or settings.
    """
    theirs, ours = saved_configs(folder), _configs(model)
    if not theirs:
        return []
    if theirs != ours:
        raise CheckpointError(f"{_unlike(folder, theirs, ours)} Convert it with the same configs, or start a new run.")
    state = read_state(folder)
    try:
        return [key for root, record in records_of(model) for key in record.adopt(root, state)]
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def saved_configs(folder: Path) -> list[MethodConfig]:
    """What the weights of a folder were trained with, by its sidecar; nothing for those of a dense model.

    Raises:
        CheckpointError: the weights say that they were trained by a converted model, and its sidecar is not theirs or
            not there.
    """
    if not (folder / SIDECAR).is_file():
        refuse_lone_weights(folder, mark_of(folder))
        return []
    about = read_sidecar(folder)
    check_mark(folder, about.get("state"))
    return [MethodConfig.from_dict(entry) for entry in about["configs"]]


def _configs(model: Any) -> list[MethodConfig]:
    return [config for _, record in records_of(model) for config in record.configs]


def _unlike(folder: Path, theirs: list[MethodConfig], ours: list[MethodConfig]) -> str:
    one, other = (" + ".join(config.method for config in configs) or "no method" for configs in (theirs, ours))
    settings = f" of other settings ({_differing(theirs, ours)})" if one == other else ""
    return f"{folder} was trained with {one}, and this model is converted with {other}{settings}."


def _differing(theirs: list[MethodConfig], ours: list[MethodConfig]) -> str:
    pairs = [(plain_values(one), plain_values(other)) for one, other in zip(theirs, ours, strict=True)]
    return ", ".join(
        f"{name}={quoted(repr(one.get(name)))} there and {quoted(repr(other.get(name)))} here"
        for one, other in pairs
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    )


def dense_state(model: nn.Module, installed: Iterable[tuple[Edit, Site]]) -> dict[str, Any]:
    """The state dict that plain transformers expects: without what methods added, with the weights they stand for."""
    state, installed = model.state_dict(), list(installed)
    ours = {id(module) for _, module in installed}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in ours)
    dense = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    for edit, module in installed:
        dense |= {f"{edit.site}.{name}": value for name, value in (module.dense_weights() or {}).items()}
    return dense


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _saving(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        record = conversion_of(self)
        if record is None or _ALONE.get() or not given.get("is_main_process", True):
            return plain(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained(push_to_hub=True) uploads before the sidecar is written. Call model.push_to_hub(…), "
                "which takes it along."
            )
        if folder.is_dir():  # what an earlier save says is no longer true
            for name in (SIDECAR, STATE):
                (folder / name).unlink(missing_ok=True)
            drop_manifest(folder)
        if isinstance(self, PreTrainedModel) and given.get("state_dict") is None:
            # weights that a method stands for are saved beside its own, so that the folder loads plainly
            without_ours = dense_state(self, record.installed)
            kwargs["state_dict"] = without_ours if record.deploys_dense else self.state_dict() | without_ours
        out = plain(self, save_directory, *args, **kwargs)
        # PEFT writes an adapter of another name into a folder of that name
        places = [folder, *(folder / name for name in getattr(self, "peft_config", {}))]
        for place in places:
            if any((place / name).is_file() for name in (_ADAPTER, "config.json")):
                write_along(self, place)
        return out

    return save_pretrained


def _loading(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = list(signature.bind(self, *args, **kwargs).arguments.values())[1:2]
        folder, ours = Path(place[0] if place and isinstance(place[0], (str, Path)) else ""), _configs(self)
        theirs = saved_configs(folder) if (folder / (_ADAPTER if ours else SIDECAR)).is_file() else []
        if not ours and _needs_us(folder, theirs):
            raise CheckpointError(f"{_unlike(folder, theirs, ours)} {_INSTEAD}")
        if theirs and ours and [config.method for config in theirs] != [config.method for config in ours]:
            raise CheckpointError(f"{_unlike(folder, theirs, ours)} Convert the base model with the same configs.")
        with _set(_CONVERTED, bool(ours)):
            out = plain(self, *args, **kwargs)
        say = logging.getLogger("sparsetrain")
        if not ours:
            return out
        if theirs and theirs != ours:
            say.warning("%s The adapter runs with this conversion.", _unlike(folder, theirs, ours))
        elif theirs and len(self.peft_config) > 1:
            say.warning("%s is one of several adapters, and runs with this model's conversion.", folder)
        elif theirs and (changed := take_along(self, folder)):
            say.info("%d sites are now as %s was trained with.", len(changed), folder)
        return out

    return load_adapter


def _needs_us(folder: Path, configs: list[MethodConfig]) -> bool:
    """Would an adapter that was trained so compute something else on the dense model?"""
    changes = any(config.changes_outputs for config in configs)
    return changes and read_sidecar(folder).get("deploy") != "dense"


def _from_pretrained(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def from_pretrained(kind: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with _set(_CONVERTED, bool(_configs(model))):
            return plain(kind, model, *args, **kwargs)

    return from_pretrained


def _reading(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def from_json_file(kind: Any, path_json_file: Any, **kwargs: Any) -> dict[str, Any]:
        values = plain(kind, path_json_file, **kwargs)
        if (known := plain_kind(values.get("peft_type"))) is None:
            return values
        if not _CONVERTED.get():
            raise CheckpointError(f"{path_json_file} is of an adapter to a sparse model. {_INSTEAD}")
        return values | {"peft_type": known}

    return from_json_file
