"""Patterns at equal density: accuracy after equal steps of CF, C, F, top_q and window beside dense attention.

Every run is `pretrain` of one recipe: the encoder of SPION's tasks (arXiv 2309.12578), the same rows, order and start
for all variants of a seed, and the same step for the switch, so that variants differ by their pattern alone. `paper`
is CF with the published softmax.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from typing import Any

from bench.runner import Asked, Benchmark, Cell

TASKS: dict[str, dict[str, Any]] = {
    "pixels": {"seq_len": 196, "batch_size": 32, "steps": 300, "eval_tokens": 196 * 1000, "train_rows": 9600},
    "listops": {
        "seq_len": 128,
        "batch_size": 32,
        "steps": 300,
        "lr": 3e-3,
        "eval_tokens": 128 * 1000,
        "train_rows": 9600,
    },
}
COMMON: dict[str, Any] = {"model": "sequence-encoder", "task": "classify", "lr": 2e-3, "weight_decay": 0.0}
COMMON["set"] = {"attention_probs_dropout_prob": 0.0}  # sparse attention has none, so dense attention has none here
METHOD = {"method": "flood_fill_attention", "change_threshold": 0.0, "max_dense_ratio": 0.3}
BLOCK = {"pixels": 7, "listops": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "cf": {"variant": "cf"},
    "c": {"variant": "c"},
    "f": {"variant": "f"},
    "top_q": {"variant": "top_q"},
    "window": {"variant": "window"},
    "paper": {"variant": "cf", "softmax": "phantom_zero"},
}


def run(asked: Asked, seed: int, variant: str) -> dict[str, Any]:
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe

    of_method = (*METHOD, "block_tokens", "keep_ratio")
    values = {name: value for name, value in asked.settings.items() if name not in of_method}
    values |= {"seed": seed, "threads": asked.threads, "warmup_steps": values["steps"] // 10}
    if variant != "dense":
        values["methods"] = [{name: asked.settings[name] for name in of_method} | VARIANTS[variant]]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = pretrain(
            PretrainRecipe.from_values(values | {"output": f"{folder}/run", "save_every": 0}), write=False
        )
    last: Any = result.run["evals"][-1]  # type: ignore[typeddict-item]
    times = [step["step_time_s"] for step in result.run["steps"]]
    before, after = times[: int(0.3 * len(times))], times[len(times) // 2 :]
    return {
        "loss": last["loss"],
        "accuracy": last["accuracy"],
        "step_before_s": statistics.median(before),
        "step_after_s": statistics.median(after),
        "density": density(result.sparsity),
        "search_share": search_s(result.notes) / sum(times),
        "run_s": time.perf_counter() - began,
    }


def search_s(notes: list[str]) -> float:
    """Seconds that probes and cutting the patterns took, as the run says it."""
    found = [re.search(r"Searching the patterns took ([\d.]+) s", note) for note in notes]
    return sum(float(match[1]) for match in found if match)


def density(sparsity: dict[str, Any]) -> float | None:
    """Mean over layers of the kept share of blocks."""
    found = [site["density"] for site in sparsity.get("stats", {}).values() if "density" in site]
    return statistics.mean(found) if found else None


def settings(task: str) -> dict[str, Any]:
    return {**COMMON, **TASKS[task], **METHOD, "block_tokens": BLOCK[task], "data": task, "keep_ratio": 0.1}


def cells(asked: Asked) -> list[Cell]:
    def cell(variant: str, seed: int) -> Cell:
        return Cell(f"{variant} {seed}", lambda: run(asked, seed, variant))

    return [cell(variant, seed) for seed in asked.seeds for variant in ("dense", *VARIANTS)]


BENCHMARKS = [
    Benchmark(
        name=f"flood_fill_accuracy_{task}",
        measures=f"patterns at equal density: accuracy after equal steps beside dense attention, {task}",
        cells=cells,
        settings=settings(task),
        quick={"steps": 10, "train_rows": 320, "eval_tokens": 64 * TASKS[task]["seq_len"]},
        seeds=(0, 1, 2),
        threads=1,
        shows=("loss", "accuracy", "density", "search_share"),
    )
    for task in TASKS
]
