"""Train sparse, deploy dense: what every way of training leaves in the plain model, beside dense LoRA.

A grid of data × arms. Four kinds of cell, each in processes of its own:

- `DATA rows`: lengths of the rows and the share of their tokens that are targets.
- `DATA auto`: what `--preset auto` takes for it, which the runs then prove right or wrong.
- `DATA ARM step`: the arm's training step in turns with the dense one, on the same batches, and its memory. It says how
  many times faster a step is, once, in pairs, so that equal time does not hang on how busy a machine was in a long run.
- `DATA ARM steps SEED`, `DATA ARM time SEED`: one `finetune` on the dense run's number of steps, or on as many as the
  dense run's time has room for at the measured ratio (dense steps counted as what they cost), with a schedule of that
  length. The loss is held-out, of the deployed dense model. `DATA dense steps SEED` is the run it is compared with.

What the automatic choice may depend on comes first, and with three seeds.

    python -m bench run deploy --output DIR [--cells 'python-docstrings tokens*'] [--minutes 60]
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

from bench.methods.deploy.grid import DATA, GRID, MEMORY, TIMES_STEPS, USUAL_STEPS, arms, recipe_of
from bench.runner import Asked, Benchmark, Cell, in_own_process

SEEDS = (0, 1, 2)


def rows(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the training rows of a run are: their number, the length of the row that the average token is in, the share
    of targets and its lowest and highest tenth among the rows; and the model's size."""
    from sparsetrain.hf.model.models import empty_model
    from sparsetrain.hf.train.assemble import open_parts
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.events import silent

    parts = open_parts(Recipe.from_values({**values, "steps": steps}), silent)
    bundle = parts.bundle
    lengths = [len(ids) for ids in bundle.train["input_ids"]]
    labels = bundle.train["labels"]
    whole = isinstance(labels[0], int)  # a label a row
    targets = lengths if whole else [sum(label != -100 for label in row) for row in labels]
    shares = [count / length for count, length in zip(targets, lengths, strict=True)]
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "row_of_a_token": sum(length**2 for length in lengths) / sum(lengths),
        "parameters": sum(weight.numel() for weight in empty_model(parts.config, values["task"]).parameters()),
        "target_share": None if whole else sum(targets) / sum(lengths),
        "target_shares": None if whole else _tenths(shares),
    }


def _tenths(values: Sequence[float]) -> list[float]:
    """Where the lowest tenth ends, and where the highest begins."""
    found = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values, *values]
    return [round(found[0], 4), round(found[-1], 4)]


def steps_otherwise(values: dict[str, Any]) -> bool:
    """Whether a step is another than dense LoRA's."""
    return bool(values["methods"]) or "gradient_checkpointing" in values


