"""Which (query block, key block) pairs a list really visits, and how, before any score is computed.

A *tile* is one query block of one list head: `block_q` positions times the query heads that share the list. Each
of its listed key blocks is invisible (dropped), partly visible (needs a mask) or fully visible (needs none). Tiles
that keep as many blocks, of which as many are partly visible, form one batch: no padding slot is ever computed.

Legend: b batch, h query heads, g key/value heads, l list heads (g or h), r = h/l query heads per list,
t queries, s keys, i query blocks, j key blocks, k list slots, n tiles of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -1e30
"""Score of an invisible pair: finite, so that a row without any visible key stays a number (and is zeroed later)."""


@dataclass(frozen=True)
class Geometry:
    """The sizes and the visibility rule of one call; queries are aligned with the end of the keys."""

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None

    @property
    def num_query_blocks(self) -> int:
        return -(-self.num_queries // self.block_q)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.num_keys // self.block_k)

    def visible(self, distance: Tensor) -> Tensor:
        """Which pairs the positions allow, from their distance i - j (query position minus key position)."""
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if self.window is None else seen & (distance.abs() < self.window)

    def classify(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """(some pair visible, every pair visible) for blocks whose distances i - j fill [near, far]."""
        some, every = torch.ones_like(near, dtype=torch.bool), torch.ones_like(near, dtype=torch.bool)
        if self.causal:
            some, every = far >= 0, near >= 0
        if self.window is not None:
            some = some & (near < self.window) & (far > -self.window)
            every = every & (far < self.window) & ((near > -self.window) | self.causal)
        return some, every


@dataclass(frozen=True)
class TileBatch:
    """Tiles with equal counts, computed together."""

    query_rows_nr: Tensor  # rows of q viewed as [b*h*i, block_q, d]
    key_rows_nk: Tensor  # rows of k and v viewed as [b*g*j, block_k, d]; partly visible blocks first
    mask: Tensor | None  # additive, [n, 1, r*block_q, k*block_k]; None when every pair is visible


def classify_blocks(blocks: Tensor, segments_bs: Tensor | None, geo: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """(some pair visible, every pair visible, segments differ inside the pair of blocks), each [b, l, i, k]."""
    query_block = torch.arange(geo.num_query_blocks, device=blocks.device)[:, None]
    first_q = geo.num_keys - geo.num_queries + query_block * geo.block_q
    last_q = (first_q + geo.block_q).clamp(max=geo.num_keys) - 1
    first_k = blocks * geo.block_k
    last_k = (first_k + geo.block_k).clamp(max=geo.num_keys) - 1
    seen, every = geo.classify(first_q - last_k, last_q - first_k)
    seen, every = seen & (blocks >= 0), every & (first_k + geo.block_k <= geo.num_keys)
    query_segments, key_segments = segment_blocks(segments_bs, geo)
    if query_segments is None or key_segments is None:
        return seen, every, torch.zeros_like(seen)
    low_q, high_q = (x[:, None, :, None] for x in query_segments.aminmax(dim=-1))
    low_k, high_k = key_segments.aminmax(dim=-1)
    safe = blocks.clamp(min=0).long().flatten(1)
    low_k, high_k = low_k.gather(1, safe).view(blocks.shape), high_k.gather(1, safe).view(blocks.shape)
    seen = seen & (high_q > 0) & (high_k > 0) & (low_k <= high_q) & (high_k >= low_q)
    mixed = (low_q != high_q) | (low_k != high_k) | (low_q != low_k)
    return seen, every & ~mixed, mixed


class TilePlan:
    """The visited blocks of every tile, sorted and grouped; everything here is O(b * l * i * k) integers.

    Args:
        blocks_blik: key block ids, -1 = empty slot.
        segments_bs: segment ids, 0 = padding; or None.
        num_heads, num_kv_heads: h and g.
    """

    def __init__(
        self, blocks_blik: Tensor, segments_bs: Tensor | None, geometry: Geometry, num_heads: int, num_kv_heads: int
    ) -> None:
        self.geometry, self.num_heads, self.num_kv_heads = geometry, num_heads, num_kv_heads
        self.batch, self.list_heads, _, num_slots = blocks_blik.shape
        blocks = blocks_blik.long()
        self.query_segments, self.key_segments = segment_blocks(segments_bs, geometry)
        seen, every, mixed = classify_blocks(blocks, segments_bs, geometry)
        rank = torch.where(seen, every.long(), 2)
        stride = geometry.num_key_blocks + 1
        slot_nk = (rank * stride + blocks).flatten(0, 2).argsort(dim=-1)
        self.blocks_nk = blocks.flatten(0, 2).gather(1, slot_nk)
        kept = seen.sum(-1)
        code = (kept * (num_slots + 1) + (seen & ~every).sum(-1)) * 2 + (seen & mixed).any(-1)
        code, self.order = code.flatten().sort(stable=True)
        codes, counts = torch.unique_consecutive(code, return_counts=True)
        self.groups = [
            (code // 2 // (num_slots + 1), code // 2 % (num_slots + 1), bool(code % 2), count)
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        ]

    def batches(self, max_elements: int, head_dim: int, dtype: torch.dtype) -> Iterator[TileBatch]:
        """Yield the tiles in batches of about `max_elements` gathered numbers (at least one tile each)."""
        geo, start = self.geometry, 0
        rows = self.num_heads // self.list_heads * geo.block_q
        for kept, partial, mixed, count in self.groups:
            stop = start + count
            columns = kept * geo.block_k
            size = 4 * (columns + rows) * head_dim + (rows * columns if partial else 0)
            step = max(1, max_elements // max(1, size))
            for first in range(start, stop if kept else start, step):
                tiles = self.order[first : min(first + step, stop)]
                yield self._batch(tiles, kept, partial, mixed, dtype)
            start = stop

    def _batch(self, tiles: Tensor, kept: int, partial: int, mixed: bool, dtype: torch.dtype) -> TileBatch:
        geo, per_list = self.geometry, self.num_heads // self.list_heads
        blocks = self.blocks_nk[tiles, :kept]
        head = tiles // geo.num_query_blocks  # over (b, l)
        query_block = tiles % geo.num_query_blocks
        query_head = head[:, None] * per_list + torch.arange(per_list)
        key_head = head // (self.list_heads // self.num_kv_heads)
        mask = self._mask(head // self.list_heads, query_block, blocks, partial, mixed, dtype) if partial else None
        return TileBatch(
            query_head * geo.num_query_blocks + query_block[:, None],
            key_head[:, None] * geo.num_key_blocks + blocks,
            mask,
        )

    def _mask(
        self, batch: Tensor, query_block: Tensor, blocks: Tensor, partial: int, mixed: bool, dtype: torch.dtype
    ) -> Tensor:
        """Additive mask; tiles that sit alike relative to their partly visible blocks share one (causal: all)."""
        geo, kept = self.geometry, blocks.shape[1]
        blocks = blocks[:, :partial]
        first_k = blocks * geo.block_k
        shift = geo.num_keys - geo.num_queries + query_block[:, None] * geo.block_q - first_k
        if not geo.causal and geo.window is None:
            shift = torch.zeros_like(shift)
        left = (geo.num_keys - first_k).clamp(max=geo.block_k)
        if not mixed and bool(((shift == shift[:1]) & (left == left[:1])).all()):
            shift, left = shift[:1], left[:1]
        inside = torch.arange(geo.block_k, dtype=torch.int32)
        distance = torch.arange(geo.block_q, dtype=torch.int32)[:, None, None] - inside
        seen = geo.visible(shift.int()[:, None, :, None] + distance) & (inside < left[:, None, :, None])
        if mixed:
            assert self.query_segments is not None and self.key_segments is not None
            query_segments = self.query_segments[batch, query_block][:, :, None, None]
            seen &= (query_segments == self.key_segments[batch[:, None], blocks][:, None]) & (query_segments > 0)
        per_list = self.num_heads // self.list_heads
        mask = torch.zeros(len(seen), per_list, geo.block_q, kept * geo.block_k, dtype=dtype)
        mask[..., : partial * geo.block_k].masked_fill_(~seen.flatten(2)[:, None], MASKED)
        return mask.flatten(1, 2)[:, None].expand(len(blocks), -1, -1, -1)


def segment_blocks(segments_bs: Tensor | None, geo: Geometry) -> tuple[Tensor | None, Tensor | None]:
    """Segment ids cut into query blocks [b, i, block_q] and key blocks [b, j, block_k]; tails repeat the last id."""
    if segments_bs is None:
        return None, None

    def cut(ids: Tensor, size: int) -> Tensor:
        tail = ids[:, -1:].expand(-1, -ids.shape[1] % size)
        return torch.cat((ids, tail), dim=1).view(len(ids), -1, size)

    segments = segments_bs.int()
    return cut(segments[:, geo.num_keys - geo.num_queries :], geo.block_q), cut(segments, geo.block_k)
