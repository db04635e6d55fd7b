"""The matrix products of one tile, always as batches over its blocks: [B, hidden units, ...] by [B, rows, ...].

LoRA widens rows: `x_aug = [x | x A_gateᵀ | x A_upᵀ]` and `y_aug = [y | h A_downᵀ]`, so a row is gathered and added back
once. Narrow blocks widen their (copied) weights as well, `[W | B]`, and LoRA needs no product of its own.

Legend: B blocks of a tile, u hidden units of a block, m rows, d model width, r LoRA rank, e widened row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.routed_ffn.tiles import NARROW, Layout, Tile


class Matrices(NamedTuple):
    """What an FFN multiplies with, hidden units first, gate before up; or the gradients of those, None if not wanted."""

    weights: Sequence[Tensor | None]  # [f, d]
    biases: Sequence[Tensor | None]  # [f]
    lora_b: Sequence[Tensor | None]  # [f, r]
    down_fd: Tensor | None
    lora_a_fr: Tensor | None


class Term(NamedTuple):
    """A product of a tile: `matrix` [B, u, c] between columns of the rows and a range of pre-activations."""

    matrix: Tensor
    columns: slice
    units: slice


class TileTerms(NamedTuple):
    """inputs: rows to pre-activations. outputs: hidden units to rows. bias: [B, matrices * u, 1] or None."""

    inputs: list[Term]
    outputs: list[Term]
    bias: Tensor | None


class Products:
    """Views and packed copies of an FFN's matrices, cut for the tiles of a layout."""

    def __init__(self, matrices: Matrices, num_shared: int, width: int, layout: Layout, separate: bool) -> None:
        """`separate` keeps LoRA's products apart (its inputs are gated or dropped differently)."""
        self.m, self.num_shared, self.width = matrices, num_shared, width
        self.num_inputs = len(matrices.weights)
        hidden = matrices.down_fd.shape[1]  # type: ignore[union-attr]
        edges = [hidden]
        for b in matrices.lora_b:
            edges.append(edges[-1] + (b.shape[1] if b is not None else 0))
        self.row_columns = slice(0, hidden)
        self.low_columns = [slice(lo, hi) for lo, hi in zip(edges, edges[1:])]
        rank = matrices.lora_a_fr.shape[1] if matrices.lora_a_fr is not None else 0
        self.out_columns = slice(hidden, hidden + rank)
        self.packed = self._pack(layout.order, edges[-1]) if 0 < width <= NARROW and not separate and layout.order else None

    def of(self, tile: Tile) -> TileTerms:
        if tile.blocks and self.packed is not None:
            inputs, outputs, bias = (None if t is None else t[tile.rank : tile.rank + len(tile.blocks)] for t in self.packed)
            everything = slice(None)
            return TileTerms([Term(inputs, everything, everything)], [Term(outputs, everything, everything)], bias)
        m, units = self.m, self.units(tile)
        size = self.width if tile.blocks else self.num_shared
        parts = [slice(i * size, (i + 1) * size) for i in range(self.num_inputs)]
        pick = lambda t: torch.stack([t[u] for u in units]) if len(units) > 1 else t[units[0]].unsqueeze(0)  # noqa: E731
        inputs = [Term(pick(w), self.row_columns, part) for w, part in zip(m.weights, parts)]
        inputs += [Term(pick(b), columns, part) for b, columns, part in zip(m.lora_b, self.low_columns, parts) if b is not None]
        outputs = [Term(pick(m.down_fd), self.row_columns, slice(None))]
        if m.lora_a_fr is not None:
            outputs.append(Term(pick(m.lora_a_fr), self.out_columns, slice(None)))
        bias = None
        if any(b is not None for b in m.biases):
            bias = torch.cat([pick(b) if b is not None else w.new_zeros(len(units), size) for b, w in zip(m.biases, m.weights)], 1)
            bias = bias.unsqueeze(2)
        return TileTerms(inputs, outputs, bias)

    def units(self, tile: Tile) -> list[slice]:
        if not tile.blocks:
            return [slice(0, self.num_shared)]
        starts = [self.num_shared + block * self.width for block in tile.blocks]
        return [slice(start, start + self.width) for start in starts]

    def _pack(self, order: list[int], columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        m = self.m
        index = torch.tensor(order, device=m.down_fd.device)
        blocks = lambda t: t[self.num_shared :].unflatten(0, (-1, self.width)).index_select(0, index)  # noqa: E731
        rows = []
        for weight, b, low in zip(m.weights, m.lora_b, self.low_columns):
            row = [blocks(weight)]
            if b is not None:
                row.append(F.pad(blocks(b), (low.start - self.row_columns.stop, columns - low.stop)))
            elif columns > self.row_columns.stop:
                row.append(row[0].new_zeros(*row[0].shape[:2], columns - self.row_columns.stop))
            rows.append(torch.cat(row, 2) if len(row) > 1 else row[0])
        outputs = blocks(m.down_fd)
        if m.lora_a_fr is not None:
            outputs = torch.cat([outputs, blocks(m.lora_a_fr)], 2)
        bias = None
        if any(b is not None for b in m.biases):
            bias = torch.cat([blocks(b) if b is not None else rows[0].new_zeros(len(order), self.width) for b in m.biases], 1)
            bias = bias.unsqueeze(2)
        return torch.cat(rows, 1), outputs, bias
