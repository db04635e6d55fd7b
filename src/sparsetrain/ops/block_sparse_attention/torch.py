"""Block-sparse attention on the CPU: gather the listed blocks of a batch of tiles and run one fused kernel on them.

PyTorch's own CPU flash kernel, called on [tiles, 1, rows, d] tensors, keeps the scores of a tile in the second-level
cache: 60 to 75 GFLOP/s a thread, as fast as it runs dense attention. The same five products with `bmm` and separate
softmax passes reach 0.75 of that, and calling SDPA on the tiles through autograd keeps every gathered key alive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.block_sparse_attention.tiles import MASKED, Geometry, TilePlan

BATCH_ELEMENTS = 4 * 2**20
"""Numbers gathered at a time (16 MiB): 2 % to 20 % slower at an eighth or at four times that, see docs/log.md."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class BlockSparseAttention(torch.autograd.Function):
    """Saves q, k, v, out, lse and the lists; the backward gathers again and recomputes the weights tile by tile."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, segments, geometry: Geometry, scale: float):
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.scale = geometry, scale
        work = torch.promote_types(q.dtype, torch.float32)
        q_blocks, k_blocks, v_blocks = _cut(q, geometry.block_q), _cut(k, geometry.block_k), _cut(v, geometry.block_k)
        out_blocks = torch.zeros_like(q_blocks, dtype=work)
        lse_blocks = out_blocks.new_full((*q_blocks.shape[:2], 1), MASKED)
        plan = TilePlan(blocks, segments, geometry, q.shape[1], k.shape[1])
        for batch in plan.batches(BATCH_ELEMENTS, q.shape[3], work):
            q_tile = _gather(q_blocks, batch.query_rows_nr, work)
            k_tile, v_tile = (_gather(x, batch.key_rows_nk, work) for x in (k_blocks, v_blocks))
            out, lse = _flash(q_tile, k_tile, v_tile, attn_mask=batch.mask, scale=scale)
            _scatter(out_blocks, batch.query_rows_nr, out)
            _scatter(lse_blocks, batch.query_rows_nr, lse)
        out, lse = _join(out_blocks, q, q.dtype), _join(lse_blocks, q, work).squeeze(-1)
        empty = lse < MASKED / 2
        if bool(empty.any()):
            out.masked_fill_(empty[..., None], 0)
            lse.masked_fill_(empty, -torch.inf)
        ctx.save_for_backward(q, k, v, out, lse, blocks, segments)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, blocks, segments = ctx.saved_tensors
        geometry, work, like = ctx.geometry, lse.dtype, (q, k, v)
        empty = lse.isneginf()
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:
            q, k, v, dout, out = _with_lse_channel(q, k, v, dout, out, dlse.masked_fill(empty, 0))
        q_blocks, out_blocks, dout_blocks = (_cut(x, geometry.block_q) for x in (q, out, dout))
        k_blocks, v_blocks = _cut(k, geometry.block_k), _cut(v, geometry.block_k)
        # exp(score - inf) = 0: an empty row has no weight on any key
        lse_blocks = _cut(lse.masked_fill(empty, torch.inf)[..., None], geometry.block_q)
        dq_blocks, dk_blocks, dv_blocks = (torch.zeros_like(x, dtype=work) for x in (q_blocks, k_blocks, v_blocks))
        plan = TilePlan(blocks, segments, geometry, q.shape[1], k.shape[1])
        for batch in plan.batches(BATCH_ELEMENTS, q.shape[3], work):
            queries, keys = batch.query_rows_nr, batch.key_rows_nk
            q_tile, out_tile, dout_tile = (_gather(x, queries, work) for x in (q_blocks, out_blocks, dout_blocks))
            k_tile, v_tile = (_gather(x, keys, work) for x in (k_blocks, v_blocks))
            tensors = dout_tile, q_tile, k_tile, v_tile, out_tile, _gather(lse_blocks, queries, work).squeeze(-1)
            dq, dk, dv = _flash_backward(*tensors, 0.0, False, attn_mask=batch.mask, scale=ctx.scale)
            _scatter(dq_blocks, queries, dq)
            # index_add_ walks the tiles in order: the same sums every time, at the speed of a copy
            dk_blocks.index_add_(0, keys.flatten(), dk.reshape(-1, *k_blocks.shape[1:]))
            dv_blocks.index_add_(0, keys.flatten(), dv.reshape(-1, *v_blocks.shape[1:]))
        blocks_of = zip((dq_blocks, dk_blocks, dv_blocks), like, strict=True)
        return *(_join(x, y, y.dtype)[..., : y.shape[3]] for x, y in blocks_of), None, None, None, None


def _with_lse_channel(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, dout and out with one more channel, by which the kernel's backward also adds the gradient of lse.

    The kernel forms dS = P * (dP - rowsum(dout * out)); the gradient of lse adds dlse inside the bracket. A channel
    that is 1 in dout, -dlse in out and 0 in the others does exactly that.
    """
    q, k, v = (F.pad(x, (0, 1)) for x in (q, k, v))
    return q, k, v, F.pad(dout, (0, 1), value=1.0), torch.cat((out.to(dlse.dtype), -dlse[..., None]), dim=-1)


def _cut(x_bhtd: Tensor, size: int) -> Tensor:
    """[b, h, t, d] -> [b*h*blocks, size, d], zero-padded; a view if t divides and x is contiguous."""
    tail = -x_bhtd.shape[2] % size
    x_bhtd = F.pad(x_bhtd, (0, 0, 0, tail)) if tail else x_bhtd
    return x_bhtd.reshape(-1, size, x_bhtd.shape[3])


def _join(blocks: Tensor, like_bhtd: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_cut`: [b, h, t, width of the blocks], without the padding."""
    b, h, t, _ = like_bhtd.shape
    return blocks.view(b, h, -1, blocks.shape[2])[:, :, :t].contiguous().to(dtype)


def _gather(blocks: Tensor, rows_nr: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, size, d] -> [n, 1, r*size, d], one line of blocks a tile."""
    return blocks.index_select(0, rows_nr.flatten()).view(len(rows_nr), 1, -1, blocks.shape[2]).to(dtype)


def _scatter(blocks: Tensor, rows_nr: Tensor, tiles: Tensor) -> None:
    blocks.index_copy_(0, rows_nr.flatten(), tiles.reshape(-1, *blocks.shape[1:]))


def attend(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_blik: Tensor,
    segments_bs: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_bhtd, lse_bht) by gathered tiles; differentiable once, in both outputs."""
    return BlockSparseAttention.apply(q_bhtd, k_bgsd, v_bgsd, blocks_blik, segments_bs, geometry, scale)
