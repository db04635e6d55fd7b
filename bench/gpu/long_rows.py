"""Very long rows on a GPU: token selection that keeps keys and values alone, beside all that exact tools give.

Layers of Llama-3-8B's shape with LoRA; 2 % of the tokens are targets, at the end of the row. The dense side has
checkpointing, its inputs on the host (transformers 5.23), and FFNs in pieces, as Unsloth and ALST train long rows. The
whole model in one step comes last, its peak beside the plan's. `--device cpu --quick` tries the code.
"""

from __future__ import annotations

import functools
import gc
import inspect
from typing import Any

import torch

from bench import runner
from bench.gpu import sides, steps
from sparsetrain.measure import compare

SHARE = 50
"""One target in so many tokens."""
CHOSEN = {"method": "token_selection", "keep_ratio": 1 / SHARE, "pool": "targets", "recompute": True}
TARGET = {131072: 1.5}


def can_offload() -> bool:
    """transformers 5.23 moves what checkpointing keeps to the host."""
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    return "offload" in inspect.signature(enable).parameters


def pair(asked: runner.Asked, tokens: int, checked: Any) -> dict[str, Any]:
    """Both steps in turns, and what each leaves at its peak."""
    if not checked["passed"]:
        raise SystemExit(f"gpu_long_rows: nothing is timed over a red test: {checked}")
    device, settings = sides.device_of(asked), asked.settings
    config = sides.config_of("8b", settings["layers"], settings["width"])
    offload = device.type == "cuda" and can_offload()
    row: dict[str, Any] = {"tokens": tokens, "layers": config.num_hidden_layers, "dtype": str(sides.dtype_on(device))}
    row |= {"dense offloads": offload, "target": TARGET.get(tokens)}
    batches = sides.batches_of(config, tokens, device, max(1, tokens // SHARE))
    try:
        dense, sparse = sides.Side(config, device, pieces=8), sides.Side(config, device, [CHOSEN])
        dense.recompute(offload)
        both = [functools.partial(side.step, batches) for side in (dense, sparse)]
        peaks = [steps.peak(step, device) for step in both]
        row |= {"baseline_peak_bytes": peaks[0], "candidate_peak_bytes": peaks[1]}
        row["times"] = compare(*both, rounds=settings["rounds"], warmup=0, device=device).to_dict()
        row["ratio"] = row["times"]["median"]
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    finally:
        dense = sparse = both = None
        _free(device)
    return row


def whole(asked: runner.Asked, tokens: int, offload: bool) -> dict[str, Any]:
    """One step of the whole model: its peak beside the plan's."""
    from sparsetrain.hf.study.recipe_trace import outline

    device, layers = sides.device_of(asked), asked.settings["whole_layers"]
    config = sides.config_of("8b", layers, asked.settings["width"])
    chosen = {**CHOSEN, "offload": offload}
    recipe = sides.recipe_of([chosen])
    planned_on = sides.config_of("8b", layers, asked.settings["width"])
    on_gpu = device.type == "cuda"
    plan = outline(recipe, planned_on, bf16=on_gpu, gpu=on_gpu, lengths=(tokens,)).peak(tokens)
    row: dict[str, Any] = {"tokens": tokens, "layers": layers, "offload": offload, "planned_bytes": plan.total}
    row |= {"planned_host_bytes": plan.host}
    try:
        side = sides.Side(config, device, [chosen])
        batches = sides.batches_of(config, tokens, device, max(1, tokens // SHARE))
        side.step(batches)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        side.step(batches)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    finally:
        side = None
        _free(device)
    return row


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cells(asked: runner.Asked) -> list[runner.Cell]:
    check = runner.Cell("correctness", lambda: steps.correctness(asked))
    found = [check]
    for tokens in asked.settings["tokens"]:
        found.append(runner.Cell(f"8b {tokens}", functools.partial(pair, asked, tokens), uses=(check.key,)))
    for tokens, offload in asked.settings["whole"]:
        key = f"whole 8b {tokens}" + (", keys and values on the host" if offload else "")
        found.append(runner.Cell(key, functools.partial(whole, asked, tokens, offload)))
    return found


BENCHMARKS = [
    runner.Benchmark(
        name="gpu_long_rows",
        measures="rows of 32k to 256k tokens on a GPU, 2 % of them targets: steps and peaks beside exact tools",
        cells=cells,
        settings={
            "tokens": [131072, 32768],
            "whole": [[131072, False], [131072, True], [262144, False]],
            "layers": 4,
            "whole_layers": 32,
            "width": None,
            "rounds": 3,
        },
        quick={"tokens": [200], "whole": [[200, True]], "layers": 1, "whole_layers": 2, "width": 32},
        dtype="bfloat16; float32 on a CPU",
        shows=("passed", "ratio", "baseline_peak_bytes", "candidate_peak_bytes", "planned_bytes", "peak_bytes"),
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        needs_gpu=True,
    )
]
