"""The routed FFN as grouped products: pairs sorted by block, rows gathered and added back tile by tile.

Hidden units come first in every product (`pre_bum`), so that a block's gate and up halves are each contiguous however
narrow the block is: at 18 units the product runs at 88 against 72 GFLOP/s and elementwise work is four times faster.

Saved for backward: x, x Aᵀ, h A_downᵀ and the pre-activations of the active units. Activations and their products are
recomputed, and a token's gate receives ⟨dh, h⟩, so that no block output is kept.

Legend: t tokens, d model width, e widened row, r LoRA rank, B blocks of a tile, u hidden units of a block (twice that
in `pre`, if gated), m rows of a tile for each block, q places of the padded pair list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS, Forward
from sparsetrain.ops.routed_ffn.problem import Problem, with_dense_tokens
from sparsetrain.ops.routed_ffn.products import Matrices, Products, accumulate, product
from sparsetrain.ops.routed_ffn.rows import Source, Total
from sparsetrain.ops.routed_ffn.tiles import Layout, Tile, lay_out, pad_pairs
from sparsetrain.ops.routing import group_by_block


class Form(NamedTuple):
    """What is not a tensor."""

    activation: str
    gates_base: bool
    num_shared: int
    num_blocks: int
    width: int
    num_inputs: int
    layout: Layout


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
        products = _products(form, down_df, a_rf, rest, keep_tf)
        act, _ = ACTIVATIONS[form.activation]
        t, d = x_td.shape
        x_te = x_td if low_tr is None else torch.cat([x_td, low_tr], 1)
        saved = x_td.new_empty(form.layout.saved_numel)
        y = Total(x_td, t + 1, products.out_width, written=form.num_shared > 0)
        if start_d is not None and not form.num_shared:
            y.sum[:, :d] = start_d
        offset_ge = None if shift_gd is None else F.pad(-shift_gd, (0, products.out_width - d))
        c_q = _gates(gate_tk, pair_q)
        source = Source(x_te, token_q)
        for tile in form.layout.tiles:
            terms = products.of(tile)
            xs, ys = source.rows(tile), y.rows(tile)
            pre = _saved(saved, tile, form)
            c = _tile_gates(c_q, tile)
            xs_t = xs.mT
            for term in terms.inputs:
                product(
                    pre[:, term.units],
                    term.matrix,
                    xs_t[:, term.columns],
                    None if terms.bias is None else terms.bias[:, term.units],
                )
            if c is not None and form.gates_base:
                pre = pre * c
            for term in terms.low_inputs:
                accumulate(pre[:, term.units], term.matrix, xs_t[:, term.columns])
            _, h = _hidden(act, pre, form)
            if c is not None and not form.gates_base:
                h.mul_(c)
            if terms.low_output is not None:
                product(
                    ys[:, :, terms.low_output.columns],
                    _dropped(h, keep_tf, tile, token_q, form).mT,
                    terms.low_output.matrix,
                )
            if c is not None and form.gates_base:
                h.mul_(c)
            offset = None
            if tile.blocks and offset_ge is not None:
                offset = offset_ge[list(tile.blocks)][:, None, terms.output.columns]
            elif not tile.blocks and start_d is not None:
                offset = start_d[None, None]
            product(ys[:, :, terms.output.columns], h.mT, terms.output.matrix, offset)
            y.add(tile, sink_q, ys)
        low_out = y.sum[:-1, d:].to(x_td.dtype, copy=True) if a_rf is not None else None
        ctx.form = form
        ctx.save_for_backward(
            x_td,
            low_tr,
            gate_tk,
            down_df,
            a_rf,
            b_dr,
            *rest,
            keep_tf,
            pair_q,
            token_q,
            sink_q,
            place_tk,
            saved,
            low_out,
        )
        if low_out is None:
            return y.sum.resize_(t, d).to(x_td.dtype)
        return torch.addmm(y.sum[:-1, :d].to(x_td.dtype), low_out, b_dr.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_td: Tensor) -> tuple[Any, ...]:
        form = ctx.form
        x_td, low_tr, gate_tk, down_df, a_rf, b_dr, *rest = ctx.saved_tensors
        *rest, keep_tf, pair_q, token_q, sink_q, place_tk, saved, low_out = rest
        products = _products(form, down_df, a_rf, rest, keep_tf)
        act, act_backward = ACTIVATIONS[form.activation]
        t, d = x_td.shape
        _, need_x, need_low, need_gate, need_start, need_shift, need_down, need_a, need_b, *need_rest = (
            ctx.needs_input_grad
        )
        d_down, d_a = _zeros(down_df, need_down), _zeros(a_rf, need_a)
        d_rest = [_zeros(tensor, need) for tensor, need in zip(rest, need_rest)]
        wanted = _matrices(form, d_down, d_a, d_rest)
        dy_te = dy_td.new_zeros(t + 1, products.out_width)
        dy_te[:t, :d] = dy_td
        if a_rf is not None:
            torch.mm(dy_td, b_dr, out=dy_te[:t, d:])
        dx: Any = Total(x_td, t, products.in_width, written=form.num_shared > 0) if need_x or need_low else None
        c_q = _gates(gate_tk, pair_q)
        dc_q = x_td.new_zeros(len(c_q) + 1) if need_gate and c_q is not None else None
        dy_rows, x_rows = Source(dy_te, sink_q), Source(x_td, token_q)
        low_rows = Source(low_tr if low_tr is not None else x_td[:, :0], token_q)
        d_shift = x_td.new_zeros(form.num_blocks, d) if need_shift else None
        for tile in form.layout.tiles:
            terms = products.of(tile)
            dys, lows = dy_rows.rows(tile), low_rows.rows(tile)
            c = _tile_gates(c_q, tile)
            spt = c is not None and form.gates_base
            base = pre = _saved(saved, tile, form)
            if spt:
                pre = pre * c  # type: ignore
                for term in terms.low_inputs:
                    accumulate(
                        pre[:, term.units], term.matrix, lows.mT[:, term.columns.start - d : term.columns.stop - d]
                    )
            a, h = _hidden(act, pre, form)
            dh = torch.empty_like(h)
            product(dh, terms.output.matrix, dys.mT[:, terms.output.columns])
            dc: Any = None
            if spt:
                dc = (dh * h).sum(1)
                dh.mul_(c)  # type: ignore
            low_dys = dys[:, :, products.out_columns]
            if terms.low_output is not None:
                if keep_tf is None:
                    accumulate(dh, terms.low_output.matrix, low_dys.mT)
                else:
                    part = torch.bmm(terms.low_output.matrix, low_dys.mT)
                    dh.add_(_dropped(part, keep_tf, tile, token_q, form))
            if wanted.lora_a_fr is not None:
                part = low_dys if c is None or spt else low_dys * c.mT
                products.add_product(wanted.lora_a_fr, tile, _dropped(h, keep_tf, tile, token_q, form), part)
            if c is not None and not spt:
                dc = (dh * h).sum(1) if dc_q is not None else None
                dh.mul_(c)
            if wanted.down_fd is not None:
                products.add_product(wanted.down_fd, tile, h if c is None else h * c, dys[:, :, :d])
            parts = products.parts(tile)
            dpre = torch.empty_like(pre)
            if form.num_inputs == 2:
                torch.mul(dh, a, out=dpre[:, parts[1]])
                dh.mul_(pre[:, parts[1]])
            act_backward(dh, pre[:, parts[0]], dpre[:, parts[0]])
            for target, part, columns in zip(wanted.lora_b, parts, products.low_columns):
                if target is not None:
                    products.add_product(target, tile, dpre[:, part], lows[:, :, columns.start - d : columns.stop - d])
            dxs: Any = dx.rows(tile) if dx is not None else None
            if dxs is not None:
                for term in terms.low_inputs:
                    product(dxs[:, :, term.columns], dpre[:, term.units].mT, term.matrix)
            if spt:
                dc.add_((dpre * base).sum(1))
                dpre.mul_(c)  # type: ignore
            if dc_q is not None and dc is not None:
                dc_q[tile.span] = dc.view(-1)
            if any(w is not None for w in wanted.weights):
                xs = x_rows.rows(tile)
                for target, part in zip(wanted.weights, parts):
                    products.add_product(target, tile, dpre[:, part], xs)
            for target, part in zip(wanted.biases, parts):
                products.add_sum(target, tile, dpre[:, part])
            if d_shift is not None and tile.blocks:
                d_shift[list(tile.blocks)] -= dys[:, :, :d].sum(1)
            if dxs is not None:
                for i, term in enumerate(terms.inputs):
                    (accumulate if i else product)(dxs[:, :, term.columns], dpre[:, term.units].mT, term.matrix)
                dx.add(tile, token_q, dxs)  # type: ignore[union-attr]
        dx_te: Any = dx.sum.to(x_td.dtype) if dx is not None else None
        return (
            None,
            dx_te[:, :d] if need_x else None,
            dx_te[:, d:] if need_low else None,
            dc_q[place_tk] if dc_q is not None else None,
            dy_td.sum(0) if need_start else None,
            d_shift,
            d_down,
            d_a,
            dy_td.t() @ low_out if need_b else None,
            *d_rest,
            *(None,) * 5,
        )


def _matrices(form: Form, down_df: Tensor | None, a_rf: Tensor | None, rest: list[Any]) -> Matrices:
    n = form.num_inputs
    return Matrices(
        rest[:n],
        rest[n : 2 * n],
        rest[2 * n :],
        None if down_df is None else down_df.t(),
        None if a_rf is None else a_rf.t(),
    )


def _products(form: Form, down_df: Tensor, a_rf: Tensor | None, rest: list[Any], keep_tf: Tensor | None) -> Products:
    return Products(
        _matrices(form, down_df, a_rf, rest),
        form.num_shared,
        form.width,
        form.layout,
        form.gates_base or keep_tf is not None,
    )


def _zeros(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros_like(tensor) if needed and tensor is not None else None


def _gates(gate_tk: Tensor | None, pair_q: Tensor | None) -> Tensor | None:
    """c at every place."""
    return gate_tk.reshape(-1)[pair_q] if gate_tk is not None and pair_q is not None else None


def _tile_gates(c_q: Tensor | None, tile: Tile) -> Any:
    """c of the tile's rows [B, 1, m]; None for always-on units."""
    return c_q[tile.span].view(len(tile.blocks), 1, -1) if c_q is not None and tile.blocks else None


def _saved(saved: Tensor, tile: Tile, form: Form) -> Tensor:
    """The tile's pre-activations [B, u, m] in the saved buffer."""
    units = form.num_inputs * (form.width if tile.blocks else form.num_shared)
    b = max(1, len(tile.blocks))
    return saved[tile.saved : tile.saved + b * units * tile.rows].view(b, units, tile.rows)


def _hidden(act: Forward, pre: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(act(gate), act(gate) * up), or twice act(up) if the FFN is not gated."""
    if form.num_inputs == 1:
        h = act(pre)
        return h, h
    gate, up = pre.chunk(2, 1)
    a = act(gate)
    return a, a * up


def _dropped(h: Tensor, keep_tf: Tensor | None, tile: Tile, token_q: Any, form: Form) -> Tensor:
    """h as the down-projection's LoRA sees it."""
    if keep_tf is None:
        return h
    if not tile.blocks:
        return h * keep_tf[None, tile.span, : form.num_shared].mT
    blocks = keep_tf[:, form.num_shared :].unflatten(1, (-1, form.width))
    rows = token_q[tile.span].view(len(tile.blocks), -1)
    return h * torch.stack([blocks[row, block] for row, block in zip(rows, tile.blocks)]).mT
