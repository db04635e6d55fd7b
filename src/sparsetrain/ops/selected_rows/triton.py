"""Attention of selected queries as three GPU kernels: output and statistics, dQ, and dK and dV.

Rows of a tile are (query, head) pairs of one key/value head, so keys are read once for all heads that share them. A
tile's positions are sorted: keys that all of its queries see come first and need no mask. dQ walks a query tile's keys
and dK, dV a key tile's queries, so nothing is summed by atomics and two runs give the same bits. Where the output is
known already, the first kernel forms the statistics alone and reads no values.

Products a backward, of |S| rows by the keys they see: 1 for the statistics, 3 for dQ, 4·|S|/t for dK and dV of
selected keys (a library's backward: 2 to form its statistics, 5). Scores are in powers of two, statistics in fp32.
"""

# A jitted function is a language of its own, and triton need not be installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
FAR: tl.constexpr = tl.constexpr(2**30)
"""Behind every key, and far from overflow: a tile without rows begins there and ends at key 0."""


@triton.jit
def _rows(index_ptr, looks_ptr, count, first_row, rep, ROWS: tl.constexpr, LOOKS: tl.constexpr):
    """(query, head of the group, is it used, position, sequence that it looks at) of a tile's rows."""
    row = first_row + tl.arange(0, ROWS)
    query, head = row // rep, row % rep
    used = query < count
    position = tl.load(index_ptr + query, mask=used, other=-1)
    looks = position
    if LOOKS:
        looks = tl.load(looks_ptr + query, mask=used, other=-1)
    return query, head, used, position, looks


@triton.jit
def _visible(
    position, looks, used, key, there, sequence, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """bool [rows, keys]: who sees whom."""
    distance = position[:, None] - key[None, :]
    seen = used[:, None] & there[None, :]
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window) & (distance > -window)
    if LOOKS:
        seen = seen & (looks[:, None] == sequence[None, :]) & (sequence[None, :] > 0)
    return seen


