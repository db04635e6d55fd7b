"""What token selection costs in quality: policies × shares of tokens × seeds, beside dense LoRA at equal steps.

    python bench/methods/token_selection/quality.py --task classify --json FILE [--seeds 0,1,2] [--steps 200]
    python bench/methods/token_selection/quality.py --task sft --json FILE --policies random,targets,loss

A run that FILE holds is not made again, so the script may be stopped and started. Every run is `finetune` of one
recipe: the same rows, order, LoRA start and steps for all policies of a seed. `targets` is policy random in the pool of
supervised tokens; `unbiased` is random with importance weights. `bench/report.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

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
DEFAULT = {"classify": "random,prefix", "sft": "random,targets,prefix,loss,gradient_norm,unbiased"}


def run(
    settings: dict[str, Any], seed: int, method: dict[str, Any] | None, threads: int, device: str
) -> dict[str, Any]:
    from sparsetrain.hf.train.evaluate import Quality
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="classify")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    parser.add_argument("--policies", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--ratios", default="0.1,0.3,0.5")
    parser.add_argument("--seeds", default="0", help="the committed results hold more for some policies")
    parser.add_argument("--steps", type=int, help="instead of the task's own")
    parser.add_argument("--eval-tokens", type=int, help="instead of the task's own")
    parser.add_argument("--model", help="instead of the task's own")
    parser.add_argument("--data", help="instead of the task's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    from sparsetrain.measure.machine import describe_machine

    seeds = [int(seed) for seed in args.seeds.split(",")]
    asked = {name: getattr(args, name) for name in ("steps", "eval_tokens", "model", "data")}
    settings = {**TASKS[args.task], "task": args.task, **{name: value for name, value in asked.items() if value}}
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
            found = run(settings, seed, None if policy == "dense" else method, args.threads, args.device)
            stored["results"][key] = found
            args.json.write_text(json.dumps(stored, indent=1))
            print(key, {name: round(x, 4) for name, x in found.items() if x is not None}, flush=True)


if __name__ == "__main__":
    main()
