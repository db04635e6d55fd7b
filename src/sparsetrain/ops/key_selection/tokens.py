"""Keys for single queries, in tiles of queries. Legend as in the package; q queries of a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetrain.ops.product_quantization import encode
from sparsetrain.ops.product_quantization.reference import decode

if TYPE_CHECKING:
    from sparsetrain.ops.key_selection import Visibility

TILE = 4 * 2**20
"""Scores of a tile: 16 MiB, well below what one layer's activations take."""


@torch.no_grad()
def select_keys(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor,
    num_keys_bt: Tensor,
    visibility: Visibility,
    *,
    score: str,
    selection: str,
    distance: str,
    local_tokens: int,
    keep_first: bool,
) -> Tensor:
    b, h, t, _ = q_bhtd.shape
    s = k_bgsd.shape[2]
    most = int(num_keys_bt.max())
    step = max(1, TILE // (b * h * s))
    left, right = factors(q_bhtd, k_bgsd, codebook_gmew, score, distance)
    found = []
    for start in range(0, t, step):
        stop = min(start + step, t)
        score_bhqs = left[:, :, start:stop] @ right.mT
        seen = visible(visibility, torch.arange(start, stop), t, s, q_bhtd.device)
        limit_bq = num_keys_bt[:, start:stop]
        if selection == "exact":
            near = distances(torch.arange(start, stop), t, s, q_bhtd.device)
            forced = forced_keys(near, seen, visibility.causal, local_tokens, keep_first)
            found.append(take_exact(score_bhqs, seen, forced, near, limit_bq, most, score == "match_count"))
        else:
            spaces = codebook_gmew.shape[1]
            found.append(take_buckets((score_bhqs.round() // (spaces // 4)).clamp(max=3), seen, limit_bq, most))
    return torch.cat(found, dim=2)


def factors(q: Tensor, k: Tensor, codebook: Tensor, score: str, distance: str) -> tuple[Tensor, Tensor]:
    """(left [b, h, t, r], right [b, h, s, r]) whose product is the score of every pair."""
    per_group = q.shape[1] // k.shape[1]
    codes_k = encode(k, codebook, distance)
    if score == "table":
        right = decode(codes_k, codebook)
        return q.float(), right.float().repeat_interleave(per_group, 1)
    codes_q, words = encode(q, codebook, distance), codebook.shape[2]
    left, right = (torch.nn.functional.one_hot(c.long(), words).flatten(-2).float() for c in (codes_q, codes_k))
    return left, right.repeat_interleave(per_group, 1)


def distances(rows: Tensor, t: int, s: int, device: torch.device) -> Tensor:
    """i - j for the queries `rows` and every key, [q, s]."""
    return (rows + s - t).to(device)[:, None] - torch.arange(s, device=device)


def visible(visibility: Visibility, rows: Tensor, t: int, s: int, device: torch.device) -> Tensor:
    """[b or 1, q, s] bool."""
    near = distances(rows, t, s, device)
    seen = near >= 0 if visibility.causal else torch.ones_like(near, dtype=torch.bool)
    if visibility.window is not None:
        seen = seen & (near.abs() < visibility.window)
    seen = seen[None]
    segments = visibility.segments_bs
    if segments is not None:
        own = segments[:, s - t :][:, rows.to(device), None]
        seen = seen & (own == segments[:, None]) & (own > 0)
    return seen


def forced_keys(near: Tensor, seen: Tensor, causal: bool, local_tokens: int, keep_first: bool) -> Tensor:
    """[b or 1, q, s] bool: the query itself, the nearest `local_tokens`, and the first visible key."""
    reach = local_tokens if causal else local_tokens // 2 + 1
    local = (near.abs() < reach) | (near == 0) if local_tokens else torch.zeros_like(near, dtype=torch.bool)
    forced = local[None] & seen
    if keep_first:
        forced = forced | (seen & (seen.cumsum(-1) == 1))
    return forced


def take_exact(
    score_bhqs: Tensor, seen: Tensor, forced: Tensor, near: Tensor, limit_bq: Tensor, most: int, counts: bool
) -> Tensor:
    s = near.shape[1]
    # equal codes tie: the nearer key first, then the older. The step is below what fp32 scores can differ by
    order = 2 * (s - near.abs()) + (near > 0)
    step = 1 / (2 * s + 2) if counts else 1e-9 * float(score_bhqs.abs().amax()) / (2 * s + 2)
    rank = (score_bhqs.round() if counts else score_bhqs).double() + order * step
    rank = rank.masked_fill(forced[:, None], torch.inf).masked_fill(~seen[:, None], -torch.inf)
    value, key = rank.topk(min(most, s), dim=-1)
    slot = torch.arange(value.shape[-1], device=value.device)
    empty = (value == -torch.inf) | (slot >= limit_bq[:, None, :, None])
    return key.to(torch.int32).masked_fill(empty, -1)


def take_buckets(bucket_bhqs: Tensor, seen: Tensor, limit_bq: Tensor, most: int) -> Tensor:
    s = seen.shape[-1]
    rank = seen.cumsum(-1) - 1
    order = bucket_bhqs.double() * (s + 1) + (s - rank)[:, None]
    parts = []
    for residue in range(4):
        mine = seen & (rank % 4 == residue)
        value, key = order.masked_fill(~mine[:, None], -torch.inf).topk(min(most // 4, s), dim=-1)
        slot = torch.arange(value.shape[-1], device=value.device)
        empty = (value == -torch.inf) | (slot >= (limit_bq // 4)[:, None, :, None])
        parts.append(key.to(torch.int32).masked_fill(empty, -1))
    return torch.cat(parts, dim=-1)
