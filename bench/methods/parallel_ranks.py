"""Data parallel on this machine: two ranks beside one process with as many threads, and what our hooks cost a step.

Both train the same recipe, so the same rows of each step. Launches alternate, and a cell is the median of the ratios of
neighbours: a machine that is busy for a while is busy for both.

- `MODEL ARM ddp`: tokens/s of RANKS ranks of one thread, over those of one process with RANKS threads.
- `MODEL ARM hooks`: the share of the steps' time that is spent in all that a Trainer calls of us (target: under 3 %).

    python -m bench run parallel_ranks --output DIR [--cells 'smollm2-135m *'] [--minutes 20]
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

ARMS = {"dense": ["--preset", "dense"], "routed_ffn": ["--method", "routed_ffn:num_blocks=8,num_active=4"]}
EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")
"""What a Trainer calls in each step; with no checkpoint and no evaluation."""
WARM = 2
"""Steps that are not counted: first calls allocate."""


def launched(settings: dict[str, Any], arm: str, ranks: int, threads: int) -> dict[str, float]:
    """Tokens/s of a run of the command line, after its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", settings["model"], "--data", settings["data"], "--output", f"{folder}/run", *ARMS[arm]]
        for name in ("seq_len", "batch_size", "grad_accum", "steps"):
            flags += [f"--{name.replace('_', '-')}", str(settings[name])]
        flags += ["--task", "lm", "--dtype", "fp32", "--device", "cpu", "--threads", str(threads)]
        flags += ["--save-every", "0", "--eval-tokens", "1", "--calibration-tokens", "1024"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "sparsetrain", "finetune", *flags]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=env, check=True, capture_output=True)
        steps = json.loads((Path(folder) / "run" / "result.json").read_text())["run"]["steps"][WARM:]
    return {
        "tokens_per_s": sum(step["tokens"] for step in steps) / sum(step["step_time_s"] for step in steps),
        "last_loss": steps[-1]["loss"],
    }


def ddp(settings: dict[str, Any], arm: str, ranks: int) -> dict[str, Any]:
    turns = []
    for _ in range(settings["turns"]):
        turns.append({"ranks": launched(settings, arm, ranks, 1), "alone": launched(settings, arm, 1, ranks)})
    ratios = [turn["ranks"]["tokens_per_s"] / turn["alone"]["tokens_per_s"] for turn in turns]
    gaps = [abs(turn["ranks"]["last_loss"] - turn["alone"]["last_loss"]) for turn in turns]
    return {"tokens_per_s_ratio": statistics.median(ratios), "ratios": ratios, "loss_gap": max(gaps), "turns": turns}


def hooks(settings: dict[str, Any], arm: str) -> dict[str, Any]:
    return in_own_process("bench.methods.parallel_ranks:hook_share", settings, arm)


def hook_share(settings: dict[str, Any], arm: str) -> dict[str, Any]:
    """Seconds inside all callbacks of ours, as a share of those of the steps that they are called in."""
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

    spent = timed_callbacks()
    with tempfile.TemporaryDirectory() as folder:
        keys = ("model", "data", "seq_len", "batch_size", "grad_accum", "steps")
        values: dict[str, Any] = {key: settings[key] for key in keys}
        method, _, options = ARMS[arm][1].partition(":")
        entry = {"method": method} | {k: int(v) for k, v in (pair.split("=") for pair in options.split(",") if pair)}
        values |= {"methods": [entry], "task": "lm", "dtype": "fp32", "device": "cpu", "save_every": 0}
        values |= {"eval_tokens": 1, "calibration_tokens": 1024, "output": f"{folder}/run"}
        result = finetune(Recipe.from_values(values), write=False)
    steps = sum(step["step_time_s"] for step in result.run["steps"])
    hooks_s = sum(spent.values())
    return {"hooks_s": hooks_s, "steps_s": steps, "share": hooks_s / steps, "seconds": dict(spent)}


def timed_callbacks() -> dict[str, float]:
    """Let the callbacks of ours note, from now on, how long each event of a step takes in them."""
    from transformers import TrainerCallback

    import sparsetrain.hf.train.run  # noqa: F401  (so that all of them are there)

    spent: dict[str, float] = defaultdict(float)
    for kind in TrainerCallback.__subclasses__():
        for event in EVENTS:
            if kind.__module__.startswith("sparsetrain.") and event in vars(kind):
                setattr(kind, event, _timed(vars(kind)[event], f"{kind.__name__}.{event}", spent))
    return spent


def _timed(plain: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - began

    return timed


def cells(asked: Asked) -> list[Cell]:
    settings = asked.settings
    name = settings["model"]
    beside = [Cell(f"{name} {arm} ddp", functools.partial(ddp, settings, arm, settings["ranks"])) for arm in ARMS]
    inside = [Cell(f"{name} {arm} hooks", functools.partial(hooks, settings, arm)) for arm in ARMS if arm != "dense"]
    return [*beside, *inside]


BENCHMARKS = [
    Benchmark(
        name="parallel_ranks",
        measures="tokens/s of data-parallel ranks over one process with as many threads, and the time of our hooks",
        cells=cells,
        settings={"model": "smollm2-135m", "data": "python-stdlib", "seq_len": 256, "batch_size": 1, "grad_accum": 2}
        | {"steps": 10, "ranks": 2, "turns": 3},
        quick={"seq_len": 64, "steps": 4, "turns": 1},
        shows=("tokens_per_s_ratio", "loss_gap", "share"),
    )
]
