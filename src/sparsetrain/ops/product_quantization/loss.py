"""The codebook loss in pieces: forward and gradient of a few hundred tokens at a time. Legend in `__init__`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from sparsetrain.ops.product_quantization.reference import loss_per_token

PIECE_ELEMENTS = 2**20
"""Distances of a piece: 4 MiB in fp32, eight times that for the differences they come from."""


def check_valid(valid: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `valid` is None or bool [b, t] for x [b, h, t, d]."""
    b, _, t, _ = x.shape
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (b, t)):
        raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}; need bool [{b}, {t}].")


def _same(x: Tensor) -> Tensor:
    return x


class CodebookLoss(torch.autograd.Function):
    """Forms the gradient in the forward, so that nothing but the gradient is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, codebook: Tensor, distance: str, valid: Tensor | None) -> Tensor:
        b, h, t, d = x.shape
        _, m, e, _ = codebook.shape
        step = max(1, PIECE_ELEMENTS // (b * h * m * e))
        count = b * t if valid is None else valid.sum().clamp(min=1)
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        grads = [torch.zeros_like(x), torch.zeros_like(codebook)]
        for start in range(0, t, step):
            here = slice(start, start + step)
            leaves = [x[:, :, here].detach().requires_grad_(), codebook.detach().requires_grad_()]
            # hooks of the outer forward (checkpointing's) must not see what lives in this one alone
            with torch.set_grad_enabled(bool(wanted)), saved_tensors_hooks(_same, _same):
                valid_here = None if valid is None else valid[:, here]
                part = loss_per_token(leaves[0], leaves[1], distance, valid_here).sum() / (count * h * d)
            total += part.detach()
            found = torch.autograd.grad(part, [leaves[i] for i in wanted]) if wanted else ()
            for i, grad in zip(wanted, found):
                (grads[0][:, :, here] if i == 0 else grads[1]).add_(grad)
        ctx.save_for_backward(*(grads[i] if i in wanted else None for i in (0, 1)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *(None if grad is None else grad * dloss for grad in ctx.saved_tensors), None, None
