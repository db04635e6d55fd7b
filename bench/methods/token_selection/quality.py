"""What token selection costs in quality: policies × shares of tokens × seeds, beside dense LoRA at equal steps.

    python bench/methods/token_selection/quality.py --task classify --json FILE [--seeds 0,1,2] [--steps 60]
    python bench/methods/token_selection/quality.py --task sft --json FILE --policies random,targets,loss

A run that FILE holds is not made again, so the script may be stopped and started. Every run is `finetune` of one
recipe: the same rows, order, LoRA start and steps for all policies of a seed. `targets` is policy random in the pool of
supervised tokens; `unbiased` is random with importance weights.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "classify": {"model": "minilm", "data": "movie-reviews", "seq_len": 128, "batch_size": 16, "lr": 1e-3},
    "sft": {"model": "smollm2-135m", "data": "chitchat", "seq_len": 128, "batch_size": 2, "lr": 5e-4},
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
DEFAULT = {"classify": "random,prefix", "sft": "random,targets,prefix,loss,gradient_norm,unbiased"}


def run(task: str, steps: int, seed: int, method: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, Any]:
    from sparsetrain.hf.evaluate import Quality
    from sparsetrain.hf.finetune import finetune
    from sparsetrain.hf.recipe import Recipe

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "quality" and event["stage"] == "dense":
            KNOWN[seed] = Quality(**event["quality"])

    with tempfile.TemporaryDirectory() as folder:
        values = {**TASKS[task], "task": task, "output": f"{folder}/run", "steps": steps, "seed": seed, "save_every": 0}
        values |= {"methods": [] if method is None else [method], "threads": args.threads, "device": args.device}
        values |= {"warmup_steps": max(1, steps // 10), "eval_tokens": args.eval_tokens}
        values |= {name: value for name, value in (("model", args.model), ("data", args.data)) if value}
        began = time.perf_counter()
        result = finetune(Recipe.from_values(values), report=keep, write=False, dense_quality=KNOWN.get(seed))
    last = result.run["evals"][-1]  # type: ignore[typeddict-item]
    seconds = statistics.median(step["step_time_s"] for step in result.run["steps"])
    found = {"loss": last["loss"], "accuracy": last.get("accuracy"), "step_s": seconds}
    return found | {
        "saved_bytes": sum(result.run["saved_activation_bytes"].values()),
        "run_s": time.perf_counter() - began,
    }


def table(results: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    """Mean ± standard error over seeds, and of the paired differences to dense."""
    lines = ["| policy | r | loss | loss - dense | accuracy | accuracy - dense | saved bytes / dense |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    names = dict.fromkeys(key.rpartition(" ")[0] for key in results)
    for name in names:
        pairs = [
            (results[f"{name} {s}"], results[f"dense 1 {s}"])
            for s in seeds
            if f"{name} {s}" in results and f"dense 1 {s}" in results
        ]
        if not pairs:
            continue
        cells = []
        for key in ("loss", "accuracy"):
            known = pairs[0][0][key] is not None
            cells.append(mean([own[key] for own, _ in pairs]) if known else "")
            cells.append(mean([own[key] - dense[key] for own, dense in pairs]) if known else "")
        saved = statistics.mean(own["saved_bytes"] / dense["saved_bytes"] for own, dense in pairs)
        policy, _, ratio = name.rpartition(" ")
        lines.append(f"| {policy} | {ratio} | {' | '.join(cells)} | {saved:.3f} |")
    return lines


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="classify")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    parser.add_argument("--policies", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--ratios", default="0.1,0.3,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--model", help="instead of the task's own")
    parser.add_argument("--data", help="instead of the task's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    from sparsetrain.measure.machine import describe_machine

    seeds = [int(seed) for seed in args.seeds.split(",")]
    settings = TASKS[args.task] | {"task": args.task, "steps": args.steps, "eval_tokens": args.eval_tokens}
    settings |= {"model": args.model or settings["model"], "data": args.data or settings["data"]}
    stored = (
        json.loads(args.json.read_text())
        if args.json.exists()
        else {"settings": settings, "machine": describe_machine().to_dict(), "results": {}}
    )
    if stored["settings"] != settings:
        raise SystemExit(f"{args.json} holds runs with {stored['settings']}, not {settings}. Choose another file.")
    jobs: list[tuple[str, str]] = [("dense", "1")]
    jobs += [(p, r) for r in args.ratios.split(",") for p in (args.policies or DEFAULT[args.task]).split(",")]
    for seed in seeds:
        for policy, ratio in jobs:
            key = f"{policy} {ratio} {seed}"
            if key in stored["results"]:
                continue
            method = {"method": "token_selection", "keep_ratio": float(ratio), **POLICIES.get(policy, {})}
            found = run(args.task, args.steps, seed, None if policy == "dense" else method, args)
            stored["results"][key] = found
            args.json.write_text(json.dumps(stored, indent=1))
            print(key, {name: round(x, 4) for name, x in found.items() if x is not None}, flush=True)
    print("\n".join(table(stored["results"], seeds)))


if __name__ == "__main__":
    main()
