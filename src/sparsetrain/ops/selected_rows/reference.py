"""The definition: where(selected, x, x.detach()). Exact, differentiable, saves nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def keep(x: Tensor, selected_bt: Tensor) -> Tensor:
    """x [b, t, ...] with gradient through the selected tokens alone.

    Args:
        selected_bt: bool [b, t].
    """
    mask = selected_bt.view(*selected_bt.shape, *(1,) * (x.ndim - 2))
    return torch.where(mask, x, x.detach())


def selected_attention_reference(
    q_bhtd: Tensor,
    k_bgtd: Tensor,
    v_bgtd: Tensor,
    selected_bt: Tensor,
    *,
    causal: bool,
    scale: float,
    segments_bt: Tensor | None = None,
    looks_at_bt: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of all rows [b, h, t, d] in which K and V carry gradient for the selected rows alone.

    segments_bt, looks_at_bt: as in `KeyValues`.
    """
    t, rep = q_bhtd.shape[2], q_bhtd.shape[1] // k_bgtd.shape[1]
    k, v = (keep(x.transpose(1, 2), selected_bt).transpose(1, 2).repeat_interleave(rep, 1) for x in (k_bgtd, v_bgtd))
    distance = torch.arange(t)[:, None] - torch.arange(t)[None]
    visible = torch.ones(t, t, dtype=torch.bool) if not causal else distance >= 0
    if window is not None:
        visible = visible & ((distance if causal else distance.abs()) < window)
    visible = visible[None]
    if segments_bt is not None:
        looks_at_bt = segments_bt if looks_at_bt is None else looks_at_bt
        visible = visible & (looks_at_bt[:, :, None] == segments_bt[:, None]) & (segments_bt > 0)[:, None]
    visible = visible[:, None]
    scores = (q_bhtd @ k.transpose(2, 3)) * scale
    # a query that sees nothing gives 0, and its softmax must not be NaN on the way
    p = F.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), dim=-1)
    return p.masked_fill(~visible, 0) @ v
