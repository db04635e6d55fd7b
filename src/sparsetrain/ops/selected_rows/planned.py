"""Attention of selected rows as a plan traces it: what a GPU's kernels keep, form and compute, without values.

Kept are q, k, v, the output and a statistic a row. Our kernels form dK and dV of selected keys, a library's of all
that it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from sparsetrain.core.autograd import as_output
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows


def attention_as_planned(
    q: Tensor, k: Tensor, v: Tensor, e: KeyValues, rows: Rows, known: Tensor | None,
    context: tuple[Tensor, Tensor] | None, kernel: str,
) -> Tensor:  # fmt: skip
    """As `selected_attention`, of tensors without values, by `kernel`: sdpa or triton."""
    whole = e.k_bgsd.shape[2] if context is not None else 0
    if kernel == "sdpa" and not whole and rows.run is not None:
        whole = rows.run.end
    return _Planned.apply(
        q, k, v, *(context or (None, None)), known, e.k_bgsd, e.v_bgsd, rows, _pairs(q, e, rows), whole
    )  # type: ignore[return-value]


def _pairs(q: Tensor, e: KeyValues, rows: Rows) -> int:
    """Pairs of a query and a key that it may see, of all heads; documents of a packed row see one another here."""
    offset, num_keys = e.k_bgsd.shape[2] - rows.num_tokens, e.k_bgsd.shape[2]
    if not e.causal:
        return q.shape[1] * num_keys * sum(rows.counts)
    reach = num_keys if e.window is None else e.window
    seen = (rows.index_bk + (offset + 1)).clamp(max=reach)
    seen = seen if rows.used_bk is None else seen * rows.used_bk
    return q.shape[1] * int(seen.sum())


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_all: Tensor | None, v_all: Tensor | None, known: Tensor | None,
        keys: Tensor, values: Tensor, rows: Rows, pairs: int, whole: int,
    ) -> Tensor:  # fmt: skip
        out, lse = planned_attention(q, keys, values, pairs)
        out = out if known is None else known
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.rows, ctx.pairs, ctx.whole, ctx.others = rows, pairs, whole, k_all is not None
        return as_output(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, keys, values, out, lse = ctx.saved_tensors
        rows, slots = ctx.rows, ctx.whole or q.shape[2]
        dq, dk, dv = planned_attention_backward(grads[0], q, keys, values, out, lse, slots, ctx.pairs)
        of_all = (dk, dv) if ctx.others else (None, None)
        if ctx.whole:
            index = (rows.index_bk + (keys.shape[2] - rows.num_tokens))[:, None, :, None].expand(
                -1, dk.shape[1], -1, dk.shape[3]
            )
            dk, dv = dk.gather(2, index), dv.gather(2, index)
        return dq, dk, dv, *of_all, *(None,) * 6


@torch.library.custom_op("sparsetrain::planned_attention", mutates_args=())
def planned_attention(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """(output like q [b, h, k, d], statistics fp32 [b, h, k]), empty."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@planned_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparsetrain::planned_attention_backward", mutates_args=())
def planned_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, slots: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq like q, dk and dv [b, g, slots, d]), empty."""
    return _gradients(q, k, slots)


@planned_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, slots: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k, slots)


def _gradients(q: Tensor, k: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    like = (*k.shape[:2], slots, k.shape[3])
    return torch.empty_like(q), k.new_empty(like), k.new_empty(like)


@register_flop_formula(torch.ops.sparsetrain.planned_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, pairs: int, *_: Any, **__: Any) -> int:
    return 4 * pairs * q.shape[3]


@register_flop_formula(torch.ops.sparsetrain.planned_attention_backward, get_raw=True)
def _backward_flops(do: Tensor, q: Tensor, *more: Any, **__: Any) -> int:
    return 10 * more[-1] * q.shape[3]
