"""Masked norms in plain PyTorch; differentiable, statistics in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_layer_norm(
    x: Tensor, mask_d: Tensor, num_old: int, weight_d: Tensor | None, bias_d: Tensor | None, eps: float
) -> Tensor:
    """((x − μ) / √(σ² + ε) · w + b) ⊙ c."""
    exact, mask_d = _exact(x, mask_d)
    count = mask_d.sum()
    centred = exact - _masked_sum(exact, mask_d, num_old) / count
    variance = _masked_sum(centred.square(), mask_d, num_old) / count
    y = centred / (variance + eps).sqrt()
    y = y if weight_d is None else y * weight_d
    y = y if bias_d is None else y + bias_d
    return (y * mask_d).to(x.dtype)


def reference_rms_norm(x: Tensor, mask_d: Tensor, num_old: int, weight_d: Tensor | None, eps: float) -> Tensor:
    """(x / √(Σ c·x² / Σ c + ε) · w) ⊙ c."""
    exact, mask_d = _exact(x, mask_d)
    y = exact / (_masked_sum(exact.square(), mask_d, num_old) / mask_d.sum() + eps).sqrt()
    y = y if weight_d is None else y * weight_d
    return (y * mask_d).to(x.dtype)


def _exact(x: Tensor, mask_d: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype), mask_d.to(dtype)


def _masked_sum(v: Tensor, mask_d: Tensor, num_old: int) -> Tensor:
    """Σ c·v over the last dimension, [..., 1]; the old channels, which count as 1, in one sum of their own."""
    # copied: a sum over rows that lie apart may take another order than one over rows that touch
    old = v[..., :num_old].contiguous().sum(-1, keepdim=True)
    if num_old == v.shape[-1]:
        return old
    return old + (v[..., num_old:] * mask_d[num_old:]).sum(-1, keepdim=True)
