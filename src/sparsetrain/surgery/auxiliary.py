"""Auxiliary losses that count exactly once, whatever gradient checkpointing does.

Returning a loss from deep inside a model needs a change in its forward; collecting it in a list counts it twice when
the forward is recomputed. So the loss rides on the data path: `attach_loss(y, loss)` is y, and its backward sends
`scale` to the loss. A recomputed forward that is thrown away sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.autograd import as_output


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,) = grads
        return dy, torch.full((), ctx.scale, dtype=ctx.dtype, device=dy.device), None


def attach_loss(y: Tensor, loss: Tensor, scale: float) -> Tensor:
    """y, with `scale · loss` added to whatever scalar is differentiated later.

    Args:
        y: any tensor that the main loss depends on.
        loss: a scalar.
        scale: the loss's weight times the scale of the task loss (1 / gradient accumulation steps).
    """
    return _AttachLoss.apply(y, loss, scale)  # type: ignore[return-value]
