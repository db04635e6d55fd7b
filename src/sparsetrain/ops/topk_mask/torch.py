"""The same mask from one selection, a tenth of a sort's time on a CPU, and from two numbers once these are known."""

from __future__ import annotations

import torch
from torch import Tensor

Cut = tuple[Tensor, Tensor]
"""(score, count), scalars: kept is what lies above the score, and the first `count` entries that are equal to it."""


def find_cut(scores: Tensor, num_zeros: int) -> Cut:
    """The cut below which exactly `num_zeros` entries lie."""
    flat = scores.flatten()
    if num_zeros == 0:
        return flat.new_full((), -torch.inf), torch.full((), flat.numel(), device=flat.device)
    value = flat.kthvalue(num_zeros).values
    return value, (flat <= value).sum() - num_zeros


def cut_mask(scores: Tensor, cut: Cut) -> Tensor:
    """What a cut keeps of scores, as a bool mask of their shape."""
    value, count = cut
    tied = scores == value
    counts = torch.int32 if scores.numel() < 2**31 else torch.int64
    first = tied.flatten().cumsum(0, dtype=counts).view(scores.shape) <= count
    return (scores > value) | (tied & first)
