"""What token selection costs in quality: policies × shares of tokens × seeds, beside dense LoRA at equal steps.

Every run is `finetune` of one
recipe: the same rows, order, LoRA start and steps for all policies of a seed. `targets` is policy random in the pool of
supervised tokens; `unbiased` is random with importance weights. The committed results hold more seeds for some
policies (`--seeds`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from bench.runner import Asked, Benchmark, Cell

TASKS: dict[str, dict[str, Any]] = {
    "classify": {
        "model": "minilm",
        "data": "movie-reviews",
        "seq_len": 128,
        "batch_size": 16,
        "lr": 1e-3,
        "steps": 60,
        "eval_tokens": 16384,
    },
    "sft": {
        "model": "smollm2-135m",
        "data": "chitchat",
        "seq_len": 128,
        "batch_size": 2,
        "lr": 5e-4,
        "steps": 30,
        "eval_tokens": 4096,
    },
}
POLICIES: dict[str, dict[str, Any]] = {
    "random": {},
    "prefix": {"policy": "prefix"},
    "targets": {"pool": "targets"},
    "loss": {"policy": "loss"},
    "gradient_norm": {"policy": "gradient_norm"},
    "unbiased": {"unbiased": True},
}
KNOWN: dict[int, Any] = {}  # seed -> quality before training, the same for all policies
POLICIES_OF = {"classify": ("random", "prefix"), "sft": tuple(POLICIES)}


def run(
    settings: dict[str, Any], seed: int, method: dict[str, Any] | None, threads: int, device: str
) -> dict[str, Any]:
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.quality import Quality

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "quality" and event["stage"] == "dense":
            KNOWN[seed] = Quality.from_dict(event["quality"])

    with tempfile.TemporaryDirectory() as folder:
        values = {**settings, "output": f"{folder}/run", "seed": seed, "save_every": 0, "threads": threads}
        values |= {"methods": [] if method is None else [method], "device": device}
        values |= {"warmup_steps": max(1, settings["steps"] // 10)}
        began = time.perf_counter()
        result = finetune(Recipe.from_values(values), report=keep, write=False, dense_quality=KNOWN.get(seed))
    last = result.run["evals"][-1]  # type: ignore[typeddict-item]
    seconds = statistics.median(step["step_time_s"] for step in result.run["steps"])
    found = {"loss": last["loss"], "accuracy": last.get("accuracy"), "step_s": seconds}
    return found | {
        "saved_bytes": sum(result.run["saved_activation_bytes"].values()),
        "run_s": time.perf_counter() - began,
    }


def cells(asked: Asked) -> list[Cell]:
    of = POLICIES_OF[asked.settings["task"]]

    def cell(policy: str, ratio: float, seed: int) -> Cell:
        method = {"method": "token_selection", "keep_ratio": float(ratio), **POLICIES.get(policy, {})}
        sparse = None if policy == "dense" else method
        return Cell(f"{policy} {ratio} {seed}", lambda: run(asked.settings, seed, sparse, asked.threads, asked.device))

    jobs = [("dense", 1), *((policy, ratio) for ratio in (0.1, 0.3, 0.5) for policy in of)]
    return [cell(policy, ratio, seed) for seed in asked.seeds for policy, ratio in jobs]


BENCHMARKS = [
    Benchmark(
        name=f"token_selection_quality_{task}",
        measures=f"what token selection costs in quality beside dense LoRA at equal steps, {task}",
        cells=cells,
        settings={**TASKS[task], "task": task},
        quick={"steps": 3, "eval_tokens": 512},
        threads=1,
        shows=("loss", "accuracy", "step_s"),
    )
    for task in TASKS
]
