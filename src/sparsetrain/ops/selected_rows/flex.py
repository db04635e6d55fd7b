"""Attention of selected queries by FlexAttention: positions in the mask function, block lists from sorted positions.

The lists are formed where the positions are, once a selection: `create_block_mask` would evaluate the mask for every
pair, and a length that is a tensor's content, and not its shape, compiles nothing anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsetrain.ops.selected_rows.keys import KeyValues, keys_with_gradient
from sparsetrain.ops.selected_rows.rows import Rows

BLOCK = 128
"""Queries and keys of a block."""


def attention_of_any(
    q: Tensor, k: Tensor, v: Tensor, e: KeyValues, rows: Rows, context: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Any selected rows, [b, h, k, d]. Uncompiled, on a CPU, all scores are formed."""
    attend: Any = flex_attention if q.device.type == "cpu" else _compiled()
    keys, values = keys_with_gradient(k, v, e, rows, context, rows.num_tokens)
    grouped = q.shape[1] != k.shape[1]
    return attend(q, keys, values, block_mask=block_mask(e, rows), scale=e.scale, enable_gqa=grouped)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(e: KeyValues, rows: Rows) -> BlockMask:
    """The mask of a selection; made once for all layers that see alike."""
    form = (e.causal, e.window, e.segments_bs is not None)
    found = rows.masks.get(form)
    if found is None:
        lists = block_lists(rows.index_bk, rows.counts_b, rows.num_tokens, e.causal, e.window, e.segments_bs)
        lengths = (rows.shape[1], rows.num_tokens)
        found = rows.masks[form] = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=_sees(e, rows), seq_lengths=lengths
        )
    return found


def _sees(e: KeyValues, rows: Rows) -> Any:
    index_bk, counts_b, segments, looks = rows.index_bk, rows.counts_b, e.segments_bs, None
    if segments is not None:
        looks = rows.gather(segments if e.looks_at_bt is None else e.looks_at_bt)
    causal, window = e.causal, e.window

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = index_bk[b, i] - j
        seen = i < counts_b[b]
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance < window) & (distance > -window)
        if segments is not None and looks is not None:
            seen = seen & (looks[b, i] == segments[b, j]) & (segments[b, j] > 0)
        return seen

    return sees


def block_lists(
    index_bk: Tensor, counts_b: Tensor, num_keys: int, causal: bool, window: int | None, segments_bs: Tensor | None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(number and indices of the key blocks of every query block that need the mask function, and of those that all of
    its queries see whole); int32 [b, 1, q] and [b, 1, q, keys], indices that count come first.

    Equals: with seen [b, k, s] cut into blocks, those with any pair seen and not all, and those with all.

    Of packed rows every block that holds a neighbour is listed: sequences are told apart inside of blocks.

    Args:
        index_bk: ascending positions. counts_b: used slots. segments_bs: of packed rows, or None.
    """
    slots, device = index_bk.shape[1], index_bk.device
    ends = torch.arange(block - 1, slots + block - 1, block, device=device).clamp(max=slots - 1)
    first_bq, last_bq = index_bk[:, ::block, None], index_bk[:, ends, None]
    begin = torch.arange(0, num_keys, block, device=device)
    stop = (begin + block).clamp(max=num_keys)
    some = (first_bq >= 0) & (torch.arange(0, slots, block, device=device)[:, None] < counts_b[:, None, None])
    whole = (ends[:, None] < counts_b[:, None, None]) & (stop - begin == block)
    if causal:
        some, whole = some & (begin <= last_bq), whole & (stop - 1 <= first_bq)
    if window is not None:
        some = some & (stop - 1 > first_bq - window) & (begin < last_bq + window)
        whole = whole & (begin > last_bq - window) & (stop - 1 < first_bq + window)
    some, whole = some.expand(-1, -1, len(begin)), whole.expand(-1, -1, len(begin))
    if segments_bs is not None:
        whole = torch.zeros_like(whole)
    return *_listed(some & ~whole), *_listed(some & whole)


def _listed(chosen_bqn: Tensor) -> tuple[Tensor, Tensor]:
    indices = chosen_bqn.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_bqn.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]
