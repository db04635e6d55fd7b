"""A softmax in whose denominator every pruned visible key stands as a zero logit, from masked attention and its lse.

P_ij = exp(s_ij) / (sum_{k in N(i)} exp(s_ik) + r_i),  r_i = |V(i)| - |N(i)|;  V(i) visible keys, N(i) kept ones.
Then out = out_masked * sigmoid(lse - log r_i), factor 1 where r_i = 0: any masked kernel serves (arXiv 2309.12578).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.block_sparse_attention.tiles import Geometry


def add_phantom_zeros(out_bhtd: Tensor, lse_bht: Tensor, pruned_blt: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of masked attention -> those of the softmax that counts `pruned` zero logits; l divides h."""
    pruned = pruned_blt.repeat_interleave(lse_bht.shape[1] // pruned_blt.shape[1], 1)
    some = pruned > 0
    log_pruned = pruned.clamp(min=1).to(lse_bht.dtype).log()
    factor = torch.where(some, torch.sigmoid(lse_bht - log_pruned), 1)
    lse = torch.where(some, torch.logaddexp(lse_bht, log_pruned), lse_bht)
    return (out_bhtd * factor[..., None]).to(out_bhtd.dtype), lse


def pruned_keys(blocks_blik: Tensor, segments_bs: Tensor | None, geometry: Geometry) -> Tensor:
    """r_i of every query, [b or 1, l, t]: keys that it sees and that no listed block holds.

    Visible keys lie in an interval of positions, so those of a block are the overlap of two intervals; with segments,
    a sorted array of (segment, position) counts the keys of one segment between two positions.
    """
    t, s, device = geometry.num_queries, geometry.num_keys, blocks_blik.device
    blocks = blocks_blik[:1] if segments_bs is None else blocks_blik
    row = torch.arange(s - t, s, device=device)
    reach = s + t if geometry.window is None else geometry.window
    low = (row - reach + 1).clamp(min=0)
    high = row if geometry.causal else (row + reach - 1).clamp(max=s - 1)
    first = blocks.repeat_interleave(geometry.block_q, 2)[:, :, :t] * geometry.block_k
    last = (first + geometry.block_k).clamp(max=s) - 1
    last = torch.where(first < 0, first - 1, last)  # an empty slot holds nothing
    first, last = torch.maximum(first, low[:, None]), torch.minimum(last, high[:, None])
    if segments_bs is None:
        return ((high - low + 1) - (last - first + 1).clamp(min=0).sum(-1)).expand(len(blocks_blik), -1, -1)
    own = segments_bs[:, s - t :].long()
    visible = _count(segments_bs, own, low.expand_as(own), high.expand_as(own))
    kept = _count(segments_bs, own[:, None, :, None].expand_as(first), first, last).sum(-1)
    return visible[:, None] - kept


def _count(segments_bs: Tensor, own: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Keys of segment `own` (0: none) at positions first .. last, elementwise; the leading axis is the batch."""
    s = segments_bs.shape[1]
    keys = (segments_bs.long() * s + torch.arange(s, device=segments_bs.device)).sort(-1).values

    def up_to(position: Tensor) -> Tensor:
        wanted = (own * s + position).flatten(1).contiguous()
        return torch.searchsorted(keys, wanted, right=True).view_as(position)

    # -1 below the first position of a segment is the last of the segment before: `right` counts it out of both
    counted = (up_to(last) - up_to(first - 1)).clamp(min=0)
    return torch.where((own > 0) & (last >= first), counted, 0)
