"""Feature by feature: operands and results are [features, n], so that both permutations are strides of a product.

A product takes a matrix without copying it when one of its two strides is 1. Row by row ([n, features]) the permuted
operand has strides (k q, m) and must be copied, twice; feature by feature it has (m n, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Product = Callable[..., Tensor]
"""(a, b, out, bias or None) -> out[i] = a[i] b[i] + bias[i]."""


def strided_monarch(
    x_ni: Tensor, right: Tensor, left: Tensor | None, bias: Tensor | None, columns: bool, product: Product | None = None
) -> Tensor:
    """y [n, o]; arguments as of `monarch_linear`, in one dtype.

    Args:
        product: one that reads and writes any strides, so that results are row by row where `columns` is False; None:
            PyTorch's, after which they are made so.
    """
    y_no = _Monarch.apply(x_ni, right, left, bias, columns or product is None, product)
    return y_no if columns else y_no.contiguous()  # type: ignore[union-attr]


class _Monarch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ni: Tensor, right: Tensor, left: Tensor | None, bias: Tensor | None, columns: bool,
        product: Product | None,
    ) -> Tensor:  # fmt: skip
        ctx.product = multiply = product or _product
        n, (k, q, p) = len(x_ni), right.shape
        x_kpn = x_ni.view(n, k, p).permute(1, 2, 0)
        if left is None:
            y_kqn = _features(x_ni, k, q, columns)
            multiply(right, x_kpn, y_kqn, None if bias is None else bias.view(k, q))
            ctx.save_for_backward(x_ni, right, None, None)
            return y_kqn.permute(2, 0, 1).flatten(1)
        m, s, r = left.shape
        u_kqn = multiply(right, x_kpn, x_ni.new_empty(k, q, n))
        y_smn = _features(x_ni, s, m, columns)
        v_mrn = u_kqn.view(r, m, n).transpose(0, 1)
        multiply(left, v_mrn, y_smn.transpose(0, 1), None if bias is None else bias.view(s, m).t())
        ctx.save_for_backward(x_ni, right, left, u_kqn)
        return y_smn.permute(2, 0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy_no,), (x_ni, right, left, u_kqn) = grads, ctx.saved_tensors
        multiply, n, (k, q, p) = ctx.product, len(x_ni), right.shape
        dy_on = dy_no.t()
        if multiply is _product:
            dy_on = dy_on.contiguous()  # no copy where the gradient comes as columns
        dx = dright = dleft = dbias = None
        if ctx.needs_input_grad[3]:
            dbias = dy_on.sum(1)
        if left is None:
            du_kqn = dy_on.unflatten(0, (k, q))
        else:
            m, s, r = left.shape
            dy_msn = dy_on.unflatten(0, (s, m)).transpose(0, 1)
            if ctx.needs_input_grad[2]:
                dleft = multiply(dy_msn, u_kqn.view(r, m, n).permute(1, 2, 0), torch.empty_like(left))
            du_kqn = torch.empty_like(u_kqn)
            multiply(left.transpose(1, 2), dy_msn, du_kqn.view(r, m, n).transpose(0, 1))
        if ctx.needs_input_grad[1]:
            dright = multiply(du_kqn, x_ni.view(n, k, p).transpose(0, 1), torch.empty_like(right))
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(du_kqn, right, x_ni.stride(0) == 1 and n > 1, multiply)
        return dx, dright, dleft, dbias, None, None


def _features(x_ni: Tensor, first: int, second: int, columns: bool) -> Tensor:
    """An empty [first, second, n], in memory as it is or, not as columns, row by row."""
    n = len(x_ni)
    if columns:
        return x_ni.new_empty(first, second, n)
    return x_ni.new_empty(n, first, second).permute(1, 2, 0)


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[i] = a[i] b[i] (+ bias[i], one number a row), for blocks of any strides; returns out."""
    if a.device.type != "cpu":
        if bias is None:
            return torch.bmm(a, b, out=out)
        return torch.baddbmm(bias[..., None].expand(out.shape), a, b, out=out)
    # block by block: on a CPU bmm copies transposed bf16 operands, 58 ms where a product takes 10 (4096 -> 1024)
    for i in range(len(a)):
        if bias is None:
            torch.mm(a[i], b[i], out=out[i])
        else:
            torch.addmm(bias[i][:, None].expand(out[i].shape), a[i], b[i], out=out[i])
    return out


def _input_gradient(du_kqn: Tensor, right: Tensor, columns: bool, multiply: Product) -> Tensor:
    """dx [n, i], laid out as x is."""
    (k, _, n), p = du_kqn.shape, right.shape[2]
    if columns:
        dx_kpn = du_kqn.new_empty(k, p, n)
        return multiply(right.transpose(1, 2), du_kqn, dx_kpn).view(k * p, n).t()
    dx_nkp = du_kqn.new_empty(n, k, p)
    multiply(du_kqn.transpose(1, 2), right, dx_nkp.transpose(0, 1))
    return dx_nkp.view(n, k * p)
