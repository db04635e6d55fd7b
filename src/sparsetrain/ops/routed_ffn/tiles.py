"""Cut the work of a routed FFN into tiles that stay in cache: some rows, and the hidden units they go through.

A tile is a run of tokens that go through the always-on units, or places of the sorted pair list that go through some
blocks. A large block is cut into several tiles. Narrow blocks of about equal load share a tile as one batched product,
because a tile costs about 40 calls into PyTorch however small it is.

Legend: q places of the padded pair list, p pairs, t tokens, k slots of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.ops.routing import Grouping

# Blocks up to this width share tiles, at the price of a copy of their weights: 15-25 % faster at 18 units, 3-7 % at 36,
# and no gain at 72 and 144 (one thread, f+b, loaded machine).
NARROW = 64
# Rows a tile holds at most, for narrow and for wide blocks: 1,024 rows of width 576 are 2.3 MB, to stay in L3.
# From 704 to 2,816 rows no limit was faster beyond noise; 352 was slower.
NARROW_ROWS, WIDE_ROWS = 1536, 1024
# Rows of a block are padded to a multiple of 16, one vector of fp32: 341 rows ran 6-25 % slower than 336.
ROW_MULTIPLE = 16
# A block joins a tile if at most this share of its rows would be padding.
MAX_PADDING = 0.1


class Tile(NamedTuple):
    """`len(blocks) * rows` places from `start` on; for the always-on units (no blocks) `rows` tokens from `start` on.

    rank: place of the first block in the order of tiles.
    saved: where its pre-activations start in the saved buffer.
    """

    blocks: tuple[int, ...]
    rank: int
    start: int
    rows: int
    saved: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + max(1, len(self.blocks)) * self.rows)


class Layout(NamedTuple):
    """All tiles of one call.

    order: the blocks that have pairs, in the order of tiles.
    places: padded places of each of them.
    saved_numel: pre-activations saved.
    """

    tiles: list[Tile]
    order: list[int]
    places: list[int]
    saved_numel: int


class Pairs(NamedTuple):
    """The pairs in the order of tiles, padded.

    pair_q: number of the pair at each place; a padding place repeats the block's last pair.
    token_q: its token.
    sink_q: the same, but t (one past the last token) at padding places: what a padding place computes is added to a
        row that nobody reads, and its gradient is read from a row of zeros.
    place_tk: place of each pair, and `len(pair_q)` for tokens that are not valid.
    """

    pair_q: Tensor
    token_q: Tensor
    sink_q: Tensor
    place_tk: Tensor


def lay_out(num_tokens: int, num_shared: int, width: int, matrices: int, loads: list[int]) -> Layout:
    """Tiles of the always-on units, then of the blocks, those with the largest load first.

    Args:
        num_tokens: t.
        num_shared: always-on units.
        width: units of a block.
        matrices: pre-activations saved for each unit and row (2 for a gated FFN).
        loads: pairs of each block.
    """
    tiles: list[Tile] = []
    saved = start = rank = 0
    for first, rows in _even(num_tokens, WIDE_ROWS) if num_shared else ():
        tiles.append(Tile((), 0, first, rows, saved))
        saved += rows * num_shared * matrices
    order = sorted((block for block, load in enumerate(loads) if load), key=lambda block: -loads[block])
    places: list[int] = []
    limit = NARROW_ROWS if width <= NARROW else WIDE_ROWS
    while rank < len(order):
        rows = _round_up(loads[order[rank]])
        most = max(1, limit // rows) if width <= NARROW else 1
        fits = [block for block in order[rank : rank + most] if loads[block] >= (1 - MAX_PADDING) * rows]
        blocks = tuple(fits) or (order[rank],)
        for _, part in _even(rows, limit) if len(blocks) == 1 else [(0, rows)]:
            tiles.append(Tile(blocks, rank, start, part, saved))
            start += part * len(blocks)
            saved += part * len(blocks) * width * matrices
        places += [rows] * len(blocks)
        rank += len(blocks)
    return Layout(tiles, order, places, saved)


def pad_pairs(groups: Grouping, layout: Layout) -> Pairs:
    """Put the pairs in the order of the layout's tiles, padded to its places."""
    device = groups.offsets.device
    num_tokens, num_slots = groups.inverse_tk.shape
    total = sum(layout.places)
    places, order = torch.tensor([layout.places, layout.order], device=device, dtype=torch.int64)
    rank_q = torch.arange(len(order), device=device).repeat_interleave(places, output_size=total)
    local_q = torch.arange(total, device=device) - (places.cumsum(0) - places)[rank_q]
    count_q = groups.offsets.diff()[order][rank_q]
    live_q = local_q < count_q
    pair_q = groups.order_p[groups.offsets[order][rank_q] + torch.minimum(local_q, count_q - 1)]
    token_q = torch.div(pair_q, num_slots, rounding_mode="floor")
    place_p = torch.full((num_tokens * num_slots + 1,), total, device=device)
    place_p[torch.where(live_q, pair_q, len(place_p) - 1)] = torch.arange(total, device=device)
    return Pairs(pair_q, token_q, torch.where(live_q, token_q, num_tokens), place_p[:-1].view(num_tokens, num_slots))


def _round_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def _even(total: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, size) of about equal parts of at most `limit`, all but the last a multiple of `ROW_MULTIPLE`."""
    if not total:
        return
    size = _round_up(-(-total // -(-total // limit)))
    for start in range(0, total, size):
        yield start, min(size, total - start)
