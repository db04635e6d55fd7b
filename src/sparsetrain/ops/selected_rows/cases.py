"""Shapes and tolerances of attention on selected rows, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call on two rows, of which `counts` tokens are selected. segments: packed, left, right
    or middle (padding), None."""

    name: str
    heads: int = 2
    kv_heads: int = 2
    tokens: int = 37
    head_dim: int = 5
    counts: tuple[int, int]
    causal: bool = True
    window: int | None = None
    segments: str | None = None

    def segment_ids(self) -> Tensor | None:
        """int32 [2, tokens], 0 = padding."""
        if self.segments is None:
            return None
        ids = torch.ones(2, self.tokens, dtype=torch.int32)
        if self.segments == "packed":
            ids[0, self.tokens // 3 + 1 :] = 2
            ids[1, self.tokens * 4 // 5 + 1 :] = 2
        if self.segments == "left":
            ids[1, : self.tokens // 4] = 0
        if self.segments == "right":
            ids[1, -(self.tokens // 4) :] = 0
        if self.segments == "middle":
            ids[1, self.tokens // 4 : self.tokens // 2] = 0
        return ids


FORMS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 9},
    "local": {"causal": False, "window": 6},
    "packed": {"segments": "packed"},
    "padded_left": {"segments": "left"},
    "padded_both_ways": {"causal": False, "segments": "right"},
    "packed_window": {"window": 5, "segments": "packed"},
    "padded_within": {"segments": "middle"},
    "padded_local": {"causal": False, "window": 6, "segments": "left"},
}

TINY = tuple(
    Case(name=f"{form}_h{h}_{g}_{'_'.join(map(str, counts))}", heads=h, kv_heads=g, counts=counts, **options)  # type: ignore[arg-type]
    for form, options in FORMS.items()
    for h, g in ((2, 2), (4, 2), (3, 1))
    for counts in ((13, 13), (17, 4), (37, 37))
)

REAL = tuple(
    Case(name=f"h{h}_{g}_t{t}", heads=h, kv_heads=g, tokens=t, head_dim=64, counts=(t // 2, t // 2))
    for h, g in ((8, 8), (9, 3))
    for t in (1024, 2048)
)
"""Half of the tokens selected."""

TOLERANCE = {torch.float64: 1e-12}
"""Of outputs and gradients, against the detach definition."""
