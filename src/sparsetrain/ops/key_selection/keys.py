"""Keys for every query, a few queries at a time. Legend in `__init__`; r query rows of a tile, n keys of a tile.

Keys of a row get a level: 0 invisible, then the score, the forced ones on top. The L best are those above a cut level
and, of those at the cut, the nearest (`bucket4`: the oldest). Finding the cut by bisection over a dozen byte-wide
levels replaces `torch.topk`, which needs 120 microseconds for a row of 4,096 keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.ops.key_selection.scores import products, query_tables, table_scores
from sparsetrain.ops.key_selection.visibility import Sequences, Visibility

TILE_ELEMENTS = 2**20
"""Levels of a tile: 1 MiB of bytes."""


@dataclass(frozen=True)
class Rule:
    """What a query sees and what it must keep."""

    visibility: Visibility
    selection: str
    local_tokens: int
    keep_first: bool

    def forced(self, place_r: Tensor, place_n: Tensor, first_r: Tensor) -> Tensor:
        """[r, n]: the query's neighbours, itself among them, and the first key of its sequence."""
        distance = place_r[:, None] - place_n
        if not self.local_tokens:
            near = torch.zeros_like(distance, dtype=torch.bool)
        elif self.visibility.causal:
            near = distance < self.local_tokens
        else:
            near = distance.abs() <= self.local_tokens // 2
        return near | (first_r[:, None] == place_n) if self.keep_first else near


class Compared(NamedTuple):
    """What is compared: codes [b, h, t, m] and [b, g, s, m] (uint8) with `num_levels` levels of agreement; vectors
    [b, h, t, d] with such codes by the tables of a codebook [g, m, e, w]; or vectors with vectors."""

    q_bhtx: Tensor
    k_bgsx: Tensor
    num_levels: int | None = None
    codebook_gmew: Tensor | None = None


