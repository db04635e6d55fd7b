"""The definition: where(selected, x, x.detach()). Exact, differentiable, saves nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows


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


def attention_by_definition(
    q_bhkd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, e: KeyValues, rows: Rows, context: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`selected_attention` of compact queries [b, h, k, d] by all their scores, in fp32 or wider, through autograd.

    Args:
        context: keys and values of all rows that train where they are not selected, or None.
    """
    wide = torch.promote_types(q_bhkd.dtype, torch.float32)
    others = context or (None, None)
    keys, values = (
        _carry(x, chosen, other, rows).to(wide).repeat_interleave(q_bhkd.shape[1] // x.shape[1], 1)
        for x, chosen, other in zip((e.k_bgsd, e.v_bgsd), (k_bgkd, v_bgkd), others, strict=True)
    )
    visible = _visible(e, rows)[:, None]
    scores = (q_bhkd.to(wide) @ keys.transpose(2, 3)) * e.scale
    p = F.softmax(scores.masked_fill(~visible, torch.finfo(wide).min), dim=-1)
    return (p.masked_fill(~visible, 0) @ values).to(q_bhkd.dtype)


def _carry(x_bgsd: Tensor, chosen_bgkd: Tensor, other: Tensor | None, rows: Rows) -> Tensor:
    """x, of which the selected rows send their gradient to `chosen`, and all others to `other`."""
    offset, used = x_bgsd.shape[2] - rows.num_tokens, rows.used_bk
    x = x_bgsd.detach()
    if other is not None:
        x = torch.where(F.pad(rows.selected_bt, (offset, 0))[:, None, :, None], x, other.to(x.dtype))
    index = (rows.index_bk + offset)[:, None, :, None].expand_as(chosen_bgkd)
    nothing = chosen_bgkd - chosen_bgkd.detach()
    return x.scatter_add(2, index, nothing if used is None else nothing * used[:, None, :, None])


def _visible(e: KeyValues, rows: Rows) -> Tensor:
    """bool [b, k, s]; an unused slot sees nothing."""
    s = e.k_bgsd.shape[2]
    offset = s - rows.num_tokens
    distance = (rows.index_bk + offset)[:, :, None] - torch.arange(s, device=rows.index_bk.device)
    visible = distance >= 0 if e.causal else torch.ones_like(distance, dtype=torch.bool)
    if e.window is not None:
        visible = visible & (distance.abs() < e.window)
    if e.segments_bs is not None:
        looks_at = e.segments_bs[:, offset:] if e.looks_at_bt is None else e.looks_at_bt
        visible = visible & (rows.gather(looks_at)[:, :, None] == e.segments_bs[:, None]) & (e.segments_bs > 0)[:, None]
    return visible if rows.used_bk is None else visible & rows.used_bk[:, :, None]
