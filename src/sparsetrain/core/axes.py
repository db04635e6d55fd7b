"""The axes of every parameter: what each dimension counts, read off the sites and, outside the blocks, off a table."""

from __future__ import annotations

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
    for name, _ in model.named_parameters():
        if name not in axes and not any(name.startswith(f"{block.name}.") for block in blocks):
            _outside(name, axes, reads)
    if head:
        axes[f"{head}.weight"], axes[f"{head}.bias"] = ("vocab", "embed"), ("vocab",)
        reads[f"{head}.weight"] = 1
    if embedding and isinstance(model.get_submodule(embedding), nn.Embedding):
        axes[f"{embedding}.weight"] = ("vocab", "embed")
    known = {name: parameter.ndim for name, parameter in model.named_parameters()}
    axes = {name: value for name, value in axes.items() if known.get(name) == len(value)}
    return axes, {name: dim for name, dim in reads.items() if name in axes}


def _outside(name: str, axes: dict[str, tuple[str, ...]], reads: dict[str, int]) -> None:
    """Axes of a parameter outside the blocks, where a table has the end of its name."""
    module, _, kind = name.rpartition(".")
    if found := next((value for end, value in _PARAMETERS.items() if _ends(name, end)), None):
        axes[name] = found
    elif any(_ends(module, end) for end in _NORMS):
        axes[name] = ("embed",)
    elif table := next((axis for end, axis in _TABLES.items() if _ends(module, end)), None):
        axes[name] = (table, "embed")
    elif found := next((value for end, value in _OUTSIDE.items() if _ends(module, end)), None):
        axes[name] = found[:1] if kind == "bias" else found
        if kind == "weight" and len(found) == 2:
            reads[name] = 1


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
