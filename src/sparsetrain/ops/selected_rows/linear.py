"""Linears and dropout on selected rows: the values come from the pass over all rows, the backward is compact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.core.autograd import as_output
from sparsetrain.ops.linear_parts import LinearParts


def selected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, known: Tensor, transposed: bool = False
) -> Tensor:
    """y = x Wᵀ + b on the selected rows; x is saved only if W needs a gradient.

    Args:
        x: selected rows [..., in].
        weight: [out, in]; [in, out] with `transposed`.
        bias: [out] or None.
        known: y, in the dtype that the backward shall use.
        transposed: the weight is stored as in GPT-2's Conv1D.
    """
    return _Linear.apply(x, weight, bias, known, transposed)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor, transposed: bool) -> Tensor:
        need_weight = ctx.needs_input_grad[1]
        # under autocast the product was formed in a lower dtype than x and W have
        ctx.save_for_backward(x.to(known.dtype) if need_weight else None, weight)
        ctx.transposed, ctx.dtypes = transposed, (x.dtype, None if bias is None else bias.dtype)
        return as_output(known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        dy_n = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            w = weight.to(dy.dtype)
            dx = torch.mm(dy_n, w.t() if ctx.transposed else w).view(*dy.shape[:-1], -1).to(x_dtype)
        if ctx.needs_input_grad[1]:
            x_n = x.reshape(-1, x.shape[-1])
            dw = (torch.mm(x_n.t(), dy_n) if ctx.transposed else torch.mm(dy_n.t(), x_n)).to(weight.dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy_n.sum(0, dtype=bias_dtype)
        return dx, dw, db, None, None


def adapted_product(x: Tensor, parts: LinearParts) -> Tensor:
    """x Wᵀ + bias + (x aᵀ) bᵀ · scale without gradient, in the dtype of x Wᵀ and, but for one product, its memory.

    Args:
        x: [..., in].
        parts: a linear with LoRA; no dropout.
    """
    assert parts.lora is not None
    with torch.no_grad():
        out = torch.nn.functional.linear(x, parts.weight, parts.bias)
        a, b = (factor.to(out.dtype) for factor in parts.lora)
        x_a = torch.nn.functional.linear(x.to(out.dtype), a)
        scale = 1 if parts.lora_scale is None else parts.lora_scale
        out.view(-1, out.shape[-1]).addmm_(x_a.view(-1, a.shape[0]), b.t(), alpha=scale)
        return out


def adapted_as_peft(x: Tensor, product: Tensor, parts: LinearParts) -> Tensor:
    """`product` + (x aᵀ) bᵀ · scale, rounded where PEFT's LoRA rounds.

    Args:
        x: [..., in].
        product: x Wᵀ + bias.
        parts: a linear with LoRA of the same dtype, no dropout, and `lora_scale`.
    """
    assert parts.lora is not None and parts.lora_scale is not None
    a, b = parts.lora
    update = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
    return (product + update * parts.lora_scale).to(product.dtype)


def adapted_linear(x: Tensor, parts: LinearParts, *, known: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias + (x aᵀ) bᵀ · scale as one node: gradient to x, a and b; W and the bias are constants.

    Args:
        x: selected rows [..., in]; saved in the dtype of the result.
        parts: a linear with LoRA; no dropout.
        known: the result where it was computed already.
    """
    assert parts.lora is not None
    known = adapted_product(x, parts) if known is None else known
    return _Adapted.apply(x, parts.weight, *parts.lora, known, parts.lora_scale)  # type: ignore[return-value]


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, known: Tensor, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(x.to(known.dtype), weight, a, b)
        ctx.x_dtype, ctx.scale = x.dtype, 1 if scale is None else scale
        return as_output(known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        x, weight, a, b = ctx.saved_tensors
        dy_n, x_n = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        a_c, b_c = a.to(dy.dtype), b.to(dy.dtype)
        dy_b = torch.mm(dy_n, b_c)
        if ctx.scale != 1:
            dy_b.mul_(ctx.scale)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_n, weight.to(dy.dtype)).addmm_(dy_b, a_c).view(x.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            da = torch.mm(dy_b.t(), x_n).to(a.dtype)
        if ctx.needs_input_grad[3]:
            x_a = torch.mm(x_n, a_c.t())
            db = torch.mm(dy_n.t(), x_a if ctx.scale == 1 else x_a.mul_(ctx.scale)).to(b.dtype)
        return dx, None, da, db, None, None


def selected_dropout(x: Tensor, keep_mask: Tensor, scale: float, *, known: Tensor) -> Tensor:
    """The selected rows of a dropout that all rows have had: `known` = x · keep_mask · scale."""
    return _Dropout.apply(x, keep_mask, scale, known)  # type: ignore[return-value]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep_mask: Tensor, scale: float, known: Tensor) -> Tensor:
        ctx.save_for_backward(keep_mask)
        ctx.scale = scale
        return as_output(known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (keep_mask,) = ctx.saved_tensors
        return grads[0] * keep_mask * ctx.scale, None, None, None
