"""Attention of the selected queries alone, over every key they see, with gradient to every key and value.

Other queries attend in another way, so unlike `selected_attention` no key is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.found_once import found_once
from sparsetrain.ops.selected_rows.keys import KeyValues

CHUNK = 512
"""Queries at a time: causal ones read no key after their last, and a mask of a chunk is small beside the keys."""


def attention_of_queries(q_bhtd: Tensor, everything: KeyValues, selected_bt: Tensor) -> Tensor:
    """softmax(q Kᵀ · scale) V of the selected queries, [n, h, d], sample after sample.

    Equals: `dense_attention(q, k, v).transpose(1, 2)[selected_bt]`, in values and gradients.

    Args:
        q_bhtd: queries of all tokens.
        everything: keys and values, and who sees them.
        selected_bt: bool [b, t].

    Cost: 2·n·h·d·s multiply-adds at most; saved for backward are the selected queries, their outputs, keys and values
        as they are, and one mask [n, s] for all heads.
    """
    e, found = everything, []
    chunks = found_once(selected_bt, "chunks", lambda: _chunks(selected_bt))
    gqa = e.k_bgsd.shape[1] != q_bhtd.shape[1]
    for sample, (q, k, v) in enumerate(zip(q_bhtd.unbind(0), e.k_bgsd.unbind(0), e.v_bgsd.unbind(0), strict=True)):
        for index_n, ends in chunks[sample]:
            keys, seen_nk = _seen(e, sample, index_n, ends, q_bhtd.shape[2])
            one: Any = (x[None] for x in (q.index_select(1, index_n), k[:, keys], v[:, keys]))
            form: Any = {"attn_mask": seen_nk[None, None], "scale": e.scale, "enable_gqa": gqa}
            found.append(F.scaled_dot_product_attention(*one, **form)[0].transpose(0, 1))
    return torch.cat(found) if found else q_bhtd.new_zeros(0, q_bhtd.shape[1], q_bhtd.shape[3])


def _chunks(selected_bt: Tensor) -> list[list[tuple[Tensor, tuple[int, int]]]]:
    """By sample: the selected places, some at a time, with the first and the last of them."""
    return [
        [
            (index_n, (int(index_n[0]), int(index_n[-1])))
            for index_n in row.nonzero().flatten().split(CHUNK)
            if len(index_n)
        ]
        for row in selected_bt
    ]


def _seen(e: KeyValues, sample: int, index_n: Tensor, ends: tuple[int, int], num_tokens: int) -> tuple[slice, Tensor]:
    """The keys that ascending queries can reach, and which of them each one sees, bool [n, keys]."""
    num_keys = e.k_bgsd.shape[2]
    offset = num_keys - num_tokens
    first, last = (end + offset for end in ends)
    start = 0 if e.window is None else max(0, first - e.window + 1)
    stop = last + 1 if e.causal else num_keys if e.window is None else min(num_keys, last + e.window)
    distance = (index_n + offset)[:, None] - torch.arange(start, stop, device=index_n.device)[None]
    seen = distance >= 0 if e.causal else torch.ones_like(distance, dtype=torch.bool)
    if e.window is not None:
        seen = seen & (distance.abs() < e.window)
    if e.segments_bs is not None:
        segments = e.segments_bs[sample]
        looks_at = segments[offset:] if e.looks_at_bt is None else e.looks_at_bt[sample]
        of_keys = segments[None, start:stop]
        seen = seen & (looks_at[index_n][:, None] == of_keys) & (of_keys > 0)
    return slice(start, stop), seen
