"""Token-sparse attention as dense attention under a boolean mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.block_sparse_attention.reference import masked_attention


def kept_pairs(keys_bhtl: Tensor, num_keys: int) -> Tensor:
    """[b, h, t, s] bool: the key is in the query's list."""
    slots = torch.where(keys_bhtl < 0, num_keys, keys_bhtl).long()
    pairs = slots.new_zeros(*slots.shape[:3], num_keys + 1, dtype=torch.bool)
    return pairs.scatter_(-1, slots, True)[..., :-1]


def attend(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, keys_bhtl: Tensor, scale: float) -> Tensor:
    """out_bhtd, by an explicit [t, s] mask; any device, differentiable any number of times."""
    return masked_attention(q_bhtd, k_bgsd, v_bgsd, kept_pairs(keys_bhtl, k_bgsd.shape[2]), scale)[0]
