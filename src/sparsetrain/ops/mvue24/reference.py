"""MVUE by its definition: probabilities from sums over the group, and the draw from two uniform numbers a group."""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = 1.19e-7
"""Added to every magnitude, so that a group of zeros has probabilities too."""


def magnitudes(x: Tensor) -> Tensor:
    """a = |x| + offset, in fp32 or better."""
    return (x if x.dtype == torch.float64 else x.float()).abs() + OFFSET


def inclusion(a_n4: Tensor) -> Tensor:
    """p_i = t_i + a_i Σ_{j≠i} t_j / (Σ − a_j), the probability that entry i of a group is one of the two drawn."""
    total = a_n4.sum(-1, keepdim=True)
    t = a_n4 / total
    odds = t / (total - a_n4)
    return t + a_n4 * (odds.sum(-1, keepdim=True) - odds)


def reference_mvue(x_n4: Tensor, uniform_n2: Tensor) -> Tensor:
    """Draw i with probability t_i, then j ≠ i with probability a_j / (Σ − a_i); x / p at both, 0 elsewhere."""
    a = magnitudes(x_n4)
    first = _draw(a, uniform_n2[:, :1])
    rest = a.scatter(1, first, 0.0)
    second = _draw(rest, uniform_n2[:, 1:])
    kept = torch.zeros_like(a, dtype=torch.bool).scatter(1, first, True).scatter(1, second, True)
    return torch.where(kept, x_n4 / inclusion(a).to(a.dtype), 0).to(x_n4.dtype)


def _draw(a_n4: Tensor, uniform_n1: Tensor) -> Tensor:
    """The first entry whose cumulative weight exceeds u · Σ; never one of weight 0."""
    cumulative = a_n4.cumsum(1)
    below = (cumulative <= uniform_n1 * cumulative[:, 3:]).sum(1, keepdim=True)
    last = torch.where(a_n4[:, 3:] > 0, 3, 2)
    return torch.minimum(below, last)
