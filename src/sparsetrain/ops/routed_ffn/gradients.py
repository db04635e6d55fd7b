"""The backward of a routed FFN by tiles: each tile recomputes its activations and adds to the gradients that are asked
for.

Where gates scale the base's pre-activations (SPT), pre = c · base + B (A x), and dc = ⟨dh, h⟩ + ⟨dpre, base⟩ has two
parts; else h is scaled, and dc = ⟨dh, h⟩.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.ops.routed_ffn.operands import Operands
from sparsetrain.ops.routed_ffn.products import Matrices, TileTerms, accumulate, product
from sparsetrain.ops.routed_ffn.rows import Source, Total
from sparsetrain.ops.routed_ffn.tiles import Tile


class Gradients:
    """Sums over tiles.

    Args:
        wanted: gradients of the matrices, zeros at first; None where none is asked for.
        x_td, low_tr: rows as they came in, and their product with LoRA's A.
        dy_te: gradient of the widened rows that went out, and a row of zeros for places without a token.
        sink_q: the row of dy_te of each place.
        needs: of the rows that came in, the gates, and the block's shift.
    """

    def __init__(
        self,
        operands: Operands,
        wanted: Matrices,
        x_td: Tensor,
        low_tr: Tensor | None,
        dy_te: Tensor,
        sink_q: Any,
        needs: tuple[bool, bool, bool],
    ) -> None:
        form, products, token_q = operands.form, operands.products, operands.token_q
        needs_rows, needs_gate, needs_shift = needs
        self.operands, self.products, self.wanted = operands, products, wanted
        self.d = x_td.shape[1]
        self.dy_rows, self.x_rows = Source(dy_te, sink_q), Source(x_td, token_q)
        self.low_rows = Source(low_tr if low_tr is not None else x_td[:, :0], token_q)
        self.dx = Total(x_td, len(x_td), products.in_width, written=form.num_shared > 0) if needs_rows else None
        c_q = operands.c_q
        self.dc_q = x_td.new_zeros(len(c_q) + 1) if needs_gate and c_q is not None else None
        self.d_shift = x_td.new_zeros(form.num_blocks, self.d) if needs_shift else None

    def add(self, tile: Tile, base: Tensor) -> None:
        """Add a tile's part; base: its saved pre-activations [B, u, m]."""
        terms, c = self.products.of(tile), self.operands.gates(tile)
        dys, lows = self.dy_rows.rows(tile), self.low_rows.rows(tile)
        scales_base = self.operands.scales_base(tile)
        pre = self._scaled(terms, base, c, lows) if scales_base else base
        a, h = self.operands.hidden(pre)
        dh, dc = self._of_hidden(tile, terms, dys, h, c)
        dpre = self._of_pre(tile, dh, a, pre)
        for target, part, columns in zip(self.wanted.lora_b, self.products.parts(tile), self.products.low_columns):
            if target is not None:
                self.products.add_product(target, tile, dpre[:, part], lows[:, :, self._low(columns)])
        dx = self.dx
        dxs = dx.rows(tile) if dx is not None else None
        if dxs is not None:
            for term in terms.low_inputs:
                product(dxs[:, :, term.columns], dpre[:, term.units].mT, term.matrix)
        if scales_base:
            dc.add_((dpre * base).sum(1))
            dpre.mul_(c)
        if self.dc_q is not None and dc is not None:
            self.dc_q[tile.span] = dc.view(-1)
        self._of_inputs(tile, dpre)
        if self.d_shift is not None and tile.blocks:
            self.d_shift[list(tile.blocks)] -= dys[:, :, : self.d].sum(1)
        if dx is not None and dxs is not None:
            for i, term in enumerate(terms.inputs):
                (accumulate if i else product)(dxs[:, :, term.columns], dpre[:, term.units].mT, term.matrix)
            dx.add(tile, self.operands.token_q, dxs)

    def _low(self, columns: slice) -> slice:
        """Columns of widened rows, counted among LoRA's alone."""
        return slice(columns.start - self.d, columns.stop - self.d)

    def _scaled(self, terms: TileTerms, base: Tensor, c: Tensor, lows: Tensor) -> Tensor:
        pre = base * c
        for term in terms.low_inputs:
            accumulate(pre[:, term.units], term.matrix, lows.mT[:, self._low(term.columns)])
        return pre

    def _of_hidden(self, tile: Tile, terms: TileTerms, dys: Tensor, h: Tensor, c: Any) -> tuple[Tensor, Any]:
        """(dh, dc) from the rows that went out; adds the gradients of the down-projection and its A."""
        operands, wanted = self.operands, self.wanted
        scales_base = operands.scales_base(tile)
        dh, dc = torch.empty_like(h), None
        product(dh, terms.output.matrix, dys.mT[:, terms.output.columns])
        if scales_base:
            dc = (dh * h).sum(1)
            dh.mul_(c)
        low_dys = dys[:, :, self.products.out_columns]
        if terms.low_output is not None:
            if operands.keep_tf is None:
                accumulate(dh, terms.low_output.matrix, low_dys.mT)
            else:
                dh.add_(operands.dropped(torch.bmm(terms.low_output.matrix, low_dys.mT), tile))
        if wanted.lora_a_fr is not None:
            part = low_dys if c is None or scales_base else low_dys * c.mT
            self.products.add_product(wanted.lora_a_fr, tile, operands.dropped(h, tile), part)
        if c is not None and not scales_base:
            dc = (dh * h).sum(1) if self.dc_q is not None else None
            dh.mul_(c)
        if wanted.down_fd is not None:
            self.products.add_product(wanted.down_fd, tile, h if c is None else h * c, dys[:, :, : self.d])
        return dh, dc

    def _of_pre(self, tile: Tile, dh: Tensor, a: Tensor, pre: Tensor) -> Tensor:
        """Gradient of the pre-activations; writes over dh."""
        parts, dpre = self.products.parts(tile), torch.empty_like(pre)
        if len(parts) == 2:
            torch.mul(dh, a, out=dpre[:, parts[1]])
            dh.mul_(pre[:, parts[1]])
        self.operands.act_backward(dh, pre[:, parts[0]], dpre[:, parts[0]])
        return dpre

    def _of_inputs(self, tile: Tile, dpre: Tensor) -> None:
        """Weights and biases of gate and up."""
        parts = self.products.parts(tile)
        if any(weight is not None for weight in self.wanted.weights):
            xs = self.x_rows.rows(tile)
            for target, part in zip(self.wanted.weights, parts):
                self.products.add_product(target, tile, dpre[:, part], xs)
        for target, part in zip(self.wanted.biases, parts):
            self.products.add_sum(target, tile, dpre[:, part])
