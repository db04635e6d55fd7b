"""Codes, or their histograms by block, in one pass over the vectors: no distance is stored, and no code in the latter.

A distance is added up channel by channel as everywhere, on the plain cores: at 32k tokens of 40 heads of 128 that is
8 G operations, a tenth of a millisecond, and a product on tensor cores would round codes by where a vector stands.
"""

# Kernels are a language of their own, and types are checked also where Triton is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
"""Most vectors of a tile."""


@triton.jit
def _nearest(
    x, book, rows, inside, stride, subspace, num_codewords, W: tl.constexpr, E: tl.constexpr, L1: tl.constexpr
):
    """The code of each vector in one sub-space, [rows]; the first of equal distances."""
    e = tl.arange(0, E)
    total = tl.zeros([rows.shape[0], E], tl.float32)
    for channel in tl.static_range(W):
        x_r = tl.load(x + rows.to(tl.int64) * stride + subspace * W + channel, mask=inside, other=0.0).to(tl.float32)
        place = (subspace * num_codewords + e) * W + channel
        difference = x_r[:, None] - tl.load(book + place, mask=e < num_codewords, other=0.0)[None]
        total += tl.abs(difference) if L1 else difference * difference
    total = tl.where((e < num_codewords)[None], total, float("inf"))
    return tl.minimum(tl.argmin(total, 1), num_codewords - 1)


@triton.jit
def _encode(
    x, book, codes, xb, xh, xt, heads, per_book, t, num_subspaces, num_codewords,
    ROWS: tl.constexpr, W: tl.constexpr, E: tl.constexpr, L1: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < t
    book += h // per_book * num_subspaces * num_codewords * W
    for subspace in range(num_subspaces):
        code = _nearest(x + b * xb + h * xh, book, rows, inside, xt, subspace, num_codewords, W, E, L1)
        place = ((b * heads + h) * t + rows) * num_subspaces + subspace
        tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def _histograms(
    x, book, valid, out, xb, xh, xt, heads, per_book, t, num_blocks, num_subspaces, num_codewords, block,
    ROWS: tl.constexpr, W: tl.constexpr, E: tl.constexpr, L1: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program counts the codes of one block in one sub-space."""
    n = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    subspace = tl.program_id(2)
    e = tl.arange(0, E)
    count = tl.zeros([E], tl.float32)
    book += h // per_book * num_subspaces * num_codewords * W
    for start in range(0, block, ROWS):
        place = start + tl.arange(0, ROWS)
        rows = n * block + place
        inside = (rows < t) & (place < block)
        code = _nearest(x + b * xb + h * xh, book, rows, inside, xt, subspace, num_codewords, W, E, L1)
        counted = inside
        if MASKED:
            counted = inside & (tl.load(valid + b * t + rows, mask=inside, other=0) != 0)
        count += tl.sum(tl.where((code[:, None] == e[None]) & counted[:, None], 1.0, 0.0), 0)
    first = (((b * heads + h) * num_subspaces + subspace) * num_blocks + n) * num_codewords
    tl.store(out + first + e, count, mask=e < num_codewords)


@torch.library.custom_op("sparsetrain::pq_encode", mutates_args=())
def encode(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str) -> Tensor:
    """codes_bhtm."""
    x, book = _ready(x_bhtd, codebook_gmew)
    (b, h, t, _), (g, m, e, w) = x.shape, book.shape
    codes = _codes(x_bhtd, codebook_gmew)
    rows = min(_ROWS, triton.next_power_of_2(t))
    with torch.cuda.device_of(x):  # kernels go to the current device, wherever their tensors are
        _encode[(triton.cdiv(t, rows), b * h)](
            x, book, codes, *x.stride()[:3], h, h // g, t, m, e, rows, w, triton.next_power_of_2(e), distance == "l1"
        )
    return codes


@torch.library.custom_op("sparsetrain::pq_histograms", mutates_args=())
def histograms(x_bhtd: Tensor, codebook_gmew: Tensor, block: int, distance: str, valid_bt: Tensor | None) -> Tensor:
    """[b, h, m, n, e] in fp32."""
    x, book = _ready(x_bhtd, codebook_gmew)
    (b, h, t, _), (g, m, e, w) = x.shape, book.shape
    out = _counts(x_bhtd, codebook_gmew, block)
    valid = x if valid_bt is None else valid_bt.to(torch.int8).contiguous()
    rows = min(_ROWS, triton.next_power_of_2(block))
    with torch.cuda.device_of(x):  # kernels go to the current device, wherever their tensors are
        _histograms[(out.shape[3], b * h, m)](
            x, book, valid, out, *x.stride()[:3], h, h // g, t, out.shape[3], m, e, block,
            rows, w, triton.next_power_of_2(e), distance == "l1", valid_bt is not None,
        )  # fmt: skip
    return out


@encode.register_fake
def _(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str) -> Tensor:
    return _codes(x_bhtd, codebook_gmew)


@histograms.register_fake
def _(x_bhtd: Tensor, codebook_gmew: Tensor, block: int, distance: str, valid_bt: Tensor | None) -> Tensor:
    return _counts(x_bhtd, codebook_gmew, block)


def _ready(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return (x if x.stride(3) == 1 else x.contiguous()), codebook.float().contiguous()


def _codes(x: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], codebook.shape[1]), dtype=torch.uint8)


def _counts(x: Tensor, codebook: Tensor, block: int) -> Tensor:
    b, h, t, _ = x.shape
    _, m, e, _ = codebook.shape
    return x.new_empty((b, h, m, -(-t // block), e), dtype=torch.float32)
