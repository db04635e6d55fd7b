"""Block-sparse attention in Triton: forward, dQ over the lists, dK and dV over their inverse, so without atomics.

Seven products instead of five, and the same sums every time: with fp32 atomics, they took 90 % of a token-sparse
backward (MagiAttention#335). Whole blocks come first, in a loop that computes no mask, then the partly visible ones.

Legend: m queries and n keys of a tile, c channels (padded to a power of two), l list heads, r query heads a list.
"""

# Kernels are a language of their own, and types are checked also where Triton is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsetrain.ops.block_sparse_attention.lists import Listed, block_lists, invert
from sparsetrain.ops.block_sparse_attention.tiles import Geometry

_LOG2E = math.log2(math.e)


@triton.jit
def _load(base, places, inside, stride, c, width):
    """Rows [places, c] of a [length, width] matrix; zeros outside."""
    return tl.load(
        base + places.to(tl.int64)[:, None] * stride + c[None], mask=inside[:, None] & (c < width)[None], other=0.0
    )


@triton.jit
def _visible(
    rows, keys, shift, num_keys, segments, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """[rows, keys]: position, window and segment allow the pair; `rows` may run past the last query."""
    i = (rows + shift)[:, None]
    j = keys[None]
    seen = (j < num_keys) & (i < num_keys)
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW:
        seen = seen & (j - i < window) & (i - j < window)
    if PACKED:
        own = tl.load(segments + rows + shift, mask=rows + shift < num_keys, other=0)[:, None]
        other = tl.load(segments + keys, mask=keys < num_keys, other=0)[None]
        seen = seen & (own == other) & (own > 0)
    return seen


@triton.jit
def _forward_step(
    q, acc, top, total, k, v, start, rows, c, stride_k, stride_v, shift, num_keys, width, segments, window, factor,
    N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, N)
    inside = keys < num_keys
    k_nc = _load(k, keys, inside, stride_k, c, width)
    scores = tl.dot(q, tl.trans(k_nc), input_precision="tf32x3") * factor
    if PARTIAL:
        seen = _visible(rows, keys, shift, num_keys, segments, window, CAUSAL, WINDOW, PACKED)
        scores = tl.where(seen, scores, float("-inf"))
    high = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(high == float("-inf"), 0.0, high)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(top - safe)
    v_nc = _load(v, keys, inside, stride_v, c, width)
    acc = acc * fade[:, None] + tl.dot(weights.to(v_nc.dtype), v_nc, input_precision="tf32x3")
    return acc, high, total * fade + tl.sum(weights, 1)


@triton.jit
def _forward(
    q, k, v, out, lse, full_counts, full_ids, partial_counts, partial_ids, segments,
    qb, qh, qt, kb, kg, ks, vb, vg, vs, nb, nl, slots, heads, per_key, per_list, t, s, d, window, factor,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    block = tile * M // BLOCK_Q
    rows = tile * M + tl.arange(0, M)
    c = tl.arange(0, C)
    q_mc = _load(q + b * qb + h * qh, rows, rows < t, qt, c, d)
    k += b * kb + h // per_key * kg
    v += b * vb + h // per_key * vg
    segments += b * s
    owner = b * nb + h // per_list * nl + block
    acc = tl.zeros([M, C], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    parts: tl.constexpr = BLOCK_K // N
    for place in range(tl.load(full_counts + owner) * parts):
        start = tl.load(full_ids + owner * slots + place // parts) * BLOCK_K + place % parts * N
        acc, top, total = _forward_step(
            q_mc, acc, top, total, k, v, start, rows, c, ks, vs, s - t, s, d, segments, window, factor,
            N, CAUSAL, WINDOW, PACKED, False,
        )  # fmt: skip
    for place in range(tl.load(partial_counts + owner) * parts):
        start = tl.load(partial_ids + owner * slots + place // parts) * BLOCK_K + place % parts * N
        acc, top, total = _forward_step(
            q_mc, acc, top, total, k, v, start, rows, c, ks, vs, s - t, s, d, segments, window, factor,
            N, CAUSAL, WINDOW, PACKED, True,
        )  # fmt: skip
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    first = (b * heads + h) * t + rows
    inside = rows < t
    tl.store(out + first[:, None] * d + c[None], acc.to(out.dtype.element_ty), mask=inside[:, None] & (c < d)[None])
    found = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) / 1.4426950408889634, float("-inf"))
    tl.store(lse + first, found, mask=inside)


@triton.jit
def _weights(
    q_mc, k_nc, dout_mc, v_nc, lse, delta, rows, keys, shift, num_keys, segments, window, factor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """(P, dS), [m, n]; lse is in powers of two, +inf where no key is visible."""
    scores = tl.dot(q_mc, tl.trans(k_nc), input_precision="tf32x3") * factor
    weights = tl.exp2(scores - lse[:, None])
    if PARTIAL:
        seen = _visible(rows, keys, shift, num_keys, segments, window, CAUSAL, WINDOW, PACKED)
        weights = tl.where(seen, weights, 0.0)
    products = tl.dot(dout_mc, tl.trans(v_nc), input_precision="tf32x3")
    return weights, weights * (products - delta[:, None])


@triton.jit
def _rows_of(q, dout, lse, delta, first, rows, t, stride_q, stride_out, c, width):
    """What the backward reads of some queries: q, dout, lse in powers of two (+inf for no key) and delta."""
    inside = rows < t
    q_mc = _load(q, rows, inside, stride_q, c, width)
    dout_mc = _load(dout, rows, inside, stride_out, c, width)
    found = tl.load(lse + first + rows, mask=inside, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * 1.4426950408889634)
    return q_mc, dout_mc, found, tl.load(delta + first + rows, mask=inside, other=0.0)


@triton.jit
def _dq_step(
    dq, q_mc, dout_mc, lse, delta, k, v, start, rows, c, stride_k, stride_v, shift, num_keys, width, segments, window,
    factor, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    keys = start + tl.arange(0, N)
    k_nc = _load(k, keys, keys < num_keys, stride_k, c, width)
    v_nc = _load(v, keys, keys < num_keys, stride_v, c, width)
    _, ds = _weights(
        q_mc, k_nc, dout_mc, v_nc, lse, delta, rows, keys, shift, num_keys, segments, window, factor,
        CAUSAL, WINDOW, PACKED, PARTIAL,
    )  # fmt: skip
    return dq + tl.dot(ds.to(k_nc.dtype), k_nc, input_precision="tf32x3")


@triton.jit
def _backward_q(
    q, k, v, dout, lse, delta, dq, full_counts, full_ids, partial_counts, partial_ids, segments,
    qb, qh, qt, kb, kg, ks, vb, vg, vs, ob, oh, ot, nb, nl, slots, heads, per_key, per_list, t, s, d, window, factor,
    scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * M + tl.arange(0, M)
    c = tl.arange(0, C)
    first = (b * heads + h) * t
    q_mc, dout_mc, lse_m, delta_m = _rows_of(
        q + b * qb + h * qh, dout + b * ob + h * oh, lse, delta, first, rows, t, qt, ot, c, d
    )
    k += b * kb + h // per_key * kg
    v += b * vb + h // per_key * vg
    segments += b * s
    owner = b * nb + h // per_list * nl + tile * M // BLOCK_Q
    acc = tl.zeros([M, C], tl.float32)
    parts: tl.constexpr = BLOCK_K // N
    for place in range(tl.load(full_counts + owner) * parts):
        start = tl.load(full_ids + owner * slots + place // parts) * BLOCK_K + place % parts * N
        acc = _dq_step(
            acc, q_mc, dout_mc, lse_m, delta_m, k, v, start, rows, c, ks, vs, s - t, s, d, segments, window, factor,
            N, CAUSAL, WINDOW, PACKED, False,
        )  # fmt: skip
    for place in range(tl.load(partial_counts + owner) * parts):
        start = tl.load(partial_ids + owner * slots + place // parts) * BLOCK_K + place % parts * N
        acc = _dq_step(
            acc, q_mc, dout_mc, lse_m, delta_m, k, v, start, rows, c, ks, vs, s - t, s, d, segments, window, factor,
            N, CAUSAL, WINDOW, PACKED, True,
        )  # fmt: skip
    inside = (rows < t)[:, None] & (c < d)[None]
    tl.store(dq + (first + rows)[:, None] * d + c[None], (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _dkv_step(
    dk, dv, k_nc, v_nc, q, dout, lse, delta, first, start, keys, c, stride_q, stride_out, t, num_keys, width, segments,
    window, factor, M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    rows = start + tl.arange(0, M)
    q_mc, dout_mc, lse_m, delta_m = _rows_of(q, dout, lse, delta, first, rows, t, stride_q, stride_out, c, width)
    weights, ds = _weights(
        q_mc, k_nc, dout_mc, v_nc, lse_m, delta_m, rows, keys, num_keys - t, num_keys, segments, window, factor,
        CAUSAL, WINDOW, PACKED, PARTIAL,
    )  # fmt: skip
    dv += tl.dot(tl.trans(weights.to(dout_mc.dtype)), dout_mc, input_precision="tf32x3")
    dk += tl.dot(tl.trans(ds.to(q_mc.dtype)), q_mc, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _backward_kv(
    q, k, v, dout, lse, delta, dk, dv, full_offsets, full_rows, partial_offsets, partial_rows, segments,
    qb, qh, qt, kb, kg, ks, vb, vg, vs, ob, oh, ot, fb, fl, rb, rl, groups, per_key, per_list, t, s, d, window, factor,
    scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    b = (tl.program_id(1) // groups).to(tl.int64)
    g = (tl.program_id(1) % groups).to(tl.int64)
    keys = tile * N + tl.arange(0, N)
    c = tl.arange(0, C)
    k_nc = _load(k + b * kb + g * kg, keys, keys < s, ks, c, d)
    v_nc = _load(v + b * vb + g * vg, keys, keys < s, vs, c, d)
    segments += b * s
    dk_nc = tl.zeros([N, C], tl.float32)
    dv_nc = tl.zeros([N, C], tl.float32)
    parts: tl.constexpr = BLOCK_Q // M
    for head in range(per_key):
        h = g * per_key + head
        q_h = q + b * qb + h * qh
        dout_h = dout + b * ob + h * oh
        first = (b * groups * per_key + h) * t
        offset = b * fb + h // per_list * fl + tile * N // BLOCK_K
        row = b * rb + h // per_list * rl
        for place in range(tl.load(full_offsets + offset) * parts, tl.load(full_offsets + offset + 1) * parts):
            start = tl.load(full_rows + row + place // parts) * BLOCK_Q + place % parts * M
            dk_nc, dv_nc = _dkv_step(
                dk_nc, dv_nc, k_nc, v_nc, q_h, dout_h, lse, delta, first, start, keys, c, qt, ot, t, s, d, segments,
                window, factor, M, CAUSAL, WINDOW, PACKED, False,
            )  # fmt: skip
        for place in range(tl.load(partial_offsets + offset) * parts, tl.load(partial_offsets + offset + 1) * parts):
            start = tl.load(partial_rows + row + place // parts) * BLOCK_Q + place % parts * M
            dk_nc, dv_nc = _dkv_step(
                dk_nc, dv_nc, k_nc, v_nc, q_h, dout_h, lse, delta, first, start, keys, c, qt, ot, t, s, d, segments,
                window, factor, M, CAUSAL, WINDOW, PACKED, True,
            )  # fmt: skip
    inside = (keys < s)[:, None] & (c < d)[None]
    place = ((b * groups + g) * s + keys)[:, None] * d + c[None]
    tl.store(dk + place, (dk_nc * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, dv_nc.to(dv.dtype.element_ty), mask=inside)


def unable(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why these kernels cannot run this call, on a machine that has Triton."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q.shape[3] > 256:
        return f"the kernels take fp32, bf16 and fp16 heads of up to 256 channels, not {q.dtype} of {q.shape[3]}"
    smallest = min(math.gcd(block_q, 64), math.gcd(block_k, 64))
    if q.device.type == "cuda" and smallest < 16:
        return f"tensor cores multiply 16 tokens or more, and blocks of {block_q} x {block_k} divide into {smallest}"
    return None


def attend(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_blik: Tensor,
    segments_bs: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_bhtd, lse_bht); differentiable once, in both outputs."""
    (full, full_ids), (partial, partial_ids) = block_lists(blocks_blik, segments_bs, geometry)
    segments = None if segments_bs is None else segments_bs.int().contiguous()
    lists = full, full_ids, partial, partial_ids
    sizes = geometry.block_q, geometry.block_k, geometry.causal, geometry.window, scale
    return attention_op(q_bhtd, k_bgsd, v_bgsd, *lists, segments, *sizes)


@torch.library.custom_op("sparsetrain::block_sparse_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor,
    full_ids: Tensor,
    partial: Tensor,
    partial_ids: Tensor,
    segments: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    b, h, t, d = q.shape
    out, lse = _outputs(q)
    m, n = _tiles(q, block_q, block_k, 128)
    with torch.cuda.device_of(q):  # kernels go to the current device, wherever their tensors are
        _forward[(triton.cdiv(t, m), b * h)](
            q, k, v, out, lse, full, full_ids, partial, partial_ids, full if segments is None else segments,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_steps(full), full_ids.shape[3],
            h, h // k.shape[1], h // full.shape[1], t, k.shape[2], d, window or 0, scale * _LOG2E,
            block_q, block_k, m, n, triton.next_power_of_2(d), causal, window is not None, segments is not None,
            num_warps=8 if m * d > 64 * 64 else 4, num_stages=_stages(q),
        )  # fmt: skip
    return out, lse


@attention_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("sparsetrain::block_sparse_attention_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    full: Tensor,
    full_ids: Tensor,
    partial: Tensor,
    partial_ids: Tensor,
    segments: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dout = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, dout))
    (b, h, t, d), (_, g, s, _) = q.shape, k.shape
    dq, dk, dv = _gradients(q, k)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3]
    sizes = h // g, h // full.shape[1], t, s, d, window or 0, scale * _LOG2E, scale, block_q, block_k
    rules = triton.next_power_of_2(d), causal, window is not None, segments is not None
    ids = full if segments is None else segments
    m, n = _tiles(q, block_q, block_k, 128)
    launch = {"num_warps": 8 if m * d > 64 * 64 else 4, "num_stages": _stages(q)}
    with torch.cuda.device_of(q):  # kernels go to the current device, wherever their tensors are
        _backward_q[(triton.cdiv(t, m), b * h)](
            q, k, v, dout, lse, delta, dq, full, full_ids, partial, partial_ids, ids,
            *strides, *_steps(full), full_ids.shape[3], h, *sizes, m, n, *rules, **launch,
        )  # fmt: skip
    num_key_blocks = -(-s // block_k)
    whole, part = (invert(Listed(*x), num_key_blocks) for x in ((full, full_ids), (partial, partial_ids)))
    m, n = _tiles(q, block_q, block_k, _kv_rows(q))
    with torch.cuda.device_of(q):  # kernels go to the current device, wherever their tensors are
        _backward_kv[(triton.cdiv(s, n), b * g)](
            q, k, v, dout, lse, delta, dk, dv, *whole, *part, ids,
            *strides, *_steps(whole.offsets), *_steps(whole.rows), g, *sizes, m, n, *rules, **launch,
        )  # fmt: skip
    return dq, dk, dv


@backward_op.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.sizes = inputs[8:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *lists, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:  # dS = P * (dP - delta), and the gradient of lse adds dlse inside the bracket
        delta = delta - dlse.masked_fill(lse.isneginf(), 0)
    return *backward_op(q, k, v, dout, lse, delta, *lists, *ctx.sizes), *(None,) * 10


attention_op.register_autograd(_differentiate, setup_context=_save)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _tiles(q: Tensor, block_q: int, block_k: int, rows: int) -> tuple[int, int]:
    """Queries and keys of a tile: powers of two that divide the blocks.

    At 128 channels in bf16, compiled for Hopper: 128 x 64 forward needs 255 registers and 49 KiB of shared memory.
    fp32, three products of TF32, takes a quarter.
    """
    shrink = 1 if q.itemsize == 2 else 2
    return math.gcd(block_q, rows // shrink), math.gcd(block_k, 64 // shrink)


def _kv_rows(q: Tensor) -> int:
    """Queries of a tile in dK and dV. Compiled for Hopper with aligned strides, 64 x 64 at 128 channels spill 192 bytes
    a thread and 32 x 64 none, in 64 KiB of shared memory; for Ampere neither spills. Untimed."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return 32 if hopper and q.itemsize == 2 and q.shape[3] > 64 else 64


def _steps(x: Tensor) -> tuple[int, int]:
    """Rows of lists from one batch entry, and from one list head, to the next: 0 where they share one."""
    b, heads, rows = x.shape[:3]
    return (heads * rows if b > 1 else 0), (rows if heads > 1 else 0)


def _stages(q: Tensor) -> int:
    """Tiles of keys in flight: three of fp32 would not fit into shared memory."""
    return 2 if q.itemsize == 2 else 1
