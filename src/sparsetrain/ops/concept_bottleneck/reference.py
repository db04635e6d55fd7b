"""The equations of the sparse concept bottleneck, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_loss(scores_kk: Tensor, labels_k: Tensor | None) -> Tensor:
    """−1/(2K) Σ_k [log softmax_j(G_kj) + log softmax_j(G_jk)] at j = k; other pairs of one label are left out."""
    if labels_k is not None:
        same_kk = labels_k[:, None] == labels_k[None, :]
        same_kk = same_kk & ~torch.eye(len(labels_k), dtype=torch.bool, device=labels_k.device)
        scores_kk = scores_kk.masked_fill(same_kk, -torch.inf)
    rows = F.log_softmax(scores_kk, dim=1).diagonal()
    columns = F.log_softmax(scores_kk, dim=0).diagonal()
    return -(rows + columns).mean() / 2


def averaged_loss(scores_kd: Tensor) -> Tensor:
    """−mean over *all* entries of log softmax: the cross-entropy to the uniform distribution (the authors' code)."""
    return -F.log_softmax(scores_kd, dim=-1).mean()


def cosines(x_bd: Tensor, y_cd: Tensor) -> Tensor:
    """[b, c]"""
    return F.normalize(x_bd, dim=-1) @ F.normalize(y_cd, dim=-1).t()


def shrunk(weight: Tensor, amount: float) -> Tensor:
    """sign(w) · max(|w| − amount, 0)."""
    return weight.sign() * (weight.abs() - amount).clamp(min=0)
