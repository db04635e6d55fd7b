"""Saving, loading and exporting: safetensors in the dense layout beside `sparsity_config.json`, never pickle.

A saved folder holds what transformers or PEFT would write, and three files of ours: the sidecar `sparsity_config.json`
(which methods, on which base model), `sparsity_state.safetensors` (what calibration found: routers, codebooks,
permutations) and `manifest.json` (size and sha256 of every file). A folder appears by one rename: whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

import sparsetrain.methods  # noqa: F401  (enters every method in the registry, for what a sidecar names)
from sparsetrain.core.config import MethodConfig, method_config, registered_methods
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model.adapter import WEIGHTS, base_place, check_adapter, made_for, with_adapter
from sparsetrain.hf.model.embedding_rows import SITE, give_vocabulary
from sparsetrain.hf.model.foreign import own_classes, set_options
from sparsetrain.hf.model.four_bit import bit_options
from sparsetrain.hf.model.merge import check_merge
from sparsetrain.hf.model.opening import code_of, open_config, open_image_processor, open_tokenizer, quiet, told
from sparsetrain.hf.model.pair import PairClassifier, PairReader
from sparsetrain.hf.model.saving import conversion_of, dense_state, save_alone, write_along
from sparsetrain.hf.model.weights import auto_class, class_of_adapter, known_class, load_weights
from sparsetrain.hf.model.whole import check_finite
from sparsetrain.runs.card import CARD
from sparsetrain.runs.folders import ADAPTER, stored_shapes
from sparsetrain.runs.manifest import MANIFEST, atomic_folder, disk_errors, verify_manifest, write_manifest
from sparsetrain.runs.mark import ENTRY, check_mark, drop_modules, mark_of, refuse_lone_weights
from sparsetrain.runs.sidecar import SIDECAR, STATE, WRITTEN, base_of, read_sidecar, read_state, write_sidecar
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.method import State, method_of


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


@quiet()
def save(
    model: Any, handle: Handle | None, folder: str | Path, *, tokenizer: Any = None, card: str = "", **about: Any
) -> Path:
    """Write a trained model (PEFT: its adapter; else all weights) with its sidecar; the model is unchanged.

    Args:
        model: a transformers model or a `PeftModel` on one.
        handle: what `sparsify` returned; None for a dense model, or where the handle is not at hand.
        folder: appears whole, replacing an earlier one.
        card: the README.md; PEFT's own, a form to be filled in that names a place on this machine, is not kept.
        about: entries for the sidecar: `base_model` (name or path, needed to load an adapter), `task`, ….

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with atomic_folder(folder) as scratch, disk_errors(folder):
        if isinstance(model, PeftModel):
            # "auto" would ask the hub whether the vocabulary grew; its rows go into the state file
            save_alone(model, str(scratch), save_embedding_layers=False)
            if handle is not None and handle.deploys_dense and handle.modules_to_save:  # trained, and not deployed
                drop_modules(scratch, handle.modules_to_save)
            (scratch / CARD).unlink(missing_ok=True)
        else:
            converted = conversion_of(model) or handle
            state = dense_state(model, converted.installed if converted is not None else ())
            save_alone(model, str(scratch), state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        if card:
            (scratch / CARD).write_text(card, encoding="utf-8")
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
    trust_remote_code: bool = False,
    bits: int | None = None,
) -> Loaded:
    """Read what `save` or `export` wrote, a run's output folder, or any plain model by name or path.

    Args:
        trust_remote_code: Python code that comes with the model may run. Whatever was trained with it takes it again.
        bits: hold an adapter's base in 4 or 8, as a run with load_in_4bit or load_in_8bit did.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the sidecar is of a newer format; or an adapter holds
            parameters of a sparse method and has no sidecar, so it would run dense without them.
        ValueError: no such model.
    """
    folder = _final_folder(Path(source))
    if not (folder / SIDECAR).is_file():
        return _load_plain(str(source), folder, dtype, device, trainable, trust_remote_code)
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
    about = read_sidecar(folder)
    check_mark(folder, about.get("state"))
    adapter = (folder / ADAPTER).is_file()
    if adapter and not about.get("base_model"):
        raise CheckpointError(f"{folder / SIDECAR} names no base_model for the adapter. Save it with base_model=….")
    base = str(folder)
    if adapter:
        base = base_place(about["base_model"], folder, about.get("base_revision"), trust=trust_remote_code)
    asked = check_adapter(folder) if adapter else None
    config = open_config(base, trust=trust_remote_code)
    set_options(config, about, folder / SIDECAR)
    own = code_of(config)["trust_remote_code"]  # the class of the model comes with it, too
    kind = auto_class(str(about.get("task"))).__name__ if own else str(about.get("model_class"))
    options = bit_options(bits if adapter else None, torch.device(device), dtype)
    model, new = load_weights(base, kind, dtype, config, new_head=adapter, options=options)
    vars(model.config).pop(ENTRY, None)  # of the weights as they were saved: it is not to be saved once more
    deployed = about.get("deploy") == "dense"  # what it was trained with is no part of it
    saved = read_state(folder) if about["configs"] or (folder / STATE).is_file() else {}
    rows = saved.pop(SITE, {})
    if adapter and SITE in about:
        give_vocabulary(model, about[SITE], rows)
    handle = None if deployed else _converted(model, about, folder, saved)
    if asked is not None:
        model = with_adapter(model, folder, asked, trainable, new)
    model = model.to(device)
    return Loaded(
        model=model.train(trainable),
        tokenizer=_reader(model, trust_remote_code, folder, base),
        handle=handle,
        about=about,
    )


