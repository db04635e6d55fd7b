"""Grids of flood fill, read by the tests; marks must equal the reference's to the bit, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """`grids` square grids of `edge` blocks, with many equal cells if `ties`."""

    name: str
    edge: int
    grids: int = 50
    ties: bool = False

    def tensor(self, causal: bool, seed: int = 0) -> Tensor:
        """[grids, edge, edge], uniform in [0, 1) or whole numbers up to 3; zero above the diagonal if causal."""
        x = torch.rand(self.grids, self.edge, self.edge, generator=torch.Generator().manual_seed(seed + self.edge))
        x = (x * 4).floor() if self.ties else x
        return x.tril() if causal else x


TINY = tuple(
    Case(name=f"{edge}_ties" if ties else f"{edge}", edge=edge, ties=ties)
    for edge in (1, 2, 3, 4, 5, 7, 8, 12, 16, 20)
    for ties in (False, True)
)

REAL = tuple(Case(name=f"real_{edge}", edge=edge, grids=12) for edge in (32, 64, 128))
"""Rows of 2,048 to 8,192 tokens in blocks of 64."""
