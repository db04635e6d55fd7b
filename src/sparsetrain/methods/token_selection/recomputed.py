"""Blocks that keep next to nothing: the backward runs the selected rows again.

Kept of a block are the selected rows of its input [b, k, d], and keys and values of all rows, which can wait in the
CPU's memory. The forward is one pass over all rows, without notes; what treats rows one by one (norms, FFN) runs in
pieces of them, so that no [t, d_ff] exists. The backward costs |S| / n of a forward more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsetrain.core.autograd import as_output
from sparsetrain.core.host_memory import OnHost
from sparsetrain.methods.token_selection.notes import Note
from sparsetrain.ops.selected_rows import KeyValues

PIECES = 8
"""Pieces of a row. As many at every length, so that memory grows with the length as a plan fits it."""
Again = Callable[[Tensor, KeyValues, list[Note | None]], Tensor]
"""(selected rows of the input, keys and values, masks of dropouts) -> the block's output on them, with gradient."""


def in_pieces(run: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """`run` of rows [b, t, d] that it treats one by one, a piece after another; without gradient."""
    if args or kwargs or not isinstance(x, Tensor) or x.ndim != 3 or torch.is_grad_enabled():
        return run(x, *args, **kwargs)
    size = -(-x.shape[1] // PIECES)
    out: Any = None
    for start in range(0, x.shape[1], size):
        y = run(x[:, start : start + size].contiguous())  # as the whole is: GPT-2's linears take views of it
        out = y.new_empty(*x.shape[:2], y.shape[-1]) if out is None else out
        out[:, start : start + size] = y
        del y
    return out


def recomputed(
    x_bkd: Tensor,
    y_bkd: Tensor,
    everything: KeyValues,
    masks: list[Note | None],
    again: Again,
    parameters: list[nn.Parameter],
    host: OnHost | None,
) -> Tensor:
    """`y_bkd`, whose gradient `again` finds.

    Args:
        x_bkd: selected rows of the block's input, with gradient.
        y_bkd: of its output, constants.
        everything: keys and values of all rows; `host` has them where they wait there.
        masks: what dropouts kept of the selected rows.
        parameters: trained ones of the block.
    """
    keys = (everything.k_bgsd, everything.v_bgsd) if host is None else (None, None)
    form = replace(everything, k_bgsd=None, v_bgsd=None)  # type: ignore[arg-type]
    return _Recomputed.apply(x_bkd, y_bkd, *keys, form, masks, again, host, *parameters)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, keys: Tensor | None, values: Tensor | None, form: KeyValues,
        masks: list[Note | None], again: Again, host: OnHost | None, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, keys, values, *parameters)
        ctx.form, ctx.masks, ctx.again, ctx.host = form, masks, again, host
        ctx.autocast = _autocast(x.device.type)
        return as_output(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, keys, values, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        asked = [p for p in (x, *parameters) if p.requires_grad]
        waits = nullcontext((keys, values)) if ctx.host is None else ctx.host.on_device()
        with waits as (keys, values), torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = ctx.again(x, replace(ctx.form, k_bgsd=keys, v_bgsd=values), list(ctx.masks))
            found = iter(torch.autograd.grad(y, asked, grads[0], allow_unused=True))
        dx, *of_parameters = (next(found) if p.requires_grad else None for p in (x, *parameters))
        return dx, *(None,) * 7, *of_parameters


def _autocast(device: str) -> dict[str, Any]:
    return {
        "device_type": device,
        "enabled": torch.is_autocast_enabled(device),
        "dtype": torch.get_autocast_dtype(device),
    }
