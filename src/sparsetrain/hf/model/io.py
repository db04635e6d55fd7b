"""Saving, loading and exporting: safetensors in the dense layout beside `sparsity_config.json`, never pickle.

A saved folder holds what transformers or PEFT would write, and three files of ours: the sidecar `sparsity_config.json`
(which methods, on which base model), `sparsity_state.safetensors` (what calibration found: routers, codebooks,
permutations) and `manifest.json` (size and sha256 of every file). A folder appears by one rename: whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

import sparsetrain.methods  # noqa: F401  (enters every method in the registry, for what a sidecar names)
from sparsetrain.core.config import MethodConfig, method_config, registered_methods
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model.embedding_rows import SITE, give_vocabulary
from sparsetrain.hf.model.saving import conversion_of, save_alone, write_along
from sparsetrain.hf.model.weights import class_of_adapter, known_class, load_weights, model_not_found
from sparsetrain.runs.manifest import MANIFEST, atomic_folder, disk_errors, verify_manifest, write_manifest
from sparsetrain.runs.mark import ENTRY, check_mark, mark_of, refuse_lone_weights
from sparsetrain.runs.sidecar import SIDECAR, STATE, WRITTEN, base_of, read_sidecar, read_state, write_sidecar
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.method import Edit, State, method_of
from sparsetrain.surgery.site import Site

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model read from a folder. `handle` is None for a dense one; `about` is the sidecar ({} without one)."""

    model: Any
    tokenizer: Any
    handle: Handle | None
    about: dict[str, Any]

    @property
    def task(self) -> str:
        return self.about.get("task") or known_class(type(base_of(self.model)).__name__)[0].name


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and load reports, which tear our bar and fill logs. Also a decorator."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@quiet()
def save(model: Any, handle: Handle | None, folder: str | Path, *, tokenizer: Any = None, **about: Any) -> Path:
    """Write a trained model (PEFT: its adapter; else all weights) with its sidecar; the model is unchanged.

    Args:
        model: a transformers model or a `PeftModel` on one.
        handle: what `sparsify` returned; None for a dense model, or where the handle is not at hand.
        folder: appears whole, replacing an earlier one.
        about: entries for the sidecar: `base_model` (name or path, needed to load an adapter), `task`, ….

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with atomic_folder(folder) as scratch, disk_errors(folder):
        if isinstance(model, PeftModel):
            # "auto" would ask the hub whether the vocabulary grew; its rows go into the state file
            save_alone(model, str(scratch), save_embedding_layers=False)
        else:
            converted = conversion_of(model) or handle
            state = _dense_state(model, converted.installed if converted is not None else ())
            save_alone(model, str(scratch), state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        write_along(model, scratch, handle, **about)
        write_manifest(scratch)
    return Path(folder)


@quiet()
def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable: bool = False,
) -> Loaded:
    """Read what `save` or `export` wrote, a run's output folder, or any plain model by name or path.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the sidecar is of a newer format; or an adapter holds
            parameters of a sparse method and has no sidecar, so it would run dense without them.
        ValueError: no such model.
    """
    folder = _final_folder(Path(source))
    if not (folder / SIDECAR).is_file():
        return _load_plain(str(source), folder, dtype, device, trainable)
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
    about = read_sidecar(folder)
    check_mark(folder, about.get("state"))
    adapter = (folder / _ADAPTER).is_file()
    if adapter and not about.get("base_model"):
        raise CheckpointError(f"{folder / SIDECAR} names no base_model for the adapter. Save it with base_model=….")
    base = resolve_model(about["base_model"]) if adapter else str(folder)
    options = about.get("model_options", {})
    if "id2label" in options:  # JSON has made its keys text
        options["id2label"] = {int(i): name for i, name in options["id2label"].items()}
    model = load_weights(base, about["model_class"], dtype, **options)
    vars(model.config).pop(ENTRY, None)  # of the weights as they were saved: it is not to be saved once more
    saved = read_state(folder) if about["configs"] or (folder / STATE).is_file() else {}
    if adapter and SITE in about:
        give_vocabulary(model, about[SITE], saved.get(SITE, {}))
    configs = [MethodConfig.from_dict(entry) for entry in about["configs"]]
    handle = sparsify(model, *configs, state=saved) if configs else None
    if adapter:
        model = _with_adapter(model, folder, trainable)
    model = model.to(device)
    return Loaded(model=model.train(trainable), tokenizer=_tokenizer(folder, base), handle=handle, about=about)


@quiet()
def export(source: str | Path | Loaded, folder: str | Path, *, format: str = "sparse") -> Path:
    """Write a trained model with LoRA merged in, as full weights that plain transformers loads.

    Args:
        source: what to export; a `Loaded` is used up (its model becomes dense).
        folder: appears whole. It must be absent or empty.
        format: `sparse`: dense weights and the sidecar, so that `load` runs it sparse and others run it dense.
            `dense`: no sidecar; only where the dense model gives the same outputs.
            A format of a method (`24`): no sidecar; what it trained (zeros) is written into the weights.

    Raises:
        ValueError: unknown format; `dense` for a model that routes, selects or runs 2:4; a method's format for a model
            that was trained without it; LoRA that cannot be merged; a folder that is not empty.
    """
    formats = export_formats()
    if format not in formats:
        raise ValueError(f"export format {format!r} is unknown. Choose from {', '.join(formats)}.")
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Choose another, or remove it.")
    loaded = source if isinstance(source, Loaded) else load(source)
    model, handle = loaded.model, loaded.handle
    if isinstance(model, PeftModel):
        check_merge(model, handle)
        model = model.merge_and_unload()
    about = {key: value for key, value in loaded.about.items() if key not in WRITTEN | {"base_model"}}
    state: State = {}
    if (method := formats[format]) is not None:
        _write_in(handle, format, method)
    elif handle is not None and format == "dense":
        handle.merge()
    elif handle is not None:
        state = {site: {name: value.clone() for name, value in found.items()} for site, found in handle.state().items()}
        handle.restore()
    with atomic_folder(folder) as scratch, disk_errors(folder):
        save_alone(model, str(scratch))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(str(scratch))
        if format == "sparse":
            write_sidecar(scratch, model, handle, state=state, **about)
        write_manifest(scratch)
    return Path(folder)


def check_merge(model: PeftModel, handle: Handle | None) -> None:
    """Raise ValueError if folding LoRA into the weights would change the outputs."""
    if handle is None:
        return
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    for edit in handle.plan.edits:
        linears = sorted(adapted & edit.claims)
        if reason := method_of(edit.config).merge_adapter_error(edit.config, linears):
            raise ValueError(f"LoRA on {linears[0]} cannot be merged: {reason}.")


def export_formats() -> dict[str, str | None]:
    """Format -> the method that a model must have been trained with, None if any will do."""
    own = {name: method for method, kind in registered_methods().items() for name in method_of(kind).exports}
    return {"sparse": None, "dense": None, **own}


def _write_in(handle: Handle | None, format: str, method: str) -> None:
    """Write what a method trained into the weights of the model, which becomes plain."""
    if handle is None or not handle.sites(method):
        raise ValueError(f"export format {format!r} needs a model trained with {method}, and this one was not.")
    method_of(method_config(method)).exports[format](handle)


def _load_plain(name: str, folder: Path, dtype: torch.dtype, device: Any, trainable: bool) -> Loaded:
    """A model or PEFT adapter that `save` did not write."""
    if (folder / _ADAPTER).is_file():
        _refuse_orphan(folder)
        refuse_lone_weights(folder, mark_of(folder))
        config: Any = PeftConfig.from_pretrained(str(folder))
        base = str(config.base_model_name_or_path)
        made_for = (config.auto_mapping or {}).get("base_model_class", "")  # PEFT writes one of the two
        kind = class_of_adapter(config.task_type) if config.task_type else known_class(str(made_for))[1]
        model = load_weights(base, kind, dtype)
        model = _with_adapter(model, folder, trainable)
        return Loaded(
            model=model.to(device).train(trainable), tokenizer=_tokenizer(folder, base), handle=None, about={}
        )
    path = resolve_model(name)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(model_not_found(name, error)) from None
    refuse_lone_weights(name, getattr(config, ENTRY, None))
    _, kind = known_class(*(config.architectures or []))
    model = load_weights(path, kind, dtype).to(device).train(trainable)
    return Loaded(model=model, tokenizer=_tokenizer(Path(path), path), handle=None, about={})


def _with_adapter(model: Any, folder: Path, trainable: bool) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    except (KeyError, RuntimeError) as error:  # sizes that differ, modules that are not there
        found = str(error).splitlines()[:2][-1].strip()
        raise CheckpointError(f"the adapter in {folder} does not fit its base model: {found}") from None


def _refuse_orphan(folder: Path) -> None:
    """An adapter with a router or codebook and no sidecar would load on the plain model, and lose them silently."""
    ours = {name for kind in registered_methods().values() for name in method_of(kind).modules_to_save}
    try:
        with safe_open(str(folder / _ADAPTER_WEIGHTS), framework="pt") as file:
            found = sorted({part for key in file.keys() for part in key.split(".") if part in ours})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _ADAPTER_WEIGHTS} cannot be read: {error}.") from None
    if found:
        raise CheckpointError(
            f"{folder} holds trained parameters of a sparse method ({', '.join(found)}) and no {SIDECAR}, so it would "
            "run dense without them. Copy the sidecar and its state file from where the adapter was trained."
        )


def sidecar_of(source: str | Path) -> dict[str, Any]:
    """The sidecar of a saved model, or of the one in a run's output folder; {} where there is none."""
    folder = _final_folder(Path(source))
    return read_sidecar(folder) if (folder / SIDECAR).is_file() else {}


def _final_folder(path: Path) -> Path:
    """The adapter or model inside the output folder of a run or a comparison; any other folder itself."""
    for name in ("adapter", "model", "sparse/adapter", "sparse/model"):
        if not (path / SIDECAR).is_file() and (path / name / SIDECAR).is_file():
            return path / name
    return path


def _dense_state(model: nn.Module, installed: Iterable[tuple[Edit, Site]]) -> dict[str, Any]:
    """The state dict that plain transformers expects: without what methods added, with the weights they stand for."""
    state, installed = model.state_dict(), list(installed)
    ours = {id(module) for _, module in installed}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in ours)
    dense = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    for edit, module in installed:
        dense |= {f"{edit.site}.{name}": value for name, value in (module.dense_weights() or {}).items()}
    return dense


def _tokenizer(*places: str | Path) -> Any:
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(str(place))
        except (OSError, ValueError):
            continue
    return None
