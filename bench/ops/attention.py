"""Time block-sparse and token-sparse attention against dense SDPA on the CPU: case A1, selection of the keys excluded.

    python bench/ops/attention.py --threads 2 --json bench/results/attention.json

Each case first compares output and gradients with the reference; a case that fails is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.measure import compare, describe_machine
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.block_sparse_attention import cases as block_cases
from sparsetrain.ops.token_sparse_attention import cases as token_cases
from sparsetrain.ops.token_sparse_attention import token_sparse_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TENSORS = ("out", "dq", "dk", "dv")
INPUT_SETS = 3
TOLERANCE = 1e-5
"""Relative L2 error of outputs and gradients, against the reference in fp64 (fp32 from 4k tokens on)."""


def block_attention(case: block_cases.Case, lists: Tensor, backend: str) -> Attention:
    sizes = {"block_q": case.block_q, "block_k": case.block_k, "causal": case.causal}
    return lambda q, k, v: block_sparse_attention(q, k, v, lists, backend=backend, **sizes)


def token_attention(lists: Tensor, backend: str) -> Attention:
    return lambda q, k, v: token_sparse_attention(q, k, v, lists, backend=backend)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def forward_backward(attention: Attention, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    out = attention(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def errors(case: Any, make: Callable[[Tensor, str], Attention], lists: Tensor) -> dict[str, float]:
    """Relative L2 error of each tensor for the first key/value head: the heads are independent."""
    heads = case.heads // case.kv_heads
    cut = lists[:, :1] if lists.shape[1] == case.kv_heads else lists[:, :heads]
    q, k, v = case.tensors(torch.float32)
    work = torch.float64 if case.queries <= 2048 else torch.float32
    small = tuple(x.to(work).requires_grad_() for x in (q[:, :heads], k[:, :1], v[:, :1]))
    grad = torch.randn_like(q)
    wanted = forward_backward(make(cut, "reference"), small, grad[:, :heads].to(work))
    found = forward_backward(make(lists, "torch"), tuple(x.requires_grad_() for x in (q, k, v)), grad)
    return {
        name: float((x[:, : y.shape[1]] - y).norm() / y.norm())
        for name, x, y in zip(TENSORS, found, wanted, strict=True)
    }


def saved_bytes(attention: Attention, tensors: tuple[Tensor, ...]) -> int:
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*tensors)
    return sum(storages.values())


def rotating(attention: Attention, sets: list[tuple[tuple[Tensor, ...], Tensor]]) -> Callable[[], object]:
    """Forward and backward on the next input set, so that no input stays in the cache."""
    turn = itertools.cycle(sets)
    return lambda: forward_backward(attention, *next(turn))


def pairs(case: Any, lists: Tensor) -> tuple[float, float]:
    """(pairs computed by the kernel, pairs kept) over those of dense causal attention, a head."""
    whole = case.queries * (case.queries + 1) / 2
    if isinstance(case, token_cases.Case):
        return 1.0, float((lists >= 0).sum()) / lists.shape[1] / whole
    computed = float((lists >= 0).sum()) * case.block_q * case.block_k / lists.shape[1]
    row = torch.arange(case.block_q)[:, None]
    first_q = torch.arange(lists.shape[2])[:, None, None] * case.block_q
    seen = (first_q + row - lists[..., None, :] * case.block_k + 1).clamp(0, case.block_k)
    kept = float((seen * (lists >= 0)[..., None, :]).sum()) / lists.shape[1]
    return computed / whole, kept / whole


def run(case: Any, rounds: int) -> dict[str, Any]:
    lists = case.lists()
    is_block = isinstance(case, block_cases.Case)

    def make(lists: Tensor, backend: str) -> Attention:
        return block_attention(case, lists, backend) if is_block else token_attention(lists, backend)

    found = errors(case, make, lists)
    passed = max(found.values()) < TOLERANCE
    checks = {"oracle": "reference", "rel_l2": found, "tolerance": TOLERANCE, "passed": passed}
    computed, kept = pairs(case, lists)
    result = {
        "case_id": f"A1/{case.name}",
        "op": "block_sparse_attention" if is_block else "token_sparse_attention",
        "backend": "torch",
        "shape": {**vars(case), "keys": case.num_keys},
        "dtype": "float32",
        "seed": 0,
        "date": datetime.date.today().isoformat(),
        "baseline": {"name": "F.scaled_dot_product_attention", "is_causal": True},
        "timed": "forward and backward of the kernel alone; choosing the keys is not in it",
        "list_kind": "random",
        "keep_ratio_asked": kept,
        "keep_ratio_executed": computed,
        "checks": checks,
    }
    if not passed:
        return result | {"verdict": "refused"}
    sets = []
    for seed in range(INPUT_SETS):
        tensors = tuple(x.requires_grad_() for x in case.tensors(torch.float32, seed))
        sets.append((tensors, torch.randn_like(tensors[0])))
    sparse = make(lists, "torch")
    before = describe_machine()
    ratio = compare(rotating(dense, sets), rotating(sparse, sets), rounds=rounds)
    after = describe_machine()
    flops = 14 * kept * case.queries * (case.queries + 1) / 2 * case.head_dim * case.heads
    return result | {
        "machine": before.to_dict() | {"load_average_after": after.load_average},
        "clock": ratio.clock,
        "baseline_ms": [1e3 * x for x in ratio.baseline_s],
        "candidate_ms": [1e3 * x for x in ratio.candidate_s],
        "ratio_median": ratio.median,
        "ratio_q1": ratio.q1,
        "ratio_q3": ratio.q3,
        "tflops": flops / sorted(ratio.candidate_s)[rounds // 2] / 1e12,
        "saved_bytes": saved_bytes(sparse, sets[0][0]),
        "baseline_saved_bytes": saved_bytes(dense, sets[0][0]),
        "verdict": ratio.verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="up to 2048 tokens, 5 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [case for case in (*block_cases.REAL, *token_cases.REAL) if arguments.match in case.name]
    if arguments.quick:
        cases = [case for case in cases if case.queries <= 2048]
    results = []
    for case in cases:
        rounds = 5 if arguments.quick or case.queries > 4096 else 9
        result = run(case, rounds)
        results.append(result)
        ratio = "not timed: " + str(result["checks"])
        if "ratio_median" in result:
            ratio = "{ratio_median:5.2f} [{ratio_q1:.2f}, {ratio_q3:.2f}]".format(**result)
        print(f"{result['op']:24} {case.name:26} {ratio} {result['verdict']}", flush=True)
        if arguments.json:  # written after every case: a run that is cut short still counts
            path = arguments.json / "attention.json" if arguments.json.is_dir() else arguments.json
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
