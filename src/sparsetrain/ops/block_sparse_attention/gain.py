"""Which backend is fastest here, and whether dense attention is faster than all: timed once a shape on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core import fastest
from sparsetrain.core.fastest import Timings, Ways, timings_here
from sparsetrain.ops.block_sparse_attention.cases import Case

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Case], Tensor]


def shape_of(q: Tensor, k: Tensor, block_q: int, block_k: int, num_slots: int, causal: bool) -> Case:
    """What is timed for a call: lengths and lists rounded up to powers of two, so that few shapes are."""
    slots = min(_power(num_slots), -(-_power(k.shape[2]) // block_k))
    return Case(
        name="timed",
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        list_heads=k.shape[1],
        queries=_power(q.shape[2]),
        head_dim=q.shape[3],
        kept_keys=slots * block_k,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
    )


def may_time(q: Tensor, k: Tensor) -> bool:
    """Whether a call is of a kind that is timed: whole rows."""
    return q.shape[2] == k.shape[2] and fastest.may_time(q)


def timings(case: Case, dtype: torch.dtype, device: torch.device, backends: dict[str, Attend]) -> Timings:
    """Forward and backward of each backend on random lists, and of dense attention, as remembered or timed now."""
    key = (
        f"{case.batch} x {case.queries:,} tokens, {case.heads} heads ({case.kv_heads} of keys) of {case.head_dim}, "
        f"{case.kept_keys:,} keys in blocks of {case.block_q} x {case.block_k}, "
        f"{'causal' if case.causal else 'both ways'}, {str(dtype).removeprefix('torch.')}, "
        + " ".join(sorted(backends))
    )
    return timings_here("block_sparse_attention", key, device, lambda: _ways(case, dtype, device, backends))


def _ways(case: Case, dtype: torch.dtype, device: torch.device, backends: dict[str, Attend]) -> Ways:
    lists, draw = (
        case.lists().to(device),
        torch.Generator(device).manual_seed(0),
    )  # the run's own draws stay as they are

    def drawn(heads: int) -> Tensor:
        shape = case.batch, heads, case.queries, case.head_dim
        return torch.randn(shape, generator=draw, device=device, dtype=dtype)

    q, k, v = (drawn(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    dout = drawn(case.heads)
    grouped = case.heads != case.kv_heads

    def step(attend: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(q, k, v, lists, case), (q, k, v), dout)

    dense = step(lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped))
    return {"dense": dense} | {name: step(attend) for name, attend in backends.items()}


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
