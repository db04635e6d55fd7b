"""The routed FFN as grouped GEMMs: pairs sorted by block, rows gathered and added back tile by tile.

Hidden units come first in every product (`pre_um`), so that a block's gate and up halves are each contiguous however
narrow the block is: at 18 units the GEMM runs at 88 against 72 GFLOP/s and elementwise work is four times faster.

Saved for backward: x, x Aᵀ, and the pre-activations of the active units. Activations and products are recomputed, and
a token's gate receives ⟨dh, h⟩, so no block output is kept.

Legend: t tokens, d model width, f hidden units, r LoRA rank, u hidden units of one block, m rows of one tile, q places
of the padded pair list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS
from sparsetrain.ops.routed_ffn.problem import Problem
from sparsetrain.ops.routed_ffn.tiles import Layout, Piece, Tile, lay_out, pad_pairs

# Below this width one GEMM over the copied gate and up rows beats two: 84 against 69 GFLOP/s at 18 units.
PACK_WIDTH = 64


class Group(NamedTuple):
    """Views of what belongs to some hidden units: the parameters, or (None where not wanted) their gradients."""

    weights: tuple[Tensor | None, ...]  # [u, d], gate before up
    biases: tuple[Tensor | None, ...]  # [u]
    lora_b: tuple[Tensor | None, ...]  # [u, r]
    down_ud: Tensor | None
    lora_a_ur: Tensor | None


def grouped_ffn(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(y [t, d], h Aᵀ [t, r] of the down-projection's LoRA or None). See `Problem` for the equation."""
    p = problem
    pairs = pad_pairs(p.groups) if p.groups is not None else None
    layout = lay_out(p.x_td.shape[0], p.sizes, len(p.weights), pairs.rows if pairs else [])
    indices = (pairs.pair_q, pairs.token_q, pairs.sink_q, pairs.place_tk) if pairs else (None,) * 4
    return _GroupedFFN.apply(
        (p.activation, p.gates_base, p.sizes, layout),
        p.x_td, p.low_tr, p.gate_tk, p.start_d, p.shift_gd, p.down_df, p.lora_a_rf, p.keep_tf,
        *indices, *p.weights, *p.biases, *p.lora_b,
    )  # fmt: skip


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Any, x_td: Tensor, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        low_tr, gate_tk, start_d, shift_gd, down_df, a_rf, keep_tf, pair_q, token_q, sink_q, place_tk, *rest = tensors
        activation, gates_base, sizes, layout = form
        groups = _split(sizes, down_df, a_rf, rest)
        act, _ = ACTIVATIONS[activation]
        c_q = gate_tk.reshape(-1)[pair_q] if gate_tk is not None and pair_q is not None else None
        pre = x_td.new_empty(layout.saved_numel)
        y = _Rows(x_td, layout, x_td.shape[1], start_d, fresh=bool(sizes[0]))
        low_out = _Rows(x_td, layout, a_rf.shape[0]) if a_rf is not None else None
        for tile in layout.tiles:
            xs, lows = _gather(x_td, tile, token_q), _gather(low_tr, tile, token_q)
            ys, low_outs = y.of(tile), low_out.of(tile) if low_out is not None else None
            for piece in tile.pieces:
                group, here = groups[piece.group], slice(piece.row, piece.row + piece.rows)
                c = c_q[tile.start :][here] if c_q is not None and tile.routed else None
                pre_um = _saved(pre, piece, group)
                _project(pre_um, group, xs[here])
                if c is not None and gates_base:
                    pre_um = pre_um * c
                _add_lora(pre_um, group, lows, here)
                _, h_um = _hidden(act, pre_um, len(group.weights))
                if c is not None and not gates_base:
                    h_um.mul_(c)
                if low_outs is not None:
                    torch.mm(_keep(h_um, keep_tf, piece, sizes, tile, token_q).t(), group.lora_a_ur, out=low_outs[here])
                if c is not None and gates_base:
                    h_um.mul_(c)
                offset_d = start_d if not tile.routed else None if shift_gd is None else -shift_gd[piece.group - 1]
                _mm(h_um.t(), group.down_ud, ys[here], offset_d)
            y.add(tile, sink_q, ys)
            if low_out is not None:
                low_out.add(tile, sink_q, low_outs)
        ctx.form = form
        ctx.save_for_backward(x_td, low_tr, gate_tk, down_df, a_rf, keep_tf, pair_q, token_q, sink_q, place_tk, pre, *rest)
        return y.done(), low_out.done() if low_out is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x_td, low_tr, gate_tk, down_df, a_rf, keep_tf, pair_q, token_q, sink_q, place_tk, pre, *rest = ctx.saved_tensors
        activation, gates_base, sizes, layout = ctx.form
        act, act_backward = ACTIVATIONS[activation]
        _, need_x, need_low, need_gate, need_start, need_shift, need_down, need_a, *need_rest = ctx.needs_input_grad
        need_rest = need_rest[5:]
        groups = _split(sizes, down_df, a_rf, rest)
        d_down, d_a = _zeros(down_df, need_down), _zeros(a_rf, need_a)
        d_rest = [_zeros(tensor, needed) for tensor, needed in zip(rest, need_rest)]
        d_groups = _split(sizes, d_down, d_a, d_rest)
        dy_td, dlow_out = _with_zero_row(grads[0]), _with_zero_row(grads[1]) if a_rf is not None else None
        c_q = gate_tk.reshape(-1)[pair_q] if gate_tk is not None and pair_q is not None else None
        dc_q = x_td.new_zeros(len(pair_q) + 1) if need_gate and c_q is not None else None
        dx = _Rows(x_td, layout, x_td.shape[1], fresh=bool(sizes[0])) if need_x else None
        dlow = _Rows(x_td, layout, low_tr.shape[1]) if need_low else None
        d_shift = x_td.new_zeros(len(sizes) - 1, x_td.shape[1]) if need_shift else None
        for tile in layout.tiles:
            xs = _gather(x_td, tile, token_q) if any(need_rest) else None
            lows, dys, dlow_outs = _gather(low_tr, tile, token_q), _gather(dy_td, tile, sink_q), _gather(dlow_out, tile, sink_q)
            dxs, dlows = dx.of(tile) if dx is not None else None, dlow.of(tile) if dlow is not None else None
            for piece in tile.pieces:
                group, d_group, here = groups[piece.group], d_groups[piece.group], slice(piece.row, piece.row + piece.rows)
                n = len(group.weights)
                c = c_q[tile.start :][here] if c_q is not None and tile.routed else None
                base_um = pre_um = _saved(pre, piece, group)
                spt = c is not None and gates_base
                if spt:
                    pre_um = pre_um * c
                    _add_lora(pre_um, group, lows, here)
                a_um, h_um = _hidden(act, pre_um, n)
                dh_um = torch.mm(group.down_ud, dys[here].t())
                dc = None
                if spt:
                    dc = (dh_um * h_um).sum(0)
                    dh_um.mul_(c)
                if dlow_outs is not None:
                    part = dlow_outs[here]
                    if keep_tf is None:
                        dh_um.addmm_(group.lora_a_ur, part.t())
                    else:
                        dh_um.add_(_keep(torch.mm(group.lora_a_ur, part.t()), keep_tf, piece, sizes, tile, token_q))
                    if d_group.lora_a_ur is not None:
                        d_group.lora_a_ur.addmm_(_keep(h_um, keep_tf, piece, sizes, tile, token_q), part if c is None or spt else part * c[:, None])
                if c is not None and not spt:
                    if dc_q is not None:
                        dc = (dh_um * h_um).sum(0)
                    dh_um.mul_(c)
                if d_group.down_ud is not None:
                    d_group.down_ud.addmm_(h_um if c is None else h_um * c, dys[here])
                dpre_um = torch.empty_like(pre_um)
                dpres = dpre_um.chunk(n)
                if n == 2:
                    torch.mul(dh_um, a_um, out=dpres[1])
                    dh_um.mul_(pre_um.chunk(2)[1])
                act_backward(dh_um, pre_um.chunk(n)[0], dpres[0])
                col = 0
                for dpre, b, d_b in zip(dpres, group.lora_b, d_group.lora_b):
                    if b is not None:
                        cols = slice(col, col + b.shape[1])
                        col += b.shape[1]
                        if d_b is not None:
                            d_b.addmm_(dpre, lows[here, cols])
                        if dlows is not None:
                            torch.mm(dpre.t(), b, out=dlows[here, cols])
                if spt:
                    dc.add_((dpre_um * base_um).sum(0))
                    dpre_um.mul_(c)
                if dc_q is not None and dc is not None:
                    dc_q[tile.start + piece.row : tile.start + piece.row + piece.rows] = dc
                for dpre, d_w, d_bias in zip(dpres, d_group.weights, d_group.biases):
                    if d_w is not None:
                        d_w.addmm_(dpre, xs[here])
                    if d_bias is not None:
                        d_bias.add_(dpre.sum(1))
                if d_shift is not None and tile.routed:
                    d_shift[piece.group - 1].sub_(dys[here].sum(0))
                if dxs is not None:
                    if _packs(group):
                        torch.mm(dpre_um.t(), torch.cat(group.weights), out=dxs[here])
                    else:
                        torch.mm(dpres[0].t(), group.weights[0], out=dxs[here])
                        if n == 2:
                            dxs[here].addmm_(dpres[1].t(), group.weights[1])
            if dx is not None:
                dx.add(tile, token_q, dxs)
            if dlow is not None:
                dlow.add(tile, token_q, dlows)
        d_gate = dc_q[place_tk] if dc_q is not None else None
        d_start = dy_td.sum(0) if need_start else None
        return (None, dx.done() if dx else None, dlow.done() if dlow else None, d_gate, d_start, d_shift, d_down, d_a,
                *(None,) * 5, *d_rest)


