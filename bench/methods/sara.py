"""What SaRA leaves at equal steps beside LoRA of as many numbers, full fine-tuning and PEFT's SHiRA; time and memory.

SmolLM2-135M on Python source and on conversations. Three kinds of cell, each in processes of its own:

- `memory WAY`: optimizer state, gradients and the peak of a step, as they are planned and as they are measured.
- `step ARM`: the arm's training step in turns with full fine-tuning's, on the same batches.
- `DATA ARM SEED`: one `finetune` of the same steps, rows and their order, and its held-out loss.

SaRA's learning rate follows from θ, the others' are given. An arm's second learning rate, on the first seed alone, says
whether the first one served it. SHiRA (PEFT's: random entries, as many a tensor as LoRA of that rank has) goes through
the same run, in LoRA's place.

    python -m bench run sara --output DIR [--cells 'step *'] [--minutes 60]
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from bench.planner import accuracy
from bench.runner import Asked, Benchmark, Cell, in_own_process

RANK = 35
"""LoRA of all linears has 305,280 numbers a rank: 10.68 M, beside 10.62 M entries, 10 % of 106.2 M."""
DATA: dict[str, dict[str, Any]] = {
    "python-stdlib": {"task": "lm", "seq_len": 512, "batch_size": 1},
    "chitchat": {"task": "sft", "seq_len": 512, "batch_size": 1},
}
SHARED = {"model": "smollm2-135m", "lr_schedule": "cosine", "save_every": 0, "eval_tokens": 12288}
SARA = {"lora_r": 0, "methods": [{"method": "sara", "fraction": 0.1}]}
ARMS: dict[str, dict[str, Any]] = {
    "sara": SARA,
    "lora": {"lora_r": RANK, "lora_alpha": RANK, "lr": 3e-4, "methods": []},
    "full": {"lora_r": 0, "lr": 2e-5, "methods": []},
    "shira": {"lora_r": RANK, "lr": 3e-4, "methods": []},
}
FURTHER: dict[str, dict[str, Any]] = {
    "sara lr=3e-4": {**SARA, "lr": 3e-4},
    "sara never adjusted": {**SARA, "methods": [{"method": "sara", "adjust_at": None}]},
    "sara rows": {**SARA, "methods": [{"method": "sara", "block": "rows"}], "lr": 3e-4},
    "lora lr=1e-3": {**ARMS["lora"], "lr": 1e-3},
    "full lr=1e-4": {**ARMS["full"], "lr": 1e-4},
    "shira lr=1e-3": {**ARMS["shira"], "lr": 1e-3},
}
"""On the first seed alone."""
STEPS = {"sara": SARA, "sara rows": FURTHER["sara rows"]}
WAYS = ("full", "sara", "sara rows")


@contextlib.contextmanager
def shira() -> Iterator[None]:
    """Inside, what a run makes as LoRA is SHiRA of the same rank on the same linears."""
    from unittest.mock import patch

    from peft import ShiraConfig

    from sparsetrain.hf.model import models
    from sparsetrain.recipes.tasks import task_of

    def config(recipe: Any, modules_to_save: Any = None, **_lora: Any) -> Any:
        return ShiraConfig(
            r=recipe.lora_r,
            target_modules=recipe.lora_targets,
            task_type=task_of(recipe.task).adapter,
            modules_to_save=modules_to_save,
            random_seed=0,
        )

    with patch.object(models, "lora_config", config):
        yield


def train(values: dict[str, Any], is_shira: bool, threads: int) -> dict[str, Any]:
    """One run."""
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.quality import Quality

    unread = Quality(loss=0.0, metrics={"perplexity": 1.0}, metric="perplexity", tokens=0, rows=0)
    with tempfile.TemporaryDirectory() as folder, shira() if is_shira else contextlib.nullcontext():
        given = {**values, "threads": threads, "output": f"{folder}/run"}
        began = time.perf_counter()
        result = finetune(Recipe.from_values(given), write=False, dense_quality=unread)
    run: Any = result.run
    return {
        "loss": run["evals"][-1]["loss"],
        "perplexity": run["perplexity"]["after_training"],
        "trained": result.trainable_parameters,
        "lr": max(step["learning_rate"] for step in run["steps"]),
        "train_loss": statistics.mean(step["loss"] for step in run["steps"][-10:]),
        "step_s": statistics.median(step["step_time_s"] for step in run["steps"]),
        "static": run["static_bytes"],
        "peak_bytes": run.get("peak_rss_bytes"),
        "notes": [note for note in result.notes if note.startswith("sara")],
        "run_s": time.perf_counter() - began,
    }


def step(arm: dict[str, Any], tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Full fine-tuning's time / the arm's of a step, in turns."""
    import torch

    from sparsetrain.hf.data.random_tokens import RANDOM
    from sparsetrain.hf.study.training_step import build_step, open_measured_parts
    from sparsetrain.measure.timing import compare
    from sparsetrain.recipes.finetune import Recipe

    torch.set_num_threads(threads)

    def made(arm: dict[str, Any]) -> Any:
        given = {"model": SHARED["model"], "data": RANDOM, "seq_len": tokens, "output": "unwritten", "dtype": "fp32"}
        return build_step(open_measured_parts(Recipe.from_values({**given, **arm})))

    return {"ratio": compare(made(ARMS["full"]), made(arm), rounds=rounds).to_dict()}


def memory(way: str, tokens: int) -> dict[str, Any]:
    return accuracy.cell("smollm2-135m", way, tokens)


def recipe_values(data: str, arm: dict[str, Any], seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one run, but for where it writes."""
    values = {**SHARED, **DATA[data], "data": data, **arm, "seed": seed}
    values |= {name: settings[name] for name in ("steps", "dtype")} | {"warmup_steps": settings["steps"] // 16}
    return values if settings["eval_tokens"] is None else values | {"eval_tokens": settings["eval_tokens"]}


def cells(asked: Asked) -> list[Cell]:
    settings, threads = asked.settings, asked.threads
    found = [Cell(f"memory {way}", lambda way=way: memory(way, settings["memory_tokens"])) for way in WAYS]
    for name, arm in STEPS.items():
        given = (arm, settings["step_tokens"], settings["rounds"], threads)
        found.append(Cell(f"step {name}", lambda given=given: in_own_process(f"{__name__}:step", *given)))
    first = asked.seeds[0]
    runs = [(data, arm, seed) for seed in asked.seeds for data in DATA for arm in ARMS]
    runs += [(data, arm, first) for data in DATA for arm in FURTHER]
    for data, arm, seed in runs:
        values = recipe_values(data, (ARMS | FURTHER)[arm], seed, settings)
        given = (values, arm.startswith("shira"), threads)
        found.append(Cell(f"{data} {arm} {seed}", lambda given=given: in_own_process(f"{__name__}:train", *given)))
    return found


BENCHMARKS = [
    Benchmark(
        name="sara",
        measures="SaRA beside LoRA of as many numbers, full fine-tuning and PEFT's SHiRA: loss, step time, memory",
        cells=cells,
        settings={"steps": 50, "rounds": 8, "step_tokens": 512, "memory_tokens": 512, "eval_tokens": None}
        | {"dtype": "fp32"},
        quick={"steps": 2, "rounds": 2, "step_tokens": 64, "memory_tokens": 64, "eval_tokens": 1024},
        seeds=(0, 1, 2),
        threads=2,
        shows=("loss", "trained", "lr", "step_s", "static_exact", "worst_error"),
    )
]
