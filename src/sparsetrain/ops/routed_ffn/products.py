"""The matrix products of one tile, as batches over its blocks: [B, hidden units, ...] by [B, rows, ...].

LoRA widens rows: `[x | x A_gateᵀ | x A_upᵀ]` going in and `[y | h A_downᵀ]` coming out, so that a row is gathered and
added back once. Narrow blocks widen their (copied) weights as well, `[W | B]`; then LoRA needs no product of its own.

Legend: B blocks of a tile, u hidden units of a block, m rows, f hidden units, d model width, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.routed_ffn.tiles import NARROW, Layout, Tile


class Matrices(NamedTuple):
    """What an FFN multiplies with, hidden units first, gate before up; or its gradients, None if not wanted."""

    weights: Sequence[Tensor | None]  # [f, d]
    biases: Sequence[Tensor | None]  # [f]
    lora_b: Sequence[Tensor | None]  # [f, r]
    down_fd: Tensor | None
    lora_a_fr: Tensor | None


class Term(NamedTuple):
    """A product of a tile: `matrix` [B, u, c] between columns of widened rows and a range of pre-activations."""

    matrix: Tensor
    columns: slice
    units: slice


class TileTerms(NamedTuple):
    """inputs and low_inputs (LoRA's): rows to pre-activations. output and low_output: hidden units to rows."""

    inputs: list[Term]
    low_inputs: list[Term]
    output: Term
    low_output: Term | None
    bias: Tensor | None  # [B, matrices * u, 1]


class Products:
    """The matrices of an FFN, cut for the tiles of a layout: views, or packed copies where blocks are narrow."""

    def __init__(self, matrices: Matrices, num_shared: int, width: int, layout: Layout, apart: bool) -> None:
        """`apart` keeps LoRA's products apart from the base's: they are gated or dropped differently."""
        self.matrices: Any = matrices  # of an FFN, so weights and down are there
        self.num_shared, self.width = num_shared, width
        hidden = matrices.down_fd.shape[1]  # type: ignore[union-attr]
        edges = [hidden]
        for b in matrices.lora_b:
            edges.append(edges[-1] + (0 if b is None else b.shape[1]))
        self.row_columns, self.in_width = slice(0, hidden), edges[-1]
        self.low_columns = [slice(low, high) for low, high in pairwise(edges)]
        rank = 0 if matrices.lora_a_fr is None else matrices.lora_a_fr.shape[1]
        self.out_columns, self.out_width = slice(hidden, hidden + rank), hidden + rank
        self.packed = self._pack(layout.order) if layout.order and width <= NARROW and not apart else None

    def of(self, tile: Tile) -> TileTerms:
        everything = slice(None)
        if tile.blocks and self.packed is not None:
            inputs, output, bias = self.packed
            here = slice(tile.rank, tile.rank + len(tile.blocks))
            wide_in, wide_out = (Term(t[here], everything, everything) for t in (inputs, output))
            return TileTerms([wide_in], [], wide_out, None, None if bias is None else bias[here])
        weights, biases, lora_b, down_fd, lora_a_fr = self.matrices
        parts = self.parts(tile)
        low_output = None if lora_a_fr is None else Term(self._pick(lora_a_fr, tile), self.out_columns, everything)
        return TileTerms(
            [Term(self._pick(w, tile), self.row_columns, part) for w, part in zip(weights, parts)],
            [Term(self._pick(b, tile), *where) for b, *where in zip(lora_b, self.low_columns, parts) if b is not None],
            Term(self._pick(down_fd, tile), self.row_columns, everything),
            low_output,
            _bias([None if b is None else self._pick(b, tile) for b in biases], parts[0].stop),
        )

    def parts(self, tile: Tile) -> list[slice]:
        """Where each input matrix has its pre-activations."""
        size = self.width if tile.blocks else self.num_shared
        return [slice(i * size, (i + 1) * size) for i in range(len(self.matrices.weights))]

    def add_product(self, target: Tensor | None, tile: Tile, a_bum: Tensor, b_bmc: Tensor) -> None:
        """target[units of the tile] += a b, where target [f, c] is a gradient or None."""
        if target is None:
            return
        if len(a_bum) == 1:
            target[self._units(tile)].addmm_(a_bum[0], b_bmc[0])
        else:
            self._blocks(target).index_add_(0, torch.tensor(tile.blocks, device=target.device), torch.bmm(a_bum, b_bmc))

    def add_sum(self, target: Tensor | None, tile: Tile, a_bum: Tensor) -> None:
        """target[units of the tile] += row sums of a, where target [f] is a gradient or None."""
        if target is not None:
            self.add_product(target[:, None], tile, a_bum, a_bum.new_ones(len(a_bum), a_bum.shape[2], 1))

    def _units(self, tile: Tile) -> slice:
        if not tile.blocks:
            return slice(0, self.num_shared)
        start = self.num_shared + tile.blocks[0] * self.width
        return slice(start, start + self.width)

    def _blocks(self, table: Tensor) -> Tensor:
        return table[self.num_shared :].unflatten(0, (-1, self.width))

    def _pick(self, table: Tensor, tile: Tile) -> Tensor:
        if len(tile.blocks) < 2:
            return table[self._units(tile)][None]
        return self._blocks(table)[torch.tensor(tile.blocks, device=table.device)]

    def _pack(self, order: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs [B, matrices * u, d + r], outputs [B, u, d + r], and biases, of all blocks in the order of tiles."""
        weights, biases, lora_b, down_fd, lora_a_fr = self.matrices
        index = torch.tensor(order, device=down_fd.device)
        pick = lambda table: self._blocks(table).index_select(0, index)  # noqa: E731
        rows = [F.pad(pick(w), (0, self.in_width - w.shape[1])) for w in weights]
        for row, b, columns in zip(rows, lora_b, self.low_columns):
            if b is not None:
                row[:, :, columns] = pick(b)
        outputs = [pick(table) for table in (down_fd, lora_a_fr) if table is not None]
        bias = _bias([None if b is None else pick(b) for b in biases], self.width)
        return torch.cat(rows, 1), torch.cat(outputs, 2), bias


def _bias(parts: list[Tensor | None], size: int) -> Tensor | None:
    """[B, matrices * u, 1] from the biases [B, u] that exist."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_zeros(len(like), size) if part is None else part for part in parts], 1)[:, :, None]


def product(out: Tensor, a: Tensor, b: Tensor, offset: Tensor | None = None) -> None:
    """out = offset + a b, batched."""
    if len(out) > 1:
        torch.bmm(a, b, out=out) if offset is None else torch.baddbmm(offset, a, b, out=out)
    else:
        torch.mm(a[0], b[0], out=out[0]) if offset is None else torch.addmm(offset[0], a[0], b[0], out=out[0])


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, batched."""
    out.baddbmm_(a, b) if len(out) > 1 else out[0].addmm_(a[0], b[0])
