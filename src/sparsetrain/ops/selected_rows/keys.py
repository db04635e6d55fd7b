"""What selected queries attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
