"""The same model in other sizes, and where each of its parameters comes from."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from sparsetrain.core.anatomy import Anatomy, describe
from sparsetrain.methods.masked_growth.config import Sizes
from sparsetrain.surgery.method import Origin


def sizes_of(anatomy: Anatomy) -> Sizes:
    """The sizes of a model.

    Raises:
        ValueError: a mixture of experts, blocks of different kinds, or an adapter that makes no other sizes.
    """
    if anatomy.resized is None:
        raise ValueError(
            f"masked_growth cannot take {anatomy.model_class}: its adapter makes no other sizes of it. Train another "
            "model."
        )
    found = anatomy.sizes
    return {"hidden": found["embed"], "ffn": found["ffn"], "heads": found["heads"], "layers": found["layers"]}


def check_sizes(model: Any, anatomy: Anatomy, sizes: Sizes) -> None:
    """Raise ValueError if a model cannot have these sizes without another size of its heads."""
    site = anatomy.attentions[0]
    if getattr(model.config, "head_dim", None) is None and sizes["hidden"] != sizes["heads"] * site.head_dim:
        fitting = sizes["hidden"] / site.head_dim
        raise ValueError(
            f"masked_growth: plan asks for hidden={sizes['hidden']} with heads={sizes['heads']}, and the heads of "
            f"{anatomy.model_class} have {site.head_dim} channels, hidden/heads of them. Their size cannot grow: give "
            f"hidden and heads together (hidden={sizes['heads'] * site.head_dim}"
            f"{f', or heads={fitting:.0f}' if fitting.is_integer() else ''})."
        )
    if sizes["hidden"] != anatomy.ffns[0].hidden_size and anatomy.embedding_scale != 1:
        raise ValueError(
            f"masked_growth: plan changes hidden, and {anatomy.model_class} multiplies its embeddings by a factor that "
            "follows from the hidden size, so the function would jump. Grow ffn, heads and layers of this model."
        )
    if sizes["heads"] * site.num_kv_heads % site.num_heads:
        raise ValueError(
            f"masked_growth: plan asks for heads={sizes['heads']}, and {anatomy.model_class} shares each key/value "
            f"head among {site.num_heads // site.num_kv_heads} heads: only whole groups of them can come or go."
        )


def layer_sources(old: int, new: int, how: str) -> list[int]:
    """For each layer of a deeper model, the layer that it begins as; the first with a source is that layer itself.

    `stack` repeats the whole stack and then adds the top layers, `interpolate` puts copies beside their sources
    (arXiv 2305.02869; read in the official code).
    """
    if how == "interpolate":
        return [place * old // new for place in range(new)]
    whole, rest = divmod(new, old)
    return [*range(old)] * whole + [*range(old - rest, old)]


def resized(model: nn.Module, anatomy: Anatomy, sizes: Sizes, sources: list[int], device: str | None = None) -> Any:
    """A freshly made model of the same class with other sizes; in the dtype and mode of `model`.

    Args:
        sources: of each layer, one of `model`.
        device: where it is made; None: torch's own.
    """
    assert anatomy.resized is not None, "sizes_of() has looked"
    site = anatomy.attentions[0]
    kv_heads = sizes["heads"] * site.num_kv_heads // site.num_heads
    asked = {"embed": sizes["hidden"], "heads": sizes["heads"], "kv_heads": kv_heads, "ffn": sizes["ffn"]}
    with nullcontext() if device is None else torch.device(device):
        return anatomy.resized(model, asked, sources, remembers=False)


def origins(old: nn.Module, new: nn.Module, sources: list[int]) -> dict[str, Origin]:
    """Where the parameters of an enlarged model come from: corners, whose rest is as the new model was made.

    New layers are copies, and start without optimizer state.

    Raises:
        ValueError: a parameter grows as no axis does.
    """
    small, large = describe(old), describe(new)
    axes = list(zip(_channels(small), _channels(large), strict=True))
    shapes = {name: parameter.shape for name, parameter in old.named_parameters()}
    found = {}
    for name, parameter in new.named_parameters():
        place = next((i for i, block in enumerate(large.blocks) if name.startswith(f"{block.name}.")), None)
        source, first = name, True
        if place is not None:
            source = small.blocks[sources[place]].name + name.removeprefix(large.blocks[place].name)
            first = sources.index(sources[place]) == place
        parts = _parts(name, shapes[source], parameter.shape, axes)
        found[name] = Origin(source, fill=None, carry=first, parts=parts)
    return found


def _channels(anatomy: Anatomy) -> tuple[int, ...]:
    """Channels of hidden, FFN, heads and key/value heads."""
    sizes, site = sizes_of(anatomy), anatomy.attentions[0]
    return sizes["hidden"], sizes["ffn"], sizes["heads"] * site.head_dim, site.num_kv_heads * site.head_dim


def _parts(name: str, old: torch.Size, new: torch.Size, axes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """(dimension, number) of the equal parts in which an axis lies in a parameter; None where it lies there once.

    Args:
        axes: (old size, new size) of each axis, in channels.

    Raises:
        ValueError: a dimension grows as no axis does.
    """
    found = None
    for dim, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after or (before, after) in axes:
            continue
        count = next((before // b for b, a in axes if b < a and before % b == 0 and before // b * a == after), None)
        if count is None:
            raise ValueError(
                f"masked_growth cannot tell how {name} grows from {tuple(old)} to {tuple(new)}: its dimension {dim} "
                "follows no axis. Grow other axes, or another model."
            )
        found = dim, count
    return found
