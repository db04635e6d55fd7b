"""A linear and its LoRA factors as tensors, for ops that multiply by some of its rows or columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearParts:
    """A linear in the layout y = x weightᵀ + bias + (dropout(x) aᵀ) bᵀ; a [r, in], b [out, r].

    Attributes:
        lora_scale: factor on the update, where b is the adapter's own parameter (`surgery.lora.plain_lora`); None: b
            holds it.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor] | None = None
    lora_dropout: float = 0.0
    lora_scale: float | None = None

    def to(self, dtype: torch.dtype) -> LinearParts:
        """The same linear in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        lora = None if self.lora is None else (self.lora[0].to(dtype), self.lora[1].to(dtype))
        return LinearParts(self.weight.to(dtype), bias, lora, self.lora_dropout, self.lora_scale)
