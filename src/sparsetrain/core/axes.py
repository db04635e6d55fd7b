"""The axes of every parameter: what each dimension counts, read off the sites and, outside the blocks, off a table."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Block

_LINEARS = {
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "qkv": ("heads", "embed"),
    "o": ("embed", "heads"),
    "up": ("ffn", "embed"),
    "gate": ("ffn", "embed"),
    "down": ("embed", "ffn"),
}
"""Role of a linear -> axes of its weight [out, in]."""
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "pooler.dense": ("embed", "embed"),
    "classifier.dense": ("embed", "embed"),
    "pre_classifier": ("embed", "embed"),
    "transform.dense": ("embed", "embed"),
    "lm_head.dense": ("embed", "embed"),
    "vocab_transform": ("embed", "embed"),
    "classifier": ("labels", "embed"),
    "classifier.out_proj": ("labels", "embed"),
    "score": ("labels", "embed"),
    "head.0": ("classifier", "embed"),
    "head.2": ("labels", "classifier"),
    "patch_embeddings.projection": ("embed", "channels", "patch", "patch"),
}
"""End of the name of a module outside the blocks -> axes of its weight; its bias has the first."""
_TABLES = {"wpe": "positions", "embed_positions": "positions", "position_embeddings": "positions"}
_TABLES |= {"token_type_embeddings": "types"}
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "cls_token": ("one", "one", "embed"),
    "position_embeddings": ("one", "positions", "embed"),
    "predictions.bias": ("vocab",),
    "lm_head.bias": ("vocab",),
}
_NORMS = ("norm", "ln_f", "final_layer_norm", "LayerNorm", "layernorm", "layer_norm", "vocab_layer_norm")
_OF_ONE_HEAD = ("q_norm", "k_norm")


def axes_of(
    blocks: tuple[Block, ...], embedding: str | None, head: str | None, model: nn.Module
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """(`Anatomy.axes`, `Anatomy.reads`) of the parameters that have a rule."""
    axes: dict[str, tuple[str, ...]] = {}
    reads: dict[str, int] = {}
    for block in blocks:
        for linear in block.linears:
            if linear.role in _LINEARS:
                out_axis, in_axis = _LINEARS[linear.role]
                axes[f"{linear.name}.weight"] = (in_axis, out_axis) if linear.transposed else (out_axis, in_axis)
                axes[f"{linear.name}.bias"] = (out_axis,)
                reads[f"{linear.name}.weight"] = 0 if linear.transposed else 1
        for norm in block.norms:
            axes[f"{norm}.weight"] = axes[f"{norm}.bias"] = ("embed",)
        if block.attention is not None:
            for norm in _OF_ONE_HEAD:
                axes[f"{block.attention.name}.{norm}.weight"] = ("head_dim",)
    known = {name: parameter.ndim for name, parameter in model.named_parameters()}
    inside = tuple(f"{block.name}." for block in blocks)
    for name in known:
        if name not in axes and not name.startswith(inside) and (found := _outside(name)) is not None:
            axes[name], is_read = found
            if is_read:
                reads[name] = 1
    if head:
        axes[f"{head}.weight"], axes[f"{head}.bias"] = ("vocab", "embed"), ("vocab",)
        reads[f"{head}.weight"] = 1
    if embedding and isinstance(model.get_submodule(embedding), nn.Embedding):
        axes[f"{embedding}.weight"] = ("vocab", "embed")
    axes = {name: value for name, value in axes.items() if known.get(name) == len(value)}
    return axes, {name: dim for name, dim in reads.items() if name in axes}


@cache
def _outside(name: str) -> tuple[tuple[str, ...], bool] | None:
    """(axes, whether it is a linear's weight) of a parameter outside the blocks, where a table has its name's end."""
    module, _, kind = name.rpartition(".")
    if found := next((value for end, value in _PARAMETERS.items() if _ends(name, end)), None):
        return found, False
    if any(_ends(module, end) for end in _NORMS):
        return ("embed",), False
    if table := next((axis for end, axis in _TABLES.items() if _ends(module, end)), None):
        return (table, "embed"), False
    if found := next((value for end, value in _OUTSIDE.items() if _ends(module, end)), None):
        return found[:1] if kind == "bias" else found, kind == "weight" and len(found) == 2
    return None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def last_norm(blocks: tuple[Block, ...], axes: dict[str, tuple[str, ...]]) -> str | None:
    """The norm whose output the head reads: the last one outside the blocks that no embedding has."""
    outside = [
        module
        for name in axes
        if any(_ends(module := name.rpartition(".")[0], end) for end in _NORMS)
        and "embeddings" not in module
        and not any(name.startswith(f"{block.name}.") for block in blocks)
    ]
    return outside[-1] if outside else None


def embedding_scale(module: Any) -> float:
    """What an embedding multiplies its rows by."""
    return float(getattr(module, "scalar_embed_scale", 1.0))
