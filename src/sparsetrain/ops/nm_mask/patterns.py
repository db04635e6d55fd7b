"""The 90 tile patterns of a transposable 2:4 mask: 4x4 tiles with exactly two ones in each row and each column."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

TILE = 4


@cache
def _words() -> tuple[tuple[int, ...], ...]:
    rows = [tuple(int(c in pair) for c in range(TILE)) for pair in combinations(range(TILE), 2)]
    found = [sum(tile, ()) for tile in product(rows, repeat=TILE) if all(sum(col) == 2 for col in zip(*tile))]
    return tuple(sorted(found))  # as 16-bit words, first entry most significant: every backend breaks ties alike


def tile_patterns(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool) -> Tensor:
    """The patterns [90, 16] in their fixed order; a tile is flattened row by row.

    Every entry of a tile is kept in 45 of them.
    """
    return torch.tensor(_words(), dtype=dtype, device=device)
