"""Shapes and groups of `map_units`, read by the tests. TOLERANCE: of the largest entry, beside fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-15, torch.float32: 4e-7}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One dimension of `copies` copies of the units, each `unit` wide, beside others."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    unit: int = 1
    copies: int = 1
    others: tuple[int, ...] = (5,)
    dim: int = 0

    def tensor(self, spreads: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """N(0, 1): merged units if it is to be spread, else all of them."""
        units = len(self.groups) if spreads else sum(map(len, self.groups))
        shape = list(self.others)
        shape.insert(self.dim, self.copies * units * self.unit)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


TINY = (
    Case(name="pairs", groups=((0, 2), (1, 3)), unit=3),
    Case(name="triples_last_dim", groups=((0, 1, 2), (3, 4, 5)), unit=4, dim=1),
    Case(name="one_each", groups=((0,), (1,), (2,))),
    Case(name="all_in_one", groups=((0, 1, 2, 3),), unit=2),
    Case(name="uneven", groups=((0, 3, 4), (1,), (2, 5)), unit=2, dim=1, others=(3, 4)),
    Case(name="fused_three", groups=((0, 1), (2, 3)), unit=2, copies=3),
    Case(name="vector", groups=((1, 0), (3, 2)), others=()),
)

REAL = tuple(
    Case(name=f"heads_{heads}", groups=tuple((j, j + heads // 2) for j in range(heads // 2)), unit=64, others=(768,))
    for heads in (12, 16)
)
"""The attention of BERT-base and BERT-large."""
