"""The definition in differentiable PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def reference_gated(h: Tensor, activation: str) -> Tensor:
    """value · act(gate), value the first half of the channels and gate the second."""
    value, gate = h.chunk(2, -1)
    return value * (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh"))
