"""The published rules as loops over single cells: what the vectorised forms are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_convolution(map_tt: Tensor, edge: int) -> Tensor:
    """As `ops.flood_fill.diagonal_convolution`, for one map."""
    t, reach = len(map_tt), edge // 2
    out = torch.zeros_like(map_tt)
    for i in range(t):
        for j in range(t):
            for u in range(-reach, reach + 1):
                if 0 <= i + u < t and 0 <= j + u < t:
                    out[i, j] += map_tt[i + u, j + u]
    return out


def flood_fill(grid_nn: Tensor, threshold: float, *, causal: bool = False) -> Tensor:
    """As `ops.flood_fill.flood_fill`, for one grid: a walk at a time."""
    n, grid = len(grid_nn), grid_nn.tolist()

    def at(r: int, c: int) -> float:
        return grid[r][c] if r < n and c < n else 0.0

    marks = torch.zeros(n, n, dtype=torch.bool)
    top = [] if causal else [(0, k) for k in range(n)]
    for r, c in [*top, *((k, 0) for k in range(n))]:
        while r < n and c < n:
            down, right, diagonal = at(r + 1, c), at(r, c + 1), at(r + 1, c + 1)
            if down > right and down > diagonal:
                r += 1
            elif right >= down and right > diagonal:
                c += 1
            else:
                r, c = r + 1, c + 1
            if r < n and c < n and grid[r][c] > threshold:
                marks[r, c] = True
    return marks
