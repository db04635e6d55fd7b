"""A linear whose frozen weight is updated by two factors and masked by a score that has factors of its own.

PST (arXiv 2205.11005, sections 3.1 to 3.3):

    W̃ = W + β U V
    S = |W̃| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ)
    y = x (M ∘ W̃)ᵀ + b, where M is 0 at the `num_zeros` smallest entries of S
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.masked_linear.parts import PATTERNS as PATTERNS
from sparsetrain.ops.masked_linear.parts import Factors as Factors
from sparsetrain.ops.masked_linear.parts import Rule as Rule
from sparsetrain.ops.masked_linear.parts import eligible_scores, score, updated_weight
from sparsetrain.ops.masked_linear.recompute import MaskedLinear
from sparsetrain.ops.masked_linear.reference import reference_linear
from sparsetrain.ops.topk_mask import topk_mask


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    num_zeros: int,
    rule: Rule | None = None,
    *,
    recompute: bool = True,
) -> Tensor:
    """y = x (M ∘ W̃)ᵀ + b; the mask is straight-through: S takes the gradient of M.

    With G = ∂L/∂(M ∘ W̃) and P = G ∘ W̃: ∂A = α₁ P Bᵀ, ∂B = α₁ Aᵀ P, ∂R = α₂ P 1, ∂C = α₂ Pᵀ 1, and with
    D = G ∘ M + G ∘ |W̃| (the second term is that of |W̃| in the score): ∂U = β D Vᵀ, ∂V = β Uᵀ D. W gets no gradient.

    Args:
        x: [..., in].
        weight: W [out, in], any strides, frozen.
        bias: [out] or None.
        factors: U, V, A, B, R, C.
        num_zeros: entries of the weight that are 0; `ops.topk_mask.count_zeros`.
        rule: β, α₁, α₂ and which entries may be masked; the defaults for None.
        recompute: keep x, W and the factors for the backward and make the rest again; False lets autograd keep the
            dense W̃, S and M too (to compare with).

    Returns:
        y [..., out], in x's dtype, or autocast's; W̃ and S are made in fp32 at least.

    Raises:
        ValueError: sizes that do not fit, or more zeros than the rule allows.

    Cost: 2 · out · in · tokens multiply-adds of the product (zeros are multiplied too), 2 · out · in · (r₁ + r₂) of the
        factors and a selection over the weight a forward; the backward makes the factors' products once more. Kept for
        the backward: x and three scalars.
    """
    rule = rule or Rule()
    check_sizes(x, weight, factors, num_zeros, rule)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        x_ti = x.reshape(-1, x.shape[-1]).to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        if recompute:
            y_to = MaskedLinear.apply(x_ti, weight.detach(), cast_bias, num_zeros, rule, *factors)
        else:
            y_to = reference_linear(x_ti, weight.detach(), cast_bias, factors, num_zeros, rule)
    return y_to.view(*x.shape[:-1], weight.shape[0])  # type: ignore[union-attr]


@torch.no_grad()
def masked_weight(weight: Tensor, factors: Factors, num_zeros: int, rule: Rule | None = None) -> Tensor:
    """M ∘ W̃ [out, in] in the weight's dtype, with exact zeros; arguments as of `masked_linear`."""
    rule = rule or Rule()
    updated = updated_weight(weight, factors, rule)
    mask = topk_mask(eligible_scores(score(updated, factors, rule), rule), num_zeros)
    return updated.masked_fill_(mask.logical_not_(), 0).to(weight.dtype)


@torch.no_grad()
def masked_scores(weight: Tensor, factors: Factors, rule: Rule | None = None) -> Tensor:
    """S [out, in] as the mask ranks it: +∞ where the rule's pattern keeps an entry; arguments as of `masked_linear`."""
    rule = rule or Rule()
    return eligible_scores(score(updated_weight(weight, factors, rule), factors, rule), rule)


def check_sizes(x: Tensor, weight: Tensor, factors: Factors, num_zeros: int, rule: Rule) -> None:
    """Raise ValueError where shapes or the number of zeros do not fit the weight."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"masked_linear: x has {x.shape[-1]} channels and the weight {tuple(weight.shape)} takes {in_features}. "
            "Give x [..., in] and the weight [out, in]."
        )
    r1, r2 = factors.u.shape[1], factors.a.shape[1]
    wanted = Factors.shapes(out_features, in_features, r1, r2)
    for name, tensor, shape in zip(Factors._fields, factors, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"masked_linear: factor {name} is {tuple(tensor.shape)}, and a weight {tuple(weight.shape)} with "
                f"ranks {r1} and {r2} needs {shape}."
            )
    most = weight.numel() // 2 if rule.pattern == "2:4" else weight.numel()
    if not 0 <= num_zeros <= most:
        raise ValueError(
            f"masked_linear: num_zeros={num_zeros}, and a weight {tuple(weight.shape)} can have 0 to {most} with "
            f"pattern={rule.pattern!r}."
        )
