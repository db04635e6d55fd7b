"""y = value · act(gate) of a fused up + gate projection (FST, arXiv 2404.01847, section 5.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.core.backend import choose
from sparsetrain.core.config import one_of
from sparsetrain.ops.gated_activation.reference import reference_gated

ACTIVATIONS = ("gelu_tanh", "silu")
_NO_KERNEL = "element-wise passes already walk memory in order, and torch.compile fuses them"


def gated_activation(h: Tensor, activation: str = "gelu_tanh", *, backend: str = "auto") -> Tensor:
    """y = h[..., :f] · act(h[..., f:]), saving h alone: the backward computes act and its derivative again.

    Equals: value, gate = h.chunk(2, -1); value * F.gelu(gate, approximate="tanh").

    The result and dh are laid out as h. 2:4 kernels return column-major results (h is the transpose of a contiguous
    [2f, t]), and halves of those are walked column by column, as they lie in memory.

    Args:
        h: [..., 2f]: f channels of values, then f of gates.
        activation: gelu_tanh or silu.
        backend: auto, torch (any device) or reference.

    Returns:
        y [..., f].

    Raises:
        ValueError: an odd number of channels, or an unknown activation.

    Cost: saves 2f elements a token; plain PyTorch saves 3f, with act(gate).
    """
    one_of("gated_activation", "activation", activation, ACTIVATIONS)
    if h.shape[-1] % 2:
        raise ValueError(
            f"gated_activation: h {tuple(h.shape)} has {h.shape[-1]} channels, which do not divide into values and "
            "gates. Pass the output of the fused projection, values first."
        )
    name = choose("gated_activation", backend, {"torch": None, "reference": None, "triton": _NO_KERNEL})
    return reference_gated(h, activation) if name == "reference" else _Gated.apply(h, activation)  # type: ignore[return-value]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(h)
        value, gate = h.chunk(2, -1)
        return _activated(gate, activation).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,), (h,) = grads, ctx.saved_tensors
        value, gate = h.chunk(2, -1)
        dh = torch.empty_like(h)
        dvalue, dgate = dh.chunk(2, -1)
        torch.mul(_activated(gate, ctx.activation), dy, out=dvalue)
        scaled = dy * value
        if ctx.activation == "silu":
            dgate.copy_(torch.ops.aten.silu_backward(scaled, gate))
        else:
            dgate.copy_(torch.ops.aten.gelu_backward(scaled, gate, approximate="tanh"))
        return dh, None


def _activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