class _Rows:
    """A [t + 1, width] sum of tile rows; the last row takes what padding places compute."""

    def __init__(self, like, layout, width, start_d=None, fresh=False):
        low = like.dtype in (torch.float16, torch.bfloat16)
        self.dtype = like.dtype
        self.total = like.new_empty(like.shape[0] + 1, width, dtype=torch.float32 if low else like.dtype)
        self.direct = not low
        if not fresh:
            self.total.zero_() if start_d is None else self.total.copy_(start_d.expand_as(self.total))
        self.scratch = like.new_empty(layout.max_rows, width)

    def of(self, tile):
        return self.scratch[: tile.rows] if tile.routed or not self.direct else self.total[tile.start : tile.start + tile.rows]

    def add(self, tile, index_q, rows):
        if tile.routed:
            self.total.index_add_(0, index_q[tile.start : tile.start + tile.rows], rows.to(self.total.dtype))
        elif not self.direct:
            self.total[tile.start : tile.start + tile.rows] = rows

    def done(self):
        return self.total.resize_(self.total.shape[0] - 1, self.total.shape[1]).to(self.dtype)


def _split(sizes, down_df, a_rf, rest):
    n = len(rest) // 3
    cut = lambda tensor: tensor.split(sizes) if tensor is not None else [None] * len(sizes)
    parts = [list(zip(*[cut(m) for m in rest[i * n : (i + 1) * n]])) for i in range(3)]
    downs = cut(down_df.t() if down_df is not None else None)
    lows = cut(a_rf.t() if a_rf is not None else None)
    return [Group(*views) for views in zip(*parts, downs, lows)]


