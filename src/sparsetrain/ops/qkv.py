"""What attention ops ask of queries [b, h, t, d], keys and values [b, g, s, d], and random ones for their cases."""

from __future__ import annotations

import torch
from torch import Tensor


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q [b, h, t, d] and k [b, g, s, d] share b and d, and g divides h."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} do not fit: need [b, h, t, d] and [b, g, s, d].")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} do not fit: b and d must agree, g must divide h.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v fit together, hold something and have one floating dtype."""
    if k.shape != v.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)}: need twice [b, g, s, d].")
    check_heads(q, k)
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating dtype.")
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)}: nothing to attend to or from.")


def check_segments(segments: Tensor | None, k: Tensor) -> None:
    """Raise ValueError unless `segments` is None or integers [b, s]."""
    if segments is not None and (segments.is_floating_point() or segments.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"segments is {segments.dtype} {list(segments.shape)}; need integers [{k.shape[0]}, {k.shape[2]}]."
        )


def random_qkv(
    q_shape: tuple[int, int, int, int], kv_heads: int, num_keys: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from N(0, 1)."""
    draw = torch.Generator().manual_seed(seed)
    batch, _, _, head_dim = q_shape
    kv_shape = (batch, kv_heads, num_keys, head_dim)
    q, k, v = (torch.randn(shape, generator=draw, dtype=dtype) for shape in (q_shape, kv_shape, kv_shape))
    return q, k, v
