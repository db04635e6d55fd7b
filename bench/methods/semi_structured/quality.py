"""What 2:4 training costs in quality: nine variants × seeds at equal steps, from random weights.

Every run is `pretrain` of one recipe: the variants of a seed share start, rows and their order, learning rate
and steps. gpt: four GPT-2 layers of width 128 on the bytes of Python's standard library, 128 tokens; vit: four ViT
layers of width 64 on Fashion-MNIST. `half-width` is dense, with FFNs half as wide: the same multiplications as 2:4.
`fst-dense-dw` is FST without MVUE, the package's default, and `fst-refresh-1` FST with masks of every step: forty
steps are a sixth of such a short run. λ is as published, not tuned here.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from typing import Any

from bench.runner import Asked, Benchmark, Cell
from sparsetrain import SemiStructured

TASKS: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt2-nano", "data": "python-stdlib", "task": "lm", "seq_len": 128, "batch_size": 4, "steps": 240}
    | {"lr": 2e-3, "eval_tokens": 32768},
    "vit": {"model": "vit-nano", "data": "fashion-mnist", "task": "image", "batch_size": 16, "steps": 300}
    | {"lr": 1e-3, "train_rows": 4800, "eval_tokens": 51200},
}
TRAINING = {"beta2": 0.95, "min_lr_ratio": 0.1, "warmup_steps": 30}
HALF = {"gpt": {"n_inner": 256}, "vit": {"intermediate_size": 128}}
VARIANTS: dict[str, SemiStructured | None] = {
    "dense": None,
    "ste": SemiStructured.ste(),
    "sr-ste": SemiStructured.sr_ste(),
    "fst": SemiStructured.fst(),
    "fst-without-tail": SemiStructured.fst_without_tail(),
    "s-ste": SemiStructured.s_ste(),
    "half-width": None,
    "fst-dense-dw": SemiStructured(),
    "fst-refresh-1": SemiStructured.fst(refresh_every=1),
}


def recipe_values(task: str, variant: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one run, but for where it writes."""
    config = VARIANTS[variant]
    values = {**settings, "seed": seed, "save_every": 0}
    values["methods"] = [] if config is None else [{"method": config.method, **config.to_dict()}]
    return values | ({"set": HALF[task]} if variant == "half-width" else {})


def run(values: dict[str, Any], threads: int, device: str) -> dict[str, Any]:
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe
    from sparsetrain.runs.pictures import read_galleries
    from sparsetrain.runs.quality import Quality

    with tempfile.TemporaryDirectory() as folder:
        values = values | {"output": f"{folder}/run", "threads": threads, "device": device}
        began = time.perf_counter()
        # of the untrained model; nothing here reads it
        unread = Quality(loss=0.0, metrics={"perplexity": 1.0}, metric="perplexity", tokens=0, rows=0)
        result = pretrain(PretrainRecipe.from_values(values), write=False, dense_quality=unread)
        curves = list(read_galleries(values["output"])[0].pictures[0].curves.values()) if values["methods"] else []
    last: dict[str, Any] = dict(result.run["evals"][-1])
    mean = [[rows[0][0], statistics.mean(rate for _, rate in rows)] for rows in zip(*curves)]
    return {
        "loss": last["loss"],
        "accuracy": last.get("accuracy"),
        "train_loss": statistics.mean(step["loss"] for step in result.run["steps"][-20:]),
        "flips": mean[:: -max(1, len(mean) // 10)][::-1],  # a refresh every step leaves hundreds
        "parameters": result.parameters,
        "run_s": time.perf_counter() - began,
    }


def cells(task: str, asked: Asked) -> list[Cell]:
    def cell(variant: str, seed: int) -> Cell:
        values = recipe_values(task, variant, seed, asked.settings)
        return Cell(f"{variant} {seed}", lambda: run(values, asked.threads, asked.device))

    return [cell(variant, seed) for seed in asked.seeds for variant in VARIANTS]


BENCHMARKS = [
    Benchmark(
        name=f"semi_structured_quality_{task}",
        measures=f"what 2:4 training costs in quality: nine variants at equal steps from random weights, {task}",
        cells=functools.partial(cells, task),
        settings={**TASKS[task], **TRAINING},
        quick={"steps": 10, "warmup_steps": 3},
        seeds=(0, 1, 2),
        threads=1,
        shows=("loss", "accuracy"),
    )
    for task in TASKS
]
