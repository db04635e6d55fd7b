"""The routed FFN as grouped products: pairs sorted by block, rows gathered and added back tile by tile.

Hidden units come first in every product (`pre_bum`), so that a block's gate and up halves are each contiguous however
narrow the block is: at 18 units the product runs at 88 against 72 GFLOP/s and elementwise work is four times faster.

Saved for backward: x, x Aᵀ, h A_downᵀ and the pre-activations of the active units. Activations and their products are
recomputed, and a token's gate receives ⟨dh, h⟩, so that no block output is kept.

Legend: t tokens, d model width, e widened row, r LoRA rank, B blocks of a tile, u hidden units of a block (twice that
in `pre`, if gated), m rows of a tile for each block, q places of the padded pair list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.routed_ffn.gradients import Gradients
from sparsetrain.ops.routed_ffn.operands import Form, Operands
from sparsetrain.ops.routed_ffn.problem import Problem, with_dense_tokens
from sparsetrain.ops.routed_ffn.products import Matrices, TileTerms, accumulate, product
from sparsetrain.ops.routed_ffn.rows import Source, Total
from sparsetrain.ops.routed_ffn.tiles import Tile, lay_out, pad_pairs
from sparsetrain.ops.routing import group_by_block


@torch.compiler.disable
def grouped_ffn(p: Problem) -> Tensor:
    """y [t, d]; the equation is that of `reference.py`. Reads the loads on the host once."""
    p = with_dense_tokens(p)
    groups = None if p.choice_tk is None else group_by_block(p.choice_tk, p.num_blocks, p.valid_t)
    loads = [] if groups is None else groups.offsets.diff().tolist()
    layout = lay_out(p.x_td.shape[0], p.num_shared, p.width, len(p.weights), loads)
    pairs = (None,) * 4 if groups is None else pad_pairs(groups, layout)
    form = Form(p.activation, p.gates_base, p.num_shared, p.num_blocks, p.width, len(p.weights), layout)
    return _GroupedFFN.apply(
        form, p.x_td, p.low_tr, p.gate_tk, p.start_d, p.shift_gd, p.down_df, p.lora_a_rf, p.lora_b_dr,
        *p.weights, *p.biases, *p.lora_b, p.keep_tf, *pairs,
    )  # fmt: skip


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, x_td: Tensor, *tensors: Any) -> Tensor:
        low_tr, gate_tk, start_d, shift_gd, down_df, a_rf, b_dr, *rest = tensors
        *rest, keep_tf, pair_q, token_q, sink_q, place_tk = rest
        operands = Operands(form, _matrices(form, down_df, a_rf, rest), gate_tk, keep_tf, pair_q, token_q)
        t, d = x_td.shape
        x_te = x_td if low_tr is None else torch.cat([x_td, low_tr], 1)
        saved = x_td.new_empty(form.layout.saved_numel)
        y = Total(x_td, t + 1, operands.products.out_width, written=form.num_shared > 0)
        if start_d is not None and not form.num_shared:
            y.sum[:, :d] = start_d
        offset_ge = None if shift_gd is None else F.pad(-shift_gd, (0, operands.products.out_width - d))
        source = Source(x_te, token_q)
        for tile in form.layout.tiles:
            terms, c = operands.products.of(tile), operands.gates(tile)
            xs, ys = source.rows(tile), y.rows(tile)
            h = _into_hidden(operands, terms, operands.saved(saved, tile), xs.mT, c)
            offset = None
            if tile.blocks and offset_ge is not None:
                offset = offset_ge[list(tile.blocks)][:, None]
            elif not tile.blocks and start_d is not None:
                offset = start_d[None, None]
            _out_of_hidden(operands, tile, terms, h, ys, c, offset)
            y.add(tile, sink_q, ys)
        low_out = y.sum[:-1, d:].to(x_td.dtype, copy=True) if a_rf is not None else None
        ctx.form = form
        pairs = (keep_tf, pair_q, token_q, sink_q, place_tk)
        ctx.save_for_backward(x_td, low_tr, gate_tk, down_df, a_rf, b_dr, *rest, *pairs, saved, low_out)
        if low_out is None:
            return y.sum.resize_(t, d).to(x_td.dtype)
        return torch.addmm(y.sum[:-1, :d].to(x_td.dtype), low_out, b_dr.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Any, ...]:
        form: Form = ctx.form
        x_td, low_tr, gate_tk, down_df, a_rf, b_dr, *rest = ctx.saved_tensors
        *rest, keep_tf, pair_q, token_q, sink_q, place_tk, saved, low_out = rest
        operands = Operands(form, _matrices(form, down_df, a_rf, rest), gate_tk, keep_tf, pair_q, token_q)
        t, d = x_td.shape
        _, need_x, need_low, need_gate, need_start, need_shift, need_down, need_a, need_b, *need_rest = (
            ctx.needs_input_grad
        )
        d_down, d_a = _zeros(down_df, need_down), _zeros(a_rf, need_a)
        d_rest = [_zeros(tensor, need) for tensor, need in zip(rest, need_rest)]
        dy_te = dy_td.new_zeros(t + 1, operands.products.out_width)
        dy_te[:t, :d] = dy_td
        if a_rf is not None:
            torch.mm(dy_td, b_dr, out=dy_te[:t, d:])
        needs = (need_x or need_low, need_gate, need_shift)
        found = Gradients(operands, _matrices(form, d_down, d_a, d_rest), x_td, low_tr, dy_te, sink_q, needs)
        for tile in form.layout.tiles:
            found.add(tile, operands.saved(saved, tile))
        dx_te: Any = found.dx.sum.to(x_td.dtype) if found.dx is not None else None
        return (
            None,
            dx_te[:, :d] if need_x else None,
            dx_te[:, d:] if need_low else None,
            found.dc_q[place_tk] if found.dc_q is not None else None,
            dy_td.sum(0) if need_start else None,
            found.d_shift,
            d_down,
            d_a,
            dy_td.t() @ low_out if need_b else None,
            *d_rest,
            *(None,) * 5,
        )


def _into_hidden(operands: Operands, terms: TileTerms, pre: Tensor, xs_t: Tensor, c: Any) -> Tensor:
    """h [B, u, m] of a tile's rows; writes `pre`: pre-activations, of the base alone where gates scale that."""
    for term in terms.inputs:
        bias = None if terms.bias is None else terms.bias[:, term.units]
        product(pre[:, term.units], term.matrix, xs_t[:, term.columns], bias)
    if c is not None and operands.form.gates_base:
        pre = pre * c
    for term in terms.low_inputs:
        accumulate(pre[:, term.units], term.matrix, xs_t[:, term.columns])
    return operands.hidden(pre)[1]


def _out_of_hidden(
    operands: Operands, tile: Tile, terms: TileTerms, h: Tensor, ys: Tensor, c: Any, offset: Tensor | None
) -> None:
    """Writes a tile's widened rows `ys` [B, m, e]: offset + h Wᵀ, and h Aᵀ beside it."""
    if c is not None and not operands.form.gates_base:
        h.mul_(c)
    if (low := terms.low_output) is not None:
        product(ys[:, :, low.columns], operands.dropped(h, tile).mT, low.matrix)
    if c is not None and operands.form.gates_base:
        h.mul_(c)
    columns = terms.output.columns
    product(ys[:, :, columns], h.mT, terms.output.matrix, None if offset is None else offset[:, :, columns])


def _matrices(form: Form, down_df: Tensor | None, a_rf: Tensor | None, rest: list[Any]) -> Matrices:
    n = form.num_inputs
    return Matrices(
        rest[:n],
        rest[n : 2 * n],
        rest[2 * n :],
        None if down_df is None else down_df.t(),
        None if a_rf is None else a_rf.t(),
    )


def _zeros(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros_like(tensor) if needed and tensor is not None else None
