"""Shapes of key selection, read by the tests; lists must equal the reference's exactly, so there is no tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.ops.key_selection.visibility import Visibility


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; if packed, rows hold padding and two sequences, or one and padding."""

    name: str
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    tokens: int = 29
    head_dim: int = 32
    codewords: int = 6
    causal: bool = True
    packed: bool = False
    window: int | None = None

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and a codebook of sub-spaces 8 wide, from N(0, 1)."""
        draw = torch.Generator().manual_seed(seed)
        shapes = (
            (self.batch, self.heads, self.tokens, self.head_dim),
            (self.batch, self.kv_heads, self.tokens, self.head_dim),
            (self.kv_heads, self.head_dim // 8, self.codewords, 8),
        )
        q, k, codebook = (torch.randn(shape, generator=draw) for shape in shapes)
        return q, k, codebook

    def segments(self) -> Tensor:
        """[2, tokens]: padding and two sequences in the first row, one sequence and padding in the second."""
        t = self.tokens
        first, cut, end = t // 9, t // 2, 2 * t // 3 + 1
        ids = torch.zeros(2, t, dtype=torch.int64)
        ids[0, first:cut], ids[0, cut:], ids[1, :end] = 1, 2, 1
        return ids

    def visibility(self) -> Visibility:
        return Visibility(self.causal, self.segments() if self.packed else None, self.window)


TINY = tuple(
    Case(
        name=f"{'causal' if causal else 'both'}{'_packed' if packed else ''}{f'_window{window}' if window else ''}",
        causal=causal,
        packed=packed,
        window=window,
    )
    for causal in (True, False)
    for packed in (False, True)
    for window in (None, 9, 15)
)

REAL = tuple(
    Case(name=f"h{h}_{g}_t{t}", batch=1, heads=h, kv_heads=g, tokens=t, head_dim=64, codewords=16)
    for h, g in ((8, 8), (9, 3))
    for t in (1024, 2048, 4096)
)
