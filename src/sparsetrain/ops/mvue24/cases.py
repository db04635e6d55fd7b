"""Shapes and tolerances of MVUE, read by the tests; `real` are output gradients [tokens, channels] of a GPT's FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; sizes along `dim` need not divide by 4."""

    name: str
    tokens: int
    channels: int
    dim: int = 0

    def tensor(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """x from N(0, 1), with groups of zeros in its first rows."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(self.tokens, self.channels, generator=draw, dtype=torch.float64).to(dtype)
        x[0:8, :5] = 0
        return x


TINY = tuple(Case(name=f"dim{dim}", tokens=22, channels=36, dim=dim) for dim in (0, 1, -1))

REAL = tuple(Case(name=f"t{t}_c{c}", tokens=t, channels=c) for t, c in ((1024, 1024), (2048, 3072), (4096, 3072)))

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Backends keep the same entries in each, and the values agree to `torch.testing.assert_close`'s tolerance."""
