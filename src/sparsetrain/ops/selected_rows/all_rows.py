"""Attention of every row without gradient, where it is faster than PyTorch's own call with a mask."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.backend import tuned_for
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.pieces import Piece, pieces_of
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.tiles import forward_by_tiles


def attention_of_all(q_bhtd: Tensor, everything: KeyValues) -> Tensor | None:
    """softmax(q Kᵀ · scale) V of every token, [b, h, t, d], without gradient; None where PyTorch's own is faster.

    PyTorch's attention on CPUs multiplies bf16 by AMX or not at all. Where a processor has AVX-512's units for it
    alone, tiles of two batched products are 2.4 times faster (9 heads of 64, 1,024 to 4,096 tokens). Beside AMX they
    take twice as long as that attention without a mask, and half as long as with one; so padded and packed rows are
    given to it sequence by sequence. In fp32 tiles are no faster. Their scores are rounded to bf16, as in transformers'
    eager attention.
    """
    e = everything
    if tuned_for(q_bhtd) != "cpu" or q_bhtd.dtype != torch.bfloat16 or not any(_units()):
        return None
    b, _, t, _ = q_bhtd.shape
    rows = _all_rows(b, t)
    if _tiles_win():
        return forward_by_tiles(q_bhtd, e, rows)
    if e.segments_bs is None and (e.window is None or e.window >= e.k_bgsd.shape[2]):
        return None
    pieces = pieces_of(e, rows)
    if e.window is None and e.k_bgsd.shape[2] == t and all(_is_whole(p, e.causal) for found in pieces for p in found):
        return _by_sequences(q_bhtd, e, pieces)
    return forward_by_tiles(q_bhtd, e, rows)


def _is_whole(piece: Piece, causal: bool) -> bool:
    """Do its queries begin where its sequence does, all of whose keys stand together?"""
    return not piece.holes and (not causal or piece.q_from == piece.k_from)


def _by_sequences(q_bhtd: Tensor, e: KeyValues, pieces: list[list[Piece]]) -> Tensor:
    out = torch.zeros_like(q_bhtd)
    for sample, found in enumerate(pieces):
        for piece in found:
            # padding behind a causal sequence sees all of it
            within = min(piece.q_to, piece.k_to) if e.causal else piece.q_from
            if within > piece.q_from:
                own = slice(piece.q_from, within)
                _attend(out, q_bhtd, e, sample, own, own, causal=True)
            if piece.q_to > within:
                _attend(
                    out, q_bhtd, e, sample, slice(within, piece.q_to), slice(piece.k_from, piece.k_to), causal=False
                )
    return out


def _attend(out: Tensor, q: Tensor, e: KeyValues, sample: int, queries: slice, keys: slice, causal: bool) -> None:
    """Write one sample's attention of some queries over some keys."""
    k, v = (x[sample, :, keys][None] for x in (e.k_bgsd, e.v_bgsd))
    form: Any = {"scale": e.scale, "is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
    out[sample, :, queries] = F.scaled_dot_product_attention(q[sample, :, queries][None], k, v, **form)[0]


def _tiles_win() -> bool:
    """Are bf16 products of this processor AVX-512's, and not AMX's?"""
    avx512, amx = _units()
    return avx512 and not amx


@cache
def _units() -> tuple[bool, bool]:
    """Has the processor AVX-512's units for bf16 products, and AMX? PyTorch 2.11 and later know."""
    cpu: Any = torch.cpu
    return getattr(cpu, "_is_avx512_bf16_supported", bool)(), getattr(cpu, "_is_amx_tile_supported", bool)()


@lru_cache(maxsize=8)
def _all_rows(b: int, t: int) -> Rows:
    return Rows.of([range(t)] * b, t)
