"""Linears in 4 bits as a plan sees them: packed weights that stay, and one unpacked for as long as its product takes.

As transformers loads them through bitsandbytes, with scales that are quantised too (arXiv 2305.14314): of n numbers
n/2 bytes, a byte for every 64 and an fp32 scale for every 256 of those. Head and embeddings stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.surgery.reclass import reclass


class _Unpacked(torch.autograd.Function):
    """x @ W.t() of a packed W, which is unpacked in each pass anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, torch.zeros(shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        return grad @ torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device), None, None


class FourBit:
    """Mixed into a linear whose weight is packed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = _Unpacked.apply(x, self.weight, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


def packed_bytes(numbers: int) -> int:
    """Bytes of a weight of so many numbers."""
    scales = -(-numbers // 64)
    return -(-numbers // 2) + scales + 4 * -(-scales // 256)


def pack_linears(model: Any) -> None:
    """Let the linears of a model on the meta device stand for 4-bit ones; not its head, nor what is tied to it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not head:
            size = packed_bytes(module.weight.numel())
            reclass(module, FourBit)
            packed = torch.empty(size, dtype=torch.uint8, device=module.weight.device)
            module.weight = nn.Parameter(packed, requires_grad=False)
