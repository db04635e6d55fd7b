"""Who attends for selected queries: what is installed, what a call's shape asks for, and why others are passed over.

On a GPU all that can run a class of calls is timed at the first one (`timed`). Where that cannot be, what a library
keeps well goes first: where a sample's rows stand together, as targets at its end do, PyTorch's own attention. Any
other rows run in our kernels, which are compared with plain PyTorch on that GPU before they are first used for a kind
of call, so that a compiler that fails there, or gets something wrong, costs time and not the run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.backend import has_triton, is_planned, no_triton, tuned_for
from sparsetrain.ops.selected_rows.keys import KeyValues, one_sequence, who_sees
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.runs import FULL, LEAST
from sparsetrain.ops.selected_rows.tiles import backward_by_tiles, forward_by_tiles
from sparsetrain.ops.selected_rows.varlen import attention_of_documents, documents_of, no_varlen

OP = "selected_attention"
TIMED = "and flex: the fastest, timed at each shape"
CACHED = "keys of a cache stand before the tokens"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Of the check: relative error of the output and each gradient against plain PyTorch."""


def kernels() -> Any:
    """The module of the kernels, imported when one is first needed."""
    return import_module("sparsetrain.ops.selected_rows.triton")


def available(
    q_bhkd: Tensor, e: KeyValues, rows: Rows, *, trains_others: bool, timed: bool = False
) -> dict[str, str | None]:
    """Backend -> None if it can run this call, else the reason; in the order of preference on q's device.

    timed: time will tell, so rows may stand less close together.
    """
    run = no_run(q_bhkd, e, rows, timed)
    if is_planned(q_bhkd):  # a GPU that our kernels know, with Triton
        return {"sdpa": run, "triton": None}
    flex = no_flex(q_bhkd)
    if flex is None and e.k_bgsd.shape[2] != rows.num_tokens:
        flex = CACHED
    found: dict[str, str | None] = {"sdpa": run, "flex": flex, "torch": None, "reference": None}
    triton = no_kernels(q_bhkd.device, q_bhkd.dtype, q_bhkd.shape[3])
    if q_bhkd.device.type != "cuda":
        return {"torch": None, "triton": triton, **found, "varlen": no_documents(q_bhkd, e, rows, timed)}
    # offsets of documents are found on the host: not where they are not needed
    varlen = "one attention of all samples does" if run is None else no_documents(q_bhkd, e, rows, timed)
    if triton is None and (timed or (run is not None and varlen is not None)):
        form = (e.causal, e.window is not None, e.segments_bs is not None, trains_others)
        triton = fails(q_bhkd.device, q_bhkd.dtype, q_bhkd.shape[3], *form)
    return {"sdpa": run, "varlen": varlen, "triton": triton, "torch": None, "flex": found["flex"], "reference": None}


def no_run(q_bhkd: Tensor, e: KeyValues, rows: Rows, timed: bool = False) -> str | None:
    """Why PyTorch's attention, which knows stretches of causal rows, is no choice, or None."""
    if not e.causal or e.window is not None:
        return "a call that is not causal, or that has a window"
    if e.k_bgsd.shape[2] != rows.num_tokens:
        return CACHED
    if (rows.loose_run if timed else rows.run) is None:
        return f"less than {LEAST if timed else FULL:.0%} of the stretches that hold the selected rows is selected"
    if e.segments_bs is not None and (is_planned(q_bhkd) or not one_sequence(e, rows)):
        return "rows that are packed, or begin with padding"
    if tuned_for(q_bhkd) == "cuda" and q_bhkd.shape[1] != e.k_bgsd.shape[1]:  # it would form all scores
        flash = q_bhkd.dtype in (torch.float16, torch.bfloat16) and q_bhkd.shape[3] <= 256
        flash = flash and (not q_bhkd.is_cuda or torch.cuda.get_device_capability(q_bhkd.device) >= (8, 0))
        return None if flash else "heads that share keys need flash attention: fp16 or bf16 on capability 8.0 or newer"
    return None


def no_documents(q_bhkd: Tensor, e: KeyValues, rows: Rows, timed: bool = False) -> str | None:
    """Why PyTorch's varlen attention is no choice, or None. It is compared with plain PyTorch before its first use."""
    if reason := no_flash(q_bhkd) or no_varlen():
        return reason
    if not e.causal:
        return "a call that is not causal"
    if e.k_bgsd.shape[2] != rows.num_tokens:
        return CACHED
    least = LEAST if timed else FULL
    if documents_of(e, rows, least) is None:
        return f"less than {least:.0%} of the stretches that hold a document's selected rows is selected"
    grouped = q_bhkd.shape[1] != e.k_bgsd.shape[1]
    return varlen_fails(q_bhkd.device, q_bhkd.dtype, q_bhkd.shape[3], e.window is not None, grouped)


def no_flash(q: Tensor) -> str | None:
    """Why flash attention is no choice, or None."""
    if q.device.type != "cuda":
        return "flash attention is for a GPU"
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] > 256 or q.shape[3] % 8:
        return "flash attention takes fp16 and bf16, and heads up to 256 wide that are multiples of 8"
    new = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return None if new else "flash attention needs a GPU of capability 8.0 or newer"


