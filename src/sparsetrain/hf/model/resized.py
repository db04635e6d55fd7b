"""A model of other sizes than a given one, of the same class, with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import describe

FFN_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
"""What the configs of transformers call the width of an FFN; other sizes have one name in all of them."""
AS_HIDDEN = ("word_embed_proj_dim", "pooler_output_size")
"""Keys that are the hidden size again, where they are equal to it."""
MADE_FROM = "resized_from"
"""Entry of the config of a resized model: the sizes of the one it was made from, and what that one's config said."""


def resized(model: Any, sizes: Mapping[str, int], layers: Sequence[int], *, remembers: bool = True) -> nn.Module:
    """A new model, on the device that torch makes tensors on.

    Args:
        sizes: as of `Anatomy.sizes`.
        layers: for each layer of the new model, the old layer whose own settings (its kind of attention) it has.
        remembers: its config knows the old one's, so that the old sizes give the very config again.
    """
    values, names = model.config.to_dict(), model.config.attribute_map
    earlier, hidden = values.pop(MADE_FROM, None), model.config.hidden_size
    if earlier is not None and earlier["sizes"] == {**sizes, "layers": len(layers)}:
        changed = earlier["values"]
    else:
        changed: dict[str, Any] = {
            names.get("hidden_size", "hidden_size"): sizes["embed"],
            names.get("num_attention_heads", "num_attention_heads"): sizes["heads"],
            names.get("num_hidden_layers", "num_hidden_layers"): len(layers),
            next(key for key in FFN_KEYS if key in values): sizes["ffn"],
        }
        if values.get("num_key_value_heads"):
            changed["num_key_value_heads"] = sizes["kv_heads"]
        changed |= {key: sizes["embed"] for key in AS_HIDDEN if values.get(key) == hidden}
        if isinstance(kinds := values.get("layer_types"), list):
            changed["layer_types"] = [kinds[layer] for layer in layers]
        if remembers:
            before = {key: values.get(key) for key in changed} | ({} if earlier is None else {MADE_FROM: earlier})
            changed[MADE_FROM] = {"sizes": describe(model).sizes, "values": before}
    config = type(model.config).from_dict({**values, **changed})
    config._attn_implementation = model.config._attn_implementation
    return type(model)(config).to(next(model.parameters()).dtype).train(model.training)