def select(compared: Compared, num_keys_bt: Tensor, rule: Rule, seq: Sequences) -> Tensor:
    """keys_bhtl int32, ascending in a row, then -1."""
    q_bhtx, k_bgsx, num_levels, _ = compared
    b, h, t, _ = q_bhtx.shape
    g, s = k_bgsx.shape[1:3]
    causal = rule.visibility.causal
    width = min(s, int(num_keys_bt.max()))
    keys = torch.empty(b, g, h // g, t, width, dtype=torch.int32, device=q_bhtx.device)
    step = max(1, TILE_ELEMENTS // (h // g * s))
    for start in range(0, t, step):
        rows = slice(start, min(start + step, t))
        place_r = torch.arange(s - t + rows.start, s - t + rows.stop, device=q_bhtx.device)
        place_n = torch.arange(s - t + rows.stop if causal else s, device=q_bhtx.device)
        for row in range(b):
            seen = rule.visibility.pairs(place_r[:, None], place_n, seq.segment_bs[row])
            forced = rule.forced(place_r, place_n, seq.first_bs[row][place_r]) & seen
            most_r = num_keys_bt[row, rows]
            for group in range(g):
                heads = slice(group * (h // g), (group + 1) * (h // g))
                q_prx, k_nx = q_bhtx[row, heads, rows], k_bgsx[row, group, : len(place_n)]
                if num_levels is None:
                    level = _scores(q_prx, k_nx, compared.codebook_gmew, group)
                else:
                    level = _levels(q_prx, k_nx, rule.selection)
                kept = _best(level, num_levels, seen, forced, most_r, place_r, rule.selection)
                keys[row, group, :, rows] = _compact(kept, width)
    return keys.flatten(1, 2)


def _scores(q_prd: Tensor, k_nx: Tensor, codebook_gmew: Tensor | None, group: int) -> Tensor:
    """[h / g, r, n]: q against the quantised keys, or against the keys."""
    q_rd = q_prd.flatten(0, 1)
    if codebook_gmew is None:
        score_rn = products(q_rd, k_nx)
    else:
        score_rn = table_scores(query_tables(q_rd, codebook_gmew[group % len(codebook_gmew)]), k_nx)
    return score_rn.unflatten(0, q_prd.shape[:2])


def _levels(q_prx: Tensor, k_nx: Tensor, selection: str) -> Tensor:
    """[h / g, r, n]: levels from 1 (uint8)."""
    level = torch.zeros(*q_prx.shape[:2], len(k_nx), dtype=torch.uint8, device=q_prx.device)
    equal = torch.empty_like(level, dtype=torch.bool)
    for m, code_n in enumerate(k_nx.T.contiguous()):
        torch.eq(q_prx[..., m, None], code_n, out=equal)
        level += equal.view(torch.uint8)
    if selection == "bucket4":
        level = level.div_(q_prx.shape[2] // 4, rounding_mode="floor").clamp_(max=3)
    return level.add_(1)


def _best(
    level: Tensor,
    num_levels: int | None,
    seen_rn: Tensor,
    forced_rn: Tensor,
    most_r: Tensor,
    place_r: Tensor,
    selection: str,
) -> Tensor:
    """[h / g, r, n] bool: the kept keys."""
    if num_levels is None:
        level = level.masked_fill_(~seen_rn, -torch.inf).masked_fill_(forced_rn, torch.inf)
        count = torch.minimum(most_r, seen_rn.sum(-1)).expand(level.shape[:2])
        return _nearest_above(level, _kth_largest(level, count), count, place_r)
    level = level.mul_(seen_rn).masked_fill_(forced_rn, num_levels + 1)
    if selection == "exact":
        count = torch.minimum(most_r, seen_rn.sum(-1)).expand(level.shape[:2])
        return _nearest_above(level, _cut(level, count, num_levels + 1), count, place_r)
    kept = torch.zeros_like(level, dtype=torch.bool)
    rank_rn = seen_rn.cumsum(-1) - 1
    # an L that is no multiple of 4 is that of a short sequence, which is kept whole
    quota_r = torch.where(most_r >= seen_rn.sum(-1), (most_r + 3) // 4, most_r // 4)
    for residue in range(4):
        inside = seen_rn & (rank_rn % 4 == residue)
        count = torch.minimum(quota_r, inside.sum(-1)).expand(level.shape[:2])
        of_class = level * inside
        kept |= _oldest_above(of_class, _cut(of_class, count, num_levels + 1), count)
    return kept


def _cut(level: Tensor, count: Tensor, highest: int) -> Tensor:
    """[h / g, r, 1] uint8: the largest level that at least `count` keys reach (`highest` for a count of 0)."""
    low = torch.zeros_like(count)
    high = torch.full_like(count, highest)
    for _ in range(highest.bit_length()):
        middle = (low + high + 1) // 2
        enough = (level >= middle[..., None].to(level.dtype)).sum(-1) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low[..., None].to(level.dtype)


def _kth_largest(level: Tensor, count: Tensor) -> Tensor:
    """[h / g, r, 1]: the value that exactly `count` keys reach when none are equal; inf for a count of 0."""
    best = level.topk(min(level.shape[-1], int(count.max()) if count.numel() else 0)).values
    best = torch.cat([torch.full_like(level[..., :1], torch.inf), best], dim=-1)
    return best.gather(-1, count[..., None])


def _nearest_above(level: Tensor, cut: Tensor, count: Tensor, place_r: Tensor) -> Tensor:
    """`count` keys: those above the cut, then the nearest at it, the earlier of two at one distance."""
    above = level > cut
    equal = level == cut
    missing = (count - above.sum(-1))[..., None]
    before = torch.nn.functional.pad(
        equal.cumsum(-1, dtype=torch.int32), (1, 0)
    )  # how many of the first j are at the cut
    last = level.shape[-1] - 1
    place = place_r[:, None].expand_as(missing)

    def inside(radius: Tensor) -> Tensor:
        first, stop = (place - radius).clamp(min=0), (place + radius).clamp(max=last) + 1
        return before.gather(-1, stop) - before.gather(-1, first)

    # the largest radius whose keys at the cut are no more than the missing ones; -1 holds none
    low, high = torch.full_like(missing, -1), torch.full_like(missing, last + 1)
    for _ in range((last + 2).bit_length()):
        middle = (low + high + 1) // 2
        fits = inside(middle) <= missing
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    # two keys at the next distance where one is missing: the earlier
    one_more = (inside(low) < missing).to(low.dtype)
    place_n = torch.arange(last + 1, device=level.device)
    near = (place_n >= place - low - one_more) & (place_n <= place + low)
    return above | (equal & near)


def _oldest_above(level: Tensor, cut: Tensor, count: Tensor) -> Tensor:
    """`count` keys: those above the cut, then the earliest at it."""
    above = level > cut
    equal = level == cut
    missing = (count - above.sum(-1))[..., None]
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))


def _compact(kept: Tensor, width: int) -> Tensor:
    """[..., n] bool with at most `width` true in a row -> int32 [..., width] of their places, -1 at the end."""
    num_keys, rows = kept.shape[-1], kept[..., 0].numel()
    count = kept.sum(-1).flatten()
    found = torch.nonzero_static(kept.flatten(), size=rows * width, fill_value=-1)[:, 0]
    row = torch.div(found, num_keys, rounding_mode="floor").clamp(min=0)
    slot = torch.arange(rows * width, device=kept.device) - (count.cumsum(0) - count)[row]
    lists = torch.full((rows * width + 1,), -1, dtype=torch.int32, device=kept.device)
    target = torch.where(found < 0, rows * width, row * width + slot)
    lists[target] = torch.where(found < 0, -1, found - row * num_keys).to(torch.int32)
    return lists[:-1].view(*kept.shape[:-1], width)
