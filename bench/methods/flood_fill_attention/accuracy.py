"""Patterns at equal density: accuracy after equal steps of CF, C, F, top_q and window beside dense attention.

    python bench/methods/flood_fill_attention/accuracy.py --task pixels --json FILE [--seeds 0,1,2]
    python bench/methods/flood_fill_attention/accuracy.py --task listops --json FILE

A run that FILE holds is not made again, so the script may be stopped and started. Every run is `pretrain` of one
recipe: the encoder of SPION's tasks (arXiv 2309.12578), the same rows, order and start for all variants of a seed, and
the same step for the switch, so that variants differ by their pattern alone. `paper` is CF with the published softmax.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

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


def run(args: argparse.Namespace, seed: int, variant: str) -> dict[str, Any]:
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe

    values = {**COMMON, **TASKS[args.task], "data": args.task, "seed": seed, "threads": args.threads}
    values["warmup_steps"] = values["steps"] // 10
    if variant != "dense":
        values["methods"] = [
            {**METHOD, "block_tokens": BLOCK[args.task], "keep_ratio": args.keep_ratio, **VARIANTS[variant]}
        ]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="pixels")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    parser.add_argument("--variants", default="cf,c,f,top_q,window", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from sparsetrain.measure.machine import describe_machine

    settings = {
        **COMMON,
        **TASKS[args.task],
        **METHOD,
        "block_tokens": BLOCK[args.task],
        "data": args.task,
        "keep_ratio": args.keep_ratio,
    }
    empty = {"settings": settings, "machine": describe_machine().to_dict(), "results": {}}
    stored = json.loads(args.json.read_text()) if args.json.exists() else empty
    if stored["settings"] != settings:
        raise SystemExit(f"{args.json} holds runs with {stored['settings']}, not {settings}. Choose another file.")
    for seed in map(int, args.seeds.split(",")):
        for variant in ["dense", *args.variants.split(",")]:
            key = f"{variant} {seed}"
            if key not in stored["results"]:
                stored["results"][key] = run(args, seed, variant)
                args.json.write_text(json.dumps(stored, indent=1) + "\n")
                print(key, stored["results"][key], flush=True)


if __name__ == "__main__":
    main()
