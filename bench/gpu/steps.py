"""Whole LoRA steps on a GPU: token selection, sparse attention and routed FFNs beside the dense step, each written as
it comes.

Layers of Llama-3.2-1B's and Llama-3-8B's shape with random weights, and of the vocabulary their share. The dense side
is what a user could pick: cuDNN's or flash attention, blocks compiled, a chunked loss head, fused AdamW, with and
without checkpointing; the sparse side draws, gathers, chooses keys and trains inside the timed region. The first cell
compares kernels, and every side's loss and gradients, with plain PyTorch; where it is red nothing else is measured.
`--device cpu --quick` tries the code.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import runner
from bench.gpu.sides import STRONGEST, Methods, Plans, Side, batches_of, config_of, device_of, dtype_on
from sparsetrain.core.backend import use_backend
from sparsetrain.measure import compare

_TOKENS = {"method": "token_selection", "keep_ratio": 0.3}
_AT_END = {"method": "token_selection", "keep_ratio": 0.1, "pool": "targets"}
"""A tenth of the tokens, all at the end of the row: a completion behind its prompt."""
_BLOCKS = {"method": "pq_attention", "codebook_init": "normal", "warmup_ratio": 0.0}
_ROUTED = {"method": "routed_ffn", "num_blocks": 8, "num_active": 4, "warmup_ratio": 0.0}
SIDES: dict[str, tuple[dict[str, Any], ...]] = {
    "tokens r=.3": (_TOKENS,),
    "targets at the end r=.1": (_AT_END,),
    "tokens r=.3 + sparse attention": (_BLOCKS, _TOKENS),
    "spt": (_BLOCKS, _ROUTED),
    "tokens r=.3, keys train": ({**_TOKENS, "train_keys": True},),
}
AGAINST = ("lora", "lora+checkpointing")
TARGETS = {
    (8192, "tokens r=.3", "lora"): 1.35,
    (8192, "tokens r=.3", "lora+checkpointing"): 1.9,
    (8192, "targets at the end r=.1", "lora"): 1.6,
    (32768, "tokens r=.3 + sparse attention", "lora"): 2.0,
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def methods_of(side: str, settings: dict[str, Any]) -> Methods:
    """A side's methods, with blocks of the size asked for."""
    sizes = {"num_keys": settings["keys"], "block_q": settings["block"], "block_k": settings["block"]}
    return [method | (sizes if method["method"] == "pq_attention" else {}) for method in SIDES[side]]


def correctness(asked: runner.Asked) -> dict[str, Any]:
    """Kernels against plain PyTorch, form by form; and a step of every side against the ops' definitions."""
    from sparsetrain.ops.selected_rows import choice

    device = device_of(asked)
    dtype = dtype_on(device)
    found: dict[str, Any] = {"device": str(device), "kernels": {}}
    reason = choice.no_kernels(device, dtype, 64)
    for width in (64, 128) if reason is None and device.type == "cuda" else ():
        for form in ((True, False, False, False), (True, False, True, False), (True, False, False, True)):
            named = dict(zip(("causal", "window", "packed", "all keys"), form, strict=True))
            key = f"d={width} " + ", ".join(name for name, value in named.items() if value)
            found["kernels"][key] = choice.fails(device, dtype, width, *form) or "right"
    found["not run"] = reason
    found["steps"] = {side: beside_reference(asked, side) for side in SIDES}
    wrong = [text for text in found["kernels"].values() if text != "right"]
    found["passed"] = not wrong and all(step["passed"] for step in found["steps"].values())
    return found


