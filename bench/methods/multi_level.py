"""What a V-cycle saves: held-out loss against FLOPs (all levels charged) and time, beside the ordinary run.

Every cell is one `pretrain` from random weights, `ARM SEED`, in a process of its own. gpt: four GPT-2 layers of width
128 on the bytes of Python's standard library; bert: the same sizes as BERT, 15 % of the bytes masked; vit: four ViT
layers of width 64 on Fashion-MNIST.

- `ordinary`: the whole model, all steps; `ordinary lr=…`: at other rates, since a small one may train at a higher one.
- `v-cycle`, `v-cycle x0.8`, `v-cycle x1.25`: as many steps, and runs planned shorter and longer: a loss is lowest at
  the end of a schedule, so the length at which the ordinary run's loss is reached is bracketed.
- `v-cycle alpha=…`, `v-cycle small-lr=2`, `v-cycle three levels` (gpt and bert: heads and layers allow it).
- Controls: `small alone` (the merged size, all steps), `stacking` (the small model first, expanded without a start),
  `re-init` (the small model first, then the large one from random weights), `no mixing` (alpha = 1).

What a cell is compared with is the ordinary run of its seed: the FLOPs and seconds (of the clock, and of the processor)
at which its held-out loss first was the ordinary run's last, over the ordinary run's own.

    python -m bench run multi_level_gpt --output DIR [--cells 'v-cycle*'] [--minutes 60]
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.runner import Asked, Benchmark, Cell, in_own_process

BERT = {"model_type": "bert", "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4}
BERT |= {"intermediate_size": 512, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0}
BERT |= {"attention_probs_dropout_prob": 0.0}
TEXT = {"data": "python-stdlib", "seq_len": 128, "batch_size": 16, "steps": 4000, "lr": 1e-3, "eval_tokens": 65536}
TASKS: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt2-nano", "task": "lm", **TEXT},
    "bert": {"model": "bert", "task": "mlm", **TEXT},
    "vit": {"model": "vit-nano", "data": "fashion-mnist", "task": "image", "batch_size": 32, "steps": 3000, "lr": 1e-3}
    | {"eval_tokens": 51200},
}
TRAINING = {"beta2": 0.95, "warmup_steps": 100, "dtype": "fp32", "evals": 40}
HALF = {
    "gpt": {"n_layer": 2, "n_head": 2, "n_embd": 64},
    "bert": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256},
    "vit": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 128},
}
CYCLE = {"method": "multi_level"}
ARMS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "v-cycle": {"methods": [CYCLE]},
    "v-cycle x1.25": {"methods": [{**CYCLE, "start_share": 0.04, "small_share": 0.36}], "times": 1.25},
    "v-cycle x0.8": {"methods": [CYCLE], "times": 0.8},
    "small alone": {"half": True},
    "stacking": {"methods": [{**CYCLE, "start_share": 0.0, "alpha": 1.0}]},
    "re-init": {"methods": [{**CYCLE, "start_share": 0.0, "alpha": 0.0}]},
    "no mixing": {"methods": [{**CYCLE, "alpha": 1.0}]},
    "v-cycle alpha=0.25": {"methods": [{**CYCLE, "alpha": 0.25}]},
    "v-cycle alpha=0.75": {"methods": [{**CYCLE, "alpha": 0.75}]},
    "v-cycle small-lr=2": {"methods": [{**CYCLE, "small_lr": 2.0}]},
    "v-cycle three levels": {"methods": [{**CYCLE, "levels": 3}]},
    "ordinary lr=0.5": {"rate": 0.5},
    "ordinary lr=2": {"rate": 2.0},
}
SEED_0 = tuple(ARMS)[8:]
"""Searched with the first seed alone."""
OF_VIT = ("ordinary", "v-cycle", "v-cycle x1.25", "small alone", "no mixing")


def recipe_values(task: str, arm: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one run, but for where it writes."""
    values, chosen = {**settings, "seed": seed, "save_every": 0}, ARMS[arm]
    values["steps"] = round(values["steps"] * chosen.get("times", 1))
    values["lr"] *= chosen.get("rate", 1)
    values["eval_every"] = max(1, values["steps"] // values.pop("evals"))
    values["methods"] = chosen.get("methods", [])
    return values | ({"set": HALF[task]} if chosen.get("half") else {})


class Noted(TrainerCallback):
    """Notes the size of the model that a run of one stage trains, and the processor's seconds after each step of any:
    what a busy machine makes longer is a step's time, and less so what the processor works for it."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens, self.found = row_tokens, {}
        self.spent_s, self._began = [0.0], 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent_s.append(self.spent_s[-1] + time.process_time() - self._began)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from sparsetrain.measure.ledger import size_of

        self.found = size_of(kwargs["model"], self.row_tokens)


def trained(values: dict[str, Any], threads: int, device: str) -> dict[str, Any]:
    """One run: its curve over steps, FLOPs, tokens and seconds, and its stages."""
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.measure.curves import run_seconds
    from sparsetrain.measure.ledger import charged
    from sparsetrain.recipes.pretrain import PretrainRecipe

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        if values["model"] == "bert":
            Path(folder, "config.json").write_text(json.dumps(BERT))
            values = {**values, "model": folder}
        values = {**values, "output": f"{folder}/run", "threads": threads, "device": device}
        recipe = PretrainRecipe.from_values(values)
        noted = Noted(50 if recipe.task == "image" else recipe.seq_len)
        result = pretrain(recipe, callbacks=[noted], write=False)
    run: Any = result.run
    whole = [{"name": "all", "from_step": 0, "to_step": run["steps"][-1]["step"], **noted.found}]
    run = charged({"run": {**run, "stages": run.get("stages") or whole}})["run"]
    for point in run["evals"]:
        point["cpu_s"] = noted.spent_s[point["step"]]
    keys = ("step", "flops", "tokens_seen", "wall_s", "cpu_s", "loss", "accuracy")
    return {
        "loss": run["evals"][-1]["loss"],
        "accuracy": run["evals"][-1].get("accuracy"),
        "flops": run["steps"][-1]["flops"],
        "time_s": run_seconds(run),
        "cpu_s": noted.spent_s[-1],
        "switch_s": run.get("switch_s", 0.0),
        "steps": run["steps"][-1]["step"],
        "parameters": result.parameters,
        "stages": run["stages"],
        "evals": [{key: point[key] for key in keys if key in point} for point in run["evals"]],
    }


def beside(ordinary: dict[str, Any], values: dict[str, Any], threads: int, device: str) -> dict[str, Any]:
    """One run, and what it spent until its loss was the ordinary run's last, over all that the ordinary run spent."""
    found = in_own_process(f"{__name__}:trained", values, threads, device)
    reached = {name: first_at(found["evals"], key, ordinary["loss"]) for name, key in SPENT.items()}
    own = {name: ordinary[name] for name in SPENT}
    ratios = {f"{name}_ratio": None if (x := reached[name]) is None else x / own[name] for name in SPENT}
    return {**found, **ratios, "loss_over_ordinary": found["loss"] - ordinary["loss"]}


SPENT = {"flops": "flops", "time_s": "wall_s", "cpu_s": "cpu_s"}


def first_at(evals: list[dict[str, Any]], key: str, target: float) -> float | None:
    """Where a curve first comes down to a loss, on the line between two evaluations."""
    for i, point in enumerate(evals):
        if point["loss"] <= target:
            if i == 0:
                return point[key]
            before = evals[i - 1]
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            return before[key] + share * (point[key] - before[key])
    return None


def cells(task: str, asked: Asked) -> list[Cell]:
    """All seeds of what matters, then what was searched with the first."""
    found = []
    for late in (False, True):
        for seed in asked.seeds[:1] if late else asked.seeds:
            for arm in ARMS:
                if (arm in SEED_0) != late or (task == "vit" and arm not in OF_VIT):
                    continue
                values = recipe_values(task, arm, seed, asked.settings)
                one = functools.partial(in_own_process, f"{__name__}:trained", values, asked.threads, asked.device)
                more = functools.partial(beside, values=values, threads=asked.threads, device=asked.device)
                plain = arm == "ordinary"
                uses = () if plain else (f"ordinary {seed}",)
                found.append(Cell(f"{arm} {seed}", one if plain else more, uses=uses))
    return found


BENCHMARKS = [
    Benchmark(
        name=f"multi_level_{task}",
        measures=f"held-out loss of a V-cycle against FLOPs and time, with controls, {task}",
        cells=functools.partial(cells, task),
        settings={**values, **TRAINING},
        quick={"steps": 40, "warmup_steps": 4, "evals": 4, "eval_tokens": 2048, "batch_size": 4},
        seeds=(0, 1, 2),
        threads=2,
        shows=("loss", "flops_ratio", "cpu_s_ratio", "loss_over_ordinary"),
    )
    for task, values in TASKS.items()
]
