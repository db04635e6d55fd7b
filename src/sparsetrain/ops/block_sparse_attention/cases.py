"""Shapes and tolerances of block-sparse attention, read by the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.ops.qkv import QKVCase


@dataclass(frozen=True, kw_only=True)
class Case(QKVCase):
    """One call; `list_heads` is the head axis of the lists."""

    list_heads: int = 2
    block_q: int
    block_k: int
    window: int | None = None
    packed: bool = False

    def lists(self, seed: int = 0) -> Tensor:
        """Random lists of `kept_keys // block_k` blocks: the query's own, the first one, and others that it can see."""
        draw = torch.Generator().manual_seed(seed)
        num_query_blocks, num_key_blocks = -(-self.queries // self.block_q), -(-self.num_keys // self.block_k)
        first_q = self.num_keys - self.queries + torch.arange(num_query_blocks)[:, None] * self.block_q
        first_k = torch.arange(num_key_blocks) * self.block_k
        seen = first_k < first_q + self.block_q if self.causal else torch.ones_like(first_q + first_k).bool()
        own = seen & (first_k + self.block_k > first_q) & (first_k < first_q + self.block_q)
        shape = (self.batch, self.list_heads, num_query_blocks, num_key_blocks)
        order = torch.rand(shape, generator=draw) + 2.0 * own + 1.0 * (first_k == 0)
        best = order.masked_fill(~seen, -1.0).topk(min(max(1, self.kept_keys // self.block_k), num_key_blocks))
        return torch.where(best.values < 0, -1, best.indices)

    def segments(self) -> Tensor | None:
        """If packed: padding at both ends of the row and two sequences between, cut where no block ends."""
        if not self.packed:
            return None
        s = self.num_keys
        ids = torch.zeros(s, dtype=torch.int64)
        ids[s // 11 : s // 2 - 1], ids[s // 2 - 1 : s - s // 7] = 1, 2
        return ids.expand(self.batch, s).contiguous()


TINY = (
    Case(name="causal", queries=64, block_q=16, block_k=16, kept_keys=32),
    Case(name="odd", queries=77, block_q=16, block_k=8, kept_keys=24),
    Case(name="wide_keys", queries=77, block_q=8, block_k=32, kept_keys=64),
    Case(name="one_token", queries=1, block_q=16, block_k=16, kept_keys=16),
    Case(name="one_block", queries=13, block_q=64, block_k=64, kept_keys=64),
    Case(name="gqa", batch=2, heads=6, kv_heads=2, queries=50, block_q=16, block_k=16, kept_keys=32),
    Case(name="mqa", heads=3, kv_heads=1, list_heads=1, queries=50, block_q=16, block_k=8, kept_keys=16),
    Case(name="own_lists", heads=4, kv_heads=2, list_heads=4, queries=50, block_q=16, block_k=16, kept_keys=32),
    Case(name="shared_list", heads=4, kv_heads=2, list_heads=1, queries=50, block_q=16, block_k=16, kept_keys=32),
    Case(name="bidirectional", queries=64, block_q=16, block_k=16, kept_keys=32, causal=False),
    Case(name="bidirectional_odd", queries=61, block_q=16, block_k=16, kept_keys=48, causal=False),
    Case(name="cross", queries=40, keys=23, block_q=16, block_k=8, kept_keys=16, causal=False),
    Case(name="packed", batch=2, queries=77, block_q=16, block_k=8, kept_keys=40, packed=True),
    Case(name="packed_bidirectional", queries=70, block_q=8, block_k=8, kept_keys=40, packed=True, causal=False),
    Case(name="window", queries=77, block_q=16, block_k=8, kept_keys=40, window=19),
    Case(name="window_bidirectional", queries=77, block_q=16, block_k=8, kept_keys=40, window=11, causal=False),
    Case(name="decode", heads=4, queries=1, keys=50, block_q=16, block_k=16, kept_keys=32),
    Case(name="chunk", heads=4, queries=21, keys=53, block_q=8, block_k=16, kept_keys=32, packed=True, window=30),
)

REAL = tuple(
    Case(
        name=f"h{heads}_{kv_heads}_d{head_dim}_t{queries}_keys{kept_keys}",
        heads=heads,
        kv_heads=kv_heads,
        list_heads=kv_heads,
        queries=queries,
        head_dim=head_dim,
        block_q=128,
        block_k=64,
        kept_keys=kept_keys,
    )
    for heads, kv_heads, head_dim in ((8, 8, 64), (9, 3, 64), (12, 12, 64), (8, 8, 128))
    for queries in (1024, 2048, 4096, 8192)
    for kept_keys in (256, 512, 1024)
    if kept_keys < queries and (kept_keys > 256 or queries <= 2048)
)
"""A1 of the benchmark protocol; 256 keys only where 512 are half of the row or a quarter."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest |difference| / largest |value| of outputs and gradients, against the fp64 reference."""
