"""What attention ops ask of queries [b, h, t, d], keys and values [b, g, s, d], and random ones for their cases."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class QKVCase:
    """Shapes of one call of an attention op; `keys` defaults to `queries`."""

    name: str
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int
    keys: int | None = None
    head_dim: int = 8
    kept_keys: int
    causal: bool = True

    @property
    def num_keys(self) -> int:
        return self.keys or self.queries

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, drawn from N(0, 1)."""
        draw = torch.Generator().manual_seed(seed)
        q_shape = (self.batch, self.heads, self.queries, self.head_dim)
        kv_shape = (self.batch, self.kv_heads, self.num_keys, self.head_dim)
        q, k, v = (torch.randn(shape, generator=draw, dtype=dtype) for shape in (q_shape, kv_shape, kv_shape))
        return q, k, v
