"""Attention of the selected queries over all keys, with gradient to the selected queries, keys and values.

Legend: as in the package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.core.autograd import as_output
from sparsetrain.core.backend import asked_for, choose, is_planned
from sparsetrain.core.fastest import may_time, ranked
from sparsetrain.ops.selected_rows.choice import OP, available, kernels
from sparsetrain.ops.selected_rows.keys import KeyValues, not_selected_, of_selected, who_sees
from sparsetrain.ops.selected_rows.library import LIBRARY
from sparsetrain.ops.selected_rows.planned import attention_as_planned
from sparsetrain.ops.selected_rows.reference import attention_by_definition
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.tiles import backward_by_tiles, forward_by_tiles
from sparsetrain.ops.selected_rows.timed import timings


def selected_attention(
    q_bhkd: Tensor,
    k_bgkd: Tensor,
    v_bgkd: Tensor,
    everything: KeyValues,
    rows: Rows,
    *,
    known: Tensor | None = None,
    context: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q Kᵀ · scale) V of the selected queries, [b, h, k, d].

    Args:
        q_bhkd: selected queries.
        k_bgkd, v_bgkd: selected keys and values, through which gradient flows; their values stand in `everything` too.
        everything: keys and values of all rows, constants.
        rows: the positions of the selected rows.
        known: the result where it was computed already; None computes it.
        context: keys and values of all rows once more, [b, g, s, d], through which gradient flows in the rows that are
            not selected; None: those are constants.
        backend: auto, sdpa (rows that begin a sequence or stand together later in it), varlen (the same of packed
            documents), triton, flex, torch or reference.

    Returns: the attention's output on the selected rows. Unused slots of a ragged selection hold zeros when computed,
        and neither send nor receive gradient.
    """
    e = everything
    # under autocast, keys that went through a cache are in another dtype than projections and the output
    dtype = e.k_bgsd.dtype if known is None else known.dtype
    q_bhkd, k_bgkd, v_bgkd, keys, values = (x.to(dtype) for x in (q_bhkd, k_bgkd, v_bgkd, e.k_bgsd, e.v_bgsd))
    e = replace(e, k_bgsd=keys, v_bgsd=values)
    name = _chosen(q_bhkd, e, rows, known is not None, context is not None, backend)
    if is_planned(q_bhkd):
        return attention_as_planned(q_bhkd, k_bgkd, v_bgkd, e, rows, known, context, name)
    return _attend(name, q_bhkd, k_bgkd, v_bgkd, e, rows, known, context)


def _attend(
    name: str, q_bhkd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, e: KeyValues, rows: Rows, known: Tensor | None,
    context: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`selected_attention` by one backend, of tensors of one dtype."""
    if name == "reference" or name in LIBRARY:
        way = attention_by_definition if name == "reference" else LIBRARY[name]
        out = way(q_bhkd, k_bgkd, v_bgkd, e, rows, context)
        return out if known is None else _WithValues.apply(out, known)  # type: ignore[return-value]
    return _Attention.apply(
        q_bhkd, k_bgkd, v_bgkd, *(context or (None, None)), known, e.k_bgsd, e.v_bgsd, e.segments_bs, e.looks_at_bt,
        rows, (e.causal, e.scale, e.window), name,
    )  # type: ignore[return-value]  # fmt: skip


@torch.compiler.disable()  # it asks what is installed, not for values
def _chosen(q_bhkd: Tensor, e: KeyValues, rows: Rows, known: bool, trains_others: bool, backend: str) -> str:
    timed = asked_for(backend) == "auto" and may_time(q_bhkd) and any(rows.counts) and not is_planned(q_bhkd)
    found = available(q_bhkd, e, rows, trains_others=trains_others, timed=timed)
    if timed:
        found = ranked(found, timings(found, q_bhkd, e, rows, known, trains_others, _attend))
    return choose(OP, backend, found)


class _WithValues(torch.autograd.Function):
    """The gradient of one result with the values of another, which was computed before."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, known: Tensor) -> Tensor:
        return as_output(known)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_all: Tensor | None, v_all: Tensor | None, known: Tensor | None,
        keys: Tensor, values: Tensor, segments: Tensor | None, looks_at: Tensor | None, rows: Rows, form: tuple,
        how: str,
    ) -> Tensor:  # fmt: skip
        causal, scale, window = form
        e, out, lse = KeyValues(keys, values, causal, scale, segments, window, looks_at), known, None
        if how == "triton":
            found, lse = kernels().rows_forward(q, keys, values, *who_sees(e, rows), known is None)
            out = found if out is None else out
        elif out is None:
            out = forward_by_tiles(q, e, rows)
        ctx.save_for_backward(q, keys, values, segments, looks_at, None if lse is None else out, lse)
        ctx.rows, ctx.form = rows, form
        ctx.dtypes = None if k_all is None or v_all is None else (k_all.dtype, v_all.dtype)
        return out if known is None else as_output(known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (do,) = grads
        q, keys, values, segments, looks_at, out, lse = ctx.saved_tensors
        rows, everywhere, (causal, scale, window) = ctx.rows, ctx.dtypes is not None, ctx.form
        e = KeyValues(keys, values, causal, scale, segments, window, looks_at)
        if lse is None:
            dq, dk, dv = backward_by_tiles(do, q, e, rows, everywhere)
        else:
            dq, dk, dv = kernels().rows_backward(
                do.to(q.dtype), q, keys, values, out, lse, *who_sees(e, rows), everywhere
            )
        if not everywhere:
            return dq, dk.to(keys.dtype), dv.to(values.dtype), *(None,) * 10
        offset = keys.shape[2] - rows.num_tokens
        selected = (of_selected(x, rows, offset).to(x_all.dtype) for x, x_all in ((dk, keys), (dv, values)))
        of_all = (not_selected_(x, rows, offset).to(dtype) for x, dtype in zip((dk, dv), ctx.dtypes, strict=True))
        return dq, *selected, *of_all, *(None,) * 8
