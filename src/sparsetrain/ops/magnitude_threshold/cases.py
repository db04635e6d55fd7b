"""Shapes of a threshold over several tensors, read by the tests; it is exact, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: tensors of `shapes`, rounded to `dtype`, whose coarse steps make many entries equal."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def tensors(self, seed: int = 0) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return [(torch.randn(shape, generator=draw) * self.scale).to(self.dtype) for shape in self.shapes]


TINY = (
    Case(name="one_entry", shapes=((1,),)),
    Case(name="several", shapes=((7, 5), (3,), (2, 3, 4))),
    Case(name="an_empty_one", shapes=((0, 4), (9, 2))),
    Case(name="bf16", shapes=((40, 30), (25,)), dtype=torch.bfloat16),
    Case(name="fp16_small", shapes=((40, 30),), dtype=torch.float16, scale=1e-6),
    Case(name="zeros", shapes=((6, 6),), scale=0.0),
)

REAL = (Case(name="a_block_of_135m", shapes=((576, 576), (192, 576), (1536, 576), (576, 1536)), dtype=torch.bfloat16),)
