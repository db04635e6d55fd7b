"""The magnitude of one rank without sorting: fp32 numbers from 0 on are ordered as their bits are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BINS, _SHIFT = 2**15, 16
"""Of the upper half of the bits: exponent and 7 bits of mantissa. A bin holds below 1 % of usual weights."""


def by_histogram(tensors: Sequence[Tensor], rank: int) -> float:
    """Count the entries in bins, then look at the bin that holds the rank alone."""
    counts = sum(torch.bincount(_bits(t) >> _SHIFT, minlength=_BINS).cpu() for t in tensors)
    below = torch.as_tensor(counts).cumsum(0)
    bin = int((below > rank).nonzero()[0])
    inside = [bits[(bits >> _SHIFT) == bin].cpu() for bits in map(_bits, tensors)]
    left = rank - (int(below[bin - 1]) if bin else 0)
    return float(torch.cat(inside).kthvalue(left + 1).values.view(torch.float32))


def _bits(t: Tensor) -> Tensor:
    return t.detach().float().abs().flatten().view(torch.int32)
