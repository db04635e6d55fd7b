"""PQ block attention as a model runs it, against dense attention: choosing the blocks is inside the timed region.

Forward and backward, fp32, interleaved rounds; the ratio is dense time / ours. Dense: F.scaled_dot_product_attention.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from bench.runner import Benchmark, Cell
from sparsetrain.measure import compare
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.key_selection import Visibility, select_blocks

# tokens, query heads, key/value heads, keys kept, block_q, block_k
CASES = [
    (1024, 9, 3, 256, 32, 8),
    (2048, 9, 3, 256, 8, 8),
    (2048, 9, 3, 256, 32, 8),
    (2048, 8, 8, 512, 128, 64),
    (4096, 8, 8, 512, 128, 64),
    (8192, 8, 8, 512, 128, 64),
]


def case_id(tokens: int, heads: int, groups: int, keys: int, block_q: int, block_k: int) -> str:
    return f"t{tokens}_h{heads}_{groups}_keys{keys}_{block_q}x{block_k}"


def run(tokens: int, heads: int, groups: int, keys: int, block_q: int, block_k: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, tokens, 64, requires_grad=True) for n in (heads, groups, groups))
    grad = torch.randn(1, heads, tokens, 64)
    codebook = torch.randn(groups, 8, 16, 8)
    slots = torch.full((1, -(-tokens // block_q)), -(-keys // block_k))
    spent: list[float] = []

    def sparse() -> None:
        start = time.perf_counter()
        lists = select_blocks(
            q.detach(), k.detach(), codebook, slots, Visibility(True), block_q=block_q, block_k=block_k, scale=0.125
        )
        spent.append(time.perf_counter() - start)
        block_sparse_attention(q, k, v, lists, block_q=block_q, block_k=block_k, causal=True).backward(grad)

    def dense() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups).backward(grad)

    ratio = compare(dense, sparse, rounds=rounds)
    return {
        "case_id": case_id(tokens, heads, groups, keys, block_q, block_k),
        "op": "select_blocks + block_sparse_attention",
        "selection_ms": 1000 * sorted(spent)[len(spent) // 2],
        **ratio.to_dict(),
    }


def cell(case: tuple[int, int, int, int, int, int], rounds: int) -> Cell:
    rounds = 5 if case[0] > 4096 else rounds
    return Cell(case_id(*case), lambda: run(*case, rounds=rounds))


BENCHMARKS = [
    Benchmark(
        name="selected_attention",
        measures="PQ block attention with the choice of blocks, forward + backward, against SDPA",
        cells=lambda asked: [
            cell(case, asked.settings["rounds"]) for case in CASES if case[0] <= asked.settings["longest"]
        ],
        settings={"rounds": 9, "longest": 8192},
        quick={"rounds": 5, "longest": 1024},
        key_of=lambda row: row["case_id"],
        shows=("median", "q1", "q3", "verdict"),
    )
]
