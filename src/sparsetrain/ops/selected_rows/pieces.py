"""Pieces: consecutive selected queries that look at one sequence, and where that stands among the keys.

Tiles that end where a sequence does read no key of another one, and need no mask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows


class Piece(NamedTuple):
    """Of a sample's selected queries, `q_from:q_to` look at a sequence whose keys are among `k_from:k_to`.

    Attributes:
        holes: not all of these keys belong to it.
    """

    q_from: int
    q_to: int
    k_from: int
    k_to: int
    holes: bool = False


def pieces_of(e: KeyValues, rows: Rows) -> list[list[Piece]]:
    """The pieces of every sample; queries that stand before all they look at, and see no later key, are in none.

    The sequences are read on the host once a selection.
    """
    if e.segments_bs is None:
        return [[Piece(0, len(positions), 0, e.k_bgsd.shape[2])] for positions in rows.positions]
    told = e.segments_bs, e.looks_at_bt, e.causal
    known = rows.masks.get("pieces")
    if known is None or any(x is not y for x, y in zip(known[0], told, strict=True)):
        known = rows.masks["pieces"] = told, _found(e.segments_bs, e.looks_at_bt, e.causal, rows)
    return known[1]


def _found(segments_bs: Tensor, looks_at_bt: Tensor | None, causal: bool, rows: Rows) -> list[list[Piece]]:
    offset = segments_bs.shape[1] - rows.num_tokens
    segments = segments_bs.tolist()
    looks = [row[offset:] for row in segments] if looks_at_bt is None else looks_at_bt.tolist()
    return [
        list(_of_sample(positions, ids, seen, offset if causal else None))
        for positions, ids, seen in zip(rows.positions, segments, looks, strict=True)
    ]


def _of_sample(
    positions: Sequence[int], segments: Sequence[int], looks_at: Sequence[int], offset: int | None
) -> Iterator[Piece]:
    """offset: keys before the first token, where queries see no later key."""
    stretches: dict[int, list[int]] = {}  # sequence -> [first key, last key, number of keys]
    at = 0
    for sequence, keys in groupby(segments):
        count = sum(1 for _ in keys)
        found = stretches.setdefault(sequence, [at, at, 0])
        at += count
        found[1], found[2] = at, found[2] + count
    q_from = 0
    for sequence, queries in groupby(looks_at[position] for position in positions):
        q_to = q_from + sum(1 for _ in queries)
        if sequence > 0 and sequence in stretches:
            k_from, k_to, count = stretches[sequence]
            while offset is not None and q_from < q_to and positions[q_from] + offset < k_from:
                q_from += 1
            if q_from < q_to:
                yield Piece(q_from, q_to, k_from, k_to, count < k_to - k_from)
        q_from = q_to
