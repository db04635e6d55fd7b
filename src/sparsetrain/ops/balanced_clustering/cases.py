"""Shapes of balanced clustering, read by the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    tokens: int
    units: int
    blocks: int
    active: int

    def planted(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(energy [n, u], true block [u]): a token excites the units of `active` blocks 20 times as much as others."""
        draw = torch.Generator().manual_seed(seed)
        block_u = torch.randperm(self.units, generator=draw) % self.blocks
        order_ng = torch.rand(self.tokens, self.blocks, generator=draw)
        used_ng = torch.zeros(self.tokens, self.blocks).scatter_(1, order_ng.topk(self.active).indices, 1.0)
        noise_nu = torch.rand(self.tokens, self.units, generator=draw)
        return noise_nu * (0.05 + used_ng[:, block_u]), block_u


TINY = (
    Case(name="four", tokens=200, units=32, blocks=4, active=1),
    Case(name="six", tokens=300, units=42, blocks=6, active=2),
    Case(name="one", tokens=10, units=8, blocks=1, active=1),
)
REAL = (
    Case(name="smollm2-135m", tokens=4096, units=1024, blocks=8, active=2),
    Case(name="llama3-8b", tokens=4096, units=9216, blocks=16, active=4),
)
