"""Shapes of the 2:4 soft threshold, read by the tests; backends must agree to the bit, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; the size along `dim` divides by 4."""

    name: str
    shape: tuple[int, ...]
    dim: int = -1

    def tensor(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Weights from N(0, 1)."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


TINY = tuple(Case(name=f"dim{dim}", shape=(24, 32), dim=dim) for dim in (0, 1, -1))

REAL = tuple(Case(name=f"o{o}_i{i}", shape=(o, i)) for o, i in ((1024, 256), (2048, 512), (3072, 768), (11008, 4096)))
"""The FFNs of three GPTs and of a 7B model."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
