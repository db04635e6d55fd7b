"""The task of a grid, read off a model's anatomy (which may be on the meta device): no weight is looked at."""

from __future__ import annotations

from collections import Counter

from torch import nn

from sparsetrain.core.anatomy import Anatomy, submodule
from sparsetrain.parallel.cost import GridLayer, GridTask
from sparsetrain.parallel.shape import TRANSPOSED_ROLES


def task_of(model: nn.Module, anatomy: Anatomy, rows: int, tokens: int, dtype_bytes: int = 2) -> GridTask:
    """A training step of `rows` rows of `tokens` tokens, in expert mode; embedding and head stay whole.

    Raises:
        ValueError: the model's blocks have no linear.
    """
    if not anatomy.linears:
        raise ValueError(f"{anatomy.model_class} has no linear in its blocks, so a grid has nothing to cut.")
    kinds = Counter((s.role, s.in_features, s.out_features) for s in anatomy.linears)
    layers = tuple(
        GridLayer(name=role, k=k, n=n, transposed=role in TRANSPOSED_ROLES, count=count)
        for (role, k, n), count in kinds.items()
    )
    ends = [submodule(model, name) for name in (anatomy.embedding, anatomy.head) if name]
    whole = {id(parameter): parameter.numel() for module in ends for parameter in module.parameters()}
    heads = {(site.num_heads, site.num_kv_heads) for site in anatomy.attentions}
    pairs = (min(tokens, site.window or tokens) * tokens / (2 if site.causal else 1) for site in anatomy.attentions)
    widths = (4 * site.num_heads * site.head_dim for site in anatomy.attentions)
    return GridTask(
        layers=layers,
        rows=rows,
        tokens=tokens,
        dtype_bytes=dtype_bytes,
        whole_parameters=sum(whole.values()),
        heads=min((h for h, _ in heads), default=0),
        kv_heads=min((g for _, g in heads), default=0),
        attention_flops=sum(p * w for p, w in zip(pairs, widths, strict=True)),
    )
