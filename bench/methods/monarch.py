"""What Monarch linears cost and gain in quality: from the start, with a dense end (S2D), and of a trained model (D2S).

Cells, each in processes of its own:

- `TASK ARM step`: a training step of the arm in turns with the dense one, on the same batch: how many times faster it
  is, once, in pairs, so that equal time does not hang on how busy a machine was in a long run.
- `TASK ARM steps SEED`, `TASK ARM time SEED`: one `pretrain` of the dense run's number of steps, or of as many as the
  dense run's time has room for at the measured ratio, with a schedule of that length.
- `minilm d2s SEED`: MiniLM, fine-tuned whole for an epoch of movie reviews, then projected to half of its weights:
  accuracy of the dense model, after the projection, after one more epoch, and of the dense model after that epoch too.

Tasks: gpt and vit are the nano architectures, whose widths (128, 64) are below where Monarch pays; gpt-512 is wide
enough. Arms: `monarch` and `s2d` with 4 blocks in attention and FFNs; `small` is dense, narrower, with as many
parameters as `monarch`.

    python -m bench run monarch_quality --output DIR [--cells 'gpt *'] [--minutes 60]
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

TEXT = {"model": "gpt2-nano", "data": "python-stdlib", "task": "lm", "seq_len": 256, "batch_size": 8, "lr": 2e-3}
TASKS: dict[str, dict[str, Any]] = {
    "gpt": {**TEXT, "steps": 600, "eval_tokens": 32768},
    "vit": {"model": "vit-nano", "data": "fashion-mnist", "task": "image", "batch_size": 32, "steps": 600, "lr": 1e-3}
    | {"train_rows": 19200, "eval_tokens": 51200},
    "gpt-512": {**TEXT, "lr": 1e-3, "set": {"n_embd": 512, "n_head": 8}, "steps": 300, "eval_tokens": 32768},
}
TRAINING = {"beta2": 0.95, "min_lr_ratio": 0.1, "save_every": 0, "dtype": "fp32"}
WIDTH = {"gpt2-nano": "n_embd", "vit-nano": "hidden_size"}
FOLLOWS = {"gpt2-nano": None, "vit-nano": "intermediate_size"}
"""The key of the FFN's width where it does not follow from the model's."""
HEADS, FULL = 4, {"gpt": 128, "vit": 64, "gpt-512": 512}
BLOCKS: dict[str, Any] = {"num_blocks": 4, "force": True}
ARMS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "monarch": [{"method": "monarch", "init": "matched", **BLOCKS}],
    "s2d": [{"method": "monarch_then_dense", **BLOCKS}],
    "small": [],
}
DENSE_SHARE = 0.1
D2S: dict[str, Any] = {"model": "minilm", "data": "movie-reviews", "task": "classify", "lora_r": 0, "deploy": "sparse"}
D2S |= {"lr": 5e-5, "seq_len": 256, "batch_size": 16, "eval_tokens": 131072, "save_every": 0, "dtype": "fp32"}
HALF = {"method": "monarch", "keep_ratio": 0.5, **BLOCKS}


def recipe_values(task: str, arm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of an arm, but for output, seed and steps."""
    given = {key: value for key, value in TASKS[task].items() if key != "steps"}
    values = {**given, **TRAINING, "methods": ARMS[arm]}
    if settings["eval_tokens"] is not None:
        values["eval_tokens"] = settings["eval_tokens"]
    return values | ({"set": {**values.get("set", {}), **narrower(task)}} if arm == "small" else {})


@functools.cache
def _parameters(task: str, arm: str, width: int) -> int:
    """Of the model that an arm trains, at a width."""
    import sparsetrain.methods  # noqa: F401  (enters every method in the registry)
    from sparsetrain.hf.model.architectures import empty_model, open_architecture
    from sparsetrain.recipes.pretrain import PretrainRecipe
    from sparsetrain.surgery.plan import plan

    values = {**TASKS[task], "methods": ARMS[arm], "output": "unwritten"}
    recipe = PretrainRecipe.from_values(values | {"set": {**values.get("set", {}), **_of_width(task, width)}})
    config: Any = open_architecture(recipe)
    config.vocab_size = 256
    model = empty_model(config, recipe.task)
    added = sum(row["added_params"] for row in plan(model, *recipe.configs).rows()) if recipe.configs else 0
    return sum(parameter.numel() for parameter in model.parameters()) + added


def _of_width(task: str, width: int) -> dict[str, int]:
    model = TASKS[task]["model"]
    ffn = {} if FOLLOWS[model] is None else {FOLLOWS[model]: 4 * width}
    return {WIDTH[model]: width, **ffn}


def narrower(task: str) -> dict[str, int]:
    """The width of the dense model with as many parameters as the Monarch one."""
    heads = TASKS[task].get("set", {}).get("n_head", HEADS)
    wanted = _parameters(task, "monarch", FULL[task])
    widths = range(2 * heads, FULL[task] + 1, heads)
    return _of_width(task, min(widths, key=lambda width: abs(_parameters(task, "dense", width) - wanted)))


