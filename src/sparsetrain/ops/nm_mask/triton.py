"""N:M masks in one pass over the weights: a tile's scores stay in registers, and nothing but the mask is written.

A pattern's score is a sum of four pairs, one of the six of each row: 24 pairs and three sums a pattern stand in for 90
products of 16. They are fp64, as in the reference: of two patterns that fp32 cannot tell apart both take the same. That
is 80 M sums for 4 M weights.
"""

# Kernels are a language of their own, and types are checked also where Triton is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = 128
"""Tiles of a program, a thread each."""
_ENTRIES = 1024
"""Entries that a program ranks, in whole groups."""


@triton.constexpr_function
def _row(pair):
    """The row of pair 0..5, a digit an entry, in the order of `tile_patterns`."""
    return (0x0011, 0x0101, 0x0110, 0x1001, 0x1010, 0x1100)[pair]


@triton.constexpr_function
def _last(i, j, k):
    """The pair of the last row below three others that leaves two ones in every column, or -1."""
    rows = [_row(pair) for pair in range(6)]
    rest = 0x2222 - rows[i] - rows[j] - rows[k]
    return rows.index(rest) if rest in rows else -1


@triton.constexpr_function
def _word(i, j, k, last):
    """A pattern as 16 bits, the first entry in the highest."""
    return sum(((_row(pair) >> 4 * n) & 1) << (4 * r + n) for r, pair in enumerate((last, k, j, i)) for n in range(4))


@triton.jit
def _pairs(w, TILES: tl.constexpr):
    """Sums of two of a row's magnitudes [TILES, 4], in the order of `_row`."""
    even, odd = tl.split(tl.reshape(tl.abs(w.to(tl.float64)), [TILES, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return c + d, b + d, b + c, a + d, a + c, a + b


@triton.jit
def _transposable(w, mask, so, si, tiles_in, TILES: tl.constexpr):
    """The mask [out, in], contiguous, of one row of tiles."""
    row = tl.program_id(0).to(tl.int64) * 4
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tl.arange(0, 4)
    inside = (tile < tiles_in)[:, None] & (column < 4)[None]
    entry = (tile.to(tl.int64) * 4)[:, None] + column[None]
    w += row * so + entry * si
    first = _pairs(tl.load(w, mask=inside, other=0.0), TILES)
    second = _pairs(tl.load(w + so, mask=inside, other=0.0), TILES)
    third = _pairs(tl.load(w + 2 * so, mask=inside, other=0.0), TILES)
    fourth = _pairs(tl.load(w + 3 * so, mask=inside, other=0.0), TILES)
    best = tl.full([TILES], -1.0, tl.float64)
    word = tl.full([TILES], _word(0, 0, 5, 5), tl.int32)
    for i in tl.static_range(6):
        for j in tl.static_range(6):
            for k in tl.static_range(6):
                if _last(i, j, k) >= 0:
                    kept = (first[i] + second[j]) + (third[k] + fourth[_last(i, j, k)])
                    more = kept > best  # the first of equal ones stays
                    best = tl.where(more, kept, best)
                    word = tl.where(more, _word(i, j, k, _last(i, j, k)), word)
    for r in tl.static_range(4):
        bits = (word[:, None] >> (15 - 4 * r - column)[None]) & 1
        tl.store(mask + (row + r) * tiles_in * 4 + entry, bits.to(tl.uint8), mask=inside)


@triton.jit
def _ranked(
    w, mask, groups, inner, keep, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ABS: tl.constexpr
):
    """A group's entries are `inner` apart; an entry is kept if fewer than `keep` of its group beat it."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, PADDED)
    start = group // inner * (inner * SIZE) + group % inner
    entry = start[:, None] + place[None] * inner
    inside = (group < groups)[:, None] & (place < SIZE)[None]
    own = tl.load(w + entry, mask=inside, other=0.0)
    own = tl.abs(own) if ABS else own
    beaten_by = tl.zeros([GROUPS, PADDED], tl.int32)
    for other in tl.static_range(SIZE):
        theirs = tl.load(w + start + other * inner, mask=group < groups, other=0.0)[:, None]
        theirs = tl.abs(theirs) if ABS else theirs
        # a tie goes to the earlier entry
        beaten_by += ((theirs > own) | ((theirs == own) & (other < place)[None])).to(tl.int32)
    tl.store(mask + entry, (beaten_by < keep).to(tl.uint8), mask=inside)


@torch.library.custom_op("sparsetrain::transposable_mask", mutates_args=())
def transposable(w_oi: Tensor) -> Tensor:
    """bool [out, in]; any strides."""
    mask = _empty(w_oi)
    tiles_out, tiles_in = w_oi.shape[0] // 4, w_oi.shape[1] // 4
    with torch.cuda.device_of(w_oi):  # kernels go to the current device, wherever their tensors are
        _transposable[(tiles_out, triton.cdiv(tiles_in, _TILES))](
            w_oi, mask.view(torch.uint8), *w_oi.stride(), tiles_in, _TILES, num_warps=4
        )
    return mask


@torch.library.custom_op("sparsetrain::nm_mask", mutates_args=())
def ranked(w: Tensor, keep: int, group: int, dim: int, magnitude: bool) -> Tensor:
    """bool, of w's shape."""
    mask, w = _empty(w), w.contiguous()
    inner, padded = w.shape[dim + 1 :].numel(), triton.next_power_of_2(group)
    groups, of_program = w.numel() // group, max(1, _ENTRIES // padded)
    with torch.cuda.device_of(w):  # kernels go to the current device, wherever their tensors are
        _ranked[(triton.cdiv(groups, of_program),)](
            w, mask.view(torch.uint8), groups, inner, keep, group, padded, of_program, magnitude, num_warps=4
        )
    return mask


@transposable.register_fake
def _(w_oi: Tensor) -> Tensor:
    return _empty(w_oi)


@ranked.register_fake
def _(w: Tensor, keep: int, group: int, dim: int, magnitude: bool) -> Tensor:
    return _empty(w)


def _empty(w: Tensor) -> Tensor:
    return torch.empty(w.shape, dtype=torch.bool, device=w.device)
