"""Attention of selected queries tile by tile, in plain PyTorch, on any device.

The backward walks tiles of sorted queries and forms the probabilities again. A causal tile reads the keys up to its
last query and no further, and dK, dV are formed for selected keys alone: of the five products of a dense backward,
three have |S| rows and two have |S| rows and |S| columns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrain.core.autograd import unwatched
from sparsetrain.core.backend import tuned_for
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.pieces import Piece, pieces_of
from sparsetrain.ops.selected_rows.rows import Rows

TILE_ROWS = 128
"""Queries of a tile, times the heads that share a key; in half precision four times as many: with two threads a step of
SmolLM2 on 1,024 tokens is then 2.28 times faster than dense LoRA's, instead of 2.01."""
GPU_TILE_ELEMENTS = 2**24
"""Probabilities of a tile on a GPU (64 MiB in fp32), where many small products wait for their launches."""


class _Tile:
    """Queries `q_from:q_to` of one sample, the keys `s_from:s_to` they can see, and the selected keys among these."""

    def __init__(self, e: KeyValues, rows: Rows, sample: int, piece: Piece, q_from: int, q_to: int) -> None:
        positions = rows.positions[sample]
        offset = e.k_bgsd.shape[2] - rows.num_tokens
        first, last = positions[q_from] + offset, positions[q_to - 1] + offset
        self.q_from, self.q_to = q_from, q_to
        self.s_from = piece.k_from if e.window is None else max(piece.k_from, first - e.window + 1)
        reach = last if e.causal else piece.k_to if e.window is None else last + e.window - 1
        self.s_to = max(self.s_from, min(piece.k_to, reach + 1))
        # the selected keys in that range are a stretch of the sorted positions
        self.k_from = bisect_left(positions, self.s_from - offset)
        self.k_to = bisect_left(positions, self.s_to - offset)
        beyond = e.window is not None and (last - e.window >= piece.k_to - 1 or piece.k_from - e.window >= first)
        self.may_see_nothing = piece.holes or beyond  # then a query's softmax is of hidden keys alone
        self._e, self._sample, self._holes, self.offset = e, sample, piece.holes, offset
        # where only later keys are hidden, the first query sees all up to its own
        self._hidden_from = self.s_from if piece.holes or e.window is not None else first + 1 if e.causal else self.s_to

    def hidden(self, index_k: Tensor) -> tuple[slice, Tensor] | None:
        """(keys, bool [queries, keys]) where a key of the range is not visible; keys before them are visible to all."""
        e = self._e
        if self._hidden_from >= self.s_to:
            return None
        i = index_k[self.q_from : self.q_to, None] + self.offset
        j = torch.arange(self._hidden_from, self.s_to, device=index_k.device)[None]
        hidden = j > i if e.causal else torch.zeros(1, 1, dtype=torch.bool, device=index_k.device)
        if e.window is not None:
            hidden = hidden | ((i - j) >= e.window) | ((j - i) >= e.window)
        if self._holes:
            assert e.segments_bs is not None
            segments = e.segments_bs[self._sample]
            looks_at = segments[self.offset :] if e.looks_at_bt is None else e.looks_at_bt[self._sample]
            of_keys = segments[None, self._hidden_from : self.s_to]
            hidden = hidden | (looks_at[i - self.offset] != of_keys) | (of_keys == 0)
        return slice(self._hidden_from - self.s_from, self.s_to - self.s_from), hidden


