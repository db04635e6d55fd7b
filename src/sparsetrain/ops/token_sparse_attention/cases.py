"""Shapes and tolerances of token-sparse attention, read by the tests and the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.qkv import QKVCase


class Case(QKVCase):
    """One call."""

    def lists(self, seed: int = 0) -> Tensor:
        """Random lists of `kept_keys` positions that the query can see, -1 where it sees fewer."""
        draw = torch.Generator().manual_seed(seed)
        position = self.num_keys - self.queries + torch.arange(self.queries)[:, None]
        order = torch.rand(self.batch, self.heads, self.queries, self.num_keys, generator=draw)
        if self.causal:
            order = order.masked_fill(torch.arange(self.num_keys) > position, -1)
        best = order.topk(min(self.kept_keys, self.num_keys))
        return torch.where(best.values < 0, -1, best.indices)


TINY = (
    Case(name="causal", queries=33, kept_keys=8),
    Case(name="gqa", batch=2, heads=6, kv_heads=2, queries=21, kept_keys=5),
    Case(name="bidirectional", heads=3, kv_heads=1, queries=24, kept_keys=6, causal=False),
    Case(name="one_key", queries=17, kept_keys=1),
    Case(name="one_token", queries=1, kept_keys=4),
    Case(name="decode", heads=4, queries=3, keys=40, kept_keys=9),
    Case(name="cross", queries=19, keys=7, kept_keys=4, causal=False),
)

REAL = tuple(
    Case(
        name=f"h{heads}_{kv_heads}_t{queries}_keys{queries // 8}",
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        head_dim=64,
        kept_keys=queries // 8,
    )
    for heads, kv_heads in ((8, 8), (9, 3))
    for queries in (1024, 2048)
)
"""An eighth of the keys: the published SPT setting."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest |difference| / largest |value| of outputs and gradients, against the fp64 reference."""
