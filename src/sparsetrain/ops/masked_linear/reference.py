"""The equation in plain PyTorch: autograd keeps W̃, S and M."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.masked_linear.parts import Factors, Rule, eligible_scores, score, updated_weight
from sparsetrain.ops.topk_mask import straight_through_mask


def reference_linear(
    x_ti: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, num_zeros: int, rule: Rule
) -> Tensor:
    """x (M ∘ W̃)ᵀ + b with M = topk(S), straight-through."""
    updated = updated_weight(weight, factors, rule)
    scores = score(updated, factors, rule)
    # +∞ and then the mask: what the pattern keeps takes its gradient past the replaced score
    ranked = scores + (eligible_scores(scores, rule) - scores).detach()
    mask = straight_through_mask(ranked, num_zeros)
    return F.linear(x_ti, (mask * updated).to(x_ti.dtype), bias)
