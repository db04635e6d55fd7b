"""MVUE in one pass: x is read once and the drawn entries are written, whatever the strides.

The arithmetic is that of `torch.py`, step for step, in registers; fused multiply-adds can move an end by a rounding.
"""

# Kernels are a language of their own, and types are checked also where Triton is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS = 256
"""Groups of a program, two a thread."""


@triton.jit
def _over(a, b):
    """a / b as PyTorch rounds it; in fp32 Triton's own is off by two roundings."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _draw(
    x, out, row, column, offset, groups, inner, total, x_outer, x_step, x_inner, out_outer, out_step, out_inner,
    WIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Groups are numbered as [outer, groups, inner]; a group's four entries are a step apart."""
    n = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = n < total
    i, g, o = n % inner, n // inner % groups, n // (inner * groups)
    x += o * x_outer + g * 4 * x_step + i * x_inner
    x0 = tl.load(x, mask=inside, other=0.0).to(WIDE)
    x1 = tl.load(x + x_step, mask=inside, other=0.0).to(WIDE)
    x2 = tl.load(x + 2 * x_step, mask=inside, other=0.0).to(WIDE)
    x3 = tl.load(x + 3 * x_step, mask=inside, other=0.0).to(WIDE)
    small = tl.load(offset)
    a0, a1, a2, a3 = tl.abs(x0) + small, tl.abs(x1) + small, tl.abs(x2) + small, tl.abs(x3) + small
    front, back = a0 + a1, a2 + a3
    h0, h1, h2, h3 = _over(a0, a1 + back), _over(a1, a0 + back), _over(a2, front + a3), _over(a3, front + a2)
    part = _over(1.0 + tl.zeros_like(front), front + back)
    a0, a1, a2, a3 = a0 * part, a1 * part, a2 * part, a3 * part
    front, back = h0 + h1, h2 + h3
    p0, p1, p2, p3 = a0 + a0 * (h1 + back), a1 + a1 * (h0 + back), a2 + a2 * (front + h3), a3 + a3 * (front + h2)
    start = tl.load(row + g, mask=inside, other=0.0) + tl.load(column + o * inner + i, mask=inside, other=0.0)
    first = tl.floor(start)
    end0 = tl.floor(start + p0)
    end1 = tl.floor(start + p0 + p1)
    end2 = tl.floor(start + p0 + p1 + p2)
    out += o * out_outer + g * 4 * out_step + i * out_inner
    tl.store(out, _over(x0, p0) * (end0 - first), mask=inside)
    tl.store(out + out_step, _over(x1, p1) * (end1 - end0), mask=inside)
    tl.store(out + 2 * out_step, _over(x2, p2) * (end2 - end1), mask=inside)
    # the last interval ends at first + 2, however the sum of p was rounded
    tl.store(out + 3 * out_step, _over(x3, p3) * (first + 2 - end2), mask=inside)


@torch.library.custom_op("sparsetrain::mvue24", mutates_args=())
def drawn(x_osi: Tensor, row_g: Tensor, column_c: Tensor, offset: Tensor) -> Tensor:
    """x [outer, s, inner] with two of every four entries along s, whose intervals begin at row_g + column_c (c counts
    outer and inner); a last group of fewer than four as it is."""
    out = torch.empty_like(x_osi)
    size = x_osi.shape[1] // 4 * 4
    out[:, size:] = x_osi[:, size:]
    (outer, _, inner), strides = x_osi.shape, (*x_osi.stride(), *out.stride())
    total = outer * size // 4 * inner
    if not total:
        return out
    with torch.cuda.device_of(x_osi):  # kernels go to the current device, wherever their tensors are
        _draw[(triton.cdiv(total, _GROUPS),)](
            x_osi, out, row_g, column_c, offset, size // 4, inner, total, *strides,
            tl.float64 if x_osi.dtype == torch.float64 else tl.float32, _GROUPS, num_warps=4,
        )  # fmt: skip
    return out


@drawn.register_fake
def _(x_osi: Tensor, row_g: Tensor, column_c: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(x_osi)


def drawn_along(x: Tensor, dim: int, row_g: Tensor, column_c: Tensor, offset: Tensor) -> Tensor:
    """As `sliced_mvue`, of all of x: neighbours in memory are drawn by neighbouring threads, and nothing is copied."""
    dim = dim % x.ndim
    x_osi = x.reshape(x.shape[:dim].numel(), x.shape[dim], x.shape[dim + 1 :].numel())
    outer_stride, step, inner_stride = x_osi.stride()
    lone_outer, lone_inner = x_osi.shape[0] == 1, x_osi.shape[2] == 1
    if (lone_outer and inner_stride > step) or (lone_inner and outer_stride < step):
        x_osi = x_osi.transpose(0, 2)
        return drawn(x_osi, row_g, column_c, offset).transpose(0, 2).reshape(x.shape)
    return drawn(x_osi, row_g, column_c, offset).reshape(x.shape)
