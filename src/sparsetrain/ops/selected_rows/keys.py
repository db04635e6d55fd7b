"""What selected queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.core.autograd import as_output
from sparsetrain.ops.selected_rows.rows import Rows


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of all rows, and who may see them.

    Attributes:
        k_bgsd, v_bgsd: [b, g, s, d]; the last t of the s keys are the tokens of this forward.
        causal: a key is visible to queries at its position or later.
        scale: factor on the scores.
        segments_bs: int [b, s], 0 = padding, equal = one sequence; None = one sequence without padding.
        window: sliding window in tokens, or None.
        looks_at_bt: int [b, t], the sequence that each token sees as a query: its own, or of padding the one beside it;
            None = its own, and padding sees nothing. A query that sees nothing gives 0.
    """

    k_bgsd: Tensor
    v_bgsd: Tensor
    causal: bool
    scale: float
    segments_bs: Tensor | None = None
    window: int | None = None
    looks_at_bt: Tensor | None = None


def who_sees(e: KeyValues, rows: Rows) -> tuple[Any, ...]:
    """Who sees whom, as the kernels are given it: nothing of it is read on the host."""
    offset = e.k_bgsd.shape[2] - rows.num_tokens
    segments = looks = None
    if e.segments_bs is not None:
        looks_at = e.segments_bs[:, offset:] if e.looks_at_bt is None else e.looks_at_bt
        segments, looks = e.segments_bs.to(torch.int32).contiguous(), rows.gather(looks_at).to(torch.int32)
    index_bk, counts_b = rows.on_device(offset)
    return index_bk, counts_b, segments, looks, e.causal, e.scale, e.window or 0


def keys_with_gradient(
    k: Tensor, v: Tensor, e: KeyValues, rows: Rows, context: tuple[Tensor, Tensor] | None, stop: int
) -> tuple[Tensor, Tensor]:
    """The first `stop` keys and values [b, g, stop, d] of a call without a cache: gradient of the selected rows goes to
    k and v [b, g, k, d], and of the others to `context` [b, g, s, d], if there is one."""
    k_all, v_all = context or (None, None)
    keys = _Keys.apply(k, k_all, e.k_bgsd, rows, stop)
    return keys, _Keys.apply(v, v_all, e.v_bgsd, rows, stop)  # type: ignore[return-value]


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected: Tensor, others: Tensor | None, x: Tensor, rows: Rows, stop: int) -> Tensor:
        ctx.rows, ctx.dtypes = rows, (selected.dtype, None if others is None else others.dtype)
        return as_output(x[:, :, :stop])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (dx,), rows, (dtype, of_others) = grads, ctx.rows, ctx.dtypes
        if of_others is None:
            return of_selected(dx, rows, 0).to(dtype), None, None, None, None
        of_all = dx.new_zeros(*dx.shape[:2], rows.num_tokens, dx.shape[3])
        of_all[:, :, : dx.shape[2]] = dx
        return of_selected(dx, rows, 0).to(dtype), not_selected_(of_all, rows, 0).to(of_others), None, None, None


def of_selected(dx_bgsd: Tensor, rows: Rows, offset: int) -> Tensor:
    """The selected rows [b, g, k, d] of gradients of keys, zero in unused slots."""
    index = (rows.index_bk + offset)[:, None, :, None].expand(-1, dx_bgsd.shape[1], -1, dx_bgsd.shape[3])
    selected = dx_bgsd.gather(2, index)
    return selected if rows.used_bk is None else selected.masked_fill(~rows.used_bk[:, None, :, None], 0)


def not_selected_(dx_bgsd: Tensor, rows: Rows, offset: int) -> Tensor:
    """Gradients of keys [b, g, s, d], set to zero in selected rows."""
    chosen_bs = F.pad(rows.selected_bt, (offset, 0))
    return dx_bgsd.masked_fill_(chosen_bs[:, None, :, None], 0)


def one_sequence(e: KeyValues, rows: Rows) -> bool:
    """Is each sample, up to its last selected row, one sequence without padding? Read on the host once a selection."""
    segments = e.segments_bs
    if segments is None:
        return True
    known = rows.masks.get("one sequence")
    if known is None or known[0] is not segments:
        after = torch.arange(rows.num_tokens, device=segments.device) > rows.index_bk[:, -1:]
        same = (segments == segments[:, :1]) & (segments > 0) | after | (rows.counts_b == 0)[:, None]
        known = rows.masks["one sequence"] = segments, bool(same.all())
    return known[1]
