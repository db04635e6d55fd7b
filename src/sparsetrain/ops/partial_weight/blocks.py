"""Blocks of one shape (rows, columns, tiles): the weight's gradient is computed for the chosen ones alone.

Legend: weight [o, i] as it is stored; a block is [high, wide], and blocks are numbered row by row; k chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def blocks_of(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight as [o / high, i / wide, high, wide], a view.

    Raises:
        ValueError: a size does not divide.
    """
    (high, wide), sizes = shape, tuple(weight.shape)
    if weight.ndim != 2 or sizes[0] % high or sizes[1] % wide:
        raise ValueError(
            f"a weight {sizes} does not divide into blocks of {high}x{wide}. Choose rows, which always fit, or leave "
            "it out."
        )
    return weight.view(sizes[0] // high, high, sizes[1] // wide, wide).transpose(1, 2)


@torch.no_grad()
def put_blocks(weight: Tensor, blocks: Tensor, values: Tensor) -> None:
    """Write values [k, high, wide] into the weight, in place, rounded to its dtype."""
    grid = blocks_of(weight, (values.shape[1], values.shape[2]))
    grid[blocks // grid.shape[1], blocks % grid.shape[1]] = values.to(weight.dtype)


def places_of_blocks(blocks: Tensor, shape: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
    """Where the entries of blocks lie in the flat weight of `sizes`: int32 [k * high * wide], block by block."""
    (high, wide), across = shape, sizes[1] // shape[1]
    first = (blocks // across) * (high * sizes[1]) + (blocks % across) * wide
    inside = torch.arange(high, device=blocks.device)[:, None] * sizes[1] + torch.arange(wide, device=blocks.device)
    return (first[:, None] + inside.flatten()).flatten().int()


def block_linear(
    x: Tensor, weight: Tensor, values: Tensor, blocks: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """y = x Wᵀ + b, with the gradient of W's chosen blocks going to `values`, and no other part of it computed.

    Equals: F.linear(x, weight, bias), with `values` as the blocks of `weight`, which holds them already.

    Args:
        x: [..., in].
        weight: [out, in]; [in, out] if transposed (GPT-2's Conv1D). Frozen.
        values: [k, high, wide]; blocks: [k], int32 or int64.

    Returns:
        y [..., out].

    Cost: dW takes k / (number of blocks) of its products; with dX and the forward, a linear takes (2 + that) / 3.
    """
    return _BlockLinear.apply(x, weight, values, blocks, bias, transposed)  # type: ignore[return-value]


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, blocks: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, blocks)
        ctx.transposed, ctx.shape, ctx.kept = transposed, tuple(values.shape[1:]), (values.dtype, bias)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,), (x, weight, blocks) = grads, ctx.saved_tensors
        dtype, bias = ctx.kept
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:  # in the gradient's dtype: under autocast the weight is wider
            weight = weight.to(dy.dtype)
            dx = (dy @ (weight.t() if ctx.transposed else weight)).to(x.dtype)
        dy_to, x_ti = dy.flatten(0, -2), x.flatten(0, -2).to(dy.dtype)
        if ctx.needs_input_grad[2]:
            left, right = (x_ti, dy_to) if ctx.transposed else (dy_to, x_ti)
            dvalues = block_products(left, right, blocks, ctx.shape).to(dtype)
        if bias is not None and ctx.needs_input_grad[4]:
            dbias = dy_to.sum(0).to(bias.dtype)
        return dx, None, dvalues, None, dbias, None


def block_products(left_ta: Tensor, right_tb: Tensor, blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The chosen blocks [k, high, wide] of leftᵀ right [a, b], each from the columns that it needs."""
    (high, wide), across = shape, right_tb.shape[1] // shape[1]
    row, column = blocks // across, blocks % across
    if across == 1 and high == 1:  # whole rows: one product
        return (left_ta.index_select(1, row).t() @ right_tb)[:, None]
    if left_ta.shape[1] == high and wide == 1:  # whole columns
        return (left_ta.t() @ right_tb.index_select(1, column)).t()[:, :, None]
    found = right_tb.new_empty(len(blocks), high, wide)
    rights = right_tb.unflatten(1, (across, wide))
    for i, chosen in _by_row(row):
        product = left_ta[:, i * high : (i + 1) * high].t() @ rights[:, column[chosen]].flatten(1)
        found[chosen] = product.view(high, -1, wide).transpose(0, 1)
    return found


def _by_row(row: Tensor) -> list[tuple[int, slice]]:
    """(row of blocks, which of the blocks lie in it); blocks are sorted, so they lie side by side."""
    rows, counts = row.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(i, slice(end - n, end)) for i, n, end in zip(rows.tolist(), counts.tolist(), ends, strict=True)]
