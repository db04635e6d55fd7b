"""Routed FFN against a dense FFN with the same LoRA, as transformers and PEFT compute it; forward and backward.

    python bench/ops/routed_ffn.py [--json FILE] [--quick] [--threads N]

Both sides run in one loop whose order flips each round; a ratio is the median of the per-round ratios. Router, choice,
sort, gate and LoRA are inside the timed region, the base is frozen. Gradients are compared with the reference first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.ops.linear_parts import LinearParts
from sparsetrain.ops.routed_ffn import routed_ffn
from sparsetrain.ops.routed_ffn.cases import QUICK, REAL, TOLERANCE, Case
from sparsetrain.ops.routing import choose_blocks

RANK, SCALE = 16, 1.0
NEAR = TOLERANCE["float32"]


class LoraLinear(nn.Module):
    """A frozen linear plus LoRA, in the operations and order of PEFT."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * SCALE

    def parts(self) -> LinearParts:
        return LinearParts(self.base.weight, self.base.bias, (self.a.weight, self.b.weight * SCALE))


class DenseFFN(nn.Module):
    def __init__(self, d: int, f: int, gated: bool) -> None:
        super().__init__()
        self.up, self.down = LoraLinear(d, f, not gated), LoraLinear(f, d, not gated)
        self.gate = LoraLinear(d, f, False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def routed(ffn: DenseFFN, router: Tensor, active: int, shared: int, x: Tensor, backend: str = "torch") -> Tensor:
    logits = F.linear(x, router)
    choice = choose_blocks(logits, active)
    gate = ffn.gate
    return routed_ffn(
        x,
        ffn.up.parts(),
        ffn.down.parts(),
        choice,
        (2 * torch.sigmoid(logits)).gather(1, choice),
        gate=None if gate is None else gate.parts(),
        num_shared=shared,
        num_blocks=len(router),
        activation="gelu" if gate is None else "silu",
        backend=backend,
    )


def timed(run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, clock: Callable[[], float]) -> float:
    x = x.detach().requires_grad_()
    start = clock()
    run(x).backward(dy)
    return (clock() - start) * 1e3


def worst_error(ffn: DenseFFN, run: Callable[..., Tensor], x: Tensor, dy: Tensor, router: Tensor) -> float:
    """Largest relative L2 distance of output and gradients from the reference."""
    wanted = [p for p in ffn.parameters() if p.requires_grad] + [router]
    results = []
    for backend in ("torch", "reference"):
        inputs = x.detach().requires_grad_()
        y = run(inputs, backend=backend)
        results.append((y, *torch.autograd.grad(y, [inputs, *wanted], dy)))
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(*results))


def measure(case: Case, rounds: int, one_thread: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens, d, f, beta = case.tokens, case.hidden, case.ffn_size, case.keep_ratio
    ffn = DenseFFN(d, f, case.gated)
    router = (torch.randn(case.blocks, d) * 0.02).requires_grad_()
    xs, dy = [torch.randn(tokens, d) for _ in range(3)], torch.randn(tokens, d)
    run = lambda x, backend="torch": routed(ffn, router, case.active, case.shared, x, backend)  # noqa: E731
    error = worst_error(ffn, run, xs[0], dy, router)
    clock = time.process_time if one_thread else time.perf_counter
    times: dict[str, list[float]] = {"baseline": [], "candidate": []}
    for index in range(rounds + 1):
        sides = [("baseline", ffn), ("candidate", run)]
        for name, side in sides[:: 1 if index % 2 else -1]:
            times[name].append(timed(side, xs[index % 3], dy, clock))
    base, candidate = times["baseline"][1:], times["candidate"][1:]  # the first round warms up
    low, ratio_median, high = statistics.quantiles([a / b for a, b in zip(base, candidate)], n=4)
    return {
        "case_id": "B1", "op": "routed_ffn", "backend": "torch", "dtype": "float32", "seed": 0,
        "shape": {"name": case.ffn, "tokens": tokens, "d": d, "f": f,
                  "blocks": case.blocks, "active": case.active, "shared": case.shared},
        "keep_ratio_executed": beta, "baseline": "frozen FFN + LoRA r=16, as transformers and PEFT compute it",
        "baseline_ms": base, "candidate_ms": candidate,
        "ratio_q1": low, "ratio_median": ratio_median, "ratio_q3": high, "efficiency": ratio_median * beta,
        "checks": {"oracle": "reference", "rel_l2": error, "tolerance": NEAR, "passed": error < NEAR},
        "verdict": "refused" if error >= NEAR else "win" if low > 1 else "loss" if high < 1 else "tie",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="a file, or a folder to write routed_ffn.json in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for case in QUICK if args.quick else REAL:
        result = measure(case, rounds=5 if args.quick else 9, one_thread=args.threads == 1)
        results.append(result)
        shape, checks = result["shape"], result["checks"]
        print(
            f"{shape['name']:12} n={shape['tokens']:5} G={shape['blocks']:2} k={shape['active']:2} "
            f"β={result['keep_ratio_executed']:.2f}  {result['ratio_median']:.2f}x "
            f"[{result['ratio_q1']:.2f}, {result['ratio_q3']:.2f}]  of 1/β: {result['efficiency']:.2f}  "
            f"{result['verdict']}  error {checks['rel_l2']:.1e}",
            flush=True,
        )
    if args.json:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": args.threads,
            "torch": torch.__version__,
        }
        path = Path(args.json)
        path = path / "routed_ffn.json" if path.is_dir() else path
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
