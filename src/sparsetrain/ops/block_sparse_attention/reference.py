"""Block-sparse attention as dense attention under a boolean mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.block_sparse_attention.tiles import Geometry


def visible_pairs(blocks_blik: Tensor, segments_bs: Tensor | None, geometry: Geometry) -> Tensor:
    """[b, l, t, s] bool: the pair's key block is listed and position, window and segment allow the pair."""
    t, s = geometry.num_queries, geometry.num_keys
    slots = torch.where(blocks_blik < 0, geometry.num_key_blocks, blocks_blik).long()
    listed = slots.new_zeros(*slots.shape[:3], geometry.num_key_blocks + 1, dtype=torch.bool)
    listed = listed.scatter_(-1, slots, True)[..., :-1]
    pairs = listed.repeat_interleave(geometry.block_q, 2)[:, :, :t]
    pairs = pairs.repeat_interleave(geometry.block_k, 3)[..., :s]
    positions = torch.arange(s, device=slots.device)
    query_positions = torch.arange(t, device=slots.device) + (s - t)
    pairs = pairs & geometry.visible(query_positions[:, None] - positions)
    if segments_bs is None:
        return pairs
    query_segments = segments_bs[:, s - t :]
    same = (query_segments[:, :, None] == segments_bs[:, None, :]) & (query_segments > 0)[:, :, None]
    return pairs & same[:, None]


def masked_attention(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, pairs_blts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out_bhtd, lse_bht) of softmax attention over the true pairs; rows without one give 0 and -inf.

    Statistics and sums are fp32 (fp64 stays fp64). l divides h; g divides h.
    """
    work = torch.promote_types(q_bhtd.dtype, torch.float32)
    h = q_bhtd.shape[1]
    k, v = (x.to(work).repeat_interleave(h // x.shape[1], 1) for x in (k_bgsd, v_bgsd))
    pairs = pairs_blts.repeat_interleave(h // pairs_blts.shape[1], 1)
    empty = ~pairs.any(-1)
    scores = (q_bhtd.to(work) @ k.mT) * scale
    # A row of -inf has no softmax and a NaN gradient: give empty rows zeros first, and remove their output after.
    scores = scores.masked_fill(~pairs, -torch.inf).masked_fill(empty[..., None], 0)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.masked_fill(empty[..., None], 0).to(q_bhtd.dtype), lse.masked_fill(empty, -torch.inf)


def attend(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_blik: Tensor,
    segments_bs: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_bhtd, lse_bht), by an explicit [t, s] mask; any device, differentiable any number of times."""
    pairs = visible_pairs(blocks_blik, segments_bs, geometry)
    return masked_attention(q_bhtd, k_bgsd, v_bgsd, pairs, scale)
