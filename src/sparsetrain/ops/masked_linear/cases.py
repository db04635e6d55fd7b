"""Shapes of masked linears, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsetrain.ops.masked_linear.parts import Factors, Rule

DEFAULT = Rule()
SCALED = Rule(weight_scale=0.5, score_scale=2.0, line_scale=0.25)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `masked_linear`; tolerance is relative to the largest entry, in fp64."""

    name: str
    tokens: int = 5
    out_features: int = 12
    in_features: int = 16
    rank: int = 3
    score_rank: int = 2
    keep_ratio: float = 0.5
    rule: Rule = DEFAULT
    tolerance: float = 1e-12

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Factors]:
        """x, W, bias and factors, all from N(0, 1)."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        shapes = Factors.shapes(self.out_features, self.in_features, self.rank, self.score_rank)
        factors = Factors(*(normal(*shape) for shape in shapes))
        weight = normal(self.out_features, self.in_features)
        return normal(self.tokens, self.in_features), weight, normal(self.out_features), factors


TINY = (
    Case(name="half"),
    Case(name="dense", keep_ratio=1.0),
    Case(name="tenth", keep_ratio=0.1),
    Case(name="detached", rule=Rule(detach_magnitude=True)),
    Case(name="scaled", rule=SCALED),
    Case(name="odd", tokens=1, out_features=7, in_features=5, rank=1, score_rank=4, keep_ratio=0.37),
    Case(name="2:4", rule=Rule(pattern="2:4")),
    Case(name="towards_2:4", rule=replace(SCALED, pattern="2:4"), keep_ratio=0.7),
)

REAL = tuple(
    Case(name=f"o{o}_i{i}", tokens=1024, out_features=o, in_features=i, rank=8, score_rank=8, keep_ratio=0.1)
    for o, i in ((384, 1536), (1536, 576), (3072, 768))
)
"""Linears of MiniLM, SmolLM2-135M and BERT-base."""
