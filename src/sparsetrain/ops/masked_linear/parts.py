"""What W̃, S and M are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetrain.core.config import one_of
from sparsetrain.ops.nm_mask import nm_mask

PATTERNS = ("unstructured", "2:4")


class Factors(NamedTuple):
    """U [out, r1], V [r1, in] of the weight; A [out, r2], B [r2, in], R [out], C [in] of the score."""

    u: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    row: Tensor
    column: Tensor

    @staticmethod
    def shapes(out_features: int, in_features: int, r1: int, r2: int) -> tuple[tuple[int, ...], ...]:
        """Their shapes; together (r1 + r2 + 1) · (out + in) numbers."""
        o, i = out_features, in_features
        return (o, r1), (r1, i), (o, r2), (r2, i), (o,), (i,)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How factors become a mask.

    Args:
        weight_scale: β. score_scale: α₁. line_scale: α₂, of row and column scores.
        detach_magnitude: no gradient through |W̃| in the score; the published code lets it through.
        pattern: `unstructured`, or `2:4`: only the two of four consecutive inputs may be masked that score lowest.
    """

    weight_scale: float = 1.0
    score_scale: float = 1.0
    line_scale: float = 1.0
    detach_magnitude: bool = False
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        one_of("masked_linear", "pattern", self.pattern, PATTERNS)


def updated_weight(weight: Tensor, factors: Factors, rule: Rule) -> Tensor:
    """W̃ = W + β U V, in fp32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.add(weight.to(wide), factors.u.to(wide) @ factors.v.to(wide), alpha=rule.weight_scale)


def score(updated: Tensor, factors: Factors, rule: Rule) -> Tensor:
    """S = |W̃| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ), in the dtype of W̃."""
    wide = updated.dtype
    magnitude = updated.detach().abs() if rule.detach_magnitude else updated.abs()
    product = factors.a.to(wide) @ factors.b.to(wide)
    lines = factors.row.to(wide)[:, None] + factors.column.to(wide)
    return magnitude + rule.score_scale * product + rule.line_scale * lines


def eligible_scores(scores: Tensor, rule: Rule) -> Tensor:
    """Scores with +∞ where the pattern never masks, so that the smallest are among those that it may."""
    if rule.pattern == "unstructured":
        return scores
    return scores.masked_fill(nm_mask(scores, 2, 4, by="value"), torch.inf)
