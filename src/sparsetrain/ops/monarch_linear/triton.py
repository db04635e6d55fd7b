"""out[i] = a[i] b[i] + bias[i], for blocks of any strides, as a GPU kernel.

Both permutations of a Monarch product are strides of its operands and of its result, the gradients' included, so five
launches are a whole step and nothing is copied. PyTorch's batched product copies an operand or result whose inner
stride is not 1.
"""

# A jitted function is a language of its own, and triton need not be installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _products(
    a_ptr, b_ptr, bias_ptr, out_ptr, rows, columns, inner,
    a_i, a_r, a_c, b_i, b_r, b_c, out_i, out_r, out_c, bias_i, bias_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, tiles = tl.program_id(1).to(tl.int64), tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    a_ptr += block * a_i + row[:, None] * a_r
    b_ptr += block * b_i + column[None, :] * b_c
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, INNER):
        i = (start + tl.arange(0, INNER)).to(tl.int64)
        a = tl.load(a_ptr + i[None, :] * a_c, (row < rows)[:, None] & (i < inner)[None, :], other=0.0)
        b = tl.load(b_ptr + i[:, None] * b_r, (i < inner)[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + block * bias_i + row * bias_r, row < rows, other=0.0).to(tl.float32)[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    out_ptr += block * out_i + row[:, None] * out_r + column[None, :] * out_c
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), inside)


def _tile(size: int) -> int:
    return min(128, max(16, triton.next_power_of_2(size)))


@torch.library.custom_op("sparsetrain::block_products", mutates_args=("out",))
def block_products(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes out [i, r, c] = a [i, r, n] b [i, n, c] + bias [i, r]; sums in fp32, rounded once."""
    if not out.numel():
        return
    blocks, rows, columns = out.shape
    fp32 = a.dtype == torch.float32
    tile_rows, tile_columns = (min(64, _tile(size)) if fp32 else _tile(size) for size in (rows, columns))
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns), blocks)
    with torch.cuda.device_of(a):  # kernels go to the current device, wherever their tensors are
        _products[grid](
            a, b, out if bias is None else bias, out, rows, columns, a.shape[2],
            *a.stride(), *b.stride(), *out.stride(), *((0, 0) if bias is None else bias.stride()),
            ROWS=tile_rows, COLUMNS=tile_columns, INNER=32, BIAS=bias is not None,
            PRECISION="tf32x3" if fp32 else "tf32", num_warps=4 if fp32 else 8, num_stages=3,
        )  # fmt: skip


@block_products.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch._product`."""
    block_products(a, b, bias, out)
    return out
