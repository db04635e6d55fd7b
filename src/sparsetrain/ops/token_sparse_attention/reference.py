"""Token-sparse attention as dense attention under a boolean mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsetrain.ops.block_sparse_attention.reference import masked_attention


def kept_pairs(keys_bhtl: Tensor, num_keys: int) -> Tensor:
    """[b, h, t, s] bool: the key is in the query's list."""
    slots = torch.where(keys_bhtl < 0, num_keys, keys_bhtl).long()
    pairs = slots.new_zeros(*slots.shape[:3], num_keys + 1, dtype=torch.bool)
    return pairs.scatter_(-1, slots, True)[..., :-1]


def attend(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, keys_bhtl: Tensor, scale: float) -> Tensor:
    """out_bhtd, by an explicit [t, s] mask; any device, differentiable any number of times."""
    return masked_attention(q_bhtd, k_bgsd, v_bgsd, kept_pairs(keys_bhtl, k_bgsd.shape[2]), scale)[0]


CLAMPED_ROWS = 128


def attend_clamped(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, keys_bhtl: Tensor, scale: float, clamp: float
) -> Tensor:
    """out_bhtd with scores clamped to ±`clamp`, tiles of query rows recomputed in the backward; any device.

    Scores and sums are fp32 (fp64 for fp64).
    """
    work = torch.promote_types(q_bhtd.dtype, torch.float32)
    per_group = q_bhtd.shape[1] // k_bgsd.shape[1]
    k, v = (x.to(work).repeat_interleave(per_group, 1) for x in (k_bgsd, v_bgsd))

    def tile(q: Tensor, keys: Tensor) -> Tensor:
        kept = kept_pairs(keys, k.shape[2])
        scores = (scale * (q.to(work) @ k.mT)).clamp(-clamp, clamp).masked_fill(~kept, -torch.inf)
        # a row that keeps nothing is all -inf, and its softmax NaN
        return (scores.softmax(-1).masked_fill(~kept, 0) @ v).to(q.dtype)

    rows = [slice(start, start + CLAMPED_ROWS) for start in range(0, q_bhtd.shape[2], CLAMPED_ROWS)]
    tiles = [checkpoint(tile, q_bhtd[:, :, r], keys_bhtl[:, :, r], use_reentrant=False) for r in rows]
    return torch.cat(tiles, dim=2)  # type: ignore[arg-type]
