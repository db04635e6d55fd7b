"""Shapes of pooled attention maps, read by the tests, which compare them with whole maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `pooled_maps`; the row need not divide into blocks, nor the filter fit into it."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    tokens: int
    head_dim: int = 4
    block: int = 8
    edge: int
    causal: bool = True
    window: int | None = None

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """q and k of one row, from N(0, 1); q twice as large, so that maps are not flat."""
        draw = torch.Generator().manual_seed(self.tokens)
        shapes = ((1, heads, self.tokens, self.head_dim) for heads in (self.heads, self.kv_heads))
        q, k = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
        return q * 2, k


TINY = tuple(
    Case(name=f"t{t}_edge{edge}_{form}", tokens=t, edge=edge, causal=causal, window=window)
    for form, causal, window in (("causal", True, None), ("both", False, None), ("near", True, 5), ("local", False, 7))
    for t, edge in ((24, 3), (24, 15), (21, 5), (5, 9), (1, 1), (40, 1))
)

REAL = tuple(
    Case(name=f"t{t}", heads=8, kv_heads=8, tokens=t, head_dim=64, block=64, edge=31) for t in (1024, 2048, 4096)
)
