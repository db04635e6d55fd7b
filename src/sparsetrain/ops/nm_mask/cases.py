"""Shapes of N:M masks, read by the tests; backends must agree to the bit, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `nm_mask`."""

    name: str
    shape: tuple[int, ...]
    keep: int = 2
    group: int = 4
    dim: int = -1

    def tensor(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Weights from N(0, 1), rounded to whole numbers: many ties."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=draw, dtype=dtype).round()


PATTERNS = ((2, 4), (1, 2), (1, 4), (3, 4), (4, 4), (4, 8), (2, 16), (16, 32))

TINY = (
    *(
        Case(name=f"{keep}_{group}_dim{dim}", shape=(32, 64), keep=keep, group=group, dim=dim)
        for keep, group in PATTERNS
        for dim in (0, 1, -1)
    ),
    Case(name="convolution", shape=(6, 8, 3, 3), dim=1),
)

REAL = tuple(Case(name=f"o{o}_i{i}", shape=(o, i)) for o, i in ((1024, 256), (2048, 512), (3072, 768), (11008, 4096)))
"""The FFNs of three GPTs and of a 7B model."""
