"""Who multiplies: what can run, and on a GPU which is faster, timed once a shape."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.backend import no_triton
from sparsetrain.core.fastest import Timings, Ways, may_time, ranked, timings_here
from sparsetrain.ops.monarch_linear.reference import reference_monarch
from sparsetrain.ops.monarch_linear.torch import strided_monarch


def run(name: str, x_ni: Tensor, right: Tensor, left: Tensor | None, bias: Tensor | None, columns: bool) -> Tensor:
    if name == "reference":
        return reference_monarch(x_ni, right, left, bias)
    return strided_monarch(x_ni, right, left, bias, columns, _kernel() if name == "triton" else None)


def _kernel() -> Any:
    return import_module("sparsetrain.ops.monarch_linear.triton").product


def best_first(x: Tensor, right: Tensor, left: Tensor | None, dtype: torch.dtype) -> dict[str, str | None]:
    """Backends as `choose` takes them: on a GPU the faster one first, and none that broke when it was timed."""
    reason = no_triton(x.device)
    if reason is None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reason = f"the kernel takes fp32, fp16 and bf16, and not {dtype}"
    found = {"torch": None, "reference": None, "triton": reason}
    rows = x.numel() // max(1, x.shape[-1])
    if reason is not None or not rows or not may_time(x):
        return found
    known = _timings(1 << (rows - 1).bit_length(), right.shape, None if left is None else left.shape, dtype, x.device)
    return ranked(found, known)


def _timings(
    rows: int, right: tuple[int, ...], left: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> Timings:
    """Forward and backward of both ways on so many rows."""

    def ways() -> Ways:
        draw = torch.Generator(device).manual_seed(0)
        shapes = [(rows, right[0] * right[2]), right, *([] if left is None else [left])]
        x, *factors = (
            torch.randn(shape, generator=draw, device=device, dtype=dtype).requires_grad_() for shape in shapes
        )
        r, second = factors[0], factors[1] if left is not None else None

        def step(name: str) -> Callable[[], object]:
            return lambda: torch.autograd.grad(run(name, x, r, second, None, False).sum(), [x, *factors])

        return {name: step(name) for name in ("torch", "triton")}

    key = f"{rows:,} rows, R {tuple(right)}, L {None if left is None else tuple(left)}, {str(dtype)[6:]}"
    return timings_here("monarch_linear", key, device, ways)
