"""A Monarch linear against the dense one it replaces; forward and backward, all gradients.

Both sides run in one loop whose order flips each round; a ratio is the median of the per-round ratios. `rows` is what
stands anywhere in a model; `columns` is the form that stands before an activation (`ops.monarch_linear`), given and
giving column-major tensors. The reference is timed too: the same products with the permutation as copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.runner import Asked, Benchmark, Cell
from sparsetrain.ops.monarch_linear import monarch_linear
from sparsetrain.ops.monarch_linear.cases import REAL, Case

AIM = 1.5
"""Of 768 -> 3072 and 1024 -> 4096 at 4 blocks and 2,048 tokens on two cores."""
WAYS = ("rows", "columns", "reference")
DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 2e-2)}
"""Name -> dtype, and how far a side may be from the reference in fp32, as relative L2."""


def sides(case: Case, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], dict[str, Tensor]]:
    """Name -> forward, every leaf, and the gradient that comes into each."""
    x, right, left, bias, dy = (None if t is None else t.to(dtype) for t in case.tensors(torch.float32))
    weight = torch.randn(case.outputs, case.inputs, dtype=dtype) / case.inputs**0.5
    leaves = [t.requires_grad_() for t in (x, right, left, bias, weight) if t is not None]
    x, right, *_ = leaves
    columns_x = x.detach().t().contiguous().t().requires_grad_()  # type: ignore[union-attr]
    runs: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.linear(x, weight, bias),  # type: ignore[arg-type]
        "rows": lambda: monarch_linear(x, right, left, bias),  # type: ignore[arg-type]
        "columns": lambda: monarch_linear(columns_x, right, left, bias, columns=True),  # type: ignore[arg-type]
        "reference": lambda: monarch_linear(x, right, left, bias, backend="reference"),  # type: ignore[arg-type]
    }
    dys: dict[str, Tensor] = dict.fromkeys(runs, dy)  # type: ignore[arg-type]
    dys["columns"] = dy.t().contiguous().t()  # type: ignore[union-attr]
    return runs, [*leaves, columns_x], dys


def timed(run: Callable[[], Tensor], dy: Tensor, leaves: list[Tensor], clock: Callable[[], float]) -> float:
    start = clock()
    run().backward(dy)
    found = (clock() - start) * 1e3
    for leaf in leaves:
        leaf.grad = None
    return found


def error_of(case: Case, dtype: torch.dtype) -> float:
    """Largest relative L2 distance of output and gradients from the reference in fp32."""
    results = []
    for backend, kind in (("torch", dtype), ("reference", torch.float32)):
        x, right, left, bias, dy = (None if t is None else t.to(kind) for t in case.tensors(torch.float32))
        leaves = [t.requires_grad_() for t in (x, right, left, bias) if t is not None]
        y = monarch_linear(x, right, left, bias, backend=backend)  # type: ignore[arg-type]
        results.append([t.float() for t in (y, *torch.autograd.grad(y, leaves, dy))])
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(*results, strict=True))


def measure(case: Case, dtype_name: str, rounds: int, one_thread: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype, tolerance = DTYPES[dtype_name]
    error = error_of(case, dtype)
    runs, leaves, dys = sides(case, dtype)
    clock = time.process_time if one_thread else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name in list(runs)[:: 1 if index % 2 else -1]:
            times[name].append(timed(runs[name], dys[name], leaves, clock))
    kept = {name: found[1:] for name, found in times.items()}  # the first round warms up
    quartiles = {
        name: statistics.quantiles([d / m for d, m in zip(kept["dense"], kept[name], strict=True)], n=4)
        for name in WAYS
    }
    low, ratio, high = quartiles["rows"]
    factors = case.rank * (case.blocks_out * case.inputs + case.blocks_in * case.outputs)
    return {
        "case_id": "E-cpu", "op": "monarch_linear", "backend": "torch", "dtype": dtype_name, "seed": 0,
        "shape": {"name": case.name, "tokens": case.rows[0], "in": case.inputs, "out": case.outputs,
                  "blocks": case.blocks_in, "rank": case.rank},
        "keep_ratio_executed": factors / (case.inputs * case.outputs), "baseline": "F.linear, all gradients",
        "baseline_ms": kept["dense"], "candidate_ms": kept["rows"],
        "ratio_q1": low, "ratio_median": ratio, "ratio_q3": high,
        "columns_ratio": quartiles["columns"][1], "reference_ratio": quartiles["reference"][1], "aim": AIM,
        "checks": {"oracle": "reference in fp32", "rel_l2": error, "tolerance": tolerance, "passed": error < tolerance},
        "verdict": "refused" if error >= tolerance else "win" if low > 1 else "loss" if high < 1 else "tie",
    }  # fmt: skip


def cells(asked: Asked) -> list[Cell]:
    def cell(case: Case, dtype: str) -> Cell:
        one_thread, rounds = asked.threads == 1, asked.settings["rounds"]
        return Cell(f"{case.name} {dtype}", lambda: measure(case, dtype, rounds, one_thread))

    cases = REAL[:1] if asked.settings["few"] else REAL
    return [cell(case, dtype) for dtype in DTYPES for case in cases]


BENCHMARKS = [
    Benchmark(
        name="monarch",
        measures="a Monarch linear against the dense one, forward + backward, by layout",
        cells=cells,
        settings={"rounds": 9, "few": False},
        quick={"rounds": 3, "few": True},
        threads=2,
        key_of=lambda row: f"{row['shape']['name']} {row['dtype']}",
        shows=("ratio_median", "columns_ratio", "reference_ratio", "verdict"),
    )
]
