"""Block lists as GPU kernels read them: what a query block visits, and the inverse, who visits a key block.

Each side comes twice, for blocks that are wholly visible (no mask is computed there) and for partly visible ones. All
of it is built on the device of the lists, without a loop over blocks and without the host waiting for a count.

Legend: b batch, l list heads, i query blocks, j key blocks, k list slots; axes b and l are 1 where all share a list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.ops.block_sparse_attention.tiles import Geometry, classify_blocks


class Listed(NamedTuple):
    """Blocks visited by each owner: its first `counts` places of `ids`, ascending; the places after them hold 0."""

    counts: Tensor  # int32 [b, l, owners]
    ids: Tensor  # int32 [b, l, owners, places]


class Inverse(NamedTuple):
    """Query blocks by key block: those of key block n stand at offsets[n] to offsets[n + 1], ascending."""

    offsets: Tensor  # int32 [b, l, j + 1]
    rows: Tensor  # int32 [b, l, i * k]


class BlockLists(NamedTuple):
    full: Listed
    partial: Listed


def block_lists(blocks_blik: Tensor, segments_bs: Tensor | None, geometry: Geometry) -> BlockLists:
    """The visited blocks of every list: invisible ones are gone, whole and partly visible ones apart.

    Lists that were expanded over the batch or the heads (stride 0) are worked out once, unless segments differ.
    """
    blocks = blocks_blik if blocks_blik.stride(1) else blocks_blik[:, :1]
    blocks = blocks if blocks.stride(0) or segments_bs is not None else blocks[:1]
    seen, every, _ = classify_blocks(blocks, segments_bs, geometry)
    return BlockLists(*(_compact(blocks, keep, geometry.num_key_blocks) for keep in (seen & every, seen & ~every)))


def invert(listed: Listed, num_key_blocks: int) -> Inverse:
    """One stable sort of the visited slots by key block."""
    slots = listed.ids.shape[-1]
    empty = torch.arange(slots, device=listed.ids.device) >= listed.counts[..., None]
    owner, order = listed.ids.masked_fill(empty, num_key_blocks).flatten(2).sort(dim=-1, stable=True)
    blocks = torch.arange(num_key_blocks + 1, dtype=owner.dtype, device=owner.device)
    offsets = torch.searchsorted(owner, blocks.expand(*owner.shape[:2], -1).contiguous(), out_int32=True)
    return Inverse(offsets, (order // max(slots, 1)).int())


def spread(inverse: Inverse, num_query_blocks: int) -> Listed:
    """The inverse as a table with one row a key block, [b, l, j, i]."""
    offsets, rows = inverse
    places = torch.arange(num_query_blocks, device=rows.device)
    counts = offsets.diff(dim=-1)
    inside = places < counts[..., None]
    place = (offsets[..., :-1, None] + places).masked_fill(~inside, 0).flatten(2).long()
    ids = rows.gather(-1, place) if rows.shape[-1] else rows.new_zeros(place.shape)
    return Listed(counts, ids.view_as(inside).masked_fill(~inside, 0))


def _compact(blocks: Tensor, keep: Tensor, num_key_blocks: int) -> Listed:
    ids = blocks.int().masked_fill(~keep, num_key_blocks).sort(dim=-1).values
    return Listed(keep.sum(-1, dtype=torch.int32), ids.masked_fill(ids == num_key_blocks, 0))