def beside_reference(asked: runner.Asked, side: str) -> dict[str, Any]:
    """A step's loss and every gradient as they are computed here, and by the definitions, against these in fp32.

    The first may be off by twice the second and a tolerance: in bf16 a rounding moves a choice of keys or blocks.
    """
    device, width = device_of(asked), asked.settings["width"] or 512
    config = config_of("1b", 2, width)
    small = width < 512
    made = Side(config, device, methods_of(side, {"keys": 64, "block": 16} if small else {"keys": 256, "block": 128}))
    tokens = 160 if small else 640
    batch = batches_of(config, tokens, device, targets_of(side, tokens))[0]
    here = made.gradients(batch)
    with use_backend("reference"):
        defined = made.gradients(batch)
        made.model.float()  # the same weights
        exact = made.gradients(batch)
    (error, where), (rounding, _) = (furthest(x, exact) for x in (here, defined))
    bound = 2 * rounding + TOLERANCE[str(dtype_on(device)).removeprefix("torch.")]
    return {"error": error, "at": where, "of the definition": rounding, "passed": error <= bound}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative L2 error, and of what. Gradients below a thousandth of the largest count as that large."""
    if found.keys() != wanted.keys():
        return float("inf"), f"gradients of {sorted(found.keys() ^ wanted.keys())[:3]}"
    floor = 1e-3 * max(float(x.norm()) for name, x in wanted.items() if name != "loss")
    errors = {
        name: float((found[name] - x).norm() / x.norm().clamp(min=1e-12 if name == "loss" else floor))
        for name, x in wanted.items()
    }
    # a NaN is further than any number
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def targets_of(side: str, tokens: int) -> int | None:
    return max(1, tokens // 10) if _AT_END in SIDES[side] else None


def measured(
    asked: runner.Asked, plans: Callable[[], Plans], model: str, side: str, against: str, tokens: int, checked: Any
) -> dict[str, Any]:
    """One pair of steps, in turns, what each leaves at its peak beside what its plan says, and what each saves."""
    if not checked["passed"]:
        raise SystemExit(f"gpu_steps: nothing is timed over a red test: {checked}")
    device, settings = device_of(asked), asked.settings
    config = config_of(model, settings["layers"][model], settings["width"])
    row: dict[str, Any] = {"model": model, "side": side, "against": against, "tokens": tokens}
    row |= {"layers": config.num_hidden_layers, "dtype": str(dtype_on(device))}
    row |= {"target": TARGETS.get((tokens, side, against)), "attention": [each.name for each in STRONGEST]}
    batches = batches_of(config, tokens, device, targets_of(side, tokens))
    pair = plans_of(asked, model, side, against, tokens)
    dense = sparse = None
    try:
        dense, sparse = Side(config, device), Side(config, device, methods_of(side, settings))
        if against.endswith("checkpointing"):
            dense.recompute()
        steps = [functools.partial(each.step, batches) for each in (dense, sparse)]
        for name, each, step, plan in zip(("baseline", "candidate"), (dense, sparse), steps, pair, strict=True):
            row |= {f"{name}_peak_bytes": peak(step, device), f"{name}_planned_bytes": plans().of(*plan)}
            row |= {f"{name}_saved_bytes": each.saved_bytes(batches[0])}
        row |= {"saved_ratio": row["candidate_saved_bytes"] / row["baseline_saved_bytes"]}
        row |= {"eager": compare(*steps, rounds=settings["rounds"], device=device).to_dict()}
        if device.type == "cuda" and tokens in settings["compiled"]:
            dense.compile_blocks()
            row |= {"compiled": compare(*steps, rounds=settings["rounds"], warmup=3, device=device).to_dict()}
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    finally:
        dense = sparse = steps = each = step = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ratios = [row[name]["median"] for name in ("eager", "compiled") if name in row]
    return row | ({"ratio": min(ratios)} if ratios else {})


def plans_of(asked: runner.Asked, model: str, side: str, against: str, tokens: int) -> list[tuple[Any, ...]]:
    """What `planned` is asked for the dense and the sparse side."""
    shape = (model, asked.settings["layers"][model], asked.settings["width"], tokens)
    return [(*shape, (), against.endswith("checkpointing")), (*shape, methods_of(side, asked.settings), False)]


def peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes above what lies there between steps, after two to warm up; None on a CPU."""
    step()
    step()
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def pairs_of(settings: dict[str, Any]) -> list[tuple[int, str, str, str]]:
    """(tokens, model, side, against) of every cell: those with a target first, then by length."""
    every = itertools.product(settings["tokens"], settings["layers"], SIDES, AGAINST)
    apt = [pair for pair in every if not (_BLOCKS in SIDES[pair[2]] and pair[0] <= settings["keys"])]
    return sorted(apt, key=lambda pair: (pair[0], *pair[2:]) not in TARGETS)


def cells(asked: runner.Asked) -> list[runner.Cell]:
    check = runner.Cell("correctness", lambda: correctness(asked))
    pairs = {f"{m} {t} {side} / {against}": (m, side, against, t) for t, m, side, against in pairs_of(asked.settings)}

    @functools.cache
    def plans() -> Plans:
        wanted = [plan for key, pair in pairs.items() if asked.asks_for(key) for plan in plans_of(asked, *pair)]
        return Plans(asked.settings["workers"], wanted)

    def first() -> dict[str, Any]:
        plans()  # which are made while the kernels compile
        return check.measure()

    found = [runner.Cell(check.key, first)]
    for key, pair in pairs.items():
        found.append(runner.Cell(key, functools.partial(measured, asked, plans, *pair), uses=(check.key,)))
    return found


BENCHMARKS = [
    runner.Benchmark(
        name="gpu_steps",
        measures="LoRA steps on a GPU: token selection, sparse attention, SPT beside dense, of 1B- and 8B-like layers",
        cells=cells,
        settings={
            "tokens": [8192, 32768, 2048],
            "layers": {"1b": 8, "8b": 4},
            "width": None,
            "keys": 2048,
            "block": 128,
            "compiled": [8192],
            "rounds": 7,
            "workers": 6,
        },
        quick={"tokens": [160], "layers": {"1b": 1}, "width": 32, "keys": 64, "block": 16, "rounds": 3, "workers": 0},
        dtype="bfloat16; float32 on a CPU",
        shows=("passed", "ratio", "saved_ratio", "baseline_peak_bytes", "candidate_peak_bytes"),
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        needs_gpu=True,
    )
]
