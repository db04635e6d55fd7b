"""Which attention of selected rows takes the least time on this GPU: all that can run, timed once a class of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsetrain.core.fastest import Timings, Ways, timings_here
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.runs import LEAST
from sparsetrain.ops.selected_rows.varlen import documents_of

TOLERANCE = 2e-2
"""Relative error of the output and each gradient, in any dtype: plain PyTorch's fp32 may be TF32 here."""
Context = tuple[Tensor, Tensor] | None
Attend = Callable[[str, Tensor, Tensor, Tensor, KeyValues, Rows, Tensor | None, Context], Tensor]
"""Backend, q, k, v, everything, rows, known, context -> output, as `selected_attention` takes them."""


def timings(
    found: dict[str, str | None], q: Tensor, e: KeyValues, rows: Rows, known: bool, trains_others: bool, attend: Attend,
) -> Timings:  # fmt: skip
    """Forward and backward on random numbers by every backend that can run the call, as remembered or timed now.

    A class is timed on the selection that is met first. The first results are compared with plain PyTorch's: a backend
    that is further off than `TOLERANCE` counts as broken. What is made once
    a selection, block lists and offsets, is not in the times.
    """
    names = sorted(name for name, reason in found.items() if reason is None and name != "reference")
    form = ("timed", *names, q.shape, e.k_bgsd.shape, q.dtype, e.causal, e.window, e.segments_bs is None, known)
    form = (*form, trains_others)
    if form not in rows.masks:
        key = _key(names, q, e, rows, known, trains_others)
        ways = lambda: _ways(names, q, e, rows, known, trains_others, attend)  # noqa: E731
        rows.masks[form] = timings_here("selected_attention", key, q.device, ways)
    return rows.masks[form]


def _key(names: list[str], q: Tensor, e: KeyValues, rows: Rows, known: bool, trains_others: bool) -> str:
    """Lengths are rounded up to powers of two, so that few classes are."""
    (b, h, k, d), (_, g, s, _) = q.shape, e.k_bgsd.shape
    parts = [
        f"{b} x {_power(k)} of {_power(s)} tokens{_standing(names, e, rows)}, {h} heads ({g} of keys) of {d}",
        "causal" if e.causal else "both ways",
        *([] if e.window is None else [f"window {e.window}"]),
        *(["packed"] if e.segments_bs is not None else []),
        *(["all keys train"] if trains_others else []),
        *(["values known"] if known else []),
        str(q.dtype).removeprefix("torch."),
    ]
    return ", ".join(parts) + ", " + " ".join(names)


def _standing(names: list[str], e: KeyValues, rows: Rows) -> str:
    """How many queries of a sample a library's attention would compute."""
    if "sdpa" in names and rows.loose_run is not None:
        return f" in stretches of {_power(rows.loose_run.width)}"
    documents = documents_of(e, rows, LEAST) if "varlen" in names else None
    if documents is None:
        return ""
    return f" in stretches of documents, {_power(documents.num_queries // rows.shape[0])}"


def _ways(
    names: list[str], q: Tensor, e: KeyValues, rows: Rows, known: bool, trains_others: bool, attend: Attend
) -> Ways:
    draw = torch.Generator(q.device).manual_seed(0)  # the run's own draws stay as they are

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, device=q.device, dtype=q.dtype)

    keys, values, used = drawn(e.k_bgsd), drawn(e.v_bgsd), rows.used_bk
    offset = keys.shape[2] - rows.num_tokens
    given = [drawn(q), *(rows.gather(x[:, :, offset:].transpose(1, 2)).transpose(1, 2) for x in (keys, values))]
    given = [x.detach().requires_grad_() for x in given]
    context = (keys.clone().requires_grad_(), values.clone().requires_grad_()) if trains_others else None
    leaves = [*given, *(context or ())]
    everything, dout = replace(e, k_bgsd=keys, v_bgsd=values), drawn(q)
    dout = dout if used is None else dout * used[:, None, :, None]

    def step(name: str, out: Tensor | None) -> list[Tensor]:
        found = attend(name, given[0], given[1], given[2], everything, rows, out, context)
        return [found.detach(), *torch.autograd.grad(found, leaves, dout)]

    plain = step("torch", None)
    out, unchecked = plain[0] if known else None, set(names)

    def way(name: str) -> Callable[[], object]:
        def run() -> None:
            found = step(name, out)
            if name in unchecked:
                unchecked.discard(name)
                found[0] = found[0] if used is None else found[0] * used[:, None, :, None]
                off = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, plain))
                if not off <= TOLERANCE:
                    raise RuntimeError(f"it is off by {off:.2g} from plain PyTorch")

        return run

    return {name: way(name) for name in names}


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
