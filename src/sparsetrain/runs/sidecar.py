"""The sidecar of a saved model: which methods it was trained with, on what, and the tensors that rebuild them."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsetrain.core.config import plain_values
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import scratch_file
from sparsetrain.core.plain_files import regular_file
from sparsetrain.core.quote import quoted
from sparsetrain.runs.manifest import FORMAT, read_json, sha256_of, write_json
from sparsetrain.runs.mark import mark_weights
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import State
from sparsetrain.surgery.record import Record

SIDECAR, STATE = "sparsity_config.json", "sparsity_state.safetensors"
WRITTEN = frozenset({"format", "configs", "family", "model_class", "versions", "state", "vocabulary", "deploy"})
"""Entries that `write_sidecar` and its callers fill in themselves."""


def write_sidecar(
    folder: str | Path, model: Any, handle: Handle | Record | None, *, state: State | None = None, **about: Any
) -> None:
    """Write `sparsity_config.json` and `sparsity_state.safetensors` into a folder, each by one rename, and mark the
    weights in it as theirs (`runs.mark`).

    Args:
        handle: what says how the model is converted; None for a dense one.
        state: in place of the handle's own.
    """
    folder = Path(folder)
    inner = base_of(model)
    entries = {
        "format": FORMAT,
        "configs": [plain_values(config) for config in handle.configs] if handle is not None else [],
        "family": getattr(inner.config, "model_type", None),
        "model_class": type(inner).__name__,
        "versions": library_versions(),
        "deploy": "dense" if handle is None or handle.deploys_dense else "sparse",
        **about,
    }
    found = state if state is not None else (handle.state() if handle is not None else {})
    # safetensors wants owned, contiguous memory; names join the site and the tensor
    flat = {f"{site}/{name}": tensor.detach().cpu().clone().contiguous() for site, values in found.items()
            for name, tensor in values.items()}  # fmt: skip
    if handle is not None or flat:
        with scratch_file(folder / STATE) as scratch:
            save_file(flat, str(scratch), metadata={"format": "pt"})
    if handle is not None and not handle.deploys_dense:  # plain weights are anybody's
        mark = {"format": FORMAT, "configs": entries["configs"], "state": sha256_of(folder / STATE)}
        if mark_weights(folder, mark, needs_us=any(config.changes_outputs for config in handle.configs)):
            entries["state"] = mark["state"]
    write_json(folder / SIDECAR, entries)


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """The sidecar of a folder.

    Raises:
        CheckpointError: missing, damaged, or written in a newer format.
    """
    path = Path(folder) / SIDECAR
    about = read_json(path)
    _check_entries(about, path)
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {about['format']}; this version reads up to {FORMAT}. Update sparsetrain."
        )
    return about


def read_state(folder: str | Path) -> State:
    """The tensors of `sparsity_state.safetensors`, by site.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = Path(folder) / STATE
    try:
        flat = load_file(str(regular_file(path)))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {quoted(str(error))}. It is truncated or missing.") from None
    state: State = {}
    for key, tensor in flat.items():
        site, _, name = key.partition("/")
        state.setdefault(site, {})[name] = tensor
    return state


def _check_entries(about: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError if what `load` will read of a sidecar has another type than a run writes."""
    if not isinstance(about.get("format"), int) or not isinstance(about.get("configs"), list):
        raise CheckpointError(f"{path} is no sidecar of ours: it has no `format` or no `configs`.")
    if not all(isinstance(entry, dict) for entry in about["configs"]):
        raise CheckpointError(f"{path}: configs={quoted(about['configs'])} is no list of methods' configs.")
    for key in ("model_class", "task", "base_model", "job"):
        value = about.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{path}: {key}={quoted(value)} is no name.")


def library_versions() -> dict[str, str]:
    """Versions of what a saved model depends on."""
    names = ("torch", "transformers", "peft", "safetensors", "sparsetrain")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), **found}


def base_of(model: Any) -> Any:
    """The model inside PEFT, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
