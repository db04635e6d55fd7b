"""The definition in differentiable PyTorch: pruned values forward, the identity from the pruned to the dense weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def reference_linear(x: Tensor, weight_oi: Tensor, pruned_oi: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W̃ᵀ + b with dX = dY W̃ and dW = dYᵀ X, which autograd derives from the straight-through weight."""
    straight = weight_oi + (pruned_oi - weight_oi).detach()
    return F.linear(x, straight, bias)
