"""The same linear as one autograd node that keeps x, W and the factors, and makes W̃, S and M again in its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.masked_linear.parts import Factors, Rule, eligible_scores, score, updated_weight
from sparsetrain.ops.topk_mask import cut_mask, find_cut


class MaskedLinear(torch.autograd.Function):
    """x [t, in], W [out, in], bias, num_zeros, rule, then the six factors -> y [t, out]."""

    @staticmethod
    def forward(
        ctx: Any, x_ti: Tensor, weight: Tensor, bias: Tensor | None, num_zeros: int, rule: Rule, *factors: Tensor
    ) -> Tensor:
        updated = updated_weight(weight, Factors(*factors), rule)
        ctx.rule, ctx.dense = rule, num_zeros == 0
        cut: tuple[Tensor, ...] = ()
        if not ctx.dense:
            scores = eligible_scores(score(updated, Factors(*factors), rule), rule)
            # with the cut at hand the backward selects nothing: that is most of the time which a mask takes
            cut = find_cut(scores, num_zeros)
            updated.masked_fill_(cut_mask(scores, cut).logical_not_(), 0)  # type: ignore[arg-type]
            del scores
        needs_x = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x_ti if needs_x else None, weight, *factors, *cut)
        return F.linear(x_ti, updated.to(x_ti.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_to,), (x_ti, weight, *rest) = grads, ctx.saved_tensors
        factors, cut, rule = Factors(*rest[:6]), rest[6:], ctx.rule
        updated = updated_weight(weight, factors, rule)
        dropped = None
        if not ctx.dense:
            scores = eligible_scores(score(updated, factors, rule), rule)
            dropped = cut_mask(scores, tuple(cut)).logical_not_()  # type: ignore[arg-type]
            del scores
        found: list[Tensor | None] = [None] * 6
        if x_ti is not None:
            found = _factor_gradients((dy_to.t() @ x_ti).to(updated.dtype), updated, dropped, factors, rule)
        dx = None
        if ctx.needs_input_grad[0]:
            masked = updated if dropped is None else updated.masked_fill_(dropped, 0)
            dx = dy_to @ masked.to(dy_to.dtype)
        db = dy_to.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None, None, *found


def _factor_gradients(
    gradient: Tensor, updated: Tensor, dropped: Tensor | None, factors: Factors, rule: Rule
) -> list[Tensor | None]:
    """Of U, V, A, B, R, C, from G = ∂L/∂(M ∘ W̃); `gradient` is used up."""
    u, v, a, b = (factor.to(updated.dtype) for factor in factors[:4])
    product = gradient * updated  # P
    da, db = rule.score_scale * (product @ b.t()), rule.score_scale * (a.t() @ product)
    row, column = rule.line_scale * product.sum(1), rule.line_scale * product.sum(0)
    magnitude = None if rule.detach_magnitude else product.mul_(updated.sign())  # G ∘ |W̃|
    through = gradient if dropped is None else gradient.masked_fill_(dropped, 0)
    if magnitude is not None:
        through = through.add_(magnitude)  # D
    du, dv = rule.weight_scale * (through @ v.t()), rule.weight_scale * (u.t() @ through)
    made = (du, dv, da, db, row, column)
    return [one.to(factor.dtype) for one, factor in zip(made, factors, strict=True)]