@triton.jit
def _key_range(
    position, used, num_keys, window,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """(first key, first that needs a mask, behind the last) that a tile's queries can see; whole blocks before it."""
    first = tl.min(tl.where(used, position, FAR), 0)
    last = tl.max(tl.where(used, position, -1), 0)
    start = num_keys * 0
    stop = num_keys
    if WINDOW:
        start = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        stop = tl.minimum(num_keys, last + window)
    if CAUSAL:
        stop = tl.minimum(stop, last + 1)
    stop = tl.where(last < 0, 0, stop)
    masked = start
    if (not WINDOW) and (not LOOKS):
        masked = stop // KEYS * KEYS
        if CAUSAL:
            masked = tl.minimum(first + 1, stop) // KEYS * KEYS
    return start, masked, stop


@triton.jit
def _tile(ptr, row, channel, stride, there, D: tl.constexpr):
    wide = channel[None, :] < D
    return tl.load(ptr + row[:, None].to(tl.int64) * stride + channel[None, :], mask=there[:, None] & wide, other=0)


@triton.jit
def _any(seen):
    return tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0


@triton.jit
def _attend(
    q, k_ptr, v_ptr, key, there, seen, scale, k_row, v_row, m, total, o,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running largest score, sum and output with one block of keys more."""
    channel = tl.arange(0, WIDTH)
    k = _tile(k_ptr, key, channel, k_row, there, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    largest = tl.maximum(m, tl.max(s, 1))
    # a row that has seen nothing yet has no largest score, and -inf - -inf is not a number
    level = tl.where(largest == float("-inf"), 0.0, largest)
    p, fade = tl.exp2(s - level[:, None]), tl.exp2(m - level)
    total = total * fade + tl.sum(p, 1)
    if VALUES:
        v = _tile(v_ptr, key, channel, v_row, there, D)
        o = o * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return largest, total, o


@triton.jit
def _statistics_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, count_ptr, sequence_ptr, looks_ptr, o_ptr, lse_ptr,
    num_queries, num_keys, groups, rep, window, scale,
    q_b, q_h, q_k, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_k,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sample, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    # long tiles, those of late queries, first
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    count = tl.load(count_ptr + sample)
    query, head, used, position, looks = _rows(
        index_ptr + sample * num_queries, looks_ptr + sample * num_queries, count, first_row, rep, ROWS, LOOKS
    )
    h = group * rep + head
    h_, query_, c_ = h[:, None], query[:, None], tl.arange(0, WIDTH)[None, :]
    q = tl.load(q_ptr + sample * q_b + h_ * q_h + query_ * q_k + c_, used[:, None] & (c_ < D), other=0)
    k_ptr += sample * k_b + group * k_g
    v_ptr += sample * v_b + group * v_g
    sequence_ptr += sample * num_keys
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    start, masked, stop = _key_range(position, used, num_keys, window, KEYS, CAUSAL, WINDOW, LOOKS)
    for begin in range(start, masked, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = key < num_keys
        m, total, o = _attend(
            q, k_ptr, v_ptr, key, there, there, scale, k_s, v_s, m, total, o, D, WIDTH, False, VALUES, PRECISION
        )
    for begin in range(masked, stop, KEYS):
        key = begin + tl.arange(0, KEYS)
        there, sequence = key < num_keys, key
        if LOOKS:
            sequence = tl.load(sequence_ptr + key, mask=there, other=0)
        seen = _visible(position, looks, used, key, there, sequence, window, CAUSAL, WINDOW, LOOKS)
        if _any(seen):  # a block of another document is passed over
            m, total, o = _attend(
                q, k_ptr, v_ptr, key, there, seen, scale, k_s, v_s, m, total, o, D, WIDTH, True, VALUES, PRECISION
            )
    sees = total > 0
    # +inf makes every probability of a row that sees nothing 0
    lse = tl.where(sees, m + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
    inside = query < num_queries
    tl.store(lse_ptr + (sample * groups * rep + h) * num_queries + query, lse, inside)
    if VALUES:
        o = o / tl.where(sees, total, 1.0)[:, None]
        o_ptr += sample * o_b
        tl.store(o_ptr + h_ * o_h + query_ * o_k + c_, o.to(o_ptr.dtype.element_ty), inside[:, None] & (c_ < D))


@triton.jit
def _add_dq(
    q, do, lse, delta, dq, k_ptr, v_ptr, key, there, seen, scale, k_row, v_row,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, WIDTH)
    k = _tile(k_ptr, key, channel, k_row, there, D)
    v = _tile(v_ptr, key, channel, v_row, there, D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return dq + tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, index_ptr, count_ptr, sequence_ptr, looks_ptr, dq_ptr, delta_ptr,
    num_queries, num_keys, groups, rep, window, scale, factor,
    q_b, q_h, q_k, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_k, do_b, do_h, do_k, dq_b, dq_h, dq_k,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sample, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    count = tl.load(count_ptr + sample)
    query, head, used, position, looks = _rows(
        index_ptr + sample * num_queries, looks_ptr + sample * num_queries, count, first_row, rep, ROWS, LOOKS
    )
    h, inside = group * rep + head, query < num_queries
    h_, query_, c_ = h[:, None], query[:, None], tl.arange(0, WIDTH)[None, :]
    here = used[:, None] & (c_ < D)
    q = tl.load(q_ptr + sample * q_b + h_ * q_h + query_ * q_k + c_, here, other=0)
    o = tl.load(o_ptr + sample * o_b + h_ * o_h + query_ * o_k + c_, here, other=0)
    do = tl.load(do_ptr + sample * do_b + h_ * do_h + query_ * do_k + c_, here, other=0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (sample * groups * rep + h) * num_queries + query
    tl.store(delta_ptr + at, delta, inside)
    lse = tl.load(lse_ptr + at, used, other=float("inf"))
    k_ptr += sample * k_b + group * k_g
    v_ptr += sample * v_b + group * v_g
    sequence_ptr += sample * num_keys
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    start, masked, stop = _key_range(position, used, num_keys, window, KEYS, CAUSAL, WINDOW, LOOKS)
    for begin in range(start, masked, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = key < num_keys
        dq = _add_dq(
            q, do, lse, delta, dq, k_ptr, v_ptr, key, there, there, scale, k_s, v_s, D, WIDTH, False, PRECISION
        )
    for begin in range(masked, stop, KEYS):
        key = begin + tl.arange(0, KEYS)
        there, sequence = key < num_keys, key
        if LOOKS:
            sequence = tl.load(sequence_ptr + key, mask=there, other=0)
        seen = _visible(position, looks, used, key, there, sequence, window, CAUSAL, WINDOW, LOOKS)
        if _any(seen):
            dq = _add_dq(
                q, do, lse, delta, dq, k_ptr, v_ptr, key, there, seen, scale, k_s, v_s, D, WIDTH, True, PRECISION
            )
    dq_ptr += sample * dq_b
    at = h_ * dq_h + query_ * dq_k + c_
    tl.store(dq_ptr + at, (dq * factor).to(dq_ptr.dtype.element_ty), inside[:, None] & (c_ < D))


@triton.jit
def _first_at_least(index_ptr, count, wanted, steps):
    """The place of the first of `count` ascending positions that is at least `wanted`; `count` if none is."""
    low, high = count * 0, count
    for _ in range(steps):
        middle = (low + high) // 2
        within = low < high
        less = tl.load(index_ptr + middle, mask=within, other=0) < wanted
        low = tl.where(within & less, middle + 1, low)
        high = tl.where(within & (less == 0), middle, high)
    return low


@triton.jit
def _add_dkv(
    q_ptr, do_ptr, k, v, lse, delta, dk, dv, query_, h_, used, seen, scale, q_h, q_k, do_h, do_k,
    D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c_ = tl.arange(0, WIDTH)[None, :]
    here = used[:, None] & (c_ < D)
    q = tl.load(q_ptr + h_ * q_h + query_ * q_k + c_, here, other=0)
    do = tl.load(do_ptr + h_ * do_h + query_ * do_k + c_, here, other=0)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    p = tl.where(seen, p, 0.0)
    dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, index_ptr, count_ptr, sequence_ptr, looks_ptr, dk_ptr, dv_ptr,
    num_queries, num_keys, num_slots, groups, rep, window, scale, factor, steps,
    q_b, q_h, q_k, k_b, k_g, k_s, v_b, v_g, v_s, do_b, do_h, do_k, dk_b, dk_g, dk_s, dv_b, dv_g, dv_s,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, EVERYWHERE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LOOKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sample, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    count = tl.load(count_ptr + sample)
    index_ptr += sample * num_queries
    looks_ptr += sample * num_queries
    slot, channel = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    if EVERYWHERE:
        there, key = slot < num_keys, slot
    else:
        there = slot < count
        key = tl.load(index_ptr + slot, mask=there, other=0)
    k = _tile(k_ptr + sample * k_b + group * k_g, key, channel, k_s, there, D)
    v = _tile(v_ptr + sample * v_b + group * v_g, key, channel, v_s, there, D)
    sequence = key
    if LOOKS:
        sequence = tl.load(sequence_ptr + sample * num_keys + key, mask=there, other=0)
    first = tl.min(tl.where(there, key, FAR), 0)
    last = tl.max(tl.where(there, key, -1), 0)
    begin, end = count * 0, count
    if CAUSAL:
        begin = _first_at_least(index_ptr, count, first, steps)
    if WINDOW:
        if not CAUSAL:
            begin = _first_at_least(index_ptr, count, first - window + 1, steps)
        end = _first_at_least(index_ptr, count, last + window, steps)
    end = tl.where(last < 0, 0, end)
    q_ptr += sample * q_b
    do_ptr += sample * do_b
    dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    for first_row in range(begin * rep, end * rep, ROWS):
        query, head, used, position, looks = _rows(index_ptr, looks_ptr, count, first_row, rep, ROWS, LOOKS)
        h = group * rep + head
        at = (sample * groups * rep + h) * num_queries + query
        lse, delta = tl.load(lse_ptr + at, used, other=float("inf")), tl.load(delta_ptr + at, used, other=0.0)
        seen = _visible(position, looks, used, key, there, sequence, window, CAUSAL, WINDOW, LOOKS)
        if LOOKS:
            if _any(seen):
                dk, dv = _add_dkv(
                    q_ptr, do_ptr, k, v, lse, delta, dk, dv, query[:, None], h[:, None], used, seen, scale,
                    q_h, q_k, do_h, do_k, D, WIDTH, PRECISION,
                )  # fmt: skip
        else:
            dk, dv = _add_dkv(
                q_ptr, do_ptr, k, v, lse, delta, dk, dv, query[:, None], h[:, None], used, seen, scale,
                q_h, q_k, do_h, do_k, D, WIDTH, PRECISION,
            )  # fmt: skip
    inside, c_ = (slot < num_slots)[:, None] & (channel[None, :] < D), channel[None, :]
    dk_ptr += sample * dk_b + group * dk_g
    dv_ptr += sample * dv_b + group * dv_g
    tl.store(dk_ptr + slot[:, None] * dk_s + c_, (dk * factor).to(dk_ptr.dtype.element_ty), inside)
    tl.store(dv_ptr + slot[:, None] * dv_s + c_, dv.to(dv_ptr.dtype.element_ty), inside)


def _tiles(width: int, dtype: torch.dtype, on_chip: int) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of heads `width` channels wide, for `on_chip` bytes of memory beside a processor.

    Compiled for sm_90 in bf16 by Triton 3.9, 128 x 64 takes 149 kB at 128 channels and 120 bytes of stack a thread at
    most (64 channels: 8).
    """
    if dtype == torch.float32:
        return (64, 32, 4, 2) if width <= 64 else (32, 32, 4, 1)
    if on_chip < 200_000:
        return (64, 64, 4, 2) if width <= 64 else (64, 32, 4, 2) if width <= 128 else (32, 32, 4, 1)
    return (128, 64, 8, 2) if width <= 128 else (64, 32, 8, 1)


def _on_chip(x: Tensor) -> int:
    """Bytes of memory that a block of threads can have; 0 where the interpreter runs."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 0


class _Launch:
    """What all kernels are given: sizes, tiles and who sees whom."""

    def __init__(self, q: Tensor, k: Tensor, index: Tensor, counts: Tensor, segments: Tensor | None,
                 looks: Tensor | None, causal: bool, scale: float, window: int) -> None:  # fmt: skip
        self.b, self.h, self.num_queries, d = q.shape
        self.groups, self.num_keys = k.shape[1:3]
        self.width = max(16, triton.next_power_of_2(d))
        self.rows, self.keys, self.warps, self.stages = _tiles(self.width, q.dtype, _on_chip(q))
        self.rep = self.h // self.groups
        self.who = (index, counts, index if segments is None else segments, index if looks is None else looks)
        self.sizes = (self.groups, self.rep, window, scale * LOG2E)
        self.options: dict[str, Any] = {
            "ROWS": self.rows, "KEYS": self.keys, "D": d, "WIDTH": self.width, "CAUSAL": causal, "WINDOW": window > 0,
            "LOOKS": segments is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip

    def grid(self, count: int, size: int) -> tuple[int, int]:
        return triton.cdiv(count, size), self.b * self.groups


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_rows(q: Tensor) -> Tensor:
    """An empty [b, h, k, d], a row's heads side by side in memory, as the output projection reads them."""
    b, h, k, d = q.shape
    return q.new_empty(b, k, h, d).transpose(1, 2)


@torch.library.custom_op("sparsetrain::selected_rows_forward", mutates_args=())
def rows_forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor, segments: Tensor | None, looks: Tensor | None,
    causal: bool, scale: float, window: int, values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [b, h, k, d], log2 Σ exp2 of the scaled scores fp32 [b, h, k], +inf where nothing is seen).

    Args:
        q: [b, h, k, d]. k, v: [b, g, s, d].
        index: int32 [b, k], ascending keys at which the queries stand. counts: int32 [b], used slots.
        segments: int32 [b, s]. looks: int32 [b, k], the sequence that each query looks at. Both or neither.
        window: 0 for none.
        values: form the output; False leaves it empty, [0].
    """
    q, k, v = (_rowwise(x) for x in (q, k, v))
    launch = _Launch(q, k, index, counts, segments, looks, causal, scale, window)
    o = _like_rows(q) if values else q.new_empty(0)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):  # kernels go to the current device, wherever their tensors are
        _statistics_kernel[launch.grid(launch.num_queries * launch.rep, launch.rows)](
            q, k, v, *launch.who, o, lse, launch.num_queries, launch.num_keys, *launch.sizes,
            *_strides(q, k, v), *(_strides(o) if values else (0, 0, 0)), VALUES=values, **launch.options,
        )  # fmt: skip
    return o, lse


@rows_forward.register_fake
def _(q, k, v, index, counts, segments, looks, causal, scale, window, values):  # type: ignore[no-untyped-def]
    return _like_rows(q) if values else q.new_empty(0), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsetrain::selected_rows_backward", mutates_args=())
def rows_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, index: Tensor, counts: Tensor,
    segments: Tensor | None, looks: Tensor | None, causal: bool, scale: float, window: int, everywhere: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq [b, h, k, d], dk and dv [b, g, k, d] of selected keys; [b, g, s, d] of all keys with `everywhere`)."""
    do, q, k, v, o = (_rowwise(x) for x in (do, q, k, v, o))
    launch = _Launch(q, k, index, counts, segments, looks, causal, scale, window)
    slots = launch.num_keys if everywhere else launch.num_queries
    dq, delta = _like_rows(q), torch.empty_like(lse)
    dk, dv = _like_keys(k, slots), _like_keys(v, slots)
    with torch.cuda.device_of(q):  # kernels go to the current device, wherever their tensors are
        _dq_kernel[launch.grid(launch.num_queries * launch.rep, launch.rows)](
            q, k, v, o, do, lse, *launch.who, dq, delta, launch.num_queries, launch.num_keys, *launch.sizes, scale,
            *_strides(q, k, v, o, do, dq), **launch.options,
        )  # fmt: skip
        _dkv_kernel[launch.grid(slots, launch.keys)](
            q, k, v, do, lse, delta, *launch.who, dk, dv, launch.num_queries, launch.num_keys, slots, *launch.sizes,
            scale, launch.num_queries.bit_length(), *_strides(q, k, v, do, dk, dv), EVERYWHERE=everywhere,
            **launch.options,
        )  # fmt: skip
    return dq, dk, dv


def _like_keys(x: Tensor, slots: int) -> Tensor:
    b, g, _, d = x.shape
    return x.new_empty(b, slots, g, d).transpose(1, 2)


@rows_backward.register_fake
def _(do, q, k, v, o, lse, index, counts, segments, looks, causal, scale, window, everywhere):  # type: ignore[no-untyped-def]
    slots = k.shape[2] if everywhere else q.shape[2]
    return _like_rows(q), _like_keys(k, slots), _like_keys(v, slots)
