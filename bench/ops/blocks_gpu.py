"""Block-sparse attention and the routed FFN on a GPU: cases A1, A2 and B1 of the benchmark protocol, in bf16.

Attention is judged with the selection of its key blocks inside the timed region, against the faster of cuDNN's and
flash attention; kernels alone stand beside it. The routed FFN has router, sort and LoRA inside, against the compiled
dense FFN with the same LoRA. What differs from the reference is not timed. `--device cpu --quick` tries the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.routed_ffn import DenseFFN, routed
from bench.runner import Asked, Benchmark, Cell
from sparsetrain.core.errors import Unsupported
from sparsetrain.core.fastest import in_turns
from sparsetrain.measure import compare
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.key_selection import Visibility, select_blocks

BLOCK, HEADS, KV_HEADS, WIDTH, BLOCKS = 128, 32, 8, 128, 8
LENGTHS = (8192, 32768, 16384, 4096, 65536)
"""The most telling first: a run may be cut."""
FFNS = ((4096, 14336), (2048, 8192))
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative L2 distance of outputs and gradients from the reference in fp32, on a part of the heads or tokens."""
STRONGEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
"""What SDPA may choose from, in this order, where it is timed as the baseline."""


def steps(run: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        out = run(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return step


def distance(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(found, wanted, strict=True))


class Attention:
    """One shape of causal attention, its lists, and the ways to compute it."""

    def __init__(self, tokens: int, keys: int, device: str, heads: int = HEADS, kv_heads: int = KV_HEADS) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(0)

        def drawn(count: int) -> Tensor:
            return torch.randn(1, count, tokens, WIDTH, generator=draw, device=device, dtype=dtype)

        self.tokens, self.keys = tokens, keys
        self.leaves = tuple(drawn(count).requires_grad_() for count in (heads, kv_heads, kv_heads))
        self.grad = drawn(heads)
        self.codebook = torch.randn(kv_heads, WIDTH // 8, 16, 8, generator=draw, device=device)
        self.slots = torch.full((1, -(-tokens // BLOCK)), keys // BLOCK, device=device)
        self.lists = self.select(*self.leaves[:2])

    def select(self, q: Tensor, k: Tensor) -> Tensor:
        sizes = {"block_q": BLOCK, "block_k": BLOCK, "scale": WIDTH**-0.5}
        return select_blocks(q, k, self.codebook, self.slots, Visibility(True), **sizes)

    def sparse(self, backend: str, *, selected: bool) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lists = self.select(q, k) if selected else self.lists
            return block_sparse_attention(q, k, v, lists, block_q=BLOCK, block_k=BLOCK, causal=True, backend=backend)

        return run

    def error(self, backend: str) -> float:
        """Of the first key/value head and its queries: the heads are independent."""
        heads = self.leaves[0].shape[1] // self.leaves[1].shape[1]
        cut = [x[:, :count].detach().requires_grad_() for x, count in zip(self.leaves, (heads, 1, 1))]
        sizes = {"block_q": BLOCK, "block_k": BLOCK, "causal": True}
        results = []
        for name, work in ((backend, cut[0].dtype), ("reference", torch.float32)):
            leaves = tuple(x.detach().to(work).requires_grad_() for x in cut)
            run = lambda q, k, v, name=name: block_sparse_attention(q, k, v, self.lists[:, :1], backend=name, **sizes)  # noqa: E731
            results.append(steps(run, leaves, self.grad[:, :heads].to(work))())
        return distance(*results)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(STRONGEST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention(tokens: int, keys: int, device: str, rounds: int) -> dict[str, Any]:
    shape = {"tokens": tokens, "keys": keys, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "block": BLOCK}
    at = Attention(tokens, keys, device)
    errors, why = {}, {}
    small = at if tokens <= 8192 else Attention(8192, keys, device, HEADS // KV_HEADS, 1)  # the reference is [t, s]
    for backend in ("flex", "triton") if device == "cuda" else ("torch",):
        try:
            errors[backend] = small.error(backend)
        except Unsupported as reason:
            why[backend] = str(reason)
    bound = TOLERANCE[str(at.grad.dtype).removeprefix("torch.")]
    ways = {name: steps(at.sparse(name, selected=False), at.leaves, at.grad) for name in errors if errors[name] < bound}
    row = {"op": "block_sparse_attention", "case_id": "A1", "shape": shape, "dtype": str(at.grad.dtype),
           "checks": {"oracle": "reference", "rel_l2": errors, "tolerance": bound, "unable": why}}  # fmt: skip
    if not ways:
        return row | {"verdict": "refused"}
    ways |= {"dense": steps(dense, at.leaves, at.grad), "selection": lambda: at.select(*at.leaves[:2])}
    kernel_ms = {name: sorted(ms)[len(ms) // 2] for name, ms in in_turns(ways, torch.device(device), rounds).items()}
    best = min((name for name in ways if name in errors), key=kernel_ms.__getitem__)
    ratio = compare(
        ways["dense"], steps(at.sparse(best, selected=True), at.leaves, at.grad), rounds=rounds, device=device
    )
    return row | {"backend": best, "kernel_ms": kernel_ms, **numbers(ratio)}


def routed_ffn(width: int, ffn: int, tokens: int, active: int, device: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype, backend = (torch.bfloat16, "grouped_mm") if device == "cuda" else (torch.float32, "torch")
    model = DenseFFN(width, ffn, True).to(device, dtype)
    router = (torch.randn(BLOCKS, width, device=device) * 0.02).to(dtype).requires_grad_()
    x, dy = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    run = lambda x, backend=backend: routed(model, router, active, 0, x, backend)  # noqa: E731
    leaves = (x.requires_grad_(),)
    few = (x[:512].detach().requires_grad_(),)
    error = distance(steps(run, few, dy[:512])(), steps(lambda x: run(x, "reference"), few, dy[:512])())
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    shape = {"d": width, "f": ffn, "tokens": tokens, "blocks": BLOCKS, "active": active}
    row = {"op": "routed_ffn", "case_id": "B1", "shape": shape, "dtype": str(dtype), "backend": backend,
           "checks": {"oracle": "reference", "rel_l2": error, "tolerance": bound}}  # fmt: skip
    if error >= bound:
        return row | {"verdict": "refused"}
    baseline = torch.compile(model) if device == "cuda" else model
    ratio = compare(steps(baseline, leaves, dy), steps(run, leaves, dy), rounds=rounds, warmup=3, device=device)
    return row | {"efficiency": ratio.median * active / BLOCKS, **numbers(ratio)}


def numbers(ratio: Any) -> dict[str, Any]:
    times = {"baseline_ms": [1e3 * x for x in ratio.baseline_s], "candidate_ms": [1e3 * x for x in ratio.candidate_s]}
    return times | {
        "ratio_median": ratio.median,
        "ratio_q1": ratio.q1,
        "ratio_q3": ratio.q3,
        "verdict": ratio.verdict,
    }


def cells(asked: Asked) -> list[Cell]:
    device, settings = asked.device, asked.settings
    device = "cuda" if torch.cuda.is_available() else device
    rounds, longest = settings["rounds"], settings["longest"]
    found = [
        Cell(f"attention T={t} keys={keys}", lambda t=t, keys=keys: attention(t, keys, device, rounds))
        for t, keys in itertools.product(
            LENGTHS if longest > 1024 else (1024,), (2048, 1024) if longest > 1024 else (256,)
        )
        if keys < t <= longest
    ]
    sizes = FFNS if longest > 1024 else ((64, 256),)
    for (d, f), tokens, active in itertools.product(sizes, (4096, 16384, 1024), (4, 2)):
        if tokens <= longest:
            call = lambda d=d, f=f, n=tokens, k=active: routed_ffn(d, f, n, k, device, rounds)  # noqa: E731
            found.append(Cell(f"routed_ffn d={d} f={f} n={tokens} k={active}", call))
    return found


BENCHMARKS = [
    Benchmark(
        name="blocks_gpu",
        measures="block-sparse attention with selection, and the routed FFN, against the dense ones on a GPU",
        cells=cells,
        settings={"rounds": 30, "longest": 65536},
        quick={"rounds": 3, "longest": 1024},
        dtype="bfloat16",
        under="cells",
        shows=("ratio_median", "ratio_q1", "ratio_q3", "verdict"),
        needs_gpu=True,
    )
]
