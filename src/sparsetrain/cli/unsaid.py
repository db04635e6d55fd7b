"""What a command leaves unsaid: the task and the longest row follow from the model and the data, and a line says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.data.conversations import is_conversation
from sparsetrain.data.files import find_files, kind_of
from sparsetrain.data.rows import ROW_SUFFIXES, read_rows


def settled(given: Mapping[str, Any], recipe: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Keys of a `finetune` recipe with `task` and `seq_len` added where neither flags nor file say them, and the lines
    that tell of it.

    Where nothing is known, nothing is added: a model or data of the hub, and what cannot be read, which is told later.
    """
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.recipes.reading import read_mapping

    try:
        known = {**(read_mapping(recipe) if recipe else {}), **given}
        model = _config(known.get("model"))
        columns = _columns(known.get("data"))
    except ValueError:
        return dict(given), []
    found, said = dict[str, Any](), list[str]()
    if "task" not in known and (task := _task(model, columns, known.get("text_column", "text"))) is not None:
        found["task"], why = task
        said.append(f"task {task[0]}, as {why}; --task names another.")
    default = Recipe.model_fields["seq_len"].default
    context = _context(model) or default
    if "seq_len" not in known and context < default:
        found["seq_len"] = context
        said.append(f"rows of {context} tokens at most, as {known['model']} takes no more.")
    return {**given, **found}, said


def _task(model: Mapping[str, Any], columns: set[str], text_column: str) -> tuple[str, str] | None:
    """A task and why, if not the one that is trained by default."""
    from sparsetrain.planner.config_values import DIFFUSION

    if model.get("model_type") == DIFFUSION:
        return "diffusion", "the model removes noise from images"
    if {"text_config", "vision_config"} <= model.keys() and "projection_dim" in model["text_config"]:
        return "pair-image", "the model is an encoder of images beside one of texts"
    if "image_size" in model and "text_config" not in model:
        return "image", "the model reads images"
    if text_column in columns:
        labels = "label" in columns and not _is_decoder(model)
        return ("classify", "the rows have labels and the model is an encoder") if labels else None
    if is_conversation(columns):
        return "sft", f"the rows hold {' and '.join(sorted(columns))}"
    return None


def _is_decoder(model: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _config(name: Any) -> dict[str, Any]:
    """The config of a model on this machine; of another, or of none, nothing."""
    from sparsetrain.hf.assets import ASSETS, asset_status
    from sparsetrain.hf.model.model_config import read_config

    here = isinstance(name, str) and (os.path.isdir(name) or (name in ASSETS and asset_status(name).state == "ready"))
    return read_config(name).values if here else {}


def _context(model: Mapping[str, Any]) -> int | None:
    from sparsetrain.planner.model_config import usable_positions

    return usable_positions(model.get("text_config", model))


def _columns(data: Any) -> set[str]:
    """The keys of the first row of files, or of a saved table, on this machine; none of texts, and of what is
    somewhere else."""
    if isinstance(data, str) and os.path.isdir(data):
        for told in sorted(Path(data).rglob("dataset_info.json")):  # as `save_to_disk` leaves it
            return set(read_plain_object(told).get("features") or ())
    files = find_files(data) if isinstance(data, str) else None
    if not files:
        return set()
    if kind_of(files[0]) == ".parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_schema

        try:
            return set(read_schema(files[0]).names)
        except (OSError, ArrowException):
            return set()
    return set(next(read_rows(files[0]))[0]) if kind_of(files[0]) in ROW_SUFFIXES else set()
