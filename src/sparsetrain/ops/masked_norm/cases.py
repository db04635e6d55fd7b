"""Shapes of masked norms, read by the tests; with c = 1 they are within these tolerances of torch's own norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: `rows` rows of `channels`, of which `num_old` are old."""

    name: str
    rows: tuple[int, ...]
    channels: int
    num_old: int

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(x, weight, bias), far from centred."""
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(*self.rows, self.channels, generator=draw, dtype=torch.float64) * 2 + 0.7
        weight, bias = torch.randn(2, self.channels, generator=draw, dtype=torch.float64)
        return x.to(dtype), weight.to(dtype), bias.to(dtype)


TINY = (
    Case(name="odd", rows=(3, 5), channels=13, num_old=7),
    Case(name="one_token", rows=(1,), channels=48, num_old=32),
    Case(name="one_new", rows=(2, 4), channels=33, num_old=32),
    Case(name="none_new", rows=(2, 4), channels=40, num_old=40),
    Case(name="one_old", rows=(4,), channels=8, num_old=1),
)
REAL = (
    Case(name="bert_base", rows=(128, 128), channels=768, num_old=512),
    Case(name="bert_large", rows=(128, 128), channels=1024, num_old=512),
)
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
