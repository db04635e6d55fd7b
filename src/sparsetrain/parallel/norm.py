"""GridNorm: LayerNorm and RMSNorm of features that are cut over x, in expert mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsetrain.parallel.exchange import summed
from sparsetrain.parallel.grid import ParallelGrid

AXIS = "x"
"""Between linears of a pair, and so at norms, features are cut over x."""


class GridNorm(nn.Module):
    """A norm with its statistics summed over x; weight and bias are this rank's features' [f / x].

    LayerNorm: y = (h - mean) / sqrt(var + eps) * w + b. RMSNorm: y = h / sqrt(mean(h²) + eps) * (w + offset), its
    statistics in fp32 as the libraries' have them.

    Args:
        norm: the full norm, `nn.LayerNorm` or one whose class is named for RMSNorm.
        offset: what the norm adds to its weights (`Anatomy.norm_offset`).

    Raises:
        ValueError: another kind of norm.
    """

    def __init__(self, norm: nn.Module, grid: ParallelGrid, offset: float = 0.0) -> None:
        super().__init__()
        self.centred = isinstance(norm, nn.LayerNorm)
        if not self.centred and "RMSNorm" not in type(norm).__name__:
            raise ValueError(f"{type(norm).__name__} is neither LayerNorm nor RMSNorm. Use mode plain.")
        self.grid, self.offset = grid, offset
        eps = next(value for name in ("eps", "variance_epsilon") if (value := getattr(norm, name, None)) is not None)
        self.eps = float(eps)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        self.weight = None if weight is None else nn.Parameter(self.cut("weight", weight.detach()))
        self.bias = None if bias is None else nn.Parameter(self.cut("bias", bias.detach()))

    def forward(self, h: Tensor) -> Tensor:
        features = h.shape[-1] * self.grid.shape.size(AXIS)
        wide = h if self.centred else h.float()
        if self.centred:
            wide = wide - summed(wide.sum(-1, keepdim=True), self.grid, AXIS) / features
        variance = summed(wide.square().sum(-1, keepdim=True), self.grid, AXIS) / features
        y = (wide * torch.rsqrt(variance + self.eps)).to(h.dtype)
        if self.weight is not None:
            y = y * (self.weight + self.offset if self.offset else self.weight)
        return y if self.bias is None else y + self.bias

    def full(self, name: str, shard: Tensor) -> Tensor:
        """The full weight or bias [f] of this rank's part."""
        return self.grid.all_gather(shard, AXIS).wait()

    def cut(self, name: str, full: Tensor) -> Tensor:
        """This rank's part; the inverse of `full`."""
        return self.grid.own_features(full, AXIS).clone()