def _tiles(e: KeyValues, rows: Rows, heads: int) -> Iterator[tuple[int, Tensor, list[_Tile]]]:
    """(sample, its positions, its tiles) of every sample with selected rows; queries that see nothing are in none."""
    groups, num_keys = e.k_bgsd.shape[1:3]
    size = max(1, TILE_ROWS * (4 if e.k_bgsd.element_size() == 2 else 1) * groups // heads)
    if tuned_for(e.k_bgsd) != "cpu":
        size = max(size, GPU_TILE_ELEMENTS // (heads * num_keys))
    for sample, pieces in enumerate(pieces_of(e, rows)):
        tiles = [
            _Tile(e, rows, sample, piece, q, min(q + size, piece.q_to))
            for piece in pieces
            for q in range(piece.q_from, piece.q_to, size)
        ]
        if tiles := [tile for tile in tiles if tile.s_from < tile.s_to]:
            yield sample, rows.index_bk[sample], tiles


def _probabilities(q_gnd: Tensor, k_gsd: Tensor, tile: _Tile, index_k: Tensor, dtype: torch.dtype) -> Tensor:
    """[g, rep·queries, keys] in `dtype`, formed in fp32 or better; q holds the scale."""
    scores = torch.bmm(q_gnd, k_gsd[:, tile.s_from : tile.s_to].transpose(1, 2))
    masked = tile.hidden(index_k)
    if masked is None:
        return _softmax(scores, dtype)
    keys, hidden = masked
    queries = (-1, tile.q_to - tile.q_from)
    # a sum takes a CPU a third of the time of masked_fill_ with a mask that is broadcast; softmax makes it 0 as well
    lowest = torch.finfo(scores.dtype).min
    scores.unflatten(1, queries)[..., keys].add_(hidden.to(scores.dtype), alpha=lowest)
    p = _softmax(scores, dtype)
    if tile.may_see_nothing:
        p.unflatten(1, queries).masked_fill_(hidden.all(-1, keepdim=True), 0)
    return p


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """In bf16 it is formed in fp32 all the same, and rounded once. Asked for fp32 from bf16, a CPU takes five times as
    long as for both steps, one after the other (126 x 700: 911 µs, 174 in bf16)."""
    return torch.softmax(scores.to(dtype) if scores.is_cpu else scores, dim=-1, dtype=None if scores.is_cpu else dtype)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, the sum over tiles in the dtype of `total`."""
    if total.dtype == b.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a.to(b.dtype), b)


def _of_sample(x_bhkd: Tensor, sample: int, groups: int) -> Tensor:
    """[b, h, k, d] -> [g, rep, k, d] of one sample."""
    return x_bhkd[sample].unflatten(0, (groups, -1))


def _rows_of(x_grkd: Tensor, tile: _Tile) -> Tensor:
    """[g, rep, k, d] -> [g, rep·queries, d] of one tile."""
    return x_grkd[:, :, tile.q_from : tile.q_to].flatten(1, 2)


@unwatched
def forward_by_tiles(q_bhkd: Tensor, e: KeyValues, rows: Rows) -> Tensor:
    groups = e.k_bgsd.shape[1]
    out = torch.zeros_like(q_bhkd, memory_format=torch.contiguous_format)
    for sample, index_k, tiles in _tiles(e, rows, q_bhkd.shape[1]):
        q, o = _of_sample(q_bhkd * e.scale, sample, groups), _of_sample(out, sample, groups)
        for tile in tiles:
            p = _probabilities(_rows_of(q, tile), e.k_bgsd[sample], tile, index_k, q.dtype)
            found = torch.bmm(p, e.v_bgsd[sample][:, tile.s_from : tile.s_to])
            o[:, :, tile.q_from : tile.q_to] = found.unflatten(1, (o.shape[1], -1))
    return out


def backward_by_tiles(
    do: Tensor, q: Tensor, e: KeyValues, rows: Rows, everywhere: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [b, h, k, d], dk and dv [b, g, k, d] of selected keys; [b, g, s, d] of all keys with `everywhere`); dk and
    dv in fp32 or better."""
    b, groups, num_keys = e.k_bgsd.shape[:3]
    width = num_keys if everywhere else q.shape[2]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(b, groups, width, x.shape[3], dtype=_accurate(x.dtype)) for x in (e.k_bgsd, e.v_bgsd))
    for sample, index_k, tiles in _tiles(e, rows, q.shape[1]):
        q_s, do_s = _of_sample(q * e.scale, sample, groups), _of_sample(do, sample, groups)
        dq_s = _of_sample(dq, sample, groups)
        for tile in tiles:
            tensors = q_s, do_s, e.k_bgsd[sample], e.v_bgsd[sample], dq_s, dk[sample], dv[sample]
            _backward_tile(tile, index_k, *tensors, e.scale, everywhere=everywhere)
    return dq, dk, dv


def _backward_tile(
    tile: _Tile, index_k: Tensor, q: Tensor, do: Tensor, keys: Tensor, values: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, scale: float, everywhere: bool,
) -> None:  # fmt: skip
    """everywhere: dk and dv are of all keys, and not of the selected ones alone."""
    q_n, do_n = _rows_of(q, tile), _rows_of(do, tile)
    seen = slice(tile.s_from, tile.s_to)
    chosen = seen if everywhere else slice(tile.k_from, tile.k_to)

    def columns(x: Tensor) -> Tensor:
        return x if everywhere else x.index_select(2, index_k[chosen] + (tile.offset - tile.s_from))

    p = _probabilities(q_n, keys, tile, index_k, _accurate(q.dtype))
    _add_product(dv[:, chosen], columns(p).transpose(1, 2), do_n)
    dp = torch.bmm(do_n, values[:, seen].transpose(1, 2)).to(p.dtype)
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).to(q.dtype)
    _add_product(dk[:, chosen], columns(ds).transpose(1, 2), q_n)
    dq[:, :, tile.q_from : tile.q_to] = torch.bmm(ds, keys[:, seen]).mul_(scale).unflatten(1, (dq.shape[1], -1))
