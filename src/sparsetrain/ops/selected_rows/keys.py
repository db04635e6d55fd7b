"""What selected queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.ops.selected_rows.rows import Rows


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of all rows, and who may see them.

    Attributes:
        k_bgsd, v_bgsd: [b, g, s, d]; the last t of the s keys are the tokens of this forward.
        causal: a key is visible to queries at its position or later.
        scale: factor on the scores.
        segments_bs: int [b, s], 0 = padding, equal = one sequence; None = one sequence without padding.
        window: sliding window in tokens, or None.
        looks_at_bt: int [b, t], the sequence that each token sees as a query: its own, or of padding the one beside it;
            None = its own, and padding sees nothing. A query that sees nothing gives 0.
    """

    k_bgsd: Tensor
    v_bgsd: Tensor
    causal: bool
    scale: float
    segments_bs: Tensor | None = None
    window: int | None = None
    looks_at_bt: Tensor | None = None


def who_sees(e: KeyValues, rows: Rows) -> tuple[Any, ...]:
    """Who sees whom, as the kernels are given it: nothing of it is read on the host."""
    offset = e.k_bgsd.shape[2] - rows.num_tokens
    segments = looks = None
    if e.segments_bs is not None:
        looks_at = e.segments_bs[:, offset:] if e.looks_at_bt is None else e.looks_at_bt
        segments, looks = e.segments_bs.to(torch.int32).contiguous(), rows.gather(looks_at).to(torch.int32)
    index_bk, counts_b = rows.on_device(offset)
    return index_bk, counts_b, segments, looks, e.causal, e.scale, e.window or 0
