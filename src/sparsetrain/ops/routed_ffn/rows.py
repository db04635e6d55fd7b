"""Rows of a tile: gathered from a table of tokens, and added back to a sum over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.routed_ffn.tiles import Tile


class Source:
    """A table [t, e] read tile by tile, into one buffer that the next tile reuses."""

    def __init__(self, table: Tensor, index_q: Tensor | None) -> None:
        self.table, self.index_q = table, index_q
        self.buffer = table.new_empty(0)

    def rows(self, tile: Tile) -> Tensor:
        """[B, m, e]; valid until the next call."""
        if not tile.blocks:
            return self.table[None, tile.span]
        index = self.index_q[tile.span]  # type: ignore[index]
        if len(self.buffer) < len(index):
            self.buffer = self.table.new_empty(len(index), self.table.shape[1])
        return torch.index_select(self.table, 0, index, out=self.buffer[: len(index)]).unflatten(
            0, (len(tile.blocks), -1)
        )


class Total:
    """A sum [t, e] over tiles, in fp32 at least. `written`: tiles of all tokens come first and need no zeros."""

    def __init__(self, like: Tensor, rows: int, width: int, written: bool) -> None:
        self.like = like
        self.direct = like.dtype not in (torch.float16, torch.bfloat16)
        self.sum = like.new_empty(rows, width, dtype=like.dtype if self.direct else torch.float32)
        if not written:
            self.sum.zero_()
        self.buffer = like.new_empty(0)

    def rows(self, tile: Tile) -> Tensor:
        """Where the tile writes its rows, [B, m, e]."""
        if self.direct and not tile.blocks:
            return self.sum[None, tile.span]
        num_blocks = max(1, len(tile.blocks))
        if len(self.buffer) < num_blocks * tile.rows:
            self.buffer = self.like.new_empty(num_blocks * tile.rows, self.sum.shape[1])
        return self.buffer[: num_blocks * tile.rows].unflatten(0, (num_blocks, -1))

    def add(self, tile: Tile, index_q: Tensor, rows: Tensor) -> None:
        if tile.blocks:
            self.sum.index_add_(0, index_q[tile.span], rows.flatten(0, 1).to(self.sum.dtype))
        elif not self.direct:
            self.sum[tile.span] = rows[0]
