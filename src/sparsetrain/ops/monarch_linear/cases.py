"""Shapes and tolerances of the Monarch linear, read by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: x [*rows, inputs] times factors of `blocks_in` and `blocks_out` blocks and `rank`; 0: one factor."""

    name: str
    rows: tuple[int, ...]
    outputs: int
    inputs: int
    blocks_in: int
    blocks_out: int
    rank: int

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """x, R, L, bias and a gradient of y; outputs have a variance of about 1."""
        draw = torch.Generator().manual_seed(seed)
        k, m, rank = self.blocks_in, self.blocks_out, self.rank
        p, s, q, r = self.inputs // k, self.outputs // m, rank * m or self.outputs // k, k * rank
        shapes = [(*self.rows, self.inputs), (k, q, p), (m, s, r), (self.outputs,), (*self.rows, self.outputs)]
        x, right, left, bias, dy = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
        return x, right / p**0.5, left / r**0.5 if rank else None, bias, dy


TINY = (
    Case(name="square", rows=(2, 5), outputs=16, inputs=16, blocks_in=4, blocks_out=4, rank=1),
    Case(name="tall", rows=(7,), outputs=24, inputs=12, blocks_in=2, blocks_out=2, rank=3),
    Case(name="wide", rows=(1, 3), outputs=12, inputs=24, blocks_in=2, blocks_out=2, rank=3),
    Case(name="unequam_blocks", rows=(3,), outputs=36, inputs=60, blocks_in=6, blocks_out=4, rank=2),
    Case(name="one_factor", rows=(3, 2), outputs=12, inputs=8, blocks_in=4, blocks_out=4, rank=0),
    Case(name="one_row", rows=(1,), outputs=8, inputs=8, blocks_in=2, blocks_out=2, rank=2),
    Case(name="no_axis", rows=(), outputs=8, inputs=8, blocks_in=2, blocks_out=2, rank=2),
    Case(name="no_row", rows=(0,), outputs=8, inputs=8, blocks_in=2, blocks_out=2, rank=2),
)

REAL = tuple(
    Case(
        name=f"{i}->{o}", rows=(2048,), outputs=o, inputs=i, blocks_in=4, blocks_out=4, rank=min(i, o) // 16
    )
    for i, o in ((384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024))
)  # fmt: skip

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative L2 distance of y and of each gradient from the reference."""
