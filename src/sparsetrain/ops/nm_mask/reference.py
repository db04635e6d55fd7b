"""N:M masks by sorting, and transposable masks by trying all 90 patterns on each tile."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.nm_mask.patterns import TILE, tile_patterns


def reference_nm(ranks: Tensor, keep: int, group: int, dim: int) -> Tensor:
    """Sort each group in descending order, ties by index, and keep the first `keep`."""
    grouped = ranks.movedim(dim, -1).unflatten(-1, (-1, group))
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(-1, order[..., :keep], True)
    return mask.flatten(-2).movedim(-1, dim).contiguous()


def reference_transposable(w_oi: Tensor) -> Tensor:
    """The pattern of largest kept sum of |w|, one tile after another; the lowest index wins ties."""
    patterns = tile_patterns(w_oi.device)
    mask = torch.zeros_like(w_oi, dtype=torch.bool)
    for o in range(0, w_oi.shape[0], TILE):
        for i in range(0, w_oi.shape[1], TILE):
            tile = w_oi[o : o + TILE, i : i + TILE].abs().double().reshape(-1)
            best, chosen = -1.0, 0
            for index, pattern in enumerate(patterns):
                kept = float(tile[pattern].sum())
                if kept > best:
                    best, chosen = kept, index
            mask[o : o + TILE, i : i + TILE] = patterns[chosen].view(TILE, TILE)
    return mask


def reference_greedy(w_oi: Tensor) -> Tensor:
    """Entries of a tile from the largest down; each is kept if its row and its column hold fewer than two."""
    mask = torch.zeros_like(w_oi, dtype=torch.bool)
    for o in range(0, w_oi.shape[0], TILE):
        for i in range(0, w_oi.shape[1], TILE):
            tile = w_oi[o : o + TILE, i : i + TILE].abs().reshape(-1)
            kept = mask[o : o + TILE, i : i + TILE]
            for place in tile.argsort(descending=True, stable=True).tolist():
                row, column = divmod(place, TILE)
                if kept[row].sum() < 2 and kept[:, column].sum() < 2:
                    kept[row, column] = True
    return mask