def step(values: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """How many times faster the arm's step is, in its middle and in its dense phases; and its memory."""
    here = f"{__name__}:"
    found = in_own_process(here + "memory", values, threads)
    return (
        found if not steps_otherwise(values) else {**in_own_process(here + "ratio", values, rounds, threads), **found}
    )


def _training_step(values: dict[str, Any], count: int, threads: int) -> Any:
    """A training step that takes `count` batches in turn."""
    import torch

    from sparsetrain.hf.study.training_step import build_step, open_measured_parts
    from sparsetrain.recipes.finetune import Recipe

    torch.set_num_threads(threads)
    recipe = Recipe.from_values({**values, "steps": count, "output": "unwritten"})
    parts = open_measured_parts(recipe)
    made, size, held = build_step(parts), recipe.batch_size, parts.bundle.train
    starts = range(0, len(held) - size + 1, size)[:count]
    made.batches = [parts.bundle.collate_fn([held[i] for i in range(at, at + size)]) for at in starts]
    return made


def ratio(values: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """Dense time / ours of a step, in turns on the same batches: in the sparse part of a run, and in its dense one."""
    from sparsetrain.hf.study.training_step import STEPS
    from sparsetrain.measure.timing import compare

    ours = _training_step(values, rounds + 1, threads)
    plain = {**values, "methods": [], "gradient_checkpointing": "none"}
    dense = _training_step(plain, rounds + 1, threads)
    found = {"ratio": compare(dense, ours, rounds=rounds).to_dict(), "dense_phase_ratio": None}
    if dense_steps(values, STEPS):

        def in_dense_phase() -> None:
            ours.handle.step(STEPS - 1, STEPS)
            ours()

        found["dense_phase_ratio"] = compare(dense, in_dense_phase, rounds=max(3, rounds // 2)).median
    return found


def memory(values: dict[str, Any], threads: int) -> dict[str, Any]:
    """Of a few steps past the first: peak of resident memory, share of tokens selected, bytes that a forward keeps."""
    from sparsetrain.measure.memory import peak_memory, release_free_pages, reset_peak, saved_activations

    trained = _training_step(values, 4, threads)
    trained()
    release_free_pages()
    reset_peak()
    selected, given = 0.0, 0
    for batch in trained.batches[1:]:
        trained()
        given += int(batch.get("attention_mask", batch["input_ids"] >= 0).sum())
        selected += _selected(trained.handle)
    peak = peak_memory().rss_peak_bytes
    saved = saved_activations(trained.model, trained.loss).total  # of the first batch again
    return {"peak_bytes": peak, "saved_bytes": saved, "selected_share": selected / given or None}


def _selected(handle: Any) -> float:
    """Tokens that the last forward selected; 0 where nothing is selected."""
    stats = {} if handle is None else handle.report()["stats"]
    return next((found["selected_tokens"] for found in stats.values() if "selected_tokens" in found), 0.0)


def dense_steps(values: dict[str, Any], steps: int) -> int:
    """How many of a run's steps train dense, in its first and last phase."""
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.surgery.deploy import deployment

    recipe = Recipe.from_values({**values, "steps": steps})
    deploy, configs = deployment(recipe.deployment), recipe.configs
    if deploy is None:
        return 0
    return sum(any(deploy.is_dense(config, at, steps) for config in configs) for at in range(steps))


def equal_time_steps(values: dict[str, Any], steps: int, measured: dict[str, Any]) -> int:
    """The longest run, dense phases included, that takes no longer than `steps` dense ones; at least 2 steps."""
    sparse, phase = measured["ratio"]["median"], measured["dense_phase_ratio"]

    def cost(count: int) -> float:
        dense = dense_steps(values, count) if phase is not None else 0
        return (count - dense) / sparse + (dense / phase if phase is not None else 0.0)

    most = max(2, int(steps * max(sparse, phase or 0.0)))
    return next((count for count in range(most, 2, -1) if cost(count) <= steps), 2)


def trained(
    values: dict[str, Any], steps: int, seed: int, start: dict[str, Any] | None, settings: dict[str, Any], threads: int
) -> dict[str, Any]:
    """`train` in a process of its own."""
    return in_own_process(f"{__name__}:train", values, steps, seed, start, settings, threads)


def train(
    values: dict[str, Any], steps: int, seed: int, start: dict[str, Any] | None, settings: dict[str, Any], threads: int
) -> dict[str, Any]:
    """One run; `start` is the pretrained model's quality where the dense run has measured it."""
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.quality import Quality

    begun: dict[str, Any] = {}

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "quality" and event["stage"] == "dense":
            begun.update(event["quality"])

    with tempfile.TemporaryDirectory() as folder:
        given = {**values, "steps": steps, "seed": seed, "threads": threads, "output": f"{folder}/run"}
        given |= {"warmup_steps": steps // 16, "eval_every": max(1, steps // settings["evals"])}
        known = None if start is None else Quality.from_dict(start)
        began = time.perf_counter()
        result = finetune(Recipe.from_values(given), report=keep, write=False, dense_quality=known)
    run: Any = result.run
    evals = [{name: point[name] for name in ("step", "loss", "accuracy") if name in point} for point in run["evals"]]
    return {
        "steps": steps,
        "loss": evals[-1]["loss"],
        "accuracy": evals[-1].get("accuracy"),
        "by_row": run["evals"][-1].get("by_row"),
        "evals": evals,
        "start": begun,
        "train_loss": statistics.mean(step["loss"] for step in run["steps"][-10:]),
        "step_s": statistics.median(step["step_time_s"] for step in run["steps"]),
        "setup_s": run.get("setup_s", 0.0),
        "run_peak_bytes": run.get("peak_rss_bytes"),
        "run_s": time.perf_counter() - began,
    }


def automatic(data: str, dense: dict[str, Any], steps: int, threads: int) -> dict[str, Any]:
    """What `--preset auto` takes, and the seconds of it."""
    return in_own_process(f"{__name__}:take", dense, steps, MEMORY.get(data), threads)


def take(values: dict[str, Any], steps: int, memory_bytes: int | None, threads: int) -> dict[str, Any]:
    """`taken`, its methods, and what was weighed, of a run of as many steps as a user's would have."""
    import torch

    from sparsetrain.hf.study.choose import choose
    from sparsetrain.planner.choosing import Asked as Choosing
    from sparsetrain.recipes.finetune import Recipe

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        given = {key: value for key, value in values.items() if key != "methods"}
        given |= {"preset": "auto", "steps": USUAL_STEPS * steps, "output": f"{folder}/run", "threads": threads}
        found = choose(Recipe.from_values(given), Choosing(memory_bytes=memory_bytes, again=True))
    return {key: found.values[key] for key in ("taken", "methods", "recomputes", "reason", "options", "seconds")}


def cells(asked: Asked) -> list[Cell]:
    """Seed 0 of what is chosen from, its other seeds, then the rest; data in the table's order within each."""
    first, *others = asked.seeds
    found = [cell for data in DATA for cell in _of_data(data, asked, True, [first], new=True)]
    found += [cell for data in GRID for cell in _of_data(data, asked, True, others, new=False)]
    return found + [cell for data in GRID for cell in _of_data(data, asked, False, [first], new=False)]


def _of_data(data: str, asked: Asked, chosen: bool, seeds: Iterable[int], new: bool) -> list[Cell]:
    """new: what the data needs once comes with them."""
    settings, threads = asked.settings, asked.threads
    steps = settings["steps"] * TIMES_STEPS.get(data, 1)
    dense = recipe_of(data, None, settings)
    found: list[Cell] = []
    if new:
        found.append(Cell(f"{data} rows", functools.partial(rows, dense, steps)))
        found.append(Cell(f"{data} auto", functools.partial(automatic, data, dense, steps, threads)))
        found.append(Cell(f"{data} dense step", functools.partial(step, dense, settings["rounds"], threads)))
    mine = {name: arm for name, arm in arms(data).items() if arm.chosen == chosen}
    for seed in seeds:
        beside = f"{data} dense steps {seed}"
        if chosen:
            found.append(Cell(beside, functools.partial(trained, dense, steps, seed, None, settings, threads)))
        for name, arm in mine.items():
            values = recipe_of(data, arm, settings)
            timed = f"{data} {arm.timed_as or name} step"
            if steps_otherwise(values) and arm.timed_as is None and (new or not chosen):
                found.append(Cell(timed, functools.partial(step, values, settings["rounds"], threads)))
            found += _runs(f"{data} {name}", values, steps, seed, beside, timed, asked)
    return found


def _runs(
    name: str, values: dict[str, Any], steps: int, seed: int, beside: str, timed: str, asked: Asked
) -> list[Cell]:
    """A run of as many steps as the dense one beside it, and one of as much time."""

    def of_steps(dense: dict[str, Any]) -> dict[str, Any]:
        return trained(values, steps, seed, dense["start"], asked.settings, asked.threads)

    def of_time(dense: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        longer = equal_time_steps(values, steps, measured)
        return trained(values, longer, seed, dense["start"], asked.settings, asked.threads)

    found = [Cell(f"{name} steps {seed}", of_steps, uses=(beside,))]
    return [*found, Cell(f"{name} time {seed}", of_time, uses=(beside, timed))] if steps_otherwise(values) else found


BENCHMARKS = [
    Benchmark(
        name="deploy",
        measures="what every way of training leaves in the plain model, beside dense LoRA, at equal steps and time",
        cells=cells,
        settings={"steps": 60, "rounds": 8, "evals": 2, "eval_tokens": None, "dtype": "bf16"},
        quick={"steps": 3, "rounds": 3, "eval_tokens": 1024},
        seeds=SEEDS,
        threads=2,
        dtype="bfloat16",
        shows=("loss", "accuracy", "steps", "step_s", "setup_s", "peak_bytes", "rows", "target_share"),
    )
]
