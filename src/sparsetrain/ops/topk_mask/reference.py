"""The mask by a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_mask(scores: Tensor, num_zeros: int) -> Tensor:
    """Sort in descending order, ties by index, and mask the last."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[scores.numel() - num_zeros :]] = False
    return mask.view(scores.shape)
