"""MVUE by its definition: probabilities from sums over the group, and systematic sampling by them."""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = 1.19e-7
"""Added to every magnitude, as a share of the largest, so that zeros have probabilities too."""


def offset_of(x: Tensor) -> Tensor:
    """The offset of a tensor: a scalar in fp32 or better; OFFSET itself where all is zero.

    The page adds OFFSET to gradients that fp16 loss scaling has made large. Gradients of a mean over 10⁶ tokens are
    below it, and would be drawn uniformly (relative error 1.0 for .503).
    """
    least, most = x.aminmax()  # 20 times as fast on a CPU as vector_norm(x, inf)
    largest = torch.maximum(-least, most).to(exact_dtype(x))
    return OFFSET * torch.where(largest == 0, 1.0, largest)


def exact_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def magnitudes(x: Tensor, offset: Tensor) -> Tensor:
    """a = |x| + offset, in fp32 or better."""
    return x.abs().to(exact_dtype(x)).add_(offset)


def inclusion(a_n4: Tensor) -> Tensor:
    """p_i = t_i + a_i Σ_{j≠i} t_j / (Σ − a_j), the probability that entry i of a group is kept.

    Sums without an entry are added up, not subtracted from Σ, where a large entry would cancel.
    """
    others = 1 - torch.eye(4, dtype=a_n4.dtype, device=a_n4.device)
    t = a_n4 / a_n4.sum(-1, keepdim=True)
    return t + a_n4 * ((t / (a_n4 @ others)) @ others)


def reference_mvue(x_n4: Tensor, start_n1: Tensor, offset: Tensor) -> Tensor:
    """Lay the four p end to end from `start` on: an entry is kept if its interval holds an integer. x / p there."""
    p = inclusion(magnitudes(x_n4, offset))
    ends = torch.cat([start_n1, start_n1 + p[:, :3].cumsum(1), start_n1.floor() + 2], 1).floor()
    return (x_n4 / p * ends.diff(dim=1)).to(x_n4.dtype)
