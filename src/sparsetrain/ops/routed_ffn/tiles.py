"""Cut the work of a routed FFN into tiles that stay in cache: some rows, and the blocks they go through.

A tile is either rows of all tokens that go through the always-on units, or places of the sorted pair list. A large
block is cut into several tiles; many small blocks share one, so that rows are gathered and added back once a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows a tile holds at most. 1,024 rows of width 576 are 2.3 MB: a tile's inputs, hidden units and outputs stay in L3,
# and its GEMMs run at full rate (they do from about 128 rows on).
TILE_ROWS = 1024
# Rows of a block are padded to a multiple of 16, a vector of fp32: GEMMs on 341 rows ran 6-25 % slower than on 336.
ROW_MULTIPLE = 16


class Piece(NamedTuple):
    """Rows `row` to `row + padded` of a tile go through hidden units `unit` to `unit + width`; `live` of them count."""

    block: int
    unit: int
    width: int
    row: int
    live: int
    padded: int
    saved: int  # where its pre-activations start in the saved buffer


class Tile(NamedTuple):
    """Places `start` to `start + rows`, of the padded pair list if `routed`, else of all tokens."""

    routed: bool
    start: int
    rows: int
    pieces: list[Piece]


class Layout(NamedTuple):
    """All tiles of one call, and what they need: pre-activations saved, and the largest tile."""

    tiles: list[Tile]
    saved_numel: int
    scratch_rows: int


def pad_pairs(offsets: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Pad each block's places to a multiple of `ROW_MULTIPLE`, repeating its last pair.

    Args:
        offsets: int64 [G + 1], as in `Grouping`.

    Returns:
        source_q: place in the sorted list of each padded place.
        target_p: padded place of each place in the sorted list.
        live, padded: rows of each block, without and with the padding.
    """
    counts = offsets.diff()
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    starts = padded.cumsum(0) - padded
    live_list, padded_list = torch.stack([counts, padded]).tolist()
    total = sum(padded_list)
    local_q = torch.arange(total, device=offsets.device) - starts.repeat_interleave(padded, output_size=total)
    last_q = (counts - 1).repeat_interleave(padded, output_size=total)
    source_q = torch.minimum(local_q, last_q) + offsets[:-1].repeat_interleave(padded, output_size=total)
    num_pairs = sum(live_list)
    shift_p = (starts - offsets[:-1]).repeat_interleave(counts, output_size=num_pairs)
    target_p = torch.arange(num_pairs, device=offsets.device) + shift_p
    return source_q, target_p, live_list, padded_list


def lay_out(num_tokens: int, num_shared: int, width: int, matrices: int, live: list[int], padded: list[int]) -> Layout:
    """Tiles of the always-on units, then of the blocks in order; `matrices` pre-activations are saved for each unit."""
    tiles, saved = [], 0
    for row, rows in _even(num_tokens, TILE_ROWS) if num_shared else ():
        tiles.append(Tile(False, row, rows, [Piece(-1, 0, num_shared, 0, rows, rows, saved)]))
        saved += rows * num_shared * matrices
    pieces: list[Piece] = []
    start = rows = 0
    for block, total in enumerate(padded):
        for row, size in _even(total, TILE_ROWS):
            if rows + size > TILE_ROWS and pieces:
                tiles.append(Tile(True, start, rows, pieces))
                start, rows, pieces = start + rows, 0, []
            here = min(size, live[block] - row)
            pieces.append(Piece(block, num_shared + block * width, width, rows, here, size, saved))
            rows += size
            saved += size * width * matrices
    if pieces:
        tiles.append(Tile(True, start, rows, pieces))
    return Layout(tiles, saved, max((tile.rows for tile in tiles), default=0))


def _even(total: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, size) of parts of at most `limit`, about equal, all but the last a multiple of `ROW_MULTIPLE`."""
    num_parts = -(-total // limit)
    if not num_parts:
        return
    size = -(-total // num_parts // ROW_MULTIPLE) * ROW_MULTIPLE
    for start in range(0, total, size):
        yield start, min(size, total - start)
