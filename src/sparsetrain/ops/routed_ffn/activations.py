"""The activations an FFN may have, with the derivative that the fused backward pass needs.

Each entry is (forward, backward): `forward(z)` returns a new tensor, `backward(dh, z, out)` writes dh · act'(z) to
`out`, which may be `dh` itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], object]

_aten = torch.ops.aten
_QUICK = 1.702  # quick_gelu(z) = z σ(1.702 z), the constant of the original CLIP


def _quick_gelu(z: Tensor) -> Tensor:
    return F.silu(z * _QUICK) / _QUICK


def _quick_gelu_backward(dh: Tensor, z: Tensor, out: Tensor) -> object:
    return _aten.silu_backward.grad_input(dh, z * _QUICK, grad_input=out)


ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "relu": (F.relu, lambda dh, z, out: torch.mul(dh, z > 0, out=out)),
    "relu2": (lambda z: F.relu(z).square(), lambda dh, z, out: torch.mul(dh, F.relu(z).mul_(2), out=out)),
    "silu": (F.silu, lambda dh, z, out: _aten.silu_backward.grad_input(dh, z, grad_input=out)),
    "gelu": (F.gelu, lambda dh, z, out: _aten.gelu_backward.grad_input(dh, z, grad_input=out)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dh, z, out: _aten.gelu_backward.grad_input(dh, z, approximate="tanh", grad_input=out),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
}
