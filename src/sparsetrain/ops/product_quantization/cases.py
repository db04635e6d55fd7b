"""Shapes of product quantisation, read by the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `codebooks` divides `heads`."""

    name: str
    batch: int = 1
    heads: int = 2
    codebooks: int = 2
    tokens: int
    subspaces: int = 2
    codewords: int = 16
    width: int = 8

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and the codebook, drawn from N(0, 1)."""
        draw = torch.Generator().manual_seed(seed)
        x_shape = (self.batch, self.heads, self.tokens, self.subspaces * self.width)
        book_shape = (self.codebooks, self.subspaces, self.codewords, self.width)
        x, book = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in (x_shape, book_shape))
        return x.to(dtype), book.to(dtype)


TINY = (
    Case(name="plain", tokens=37),
    Case(name="gqa", batch=2, heads=6, codebooks=3, tokens=11),
    Case(name="shared", heads=4, codebooks=1, tokens=13, codewords=5),
    Case(name="one_token", tokens=1, subspaces=1),
    Case(name="one_codeword", tokens=9, codewords=1),
    Case(name="byte", tokens=7, codewords=256),
    Case(name="narrow", heads=1, codebooks=1, tokens=15, subspaces=3, width=4),
)

REAL = tuple(
    Case(name=f"h{heads}_t{tokens}_d{8 * subspaces}", heads=heads, codebooks=heads, tokens=tokens, subspaces=subspaces)
    for heads, subspaces in ((8, 8), (8, 16))
    for tokens in (1024, 4096)
)
