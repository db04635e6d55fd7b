"""What 2:4 training costs in quality: nine variants × seeds at equal steps, from random weights.

    python bench/methods/semi_structured/quality.py --task gpt --json FILE [--seeds 0,1,2] [--steps 240]
    python bench/methods/semi_structured/quality.py --task vit --json FILE --variants dense,fst,s-ste

A run that FILE holds is not made again, so the script may be stopped and started; `python bench/report.py` writes the
table. Every run is `pretrain` of one recipe: the variants of a seed share start, rows and their order, learning rate
and steps. gpt: four GPT-2 layers of width 128 on the bytes of Python's standard library, 128 tokens; vit: four ViT
layers of width 64 on Fashion-MNIST. `half-width` is dense, with FFNs half as wide: the same multiplications as 2:4.
`fst-dense-dw` is FST without MVUE, the package's default, and `fst-refresh-1` FST with masks of every step: forty
steps are a sixth of such a short run. λ is as published, not tuned here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsetrain import SemiStructured
from sparsetrain.measure.machine import describe_machine

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


def recipe_values(task: str, variant: str, seed: int, steps: int) -> dict[str, Any]:
    """The recipe of one run, but for where it writes."""
    config = VARIANTS[variant]
    values = {**TASKS[task], **TRAINING, "steps": steps, "seed": seed, "save_every": 0}
    values["methods"] = [] if config is None else [{"method": config.method, **config.to_dict()}]
    return values | ({"set": HALF[task]} if variant == "half-width" else {})


def run(values: dict[str, Any], threads: int, device: str) -> dict[str, Any]:
    from sparsetrain.hf.train.evaluate import Quality
    from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
    from sparsetrain.runs.pictures import read_galleries

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="gpt")
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="dense among them, for the differences")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    steps = args.steps or TASKS[args.task]["steps"]
    settings = {**TASKS[args.task], **TRAINING, "steps": steps}
    empty = {"settings": settings, "machine": describe_machine().to_dict(), "results": {}}
    stored = json.loads(args.json.read_text()) if args.json.exists() else empty
    if stored["settings"] != settings:
        raise SystemExit(f"{args.json} holds runs with {stored['settings']}, not {settings}. Choose another file.")
    for seed in args.seeds.split(","):
        for variant in args.variants.split(","):
            key = f"{variant} {seed}"
            if key in stored["results"]:
                continue
            found = run(recipe_values(args.task, variant, int(seed), steps), args.threads, args.device)
            stored["results"][key] = found
            args.json.write_text(json.dumps(stored, indent=1))
            print(key, {name: round(x, 4) for name, x in found.items() if isinstance(x, float)}, flush=True)


if __name__ == "__main__":
    main()