def _step(values: dict[str, Any]) -> Any:
    """A training step of a recipe's model, on one batch."""
    import torch

    from sparsetrain.hf.model.architectures import build_model
    from sparsetrain.hf.train.pretrain import open_parts
    from sparsetrain.recipes.pretrain import PretrainRecipe
    from sparsetrain.runs.events import silent
    from sparsetrain.surgery.apply import sparsify

    recipe = PretrainRecipe.from_values({**values, "steps": 10, "output": "unwritten"})
    parts = open_parts(recipe, silent)
    torch.manual_seed(0)
    model: Any = build_model(parts.config, recipe.task).train()
    handle = sparsify(model, *recipe.configs) if recipe.configs else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, fused=True)
    batch = parts.bundle.collate_fn([parts.bundle.train[i] for i in range(recipe.batch_size)])

    def run() -> None:
        if handle is not None:
            handle.step(1, 10)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def ratio(dense: dict[str, Any], ours: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """Dense time / the arm's of a step."""
    import torch

    from sparsetrain.measure.timing import compare

    torch.set_num_threads(threads)
    return compare(_step(dense), _step(ours), rounds=rounds).to_dict()


def train(values: dict[str, Any], steps: int, seed: int, threads: int) -> dict[str, Any]:
    """One run from random weights."""
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe

    with tempfile.TemporaryDirectory() as folder:
        given = {**values, "steps": steps, "seed": seed, "threads": threads, "output": f"{folder}/run"}
        began = time.perf_counter()
        result: Any = pretrain(PretrainRecipe.from_values({**given, "warmup_steps": steps // 10}), write=False)
    last = result.run["evals"][-1]
    return {
        "steps": steps,
        "loss": last["loss"],
        "accuracy": last.get("accuracy"),
        "train_loss": statistics.mean(step["loss"] for step in result.run["steps"][-20:]),
        "step_s": statistics.median(step["step_time_s"] for step in result.run["steps"]),
        "parameters": result.parameters,
        "stages": result.run.get("stages"),
        "run_s": time.perf_counter() - began,
    }


def d2s(settings: dict[str, Any], seed: int, threads: int) -> dict[str, Any]:
    """Fine-tune MiniLM for an epoch, project it, train on; and the dense model for as long."""
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

    length = {"epochs": 1} if settings["d2s_steps"] is None else {"steps": settings["d2s_steps"]}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = {**D2S, **length, "seed": seed, "threads": threads, "methods": []}
        if settings["eval_tokens"] is not None:
            base["eval_tokens"] = settings["eval_tokens"]
        first: Any = finetune(Recipe.from_values({**base, "output": f"{folder}/first"}), write=False)
        found["dense"] = first.run["evals"][-1]["accuracy"]
        for name, methods in (("monarch", [HALF]), ("dense", [])):
            again = {**base, "model": str(first.saved), "output": f"{folder}/{name}", "methods": methods}
            done: Any = finetune(Recipe.from_values(again), write=False)
            quality = done.run["accuracy"]
            found |= {f"{name}_{stage}": value for stage, value in quality.items()}
            found[f"{name}_parameters"] = done.parameters
            if methods:
                errors = [value for stats in done.sparsity["stats"].values() for value in stats.values()]
                found["relative_error"] = [min(errors), statistics.mean(errors), max(errors)]
    return found


def equal_time(arm: str, steps: int, measured: dict[str, Any]) -> int:
    """Steps of an arm in the time of `steps` dense ones; of s2d, the dense share costs what dense steps do."""
    share = DENSE_SHARE if arm == "s2d" else 0.0
    return max(2, round(steps / ((1 - share) / measured["median"] + share)))


def cells(asked: Asked) -> list[Cell]:
    """Steps and seed 0 first, then the other seeds."""
    settings, threads, here = asked.settings, asked.threads, f"{__name__}:"
    found: list[Cell] = []

    def add(task: str, seed: int) -> None:
        steps = settings["steps"] or TASKS[task]["steps"]
        for arm in ARMS:
            values = functools.partial(recipe_values, task, arm, settings)

            def at(count: int, values: Any = values) -> dict[str, Any]:
                return in_own_process(here + "train", values(), count, seed, threads)

            found.append(Cell(f"{task} {arm} steps {seed}", functools.partial(at, steps)))
            if arm in ("monarch", "s2d"):

                def of_time(measured: dict[str, Any], arm: str = arm, at: Any = at) -> dict[str, Any]:
                    return at(equal_time(arm, steps, measured))

                found.append(Cell(f"{task} {arm} time {seed}", of_time, uses=(f"{task} monarch step",)))

    for task in TASKS:
        for arm in ("monarch", "small"):

            def step(task: str = task, arm: str = arm) -> dict[str, Any]:
                dense, ours = (recipe_values(task, name, settings) for name in ("dense", arm))
                return in_own_process(here + "ratio", dense, ours, settings["rounds"], threads)

            found.append(Cell(f"{task} {arm} step", step))
    for seed in asked.seeds:
        for task in TASKS:
            add(task, seed)
        found.append(
            Cell(f"minilm d2s {seed}", functools.partial(in_own_process, here + "d2s", settings, seed, threads))
        )
    return found


BENCHMARKS = [
    Benchmark(
        name="monarch_quality",
        measures="what Monarch linears cost and gain: from the start, with a dense end, and of a trained MiniLM",
        cells=cells,
        settings={"steps": None, "rounds": 12, "eval_tokens": None, "d2s_steps": None},
        quick={"steps": 10, "rounds": 3, "eval_tokens": 2048, "d2s_steps": 2},
        seeds=(0, 1, 2),
        threads=2,
        shows=("loss", "accuracy", "median", "steps", "parameters", "monarch_after_training"),
    )
]
