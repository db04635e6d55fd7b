"""Saving and loading by others: whatever calls `save_pretrained` of a converted model or its adapter writes the sidecar
too, and an adapter that is loaded onto a converted model brings the patterns that it was trained with.

Trainers, hub uploads and users call transformers' and PEFT's own methods, so these are where it is seen to.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from sparsetrain.core.config import MethodConfig
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.vocabulary import vocabulary_of
from sparsetrain.runs.manifest import drop_manifest, read_json
from sparsetrain.runs.mark import check_mark, refuse_lone_weights
from sparsetrain.runs.sidecar import SIDECAR, STATE, base_of, read_sidecar, read_state, write_sidecar
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.record import joined, records_of

_ADAPTER = "adapter_config.json"
_ALONE: ContextVar[bool] = ContextVar("saved without a sidecar", default=False)


@cache
def keep_record() -> None:
    """Let transformers and PEFT take a converted model's sidecar along, from now on in this process."""
    for kind in (PreTrainedModel, PeftModel):
        setattr(kind, "save_pretrained", _saving(kind.save_pretrained))
    setattr(PeftModel, "load_adapter", _loading(PeftModel.load_adapter))


def save_alone(model: Any, folder: str, **options: Any) -> None:
    """`save_pretrained`, by a caller that writes the sidecar itself."""
    with _alone():
        model.save_pretrained(folder, **options)


def write_along(model: Any, folder: Path, handle: Handle | None = None, **about: Any) -> None:
    """Write the sidecar of a model or adapter that has just been saved into a folder.

    Args:
        handle: of a converted model that carries no record.
        about: entries beside those that the record has.
    """
    record = joined(record for _, record in records_of(model)) or handle
    entries: dict[str, Any] = {**(record.about if record is not None else {}), **about}
    state = record.state() if record is not None else {}
    if (folder / _ADAPTER).is_file():
        if not entries.get("base_model") and (base := read_json(folder / _ADAPTER).get("base_model_name_or_path")):
            entries["base_model"] = base
        known, rows = vocabulary_of(base_of(model), entries.get("base_model"))
        entries, state = entries | known, state | rows
    write_sidecar(folder, model, record, state=state, **entries)


def take_along(model: Any, folder: Path) -> list[str]:
    """Give a converted model what belongs to the weights that were just loaded from a folder; the sites that changed.

    Raises:
        CheckpointError: the folder's weights were trained by a converted model, and its sidecar is not there, not
            theirs, or of other methods.
    """
    records = records_of(model)
    if not (folder / SIDECAR).is_file():
        refuse_lone_weights(folder, SIDECAR)
        return []
    about = read_sidecar(folder)
    check_mark(folder, about.get("state"))
    theirs = [MethodConfig.from_dict(entry) for entry in about["configs"]]
    ours = [config for _, record in records for config in record.configs]
    if theirs != ours:
        raise CheckpointError(
            f"{folder} was trained with {_names(theirs)}, and this model is converted with {_names(ours)}"
            f"{' of other settings' if _names(theirs) == _names(ours) else ''}. Convert it with the same configs, or "
            "start a run of its own from the saved weights."
        )
    state = read_state(folder) if theirs else {}
    try:
        return [key for root, record in records for key in record.adopt(root, state)]
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _names(configs: list[MethodConfig]) -> str:
    return " + ".join(config.method for config in configs) or "no method"


@contextmanager
def _alone() -> Iterator[None]:
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _saving(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        record = joined(record for _, record in records_of(self))
        if record is None or _ALONE.get() or not given.get("is_main_process", True):
            return plain(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        for name in (SIDECAR, STATE):  # of an earlier save
            (folder / name).unlink(missing_ok=True)
        drop_manifest(folder)
        if isinstance(self, PreTrainedModel) and given.get("state_dict") is None:
            # weights that a method stands for are saved beside its own, so that the folder loads plainly
            stood_for = {
                f"{edit.site}.{name}": value
                for edit, module in record.installed
                for name, value in (module.dense_weights() or {}).items()
            }
            if stood_for:
                kwargs["state_dict"] = self.state_dict() | stood_for
        out = plain(self, save_directory, *args, **kwargs)
        # PEFT writes an adapter of another name into a folder of that name
        inner = [folder / name for name in getattr(self, "peft_config", {}) if (folder / name / _ADAPTER).is_file()]
        for place in [folder, *inner] if (folder / _ADAPTER).is_file() or not inner else inner:
            write_along(self, place)
        return out

    return save_pretrained


def _loading(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, model_id, adapter_name, *args, **kwargs)
        folder = Path(model_id)
        if not records_of(self) or not (folder / SIDECAR).is_file():
            return out
        if len(self.peft_config) > 1:
            logging.getLogger("sparsetrain").warning(
                "%s is one of several adapters, and what its sidecar holds is not taken over: the model stays converted "
                "as it is.",
                folder,
            )
        elif changed := take_along(self, folder):
            logging.getLogger("sparsetrain").info("%d sites are now as %s was trained with.", len(changed), folder)
        return out

    return load_adapter
