"""Shapes and tolerances of the gated activation, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: h of `shape`, the last axis values then gates."""

    name: str
    shape: tuple[int, ...]

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """h and a gradient of y, from N(0, 1)."""
        *rows, channels = self.shape
        shapes = (self.shape, (*rows, channels // 2))
        h, dy = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + i), dtype=dtype)
            for i, shape in enumerate(shapes)
        )
        return h, dy


TINY = (
    Case(name="batch", shape=(2, 5, 6)),
    Case(name="one_channel", shape=(1, 2)),
    Case(name="no_token", shape=(0, 8)),
    Case(name="odd", shape=(7, 10)),
)

REAL = tuple(Case(name=f"t{t}_f{f}", shape=(t, 2 * f)) for t, f in ((1024, 1024), (2048, 3072), (4096, 5504)))

TOLERANCE = {torch.float64: 1e-12}
"""Largest |difference|, relative or absolute, of y and dh from the reference."""
