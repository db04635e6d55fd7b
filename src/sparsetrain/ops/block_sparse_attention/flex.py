"""Block-sparse attention through PyTorch's FlexAttention, on our lists: for GPUs, with nothing but torch installed.

The block mask is put together from tensors, both directions of it (`create_block_mask` would evaluate every pair: 5.3 s
for a forward of 0.4 s, attention-gym#149), and the call is compiled for any length once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

from sparsetrain.ops.block_sparse_attention.lists import Listed, block_lists, invert, spread
from sparsetrain.ops.block_sparse_attention.tiles import Geometry

BLOCK_MULTIPLE = 128
"""FlexAttention's backward skips every tiling that does not divide the blocks; on Hopper its tiles are of 128."""


def unable(q: Tensor, block_q: int, block_k: int) -> str | None:
    """Why FlexAttention cannot run this call; None if it can."""
    if q.device.type != "cuda":
        return f"FlexAttention gives no gradient and no log-sum-exp on {q.device.type}"
    if q.dtype == torch.float64 or q.shape[3] < 16:
        return f"FlexAttention takes fp32, bf16 and fp16 heads of 16 channels or more, not {q.dtype} of {q.shape[3]}"
    if block_q % BLOCK_MULTIPLE or block_k % BLOCK_MULTIPLE:
        return f"FlexAttention's blocks are multiples of {BLOCK_MULTIPLE} tokens, not {block_q} x {block_k}"
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
    mask = block_mask(blocks_blik, segments_bs, geometry, q_bhtd.shape[1])
    grouped = q_bhtd.shape[1] != k_bgsd.shape[1]
    known = None if scale == q_bhtd.shape[3] ** -0.5 else scale  # its own default is no number to compile for
    out, aux = compiled()(
        q_bhtd, k_bgsd, v_bgsd, block_mask=mask, scale=known, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


@functools.cache
def compiled() -> Callable[..., tuple]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(blocks_blik: Tensor, segments_bs: Tensor | None, geometry: Geometry, num_heads: int) -> BlockMask:
    """Both directions of the lists, for each query head where lists differ among heads."""
    lists = block_lists(blocks_blik, segments_bs, geometry)
    (partial, partial_q), (full, full_q) = (_both_ways(x, geometry, num_heads) for x in (lists.partial, lists.full))
    return BlockMask(
        seq_lengths=(geometry.num_queries, geometry.num_keys),
        kv_num_blocks=partial.counts,
        kv_indices=partial.ids,
        full_kv_num_blocks=full.counts,
        full_kv_indices=full.ids,
        q_num_blocks=partial_q.counts,
        q_indices=partial_q.ids,
        full_q_num_blocks=full_q.counts,
        full_q_indices=full_q.ids,
        BLOCK_SIZE=(geometry.block_q, geometry.block_k),
        mask_mod=visible(segments_bs, geometry, blocks_blik.device),
    )


def _both_ways(listed: Listed, geometry: Geometry, num_heads: int) -> tuple[Listed, Listed]:
    inverse = spread(invert(listed, geometry.num_key_blocks), geometry.num_query_blocks)
    wide = Listed(listed.counts, F.pad(listed.ids, (0, geometry.num_key_blocks - listed.ids.shape[-1])))
    per_list = num_heads // listed.counts.shape[1] if listed.counts.shape[1] > 1 else 1
    forward, backward = (Listed(*(x.repeat_interleave(per_list, 1) for x in side)) for side in (wide, inverse))
    return forward, backward


def visible(segments_bs: Tensor | None, geometry: Geometry, device: torch.device) -> Callable[..., Tensor]:
    """The rule inside partly visible blocks. Lengths enter as tensors: a number would be compiled in."""
    causal, window = geometry.causal, geometry.window
    if not causal and window is None and segments_bs is None:
        return noop_mask
    shift = torch.full((), geometry.num_keys - geometry.num_queries, device=device)
    segments = None if segments_bs is None else segments_bs.int()

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i = q + shift
        seen = (i >= k) if causal else (k >= 0)
        if window is not None:
            seen = seen & ((i - k).abs() < window)
        if segments is not None:
            seen = seen & (segments[b, i] == segments[b, k]) & (segments[b, i] > 0)
        return seen

    return rule
