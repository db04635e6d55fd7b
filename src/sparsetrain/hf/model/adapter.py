"""A PEFT adapter's folder, which strangers may have made: what its config may say, which base it may name, and loading.

PEFT builds what the config asks for. So of the kinds of adapters those that are plain tensors are taken, of their keys
those that we know, and of regular expressions those that cannot run for minutes.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.patterns import check_pattern
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.quote import quoted
from sparsetrain.hf.assets import ASSETS, resolve_model
from sparsetrain.hf.model.four_bit import import_bitsandbytes
from sparsetrain.hf.model.opening import told
from sparsetrain.hf.model.revision import at_revision
from sparsetrain.hf.model.whole import check_finite
from sparsetrain.planner.config_values import MOST_BYTES
from sparsetrain.runs.folders import ADAPTER, check_folder, stored_shapes
from sparsetrain.runs.mark import plain_kind

WEIGHTS = "adapter_model.safetensors"
_KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA")
_TEXTS = ("task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "bias")
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "layers_pattern",
          "target_parameters")  # fmt: skip
_STARTS = ("gaussian", "orthogonal", "olora", "pissa")
_MOST_NAMES, _MOST_RANK, _MOST_ROWS = 10_000, 2**14, 2**20


def check_adapter(folder: Path) -> PeftConfig:
    """The config of an adapter's folder, after config and weights were found harmless.

    Raises:
        CheckpointError: a file is missing or damaged; weights as a pickle; a kind, a key or a pattern that is refused.
    """
    try:
        check_folder(folder)
        values = read_plain_object(folder / ADAPTER, MOST_BYTES)
        values |= {"peft_type": plain_kind(values.get("peft_type")) or values.get("peft_type")}
        _check_values(values, str(folder / ADAPTER))
        if not (folder / WEIGHTS).exists() and any(folder.glob("adapter_model.*")):
            raise ValueError(
                f"{quoted(str(folder))} holds its weights as a pickle, which can run code when it is read. Where you "
                f"trust it, load it with PEFT and write it anew by save_pretrained ({WEIGHTS})."
            )
        _check_ranks(values, stored_shapes(folder / WEIGHTS), str(folder))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    kind: Any = getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING")[values["peft_type"]]  # noqa: B009  (not in its stubs)
    kept = {key: value for key, value in values.items() if key not in ("auto_mapping", "runtime_config")}
    try:
        return kind.from_peft_type(**kind.check_kwargs(**kept))
    except Exception as error:  # each kind of adapter checks its values in a way of its own
        raise CheckpointError(f"{quoted(str(folder / ADAPTER))} cannot be used: {told(error)}") from None


def made_for(folder: Path) -> list[str]:
    """The class of the model that an adapter was made on, where its config names that in place of a task."""
    mapping = read_plain_object(folder / ADAPTER, MOST_BYTES).get("auto_mapping")
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return [found] if isinstance(found, str) else []


def base_place(base: object, folder: Path, revision: object = None, *, trust: bool = False) -> str:
    """Where the model is that an adapter's folder names: an embedded asset, a folder, or a name on the hub.

    A folder is read as any other: as data, never as code. One inside the adapter's own is refused: nobody but its maker
    has named it.

    Args:
        revision: of a model on the hub, None for its newest. trust: its Python code may run, so it is fetched, too.

    Raises:
        CheckpointError: it is no name, or lies inside the adapter's folder, or is not there.
    """
    if not isinstance(base, str) or not base.strip() or not base.isprintable() or len(base) > 4096:
        raise CheckpointError(f"{quoted(str(folder))} names no base_model for the adapter, but {quoted(repr(base))}.")
    if base in ASSETS:
        return resolve_model(base)
    path = Path(base)
    if path.exists() or path.is_symlink():
        for place in (
            path,
            folder / path,
        ):  # a relative name is of a folder beside this process, unless one is in there
            if os.path.lexists(place) and place.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(
                    f"the adapter in {quoted(str(folder))} names a base model inside its own folder ({quoted(base)}). "
                    "Its base is a model that you have: move that one elsewhere, and name it as base_model."
                )
        return base
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        return base if revision is None else at_revision(base, str(revision), trust=trust)
    raise CheckpointError(
        f"the base model of the adapter in {quoted(str(folder))}, {quoted(base)}, is not there. Put it in its place, "
        "or name it as base_model."
    )


def with_adapter(model: Any, folder: Path, config: PeftConfig, trainable: bool, new: list[str]) -> PeftModel:
    """The model inside PEFT with an adapter that was checked.

    Args:
        new: modules of the model with random weights, which the adapter must bring.

    Raises:
        CheckpointError: it is of another model: names that match nothing, tensors that are missing or too many, or of
            another size; or it holds NaN.
    """
    import_bitsandbytes()
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
    except Exception as error:  # PEFT and torch have a kind of error for each fault
        if "memory" in str(error):
            raise
        raise CheckpointError(
            f"the adapter in {quoted(str(folder))} does not fit its base model: {told(error)}"
        ) from None
    expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        found = {key for key in file.keys() if not re.search(r"embed|lm_head", key)} | expected & set(file.keys())  # noqa: SIM118
    random = {name for name in new if not any(f".{name}." in f".{key}" for key in found)}
    for names, what in (
        (expected - found, "lacks a tensor for"),
        (found - expected, "has a tensor for what its base model lacks:"),
        (random, "and its base model lack weights for"),
    ):
        if names:
            raise CheckpointError(
                f"the adapter in {quoted(str(folder))} {what} {quoted(min(names))}: the two are not of one model. Name "
                "the base model that it was trained on."
            )
    try:
        check_finite(((key, value) for key, value in adapted.named_parameters() if "lora" in key), str(folder))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return adapted


def _check_values(values: dict[str, Any], where: str) -> None:
    if values.get("peft_type") not in _KINDS:
        raise ValueError(
            f"{quoted(where)}: peft_type={quoted(values.get('peft_type'))} cannot be loaded here. "
            f"Known: {', '.join(_KINDS)}."
        )
    for key, value in values.items():
        if not _allowed(key, value):
            raise ValueError(
                f"{quoted(where)} sets {quoted(key)} to {quoted(value, 80)}, which an adapter may not here. "
                "Leave it out."
            )
        for pattern in _patterns(key, value):
            check_pattern(pattern, where)


def _allowed(key: str, value: Any) -> bool:
    """Numbers do no harm but by their size; text, lists and tables only under keys that we know."""
    if value is None or isinstance(value, bool) or value in ({}, [], ""):
        return True
    if isinstance(value, int | float):
        return math.isfinite(value) and (key != "r" or 0 < value <= _MOST_RANK)
    if key in ("auto_mapping", "runtime_config"):  # left out
        return True
    if key == "megatron_core":
        return value == "megatron.core"  # its default, and unused without megatron_config
    if key in ("init_lora_weights", "init_weights"):
        return isinstance(value, str) and value.startswith(_STARTS)
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _NAMES:
        names = [value] if isinstance(value, str) else value
        return isinstance(names, list) and len(names) <= _MOST_NAMES and all(isinstance(name, str) for name in names)
    if key in ("rank_pattern", "alpha_pattern"):
        return isinstance(value, dict) and len(value) <= _MOST_NAMES and all(
            isinstance(size, int | float) and 0 < size <= _MOST_RANK for size in value.values()
        )  # fmt: skip
    if key == "trainable_token_indices":
        lists = list(value.values()) if isinstance(value, dict) else [value]
        return len(lists) <= _MOST_NAMES and all(
            isinstance(rows, list) and len(rows) <= _MOST_ROWS and all(isinstance(i, int) and i >= 0 for i in rows)
            for rows in lists
        )
    if key == "layers_to_transform":
        return isinstance(value, list) and len(value) <= _MOST_NAMES and all(isinstance(i, int) for i in value)
    return False


def _patterns(key: str, value: Any) -> list[str]:
    """What PEFT reads as a regular expression: modules_to_save too, and the keys of patterns."""
    if key in ("rank_pattern", "alpha_pattern"):
        return list(value or ())
    if key in ("modules_to_save", "layers_pattern"):
        return [value] if isinstance(value, str) else list(value or ())
    return [value] if key in _NAMES and isinstance(value, str) else []


def _check_ranks(values: dict[str, Any], stored: dict[str, tuple[int, ...]], folder: str) -> None:
    """Refuse a rank far above that of the tensors: its memory would be asked for before they are compared."""
    ranks = [shape[0] for key, shape in stored.items() if key.endswith("lora_A.weight") and shape]
    asked = max([values.get("r") or 0, *(values.get("rank_pattern") or {}).values()])
    if ranks and asked > 4 * max(ranks) + 64:
        raise ValueError(
            f"{quoted(folder)}: {ADAPTER} asks for rank {asked:,}, and its tensors have rank {max(ranks):,}. They are "
            "not of one adapter."
        )
