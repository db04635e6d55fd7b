"""Shapes of partly trained weights, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A linear of [out, in] on x [..., in]; `block` of its stored weight, None for single entries."""

    name: str
    out_features: int
    in_features: int
    rows: tuple[int, ...] = (7,)
    block: tuple[int, int] | None = None
    transposed: bool = False
    ratio: float = 0.25

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, the weight as it is stored, the bias, and what is chosen: places, or numbers of blocks, sorted."""
        draw = torch.Generator().manual_seed(seed)
        stored = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        high, wide = self.block or (1, 1)
        number = stored[0] * stored[1] // (high * wide)
        chosen = torch.randperm(number, generator=draw)[: max(1, int(self.ratio * number))].sort().values.int()
        x = torch.randn(*self.rows, self.in_features, generator=draw, dtype=dtype)
        bias = torch.randn(self.out_features, generator=draw, dtype=dtype)
        return x, torch.randn(stored, generator=draw, dtype=dtype), bias, chosen


TINY = (
    Case(name="entries", out_features=6, in_features=10),
    Case(name="entries_transposed", out_features=6, in_features=10, transposed=True),
    Case(name="entries_batch", out_features=5, in_features=3, rows=(2, 4)),
    Case(name="all_entries", out_features=4, in_features=3, ratio=1.0),
    Case(name="rows", out_features=12, in_features=5, block=(1, 5), rows=(2, 3)),
    Case(name="all_rows", out_features=4, in_features=5, block=(1, 5), ratio=1.0),
    Case(name="rows_transposed", out_features=12, in_features=5, block=(5, 1), transposed=True),
    Case(name="tiles", out_features=8, in_features=12, block=(4, 4), rows=(2, 3), ratio=0.5),
    Case(name="tiles_transposed", out_features=8, in_features=12, block=(4, 4), transposed=True, ratio=0.5),
    Case(name="one_tile", out_features=4, in_features=4, block=(4, 4), ratio=1.0),
)

REAL = (
    Case(name="entries_576_1536", out_features=1536, in_features=576, rows=(1024,), ratio=0.1),
    Case(name="rows_576_1536", out_features=1536, in_features=576, rows=(1024,), block=(1, 576), ratio=0.1),
    Case(name="tiles_576_1536", out_features=1536, in_features=576, rows=(1024,), block=(64, 64), ratio=0.1),
)