@quiet()
def export(
    source: str | Path | Loaded, folder: str | Path, *, format: str = "sparse", trust_remote_code: bool = False
) -> Path:
    """Write a trained model with LoRA merged in, as full weights that plain transformers loads.

    Args:
        source: what to export; a `Loaded` is used up (its model becomes dense).
        folder: appears whole. It must be absent or empty.
        format: `sparse`: dense weights and the sidecar, so that `load` runs it sparse and others run it dense.
            `dense`: no sidecar; only where the dense model gives the same outputs.
            A format of a method (`24`): no sidecar; what it trained (zeros) is written into the weights.
        trust_remote_code: as of `load`.

    Raises:
        ValueError: unknown format; `dense` for a model that routes, selects or runs 2:4; a method's format for a model
            that was trained without it; LoRA that cannot be merged; a folder that is not empty.
    """
    formats = export_formats()
    if format not in formats:
        raise ValueError(f"export format {format!r} is unknown. Choose from {', '.join(formats)}.")
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Choose another, or remove it.")
    loaded = source if isinstance(source, Loaded) else load(source, trust_remote_code=trust_remote_code)
    model, handle = loaded.model, loaded.handle
    if isinstance(model, PeftModel):
        check_merge(model, handle)
        model = model.merge_and_unload()
    about = {key: value for key, value in loaded.about.items() if key not in WRITTEN | {"base_model", "base_revision"}}
    state: State = {}
    if (method := formats[format]) is not None:
        model = _written_in(handle, format, method)
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


def export_formats() -> dict[str, str | None]:
    """Format -> the method that a model must have been trained with, None if any will do."""
    own = {name: method for method, kind in registered_methods().items() for name in method_of(kind).exports}
    return {"sparse": None, "dense": None, **own}


def _written_in(handle: Handle | None, format: str, method: str) -> nn.Module:
    """The plain model with what a method trained written into its weights."""
    if handle is None or not handle.sites(method):
        raise ValueError(f"export format {format!r} needs a model trained with {method}, and this one was not.")
    return method_of(method_config(method)).exports[format](handle)


def _load_plain(name: str, folder: Path, dtype: torch.dtype, device: Any, trainable: bool, trust: bool) -> Loaded:
    """A model or PEFT adapter that `save` did not write."""
    if (folder / ADAPTER).is_file():
        asked = check_adapter(folder)
        _refuse_orphan(folder)
        refuse_lone_weights(folder, mark_of(folder))
        base = base_place(asked.base_model_name_or_path, folder, asked.revision, trust=trust)
        kind = class_of_adapter(asked.task_type) if asked.task_type else known_class(*made_for(folder))[1]
        model, new = load_weights(base, kind, dtype, open_config(base, trust=trust), new_head=True)
        model = with_adapter(model, folder, asked, trainable, new)
        return Loaded(
            model=model.to(device).train(trainable),
            tokenizer=_reader(model, trust, folder, base),
            handle=None,
            about={},
        )
    path = resolve_model(name)
    config = open_config(path, name, trust=trust)
    refuse_lone_weights(name, getattr(config, ENTRY, None))
    _, kind = known_class(*own_classes(config, name))
    model, _ = load_weights(path, kind, dtype, config, name=name)
    model = model.to(device).train(trainable)
    return Loaded(model=model, tokenizer=_reader(model, trust, Path(path)), handle=None, about={})


def _converted(model: Any, about: dict[str, Any], folder: Path, state: State) -> Handle | None:
    """The handle of a model that was converted as its sidecar says; None for a dense one."""
    if not about["configs"]:
        return None
    try:
        configs = [MethodConfig.from_dict(entry) for entry in about["configs"]]
        handle = sparsify(model, *configs, state=state)
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        if "memory" in str(error):
            raise
        raise CheckpointError(
            f"{folder / SIDECAR} and {STATE} do not fit the model: {told(error)} They were changed, or are of another."
        ) from None
    for edit, module in handle.installed:  # a record of what happened may hold NaN for what was not yet known
        check_finite(module.named_parameters(), f"{folder / STATE}, {edit.key}")
    return handle


def _refuse_orphan(folder: Path) -> None:
    """An adapter with a router or codebook and no sidecar would load on the plain model, and lose them silently."""
    ours = {name for kind in registered_methods().values() for name in method_of(kind).modules_to_save}
    found = sorted({part for key in stored_shapes(folder / WEIGHTS) for part in key.split(".") if part in ours})
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


def _reader(model: Any, trust: bool, *places: str | Path) -> Any:
    """A model's tokenizer, its image processor, or both of a pair; from the first place that has them."""
    tokenizer = _tokenizer(trust, *places)
    is_pair = isinstance(getattr(model, "get_base_model", lambda: model)(), PairClassifier)
    if tokenizer is not None and not is_pair:
        return tokenizer
    pictures = next(filter(None, (open_image_processor(place, None) for place in places)), None)
    return PairReader(tokenizer, pictures) if is_pair and tokenizer is not None else pictures


def _tokenizer(trust: bool, *places: str | Path) -> Any:
    for place in places:
        try:
            return open_tokenizer(place, trust=trust)
        except FileNotFoundError:
            continue
    return None
