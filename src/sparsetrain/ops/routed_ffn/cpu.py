"""The routed FFN as grouped GEMMs: pairs sorted by block, rows gathered and added back tile by tile.

Hidden units come first in every product (`pre_um`: u units, m rows), so that a block's gate and up halves are each
contiguous however narrow the block is: at 18 units, 88 against 72 GFLOP/s, and elementwise work 4x faster.

Saved for backward: x, x Aᵀ and the pre-activations of the active units. Activations and products are recomputed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS
from sparsetrain.ops.routed_ffn.tiles import Layout, Piece, Tile, lay_out, pad_pairs
from sparsetrain.ops.routing import Grouping

# Below this width one GEMM over the copied gate and up rows is faster than two: 84 against 69 GFLOP/s at 18 units.
PACK_WIDTH = 64


class Call(NamedTuple):
    """What does not change with the data: the form of the FFN."""

    num_shared: int
    width: int
    activation: str
    gates_base: bool  # gate_mode "spt": c on every base product


def grouped_ffn(call: Call, x_td: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], down_df: Tensor, *,
                start_d: Tensor | None, groups: Grouping | None, gate_tk: Tensor | None, low_tr: Tensor | None,
                b_pfr: Tensor | None, a_rf: Tensor | None, keep_tf: Tensor | None, shift_gd: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if groups is None:
        source_q = target_p = token_q = None
        live, padded = [], []
        pair_q = None
    else:
        source_q, target_p, live, padded = pad_pairs(groups.offsets)
        token_q = groups.token_p.index_select(0, source_q)
        pair_q = groups.order_p.index_select(0, source_q)
    layout = lay_out(x_td.shape[0], call.num_shared, call.width, len(weights), live, padded)
    place_tk = None
    if groups is not None and gate_tk is not None:
        # padded place of each (token, slot); places past the end stand for tokens that are not valid
        extra = torch.full((groups.inverse_tk.numel() - len(target_p),), len(token_q), device=x_td.device)
        place_tk = torch.cat([target_p, extra])[groups.inverse_tk.reshape(-1)]
    return _GroupedFFN.apply(call, layout, x_td, low_tr, gate_tk, down_df, start_d, b_pfr, a_rf, shift_gd, keep_tf, token_q,
                             pair_q, place_tk, *weights, *biases)


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, layout: Layout, x, low, gate, down, start, b, a, shift, keep, token, pair, place, *rest):
        n = len(rest) // 2
        weights, biases = rest[:n], rest[n:]
        t, d = x.shape
        y = _start(x, start, call.num_shared)
        low_out = x.new_zeros(t, a.shape[0]) if a is not None else None
        saved = x.new_empty(layout.saved_numel)
        c_q = gate.reshape(-1).index_select(0, pair) if gate is not None and pair is not None else None
        act = ACTIVATIONS[call.activation][0]
        scratch = x.new_empty(layout.scratch_rows, d)
        for tile in layout.tiles:
            xs, lows = _rows(x, tile, token), _rows(low, tile, token)
            ys = scratch[: tile.rows] if tile.routed else y[tile.start : tile.start + tile.rows]
            low_outs = x.new_empty(tile.rows, a.shape[0]) if a is not None else None
            for piece in tile.pieces:
                here = slice(piece.row, piece.row + piece.padded)
                units = slice(piece.unit, piece.unit + piece.width)
                c = c_q[tile.start + piece.row : tile.start + piece.row + piece.padded] if c_q is not None and tile.routed else None
                pre = _saved(saved, piece, n)
                _project(pre, weights, biases, units, xs[here])
                if call.gates_base and c is not None:
                    pre = pre * c
                if lows is not None:
                    pre.addmm_(b[:, units].reshape(-1, b.shape[2]), lows[here].t())
                h = act(pre[: piece.width])
                if n == 2:
                    h.mul_(pre[piece.width :])
                if piece.live < piece.padded:
                    h[:, piece.live :] = 0
                gated = c is not None
                if gated and not call.gates_base:
                    h.mul_(c)
                if low_outs is not None:
                    hk = h if keep is None else h * _rows(keep[:, units], tile, token, here).t()
                    torch.mm(hk.t(), a[:, units].t(), out=low_outs[here])
                if gated and call.gates_base:
                    h.mul_(c)
                if tile.routed and shift is not None:
                    torch.addmm(shift[piece.block], h.t(), down[:, units].t(), beta=-1, out=ys[here])
                    if piece.live < piece.padded:
                        ys[piece.row + piece.live : piece.row + piece.padded] = 0
                elif not tile.routed and start is not None:
                    torch.addmm(start, h.t(), down[:, units].t(), out=ys[here])
                else:
                    torch.mm(h.t(), down[:, units].t(), out=ys[here])
            _add(y, ys, tile, token)
            _add(low_out, low_outs, tile, token, fresh=False)
        ctx.call, ctx.layout, ctx.n = call, layout, n
        ctx.save_for_backward(x, low, gate, down, b, a, keep, token, pair, place, saved, *weights, *biases)
        return y, low_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dlow_out):
        call, layout, n = ctx.call, ctx.layout, ctx.n
        x, low, gate, down, b, a, keep, token, pair, place, saved, *rest = ctx.saved_tensors
        weights, biases = rest[:n], rest[n:]
        need = ctx.needs_input_grad
        needs_x, needs_low, needs_gate, needs_down, needs_start, needs_b, needs_a, needs_shift = need[2:10]
        needs_w, needs_bias = need[14 : 14 + n], need[14 + n :]
        t, d = x.shape
        dy = dy.contiguous()
        dx = _start(x, None, call.num_shared) if needs_x else None
        dlow = torch.zeros_like(low) if needs_low else None
        db = torch.zeros_like(b) if needs_b else None
        da = torch.zeros_like(a) if needs_a else None
        ddown = torch.zeros_like(down) if needs_down else None
        dweights = [torch.zeros_like(w) if needed else None for w, needed in zip(weights, needs_w)]
        dbiases = [torch.zeros_like(w) if needed else None for w, needed in zip(biases, needs_bias)]
        dstart = dy.sum(0) if needs_start else None
        c_q = gate.reshape(-1).index_select(0, pair) if gate is not None and pair is not None else None
        dc_q = x.new_zeros(len(c_q) + 1) if needs_gate and c_q is not None else None
        num_blocks = (down.shape[1] - call.num_shared) // call.width if call.width else 0
        dshift = x.new_zeros(num_blocks, d) if needs_shift else None
        act, act_backward = ACTIVATIONS[call.activation]
        scratch = x.new_empty(layout.scratch_rows, d)
        for tile in layout.tiles:
            dys, dlow_outs, lows = _rows(dy, tile, token), _rows(dlow_out if a is not None else None, tile, token), _rows(low, tile, token)
            xs = _rows(x, tile, token) if any(needs_w) else None
            dxs = None
            if dx is not None:
                dxs = scratch[: tile.rows] if tile.routed else dx[tile.start : tile.start + tile.rows]
            dlows = torch.empty_like(lows) if dlow is not None else None
            for piece in tile.pieces:
                here = slice(piece.row, piece.row + piece.padded)
                units = slice(piece.unit, piece.unit + piece.width)
                w = piece.width
                places = slice(tile.start + piece.row, tile.start + piece.row + piece.padded)
                c = c_q[places] if c_q is not None and tile.routed else None
                base = pre = _saved(saved, piece, n)
                bu = b[:, units].reshape(-1, b.shape[2]) if b is not None else None
                if call.gates_base and c is not None:
                    pre = pre * c
                    if bu is not None:
                        pre.addmm_(bu, lows[here].t())
                h = a_g = act(pre[:w])
                if n == 2:
                    h = a_g * pre[w:]
                dh = torch.mm(down[:, units].t(), dys[here].t())
                if dshift is not None and tile.routed:
                    dshift[piece.block].sub_(dys[piece.row : piece.row + piece.live].sum(0))
                dc = None
                spt = c is not None and call.gates_base
                if spt and dc_q is not None:
                    dc = (dh * h).sum(0)
                if spt:
                    dh.mul_(c)
                hk = h
                if a is not None:
                    au = a[:, units]
                    if keep is None:
                        dh.addmm_(au.t(), dlow_outs[here].t())
                    else:
                        mask = _rows(keep[:, units], tile, token, here).t()
                        dh.add_(torch.mm(au.t(), dlow_outs[here].t()).mul_(mask))
                        hk = h * mask
                if piece.live < piece.padded:
                    dh[:, piece.live :] = 0
                if c is not None and not spt:
                    if dc_q is not None:
                        dc = (dh * h).sum(0)
                    dh.mul_(c)
                if da is not None:
                    dl = dlow_outs[here]
                    if c is not None and not spt:
                        dl = dl * c[:, None]
                    live = piece.live
                    da[:, units].add_(torch.mm(dl[:live].t(), hk[:, :live].t()))
                if ddown is not None:
                    hc = h if c is None else h * c
                    ddown[:, units].addmm_(dys[here][: piece.live].t(), hc[:, : piece.live].t())
                dpre = torch.empty_like(pre)
                if n == 2:
                    torch.mul(dh, a_g, out=dpre[w:])
                    dh.mul_(pre[w:])
                act_backward(dh, pre[:w], dpre[:w])
                if db is not None:
                    db[:, units].add_(torch.mm(dpre, lows[here]).view(n, w, -1))
                if dlows is not None:
                    torch.mm(dpre.t(), bu, out=dlows[here])
                if spt:
                    if dc is not None:
                        dc.add_((dpre * base).sum(0))
                    dpre.mul_(c)
                if dc is not None:
                    dc_q[places] = dc
                for i in range(n):
                    dpi = dpre[i * w : (i + 1) * w]
                    if dweights[i] is not None:
                        dweights[i][units].addmm_(dpi, xs[here])
                    if dbiases[i] is not None:
                        dbiases[i][units].add_(dpi.sum(1))
                if dxs is not None:
                    if n == 2 and w <= PACK_WIDTH:
                        torch.mm(dpre.t(), torch.cat([m[units] for m in weights]), out=dxs[here])
                    else:
                        torch.mm(dpre[:w].t(), weights[0][units], out=dxs[here])
                        if n == 2:
                            dxs[here].addmm_(dpre[w:].t(), weights[1][units])
            _add(dx, dxs, tile, token)
            _add(dlow, dlows, tile, token, fresh=False)
        dgate = dc_q.index_select(0, place).view_as(gate) if dc_q is not None else None
        return (None, None, dx, dlow, dgate, ddown, dstart, db, da, dshift, None, None, None, None, *dweights, *dbiases)


def _start(x, start, num_shared):
    if num_shared:
        return torch.empty_like(x)
    return torch.zeros_like(x) if start is None else start.expand_as(x).clone()


def _rows(table, tile, token, here=slice(None)):
    if table is None:
        return None
    if not tile.routed:
        return table[tile.start : tile.start + tile.rows][here]
    return table.index_select(0, token[tile.start : tile.start + tile.rows][here])


def _add(total, rows, tile, token, fresh=True):
    if rows is None:
        return
    if tile.routed:
        total.index_add_(0, token[tile.start : tile.start + tile.rows], rows)
    elif not fresh:
        total[tile.start : tile.start + tile.rows] = rows


def _saved(saved, piece, n):
    return saved[piece.saved : piece.saved + n * piece.width * piece.padded].view(n * piece.width, piece.padded)


def _project(pre, weights, biases, units, xs):
    w = units.stop - units.start
    if len(weights) == 2 and w <= PACK_WIDTH and biases[0] is None and biases[1] is None:
        torch.mm(torch.cat([m[units] for m in weights]), xs.t(), out=pre)
        return
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        out = pre[i * w : (i + 1) * w]
        if bias is None:
            torch.mm(weight[units], xs.t(), out=out)
        else:
            torch.addmm(bias[units, None], weight[units], xs.t(), out=out)
