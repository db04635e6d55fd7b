"""A model cut to a few layers for `bench`, with a head in proportion."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import describe
from sparsetrain.hf.data.random_tokens import RANDOM, random_rows
from sparsetrain.hf.train.parts import Parts
from sparsetrain.recipes.tasks import task_of


def cut_layers(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])


def cut_head(base: Any, parts: Parts, layers: int, model_layers: int) -> tuple[Parts, str]:
    """Cut the vocabulary as the layers were cut, so that the head weighs as in the whole model, and say so."""
    said = f"{layers} of {model_layers} layers were run"
    task = task_of(parts.recipe.task)
    if parts.recipe.data != RANDOM or task.labelled or task.padded:  # other rows than packed text
        return parts, f"{said}, so the head weighs more than in the whole model."
    whole = parts.config.vocab_size
    kept = max(64, 64 * round(whole * layers / model_layers / 64))
    if kept >= whole:
        return parts, f"{said}, so the head weighs more than in the whole model."
    base.config.pad_token_id = parts.config.pad_token_id = None  # it may lie outside
    base.resize_token_embeddings(kept)
    parts.config.vocab_size = kept
    rows = random_rows(len(parts.bundle.train), parts.recipe.seq_len, kept, classify=False, seed=parts.recipe.seed)
    return (
        dataclasses.replace(parts, bundle=rows),
        f"{said}, and {kept:,} of {whole:,} tokens of the vocabulary: the head weighs as in the whole model.",
    )


def first_layers(base: nn.Module, count: int) -> Any:
    """A copy of the model's first layers, to check on."""
    blocks = [block.name for block in describe(base).blocks]
    parent = blocks[0].rpartition(".")[0]
    cut: Any = copy.deepcopy(base)
    kept = cut.get_submodule(parent)._modules
    for name in list(kept)[count:]:
        del kept[name]
    cut_layers(cut.config, min(count, len(blocks)))
    return cut
