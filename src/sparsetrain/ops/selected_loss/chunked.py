"""The loss head in chunks of rows, with the gradient formed in the forward, so that no chunk's logits are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_loss(
    x_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    target_n: Tensor,
    scale_n: Tensor,
    softcap: float | None,
    chunk_rows: int,
) -> Tensor:
    """Σ_i scale_i · cross_entropy_i."""
    if torch.is_autocast_enabled(x_nd.device.type):
        low = torch.get_autocast_dtype(x_nd.device.type)
        x_nd, weight_vd = x_nd.to(low), weight_vd.to(low)
        bias_v = None if bias_v is None else bias_v.to(low)
    return _Chunked.apply(x_nd, weight_vd, bias_v, target_n, scale_n, softcap, chunk_rows)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, softcap: float | None,
        chunk_rows: int,
    ) -> Tensor:  # fmt: skip
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        loss = scale.new_zeros(())
        dx = torch.empty_like(x) if need_x else None
        # sums over chunks: fp32 where the weights are in a lower dtype
        dw = torch.zeros(weight.shape, dtype=scale.dtype, device=x.device) if need_w else None
        db = torch.zeros(weight.shape[0], dtype=scale.dtype, device=x.device) if need_b else None
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                rows = slice(start, start + chunk_rows)
                part, dz = _chunk(x[rows], weight, bias, target[rows], scale[rows], softcap, need_x or need_w or need_b)
                loss += part
                if dz is None:
                    continue
                dz_low = dz.to(x.dtype)
                if dx is not None:
                    torch.mm(dz_low, weight, out=dx[rows])
                if dw is not None:
                    _add_product(dw, dz_low, x[rows])
                if db is not None:
                    db += dz.sum(0)
        ctx.save_for_backward(
            dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = [None if d is None else d * grads[0].to(d.dtype) for d in ctx.saved_tensors]
        return *found, None, None, None, None


def _add_product(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    if dz.dtype == dw.dtype:
        dw.addmm_(dz.t(), x)
    else:
        dw += dz.t() @ x


def _chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(Σ scale · cross-entropy, its gradient with respect to the logits or None)."""
    z = F.linear(x, weight, bias).to(scale.dtype)
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    of_target = z.gather(1, target[:, None])[:, 0]
    largest = z.amax(1)
    p = torch.softmax(z, 1)
    # logsumexp from the largest probability, which is at least 1/v: one pass of exponentials instead of two
    loss = ((largest - p.amax(1).log() - of_target) * scale).sum()
    if not gradient:
        return loss, None
    p.scatter_add_(1, target[:, None], p.new_full((len(p), 1), -1.0))
    p.mul_(scale[:, None])
    return loss, p if softcap is None else p.mul_(1 - (z / softcap).square())