def _zeros(tensor, needed):
    return torch.zeros_like(tensor) if needed and tensor is not None else None


def _with_zero_row(rows_td):
    padded = rows_td.new_zeros(rows_td.shape[0] + 1, rows_td.shape[1])
    padded[:-1] = rows_td
    return padded


def _gather(table, tile, index_q):
    if table is None:
        return None
    here = slice(tile.start, tile.start + tile.rows)
    return table.index_select(0, index_q[here]) if tile.routed else table[here]


def _saved(pre, piece, group):
    units = len(group.weights) * group.weights[0].shape[0]
    return pre[piece.saved : piece.saved + units * piece.rows].view(units, piece.rows)


def _packs(group):
    return len(group.weights) == 2 and group.weights[0].shape[0] <= PACK_WIDTH


def _project(pre_um, group, xs):
    if _packs(group):
        torch.mm(torch.cat(group.weights), xs.t(), out=pre_um)
        for part, bias in zip(pre_um.chunk(2), group.biases):
            if bias is not None:
                part.add_(bias[:, None])
        return
    for part, weight, bias in zip(pre_um.chunk(len(group.weights)), group.weights, group.biases):
        _mm(weight, xs.t(), part, bias[:, None] if bias is not None else None)


def _mm(a, b, out, offset):
    torch.mm(a, b, out=out) if offset is None else torch.addmm(offset, a, b, out=out)


def _add_lora(pre_um, group, lows, here):
    col = 0
    for part, b in zip(pre_um.chunk(len(group.weights)), group.lora_b):
        if b is not None:
            part.addmm_(b, lows[here, col : col + b.shape[1]].t())
            col += b.shape[1]


def _hidden(act, pre_um, n):
    if n == 1:
        h = act(pre_um)
        return h, h
    gate, up = pre_um.chunk(2)
    a = act(gate)
    return a, a * up


def _keep(h_um, keep_tf, piece, sizes, tile, token_q):
    if keep_tf is None:
        return h_um
    first = sum(sizes[: piece.group])
    rows = slice(tile.start + piece.row, tile.start + piece.row + piece.rows)
    keep = keep_tf[:, first : first + sizes[piece.group]]
    keep = keep.index_select(0, token_q[rows]) if tile.routed else keep[rows]
    return h_um * keep.t()
