"""The maps by gathering whole units: no matrix is made, and copies are exact in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_map(x: Tensor, groups: tuple[tuple[int, ...], ...], how: str, dim: int, unit: int) -> Tensor:
    """As `reference.reference_map`; sums run over a group's members in order, in x's dtype."""
    dim %= x.ndim
    merges = how in ("mean", "sum")
    count = sum(map(len, groups)) if merges else len(groups)
    x = x.unflatten(dim, (-1, count, unit))
    sizes = torch.tensor([len(group) for group in groups], dtype=x.dtype, device=x.device)
    along = [-1 if d == dim + 1 else 1 for d in range(x.ndim)]
    if merges:
        total = _taken(x, [group[0] for group in groups], dim)
        for i in range(1, max(map(len, groups))):
            longer = [t for t, group in enumerate(groups) if i < len(group)]
            members = _taken(x, [groups[t][i] for t in longer], dim)
            total = total.index_add(dim + 1, torch.tensor(longer, device=x.device), members)
        y = total / sizes.view(along) if how == "mean" else total
    else:
        group_of = {u: t for t, group in enumerate(groups) for u in group}
        y = _taken(x / sizes.view(along) if how == "split" else x, [group_of[u] for u in range(len(group_of))], dim)
    return y.flatten(dim, dim + 2)


def _taken(x: Tensor, units: list[int], dim: int) -> Tensor:
    return x.index_select(dim + 1, torch.tensor(units, device=x.device))
