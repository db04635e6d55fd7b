"""The soft threshold by sorting each group."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_threshold(w: Tensor, dim: int) -> Tensor:
    """sign(w) · max(|w| − t, 0), t the second smallest magnitude of the group."""
    grouped = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    threshold = grouped.abs().sort(-1).values[..., 1:2]
    return (grouped.sign() * (grouped.abs() - threshold).clamp(min=0)).flatten(-2).movedim(-1, dim)


def reference_scale(w: Tensor, pruned: Tensor) -> Tensor:
    """argmin over β of ‖w − β · pruned‖."""
    return torch.linalg.lstsq(pruned.reshape(-1, 1).double(), w.reshape(-1, 1).double()).solution[0, 0].to(w.dtype)
