"""A vocabulary that has grown since the base model was loaded: an adapter's folder holds no row of the embeddings.

The rows that the base model lacks go into the sidecar's state file, and back in when the folder is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.assets import resolve_model
from sparsetrain.surgery.method import State

SITE = "vocabulary"
"""Where the state file keeps the rows."""
_MOST_ROWS = 10_000_000


def vocabulary_of(model: Any, base: str | None) -> tuple[dict[str, int], State]:
    """Entries for the sidecar and for the state file of an adapter: the number of rows and those that `base` lacks.

    Args:
        model: the transformers model inside the adapter.
        base: name or path of the model that `load` will put the adapter on. Where its config cannot be read, all rows
            are kept.
    """
    embedding = _embedding(model)
    if embedding is None or not base or _vocab_size(model.config) is None:
        return {}, {}
    rows, known = len(embedding.weight), _rows_of_base(base)
    if rows == known:
        return {}, {}
    first = 0 if known is None else min(known, rows)
    kept = {"input": embedding.weight[first:]}
    if (head := _head(model, embedding)) is not None:
        if head.weight is not embedding.weight:
            kept["output"] = head.weight[first:]
        if getattr(head, "bias", None) is not None:
            kept["output_bias"] = head.bias[first:]
    return {SITE: rows}, {SITE: {name: value.detach() for name, value in kept.items() if len(value)}}


@torch.no_grad()
def give_vocabulary(model: Any, rows: Any, kept: dict[str, Tensor]) -> None:
    """Resize a base model to the rows that an adapter was trained with, and fill in those that were kept.

    Raises:
        CheckpointError: the rows are no number, or those that were kept are not all that the base model lacks.
    """
    embedding = _embedding(model)
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows <= _MOST_ROWS or embedding is None:
        raise CheckpointError(f"the sidecar says vocabulary {rows!r:.40}, and {type(model).__name__} cannot have it.")
    lacking = rows - len(embedding.weight)
    if lacking > len(kept.get("input", ())):
        raise CheckpointError(
            f"the adapter was trained with {rows:,} embedding rows, its base model has {len(embedding.weight):,}, and "
            f"{len(kept.get('input', ())):,} were saved. Load it on the base model that it was trained on."
        )
    if lacking:
        with torch.random.fork_rng(devices=[]):  # rows that are drawn here are written over
            model.resize_token_embeddings(rows, mean_resizing=False)
    embedding = _embedding(model)
    assert embedding is not None
    head = _head(model, embedding)
    places = {"input": embedding.weight, "output": getattr(head, "weight", None)}
    places["output_bias"] = getattr(head, "bias", None)
    for name, value in kept.items():
        place = places.get(name)
        if place is None or place.shape[1:] != value.shape[1:] or len(value) > len(place):
            raise CheckpointError(f"the saved rows of the vocabulary ({name}) do not fit {type(model).__name__}.")
        place[len(place) - len(value) :] = value.to(place.device, place.dtype)


def _rows_of_base(base: str) -> int | None:
    try:
        config = AutoConfig.from_pretrained(resolve_model(base), local_files_only=True, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError):
        return None
    return _vocab_size(config)


def _vocab_size(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _embedding(model: Any) -> nn.Embedding | None:
    """The token embedding under all adapters; None for a model of something else than tokens."""
    found = _call(model, "get_input_embeddings")
    return found if isinstance(found, nn.Embedding) else None


def _head(model: Any, embedding: nn.Embedding) -> Any:
    found = _call(model, "get_output_embeddings")
    fits = isinstance(getattr(found, "weight", None), Tensor) and len(found.weight) == len(embedding.weight)
    return found if fits else None


def _call(model: Any, name: str) -> Any:
    try:
        found = getattr(model, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    while (inner := _inside(found)) is not None:
        found = inner
    return found


def _inside(module: Any) -> Any:
    """What PEFT has wrapped: a layer with an adapter, or a module that it keeps beside its trained copy."""
    children = module._modules if isinstance(module, nn.Module) else {}
    names = ("base_layer", "original_module", "token_adapter")
    return next((children[name] for name in names if children.get(name) is not None), None)
