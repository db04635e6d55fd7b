"""The same masks without sorting and without loops over tiles; plain PyTorch, on any device."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from sparsetrain.ops.nm_mask.patterns import TILE, tile_patterns
from sparsetrain.ops.nm_mask.reference import reference_nm

_TILES_AT_ONCE = 8192  # 90 fp32 scores a tile: 3 MiB, which stays in a core's cache


def ranked_nm(ranks: Tensor, keep: int, group: int, dim: int) -> Tensor:
    """Count, for each entry of a group, how many beat it: group·(group − 1)/2 comparisons and no sort.

    Beyond groups of 8 the sort is cheaper.
    """
    if group > 8:
        return reference_nm(ranks, keep, group, dim)
    dim = dim % ranks.ndim
    places = ranks.unflatten(dim, (-1, group)).unbind(dim + 1)
    beaten_by = [torch.zeros_like(place, dtype=torch.uint8) for place in places]
    for i, j in combinations(range(group), 2):
        later_wins = places[j] > places[i]  # a tie goes to the earlier entry
        beaten_by[i] += later_wins
        beaten_by[j] += ~later_wins
    return torch.stack([count < keep for count in beaten_by], dim + 1).flatten(dim, dim + 1)


def matmul_transposable(w_oi: Tensor) -> Tensor:
    """Scores of all patterns as one matmul, |tiles| [n, 16] · patternsᵀ [16, 90], and their argmax."""
    tiles = _to_tiles(w_oi.abs())
    tiles = tiles if tiles.dtype == torch.float64 else tiles.float()
    patterns = tile_patterns(w_oi.device)
    columns = patterns.to(tiles.dtype).t().contiguous()
    chosen = [(part @ columns).argmax(1) for part in tiles.split(_TILES_AT_ONCE)]
    return _from_tiles(patterns[torch.cat(chosen)], w_oi.shape)


def greedy_transposable(w_oi: Tensor) -> Tensor:
    """The greedy choice for all tiles at once: 16 rounds, one for each rank of magnitude."""
    tiles = _to_tiles(w_oi.abs())
    order = tiles.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(tiles, dtype=torch.bool)
    in_row = torch.zeros(len(tiles), TILE, dtype=torch.uint8, device=w_oi.device)
    in_column = torch.zeros_like(in_row)
    for place in order.split(1, 1):
        row, column = place // TILE, place % TILE
        fits = (in_row.gather(1, row) < 2) & (in_column.gather(1, column) < 2)
        kept.scatter_(1, place, fits)
        in_row.scatter_add_(1, row, fits.to(torch.uint8))
        in_column.scatter_add_(1, column, fits.to(torch.uint8))
    return _from_tiles(kept, w_oi.shape)


def _to_tiles(w_oi: Tensor) -> Tensor:
    return w_oi.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2).reshape(-1, TILE * TILE)


def _from_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    grid = tiles.view(shape[0] // TILE, shape[1] // TILE, TILE, TILE)
    return grid.transpose(1, 2).reshape(shape)
