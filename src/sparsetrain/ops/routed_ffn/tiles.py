"""Cut the work of a routed FFN into tiles that stay in cache: some rows, and the units they go through.

A tile is either a run of tokens that go through the always-on units, or places of the sorted pair list. A large block
is cut into several tiles; small blocks share one, so that rows are gathered and added back once a tile.

Legend: q places of the padded pair list, p pairs, t tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.ops.routing import Grouping

# Rows a tile holds at most. 1,024 rows of width 576 are 2.3 MB: a tile's inputs, hidden units and outputs stay in L3,
# and its GEMMs run at full rate (they do from about 128 rows on).
TILE_ROWS = 1024
# Rows of a block are padded to a multiple of 16, one vector of fp32: GEMMs on 341 rows were 6-25 % slower than on 336.
ROW_MULTIPLE = 16


class Pairs(NamedTuple):
    """The sorted pairs, each block padded to a multiple of `ROW_MULTIPLE` places.

    pair_q: number of the pair at each place; a padding place repeats the block's last pair.
    token_q: its token.
    sink_q: the same, but the number of tokens (one past the last) at padding places: what a padding place computes is
        added to a row that nobody reads, and its gradient is read from a row of zeros.
    place_tk: place of each pair; `len(token_q)` for tokens that are not valid.
    rows: places of each block.
    """

    pair_q: Tensor
    token_q: Tensor
    sink_q: Tensor
    place_tk: Tensor
    rows: list[int]


class Piece(NamedTuple):
    """Rows `row` to `row + rows` of a tile go through group `group` of units: 0 always on, 1 + g block g."""

    group: int
    row: int
    rows: int
    saved: int  # where its pre-activations start in the saved buffer


class Tile(NamedTuple):
    """Places `start` to `start + rows`, of the padded pair list if `routed`, else tokens."""

    routed: bool
    start: int
    rows: int
    pieces: list[Piece]


class Layout(NamedTuple):
    """All tiles of one call, the numbers they save, and the rows of the largest."""

    tiles: list[Tile]
    saved_numel: int
    max_rows: int


def pad_pairs(groups: Grouping) -> Pairs:
    """Pad the places of each block. Reads the loads on the host: one synchronisation on a GPU."""
    device = groups.offsets.device
    num_tokens, num_slots = groups.inverse_tk.shape
    counts = groups.offsets.diff()
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    rows = padded.tolist()
    total = sum(rows)
    starts = padded.cumsum(0) - padded
    block_q = torch.arange(len(rows), device=device).repeat_interleave(padded, output_size=total)
    local_q = torch.arange(total, device=device) - starts[block_q]
    source_q = groups.offsets[block_q] + torch.minimum(local_q, counts[block_q] - 1)
    pair_q = groups.order_p[source_q]
    token_q = pair_q // num_slots
    sink_q = torch.where(local_q < counts[block_q], token_q, num_tokens)
    place_p = torch.full((num_tokens * num_slots + 1,), total, device=device)
    place_p[torch.where(local_q < counts[block_q], pair_q, -1)] = torch.arange(total, device=device)
    return Pairs(pair_q, token_q, sink_q, place_p[:-1].view(num_tokens, num_slots), rows)


def lay_out(num_tokens: int, sizes: list[int], matrices: int, rows: list[int]) -> Layout:
    """Tiles of the always-on units, then of the blocks in order.

    Args:
        num_tokens: t.
        sizes: hidden units of each group: always on, then each block.
        matrices: pre-activations saved for each unit and row (2 for a gated FFN).
        rows: places of each block.
    """
    tiles: list[Tile] = []
    saved = 0
    if sizes[0]:
        for start, size in _even(num_tokens):
            tiles.append(Tile(False, start, size, [Piece(0, 0, size, saved)]))
            saved += size * sizes[0] * matrices
    start = 0
    pieces: list[Piece] = []
    for group, total in enumerate(rows, 1):
        for _, size in _even(total):
            filled = sum(piece.rows for piece in pieces)
            if filled and filled + size > TILE_ROWS:
                tiles.append(Tile(True, start, filled, pieces))
                start, filled, pieces = start + filled, 0, []
            pieces.append(Piece(group, filled, size, saved))
            saved += size * sizes[group] * matrices
    if pieces:
        tiles.append(Tile(True, start, sum(piece.rows for piece in pieces), pieces))
    return Layout(tiles, saved, max((tile.rows for tile in tiles), default=0))


def _even(total: int) -> Iterator[tuple[int, int]]:
    """(start, size) of about equal parts of at most `TILE_ROWS`, all but the last a multiple of `ROW_MULTIPLE`."""
    if not total:
        return
    size = -(-total // -(-total // TILE_ROWS))
    size = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    for start in range(0, total, size):
        yield start, min(size, total - start)
