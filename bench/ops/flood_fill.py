"""Time flood-fill attention against dense SDPA on the CPU: case A3, static patterns; and the search for the patterns.

The timed sparse side is what runs in a model after the switch: lists from the pattern, then block-sparse attention.
`selection_ms` is one look at one layer, map and pattern: it is paid a few times a run, not a step. Each case first
compares output and gradients with the reference; a case that fails is not timed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparsetrain
from bench.runner import Asked, Benchmark, Cell
from sparsetrain.core.anatomy import AttentionSite
from sparsetrain.measure import compare
from sparsetrain.methods.flood_fill_attention.config import FloodFillAttention
from sparsetrain.methods.flood_fill_attention.module import FloodFillSparseAttention
from sparsetrain.ops.attention_patterns import pooled_maps
from sparsetrain.ops.block_sparse_attention.reference import masked_attention
from sparsetrain.surgery.attention import AttentionCall

HEADS, HEAD_DIM, BLOCK, INPUT_SETS = 8, 64, 64, 3
TOLERANCE = 1e-5
"""Relative L2 error of output and gradients of one head, against dense attention under the mask, both in fp32."""
# tokens, causal, variant, density, softmax
CASES = (
    *((n, False, "cf", density, "masked") for n in (2048, 4096) for density in (0.04, 0.05, 0.08, 0.16)),
    (4096, False, "top_q", 0.05, "masked"),
    (4096, False, "window", 0.05, "masked"),
    (4096, False, "cf", 0.05, "phantom_zero"),
    (4096, True, "cf", 0.05, "masked"),
    (4096, True, "cf", 0.16, "masked"),
)


def tensors(tokens: int, seed: int) -> tuple[Tensor, ...]:
    """q, k and v with a direction of their own position in them, so that the maps have a band and some columns."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, generator=draw) for _ in range(3))
    phase = torch.arange(tokens)[:, None] / 200 * torch.linspace(0.2, 1, 16)
    place = torch.cat((phase.cos(), phase.sin()), 1)
    q[..., :32] += 1.5 * place
    k[..., :32] += 1.5 * place
    k[:, :, :: tokens // 5, 32:] += 2 * q[:, :, :1, 32:]
    return tuple(x.requires_grad_() for x in (q, k, v))


def search(q: Tensor, k: Tensor, config: FloodFillAttention, causal: bool) -> tuple[FloodFillSparseAttention, float]:
    """(the layer with its pattern, seconds that the search took)."""
    site = AttentionSite(name="bench", layer=0, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, causal=causal)
    layer = FloodFillSparseAttention(config, site, {})
    start = time.perf_counter()
    with torch.no_grad():
        sums = pooled_maps(q, k, block=BLOCK, filter_edge=config.edge_in_force, causal=causal, scale=HEAD_DIM**-0.5)
        layer.observe(sums)
        layer.switch(1, 0)
    return layer, time.perf_counter() - start


def forward_backward(attention: Callable[..., Tensor], qkv: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    out = attention(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def errors(sparse: Callable[..., Tensor], layer: FloodFillSparseAttention, causal: bool, phantom: bool) -> list[float]:
    """Relative L2 error of out, dq, dk and dv of the first head."""
    assert layer.mask is not None
    tokens = layer.mask.shape[-1] * BLOCK
    qkv = tuple(x[:, :1].detach().requires_grad_() for x in tensors(tokens, 0))
    kept = layer.mask.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None]
    visible = torch.ones(tokens, tokens, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    pruned = (visible & ~kept).sum(-1, keepdim=True)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = masked_attention(q, k, v, kept & visible, HEAD_DIM**-0.5)
        total = lse[..., None].exp()
        return out * total / (total + pruned) if phantom else out

    grad = torch.randn_like(qkv[0])
    wanted, found = forward_backward(dense, qkv, grad), forward_backward(sparse, qkv, grad)
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]


def saved_bytes(attention: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> int:
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*qkv)
    return sum(storages.values())


def case_id(tokens: int, causal: bool, variant: str, density: float, softmax: str) -> str:
    name = f"A3/t{tokens}_{'causal' if causal else 'full'}_{variant}_{density:g}"
    return name + ("_phantom" if softmax == "phantom_zero" else "")


def step_id(tokens: int, causal: bool, density: float) -> str:
    return f"step/{'gpt2' if causal else 'bert'}_d256_4layers_t{tokens}_cf_{density:g}"


def run(tokens: int, causal: bool, variant: str, density: float, softmax: str, rounds: int) -> dict[str, Any]:
    config = FloodFillAttention(variant=variant, keep_ratio=density, block_tokens=BLOCK, softmax=softmax)
    sets = [(qkv, torch.randn_like(qkv[0])) for qkv in (tensors(tokens, seed) for seed in range(INPUT_SETS))]
    layer, seconds = search(sets[0][0][0], sets[0][0][1], config, causal)
    never: Any = lambda: 1 / 0  # noqa: E731

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(AttentionCall(q, k, v, causal, HEAD_DIM**-0.5, None, None, never))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def turning(attention: Callable[..., Tensor]) -> Callable[[], object]:
        turn = itertools.cycle(sets)
        return lambda: forward_backward(attention, *next(turn))

    found = dict(zip(("out", "dq", "dk", "dv"), errors(sparse, layer, causal, softmax == "phantom_zero"), strict=True))
    passed = max(found.values()) < TOLERANCE
    result = {
        "case_id": case_id(tokens, causal, variant, density, softmax),
        "op": "block_sparse_attention from a pattern",
        "shape": {"tokens": tokens, "heads": HEADS, "head_dim": HEAD_DIM, "block": BLOCK, "causal": causal},
        "dtype": "float32",
        "baseline": {"name": "F.scaled_dot_product_attention", "is_causal": causal},
        "keep_ratio_asked": density,
        "keep_ratio_executed": layer.stats()["density"],
        "selection_ms": 1000 * seconds,
        "checks": {"oracle": "reference", "rel_l2": found, "tolerance": TOLERANCE, "passed": passed},
    }
    if not passed:
        return result | {"verdict": "refused"}
    ratio = compare(turning(dense), turning(sparse), rounds=rounds)
    saved = {"saved_bytes": saved_bytes(sparse, sets[0][0]), "baseline_saved_bytes": saved_bytes(dense, sets[0][0])}
    return result | saved | ratio.to_dict()


def training_step(tokens: int, causal: bool, density: float, rounds: int) -> dict[str, Any]:
    """Forward and backward of a small BERT or GPT-2, dense against sparse, and the probe of all its layers."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids if causal else torch.zeros(1, dtype=torch.int64)}

    def build() -> Any:
        torch.manual_seed(0)
        if causal:
            sizes: dict[str, Any] = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": tokens, "attn_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=256, bos_token_id=1, eos_token_id=2))
        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        places = {"max_position_embeddings": tokens, "vocab_size": 256, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(**sizes, **places))

    dense, sparse = build(), build()
    start = time.perf_counter()
    config = FloodFillAttention(keep_ratio=density, block_tokens=BLOCK, max_dense_steps=0, probe_rows=1)
    handle = sparsetrain.sparsify(sparse, config, calibration=[batch])
    seconds = time.perf_counter() - start
    dense.train()
    sparse.train()

    def step(model: Any) -> Callable[[], object]:
        return lambda: model(**batch).loss.backward()

    ratio = compare(step(dense), step(sparse), rounds=rounds)
    densities = [site["density"] for site in handle.report()["stats"].values()]
    return {
        "case_id": step_id(tokens, causal, density),
        "op": "forward and backward of the model, one row",
        "keep_ratio_asked": density,
        "keep_ratio_executed": sum(densities) / len(densities),
        "selection_ms": 1000 * seconds,
        **ratio.to_dict(),
    }


def cells(asked: Asked) -> list[Cell]:
    rounds = asked.settings["rounds"]
    timed = [case for case in CASES if case[0] <= asked.settings["longest"]]
    found = [Cell(case_id(*case), lambda case=case: run(*case, rounds=rounds)) for case in timed]
    if asked.settings["steps"]:
        found += [
            Cell(step_id(4096, causal, 0.05), lambda causal=causal: training_step(4096, causal, 0.05, rounds))
            for causal in (False, True)
        ]
    return found


BENCHMARKS = [
    Benchmark(
        name="flood_fill",
        measures="flood-fill patterns, attention forward + backward against SDPA, and steps of small models",
        cells=cells,
        settings={"rounds": 5, "longest": 4096, "steps": True},
        quick={"rounds": 3, "longest": 2048, "steps": False},
        key_of=lambda row: row["case_id"],
        shows=("median", "q1", "q3", "verdict", "keep_ratio_executed", "selection_ms"),
    )
]
