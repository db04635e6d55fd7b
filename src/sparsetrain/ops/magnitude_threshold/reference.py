"""The magnitude of one rank, by sorting all of them at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def reference_threshold(tensors: Iterable[Tensor], rank: int) -> float:
    """Sort |w| of all tensors together and take the entry at `rank`."""
    return float(torch.cat([t.detach().float().abs().flatten() for t in tensors]).sort().values[rank])
