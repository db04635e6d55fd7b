"""Shapes of top-k masks, read by the tests; backends must agree to the bit, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `topk_mask`; `ties` rounds the scores to whole numbers."""

    name: str
    shape: tuple[int, ...]
    keep_ratio: float
    ties: bool = False

    def tensor(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Scores from N(0, 1)."""
        scores = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return scores.round() if self.ties else scores


RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)

TINY = (
    *(Case(name=f"keep{ratio}{'_ties' * ties}", shape=(10, 20), keep_ratio=ratio, ties=ties)
      for ratio in RATIOS for ties in (False, True)),
    Case(name="one", shape=(1,), keep_ratio=0.5),
    Case(name="odd", shape=(7, 11), keep_ratio=0.37, ties=True),
)  # fmt: skip

REAL = tuple(
    Case(name=f"o{o}_i{i}_keep{ratio}", shape=(o, i), keep_ratio=ratio)
    for o, i in ((384, 1536), (1536, 576), (3072, 768), (4096, 4096))
    for ratio in (0.5, 0.1)
)
"""Linears of MiniLM, SmolLM2-135M, BERT-base and a 7B model."""
