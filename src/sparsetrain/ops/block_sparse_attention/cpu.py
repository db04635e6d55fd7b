"""Block-sparse attention on the CPU: gather the listed blocks of a batch of tiles, run one fused kernel on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.block_sparse_attention.tiles import MASKED, Geometry, TilePlan

BATCH_ELEMENTS = 4 * 2**20
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _as_blocks(x_bhtd: Tensor, size: int) -> Tensor:
    """[b, h, t, d] -> [b*h*blocks, size, d], zero-padded; a view when t divides and x is contiguous."""
    tail = -x_bhtd.shape[2] % size
    x_bhtd = F.pad(x_bhtd, (0, 0, 0, tail)) if tail else x_bhtd
    return x_bhtd.reshape(-1, size, x_bhtd.shape[3])


def _from_blocks(blocks: Tensor, like_bhtd: Tensor) -> Tensor:
    b, h, t, d = like_bhtd.shape
    return blocks.view(b, h, -1, d)[:, :, :t].contiguous().to(like_bhtd.dtype)


class BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, blocks, segments, geometry: Geometry, scale: float):
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.scale = geometry, scale
        work = q.dtype if q.dtype == torch.float64 else torch.float32
        d = q.shape[3]
        q_blocks = _as_blocks(q, geometry.block_q)
        k_blocks, v_blocks = _as_blocks(k, geometry.block_k), _as_blocks(v, geometry.block_k)
        out_blocks = torch.zeros_like(q_blocks, dtype=work)
        lse_blocks = out_blocks.new_full(q_blocks.shape[:2], MASKED)
        plan = TilePlan(blocks, segments, geometry, q.shape[1], k.shape[1])
        for batch in plan.batches(BATCH_ELEMENTS, d, work):
            n, rows = len(batch.query_rows_nr), batch.query_rows_nr.flatten()
            q_tile = q_blocks[rows].view(n,1,-1,d).to(work) if 0 else q_blocks.index_select(0, rows).view(n, 1, -1, d).to(work)
            k_tile, v_tile = (x.index_select(0, batch.key_rows_nk.flatten()).view(n, 1, -1, d).to(work) for x in (k_blocks, v_blocks))
            mask = batch.mask
            if mask is not None:
                mask = mask.expand(n, -1, -1, -1)
            out, lse = _forward(q_tile, k_tile, v_tile, attn_mask=mask, scale=scale)
            out_blocks.index_copy_(0, rows, out.view(len(rows), -1, d))
            lse_blocks.index_copy_(0, rows, lse.view(len(rows), -1))
        out = _from_blocks(out_blocks, q)
        lse = _from_blocks(lse_blocks[..., None], q[..., :1].to(work)).squeeze(-1)
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
        geometry, scale = ctx.geometry, ctx.scale
        work = lse.dtype
        d = q.shape[3]
        empty = lse == -torch.inf
        if dout is None:
            dout = torch.zeros_like(out)
        q_blocks, out_blocks, dout_blocks = (_as_blocks(x, geometry.block_q) for x in (q, out, dout))
        k_blocks, v_blocks = _as_blocks(k, geometry.block_k), _as_blocks(v, geometry.block_k)
        lse_blocks = _as_blocks(lse.masked_fill(empty, torch.inf)[..., None], geometry.block_q).squeeze(-1)
        dlse_blocks = None if dlse is None else _as_blocks(dlse.masked_fill(empty, 0)[..., None], geometry.block_q)
        dq_blocks = torch.zeros_like(q_blocks, dtype=work)
        dk_blocks, dv_blocks = torch.zeros_like(k_blocks, dtype=work), torch.zeros_like(v_blocks, dtype=work)
        plan = TilePlan(blocks, segments, geometry, q.shape[1], k.shape[1])
        for batch in plan.batches(BATCH_ELEMENTS, d, work):
            n, rows, keys = len(batch.query_rows_nr), batch.query_rows_nr.flatten(), batch.key_rows_nk.flatten()
            q_tile, out_tile, dout_tile = (x.index_select(0, rows).view(n, 1, -1, d).to(work) for x in (q_blocks, out_blocks, dout_blocks))
            k_tile, v_tile = (x.index_select(0, keys).view(n, 1, -1, d).to(work) for x in (k_blocks, v_blocks))
            lse_tile = lse_blocks.index_select(0, rows).view(n, 1, -1)
            if dlse_blocks is not None:
                q_tile, k_tile, v_tile = (F.pad(x, (0, 1)) for x in (q_tile, k_tile, v_tile))
                dout_tile = F.pad(dout_tile, (0, 1), value=1.0)
                out_tile = torch.cat((out_tile, -dlse_blocks.index_select(0, rows).view(n, 1, -1, 1)), dim=-1)
            mask = batch.mask
            if mask is not None:
                mask = mask.expand(n, -1, -1, -1)
            dq, dk, dv = _backward(dout_tile, q_tile, k_tile, v_tile, out_tile, lse_tile, 0.0, False, attn_mask=mask, scale=scale)
            dq_blocks.index_copy_(0, rows, dq[..., :d].reshape(len(rows), -1, d))
            dk_blocks.index_add_(0, keys, dk[..., :d].reshape(len(keys), -1, d))
            dv_blocks.index_add_(0, keys, dv[..., :d].reshape(len(keys), -1, d))
        return _from_blocks(dq_blocks, q), _from_blocks(dk_blocks, k), _from_blocks(dv_blocks, v), None, None, None, None


def attend(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_blik: Tensor,
    segments_bs: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_bhtd, lse_bht) by gathered tiles."""
    return BlockSparseAttention.apply(q_bhtd, k_bgsd, v_bgsd, blocks_blik, segments_bs, geometry, scale)