@cache
def varlen_fails(device: torch.device, dtype: torch.dtype, head_dim: int, window: bool, grouped: bool) -> str | None:
    """As `fails`, of varlen attention on packed rows."""
    try:
        error = compare_varlen(device, dtype, head_dim, window, grouped)
    except Exception as problem:  # of a driver: there is no list of them
        return f"varlen attention fails on {device}: {type(problem).__name__}: {str(problem)[:200]}"
    tolerance = TOLERANCE[dtype]
    return None if error <= tolerance else f"varlen attention is off by {error:.2g} on {device}"


@torch.no_grad()
def compare_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, window: bool, grouped: bool) -> float:
    """The largest relative error of the output and each gradient against plain PyTorch in fp64, on one packed call."""
    draw = torch.Generator().manual_seed(0)
    rows = Rows.of([[0, *range(60, 97), *range(180, 196)], [*range(50, 99), 100, *range(150, 199)]], 200, device)
    segments = (torch.arange(200, device=device) // 100 + 1).expand(2, -1).to(torch.int32)
    q, k, v, do = (
        torch.randn(2, n, t, head_dim, generator=draw).to(device, dtype)
        for n, t in ((4, rows.shape[1]), (2 if grouped else 4, 200), (2 if grouped else 4, 200), (4, rows.shape[1]))
    )
    do = do if rows.used_bk is None else do * rows.used_bk[:, None, :, None]
    e = KeyValues(k, v, True, head_dim**-0.5, segments, 40 if window else None)
    chosen = [q, *(rows.gather(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))]
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        given = [x.detach().clone().requires_grad_() for x in chosen]
        out = attention_of_documents(given[0], given[1], given[2], e, rows, None)
        found = [out.detach(), *torch.autograd.grad(out, given, do)]
    exact = replace(e, k_bgsd=k.double(), v_bgsd=v.double())
    expected = [
        forward_by_tiles(q.double(), exact, rows),
        *backward_by_tiles(do.double(), q.double(), exact, rows, False),
    ]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def on_device(device: torch.device) -> tuple[list[str], str | None]:
    """(backends that run ordinary calls there, the preferred first; why our kernels are not among them, or None).

    On a GPU the kernels are compiled and compared with plain PyTorch for it, in bf16 with heads of 64.
    """
    if device.type != "cuda":
        return ["torch"], no_kernels(device, torch.float32, 64)
    reason = no_kernels(device, torch.bfloat16, 64)
    reason = reason or fails(device, torch.bfloat16, 64, True, False, False, False)
    together = "sdpa or varlen where selected tokens stand together"
    return [together, *([] if reason else ["triton"]), "torch", TIMED], reason


def no_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    if reason := no_triton(device):
        return reason
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of capability 8.0 or newer"
    if dtype not in TOLERANCE:
        return f"the kernels take fp32, fp16 and bf16, and not {dtype}"
    return None if head_dim <= 256 else f"the kernels take heads up to 256 wide, and these are {head_dim}"


def no_flex(q: Tensor) -> str | None:
    """Why FlexAttention is no choice, or None. Uncompiled, on a CPU, it forms all scores and has no backward."""
    if q.device.type == "cpu":
        return "FlexAttention has no backward on a CPU" if q.requires_grad else None
    return None if has_triton() else "FlexAttention is compiled by triton, which is not installed"


@cache
def fails(
    device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, window: bool, packed: bool, everywhere: bool
) -> str | None:
    """Why the kernels may not be used for calls of this kind on this GPU: what they raise, or how far off they are.

    The compiled kernels are those of the calls that follow, so the check costs a few milliseconds more than these do.
    """
    try:
        error = compare_with_tiles(device, dtype, head_dim, causal, window, packed, everywhere)
    except Exception as problem:  # of a compiler or driver: there is no list of them
        return f"the kernels fail on {device}: {type(problem).__name__}: {str(problem)[:200]}"
    tolerance = TOLERANCE[dtype]
    return None if error <= tolerance else f"the kernels are off by {error:.2g} on {device}, more than {tolerance:g}"


@torch.no_grad()
def compare_with_tiles(
    device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, window: bool, packed: bool, everywhere: bool
) -> float:
    """The largest relative error of the output and each gradient against plain PyTorch in fp64, on one small call."""
    draw = torch.Generator().manual_seed(0)
    tokens, heads, groups = 272, 4, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    rows = Rows.of([range(0, tokens, 3), range(1, tokens, 5)], tokens, device)
    segments = (torch.arange(tokens, device=device) // 100 + 1).expand(2, -1).to(torch.int32) if packed else None
    shape = (2, groups, tokens, head_dim)
    e = KeyValues(random(*shape), random(*shape), causal, head_dim**-0.5, segments, 40 if window else None)
    q, do = random(2, heads, rows.shape[1], head_dim), random(2, heads, rows.shape[1], head_dim)
    if rows.used_bk is not None:
        do = do * rows.used_bk[:, None, :, None]
    o, lse = kernels().rows_forward(q, e.k_bgsd, e.v_bgsd, *who_sees(e, rows), True)
    found = kernels().rows_backward(do, q, e.k_bgsd, e.v_bgsd, o, lse, *who_sees(e, rows), everywhere)
    exact = replace(e, k_bgsd=e.k_bgsd.double(), v_bgsd=e.v_bgsd.double())
    with torch.autocast(device.type, enabled=False):
        q, do = q.double(), do.double()
        expected = forward_by_tiles(q, exact, rows), *backward_by_tiles(do, q, exact, rows, everywhere)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip((o, *found), expected, strict=True)]
    return max(float(error) for error in errors)
