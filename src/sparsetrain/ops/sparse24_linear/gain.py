"""Does it pay here? Times the forward and the input gradient of one weight, dense and sparse, on the device."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.nm_mask import nm_mask, transposable_mask
from sparsetrain.ops.sparse24_linear.packing import (
    Packed,
    compress,
    kernel_refusal,
    multiply_backward,
    multiply_forward,
    pack,
)

WORTH = 1.15
"""Forward and input gradient must gain this much; below it the refresh and packing eat the rest (2:4 on Hopper gains
1.2x at 8192³, and a whole block at most 1.18x at width 1024)."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What was measured on one weight [out, in] with `tokens` rows: medians in ms, packing included in the sparse time.

    ratio: dense / sparse, the median over rounds in which both ran, in alternating order. 0 where nothing could run.
    algorithm: cuSPARSELt's, with which it was timed: pack with it, or other products run than those that were judged.
    reason: why nothing could run, or None.
    """

    out_features: int
    in_features: int
    tokens: int
    dtype: str
    backend: str
    dense_ms: float = 0.0
    sparse_ms: float = 0.0
    pack_ms: float = 0.0
    ratio: float = 0.0
    algorithm: int = 0
    reason: str | None = None

    @property
    def pays(self) -> bool:
        return self.ratio >= WORTH

    def __str__(self) -> str:
        shape = f"{self.out_features}x{self.in_features}, {self.tokens} tokens, {self.dtype}"
        if self.reason is not None:
            return f"{shape}: no 2:4 product can run ({self.reason})."
        figures = f"{self.dense_ms:.3f} -> {self.sparse_ms:.3f} ms, of which packing {self.pack_ms:.3f}"
        verdict = "goes sparse" if self.pays else f"{WORTH}x is needed"
        return f"{shape}: forward + input gradient {self.ratio:.2f}x on {self.backend!r} ({figures}); {verdict}."


def measure_gain(
    out_features: int,
    in_features: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    transposable: bool = True,
    backend: str | None = None,
    rounds: int = 30,
) -> Gain:
    """Time x Wᵀ and dY W against the same products of a packed 2:4 weight.

    Args:
        tokens: rows of one forward: batch size times sequence length.
        transposable: the input gradient is sparse too (FST); else it is dense (S-STE).
        backend: cusparselt or cutlass; None takes the first that can run.
        rounds: rounds of one dense and one sparse run each, after three that warm up.

    Returns:
        The gain; where no kernel can run, one with the reason and ratio 0.
    """
    device = torch.device(device)
    shape = (out_features, in_features)
    names = (backend,) if backend else ("cusparselt", "cutlass")
    refusals = {name: kernel_refusal(name, shape, dtype, device) for name in names}
    able = [name for name, reason in refusals.items() if reason is None]
    about = {"out_features": out_features, "in_features": in_features, "tokens": tokens, "dtype": f"{dtype}"[6:]}
    if not able:
        return Gain(**about, backend="emulate", reason=refusals[names[0]])
    draw = torch.Generator(device).manual_seed(0)
    w_oi = torch.randn(shape, generator=draw, device=device, dtype=dtype)
    x_ti = torch.randn(tokens, in_features, generator=draw, device=device, dtype=dtype)
    dy_to = torch.randn(tokens, out_features, generator=draw, device=device, dtype=dtype)
    w_oi *= transposable_mask(w_oi) if transposable else nm_mask(w_oi)
    algorithm = search_algorithm(w_oi, x_ti) if able[0] == "cusparselt" else 0
    make = lambda: pack(w_oi, transposable=transposable, algorithm=algorithm, backend=able[0])  # noqa: E731

    def sparse() -> None:
        both_products(make(), x_ti, dy_to)

    def dense() -> None:
        F.linear(x_ti, w_oi)
        torch.mm(dy_to, w_oi)

    dense_ms, sparse_ms, ratio = interleaved(dense, sparse, rounds, device)
    pack_ms, _, _ = interleaved(make, make, max(3, rounds // 5), device)
    found: Any = {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "pack_ms": pack_ms, "ratio": ratio}
    return Gain(**about, **found, backend=able[0], algorithm=algorithm)


def gain_together(gains: Iterable[Gain]) -> float:
    """Dense / ours of several weights, of which those that pay are sparse and the others dense; 1 without any."""
    dense = ours = 0.0
    for gain in gains:
        dense, ours = dense + gain.dense_ms, ours + (gain.sparse_ms if gain.pays else gain.dense_ms)
    return dense / ours if ours else 1.0


def both_products(packed: Packed, x_ti: Tensor, dy_to: Tensor) -> None:
    """The two products that a 2:4 weight is for."""
    multiply_forward(x_ti, packed, packed.forward, None)
    multiply_backward(dy_to, packed, packed.backward)


def search_algorithm(w_oi: Tensor, x_ti: Tensor) -> int:
    """cuSPARSELt's fastest algorithm for x Wᵀ."""
    compressed = compress(w_oi, "cusparselt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it will move
        return torch._cslt_sparse_mm_search(compressed.packed, x_ti.t(), transpose_result=True)  # type: ignore[attr-defined]


def interleaved(
    dense: Callable[[], object], sparse: Callable[[], object], rounds: int, device: torch.device
) -> tuple[float, float, float]:
    """(median dense ms, median sparse ms, median of the rounds' ratios); the order flips each round, 3 warm up."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for index in range(rounds + 3):
        sides = [("dense", dense), ("sparse", sparse)]
        for name, run in sides[:: 1 if index % 2 else -1]:
            times[name].append(_timed(run, device))
    kept = {name: found[3:] for name, found in times.items()}
    ratio = statistics.median(d / s for d, s in zip(kept["dense"], kept["sparse"]))
    return statistics.median(kept["dense"]), statistics.median(kept["sparse"]), ratio


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
