"""Mean maps and patterns by their definitions, on whole [t, t] maps and one cell at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsetrain.ops.flood_fill import reference as walks


def mean_map(q_htd: Tensor, k_htd: Tensor, visible_tt: Tensor, scale: float) -> Tensor:
    """[t, t]: softmax attention of every head under a mask, averaged over the heads."""
    scores = (q_htd @ k_htd.mT * scale).masked_fill(~visible_tt, -torch.inf)
    return scores.softmax(-1).mean(0)


def block_pattern(grid_nn: Tensor, variant: str, quantile: float, keep_ratio: float, causal: bool = False) -> Tensor:
    """The published rule for one grid: `cf` and `f` by a quantile, `c` by a keep ratio, `top_q` by a quantile."""
    n = len(grid_nn)
    cells = [(i, j) for i in range(n) for j in range(n) if not causal or j <= i]
    marks = torch.eye(n, dtype=torch.bool)
    if variant == "c":
        order = sorted(cells, key=lambda cell: (-float(grid_nn[cell]), cell))
        for cell in order[: max(0, int(keep_ratio * len(cells)) - n)]:
            marks[cell] = True
        return marks
    limit = float(np.quantile(np.array([float(grid_nn[cell]) for cell in cells], dtype=np.float32), quantile))
    if variant == "top_q":
        for cell in cells:
            marks[cell] |= bool(grid_nn[cell] > limit)
        return marks
    return marks | walks.flood_fill(grid_nn, limit, causal=causal)
