"""A weight of which some entries train, written as a copy: the equation, and what autograd makes of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_partial(weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """W with `values` at `places` of its flat form; W itself is a constant."""
    return weight.detach().flatten().index_put((places.long(),), values.to(weight.dtype)).view_as(weight)


def reference_blocks(weight: Tensor, values: Tensor, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """W with `values` [k, *shape] at the blocks numbered row by row, one after another; W itself is a constant."""
    (high, wide), across = shape, weight.shape[1] // shape[1]
    rows = [list(weight.detach().split(high, 0)[i].split(wide, 1)) for i in range(weight.shape[0] // high)]
    for block, value in zip(blocks.tolist(), values, strict=True):
        rows[block // across][block % across] = value.to(weight.dtype)
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)
