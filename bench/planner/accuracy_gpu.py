"""The planner on a GPU: predicted memory against the CUDA allocator's, predicted time against measured steps.

Weights are random and made on the GPU, for memory and time of a step do not depend on their values. Predictions are
made on the CPU, by the same versions; nothing of them enters a measurement. `--set configs=DIR`: DIR/NAME/config.json
goes before the package's. `--device cpu --quick` tries the code on one small model; its peak is read on a GPU alone.
"""

from __future__ import annotations

import functools
import gc
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import runner
from bench.planner.accuracy import compare

_AGAIN = {"gradient_checkpointing": "non-reentrant"}
_TOKENS = {"method": "token_selection"}
_CHUNKED = {"method": "token_selection", "keep_ratio": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"lora_r": 0},
    "lora": {},
    "lora+checkpointing": _AGAIN,
    "token selection": {"methods": [_TOKENS]},
    "chunked loss+checkpointing": {"methods": [_CHUNKED], **_AGAIN},
    "token selection+checkpointing": {"methods": [_TOKENS], **_AGAIN},
}
SMALL = ("full", "lora", "lora+checkpointing", "token selection")
LARGE = ("lora+checkpointing", "chunked loss+checkpointing", "token selection+checkpointing")
CELLS = [
    *(("smollm2-135m", "lm", way, tokens) for way in SMALL for tokens in (512, 2048, 8192)),
    *(("minilm", "classify", way, tokens) for way in SMALL for tokens in (128, 256, 512)),
    *(("llama-3-8b", "lm", way, tokens) for way in LARGE for tokens in (2048, 8192, 32768)),
    *(("qwen2.5-7b", "lm", way, tokens) for way in LARGE[:2] for tokens in (8192,)),
]
TRIED = ("minilm", "classify", "lora", 128)
TRACED_AT_LENGTH = ("smollm2-135m", "minilm")
Cell = tuple[str, str, str, int]


def make_recipe(cell: Cell) -> Any:
    from sparsetrain.recipes.finetune import Recipe

    model, task, way, tokens = cell
    values = {"model": model, "data": "none", "task": task, "seq_len": tokens, "methods": [], **WAYS[way]}
    return Recipe.from_values(values)


def open_config(model: str, folder: Path | None) -> Any:
    from transformers import AutoConfig

    from sparsetrain.hf.model.model_config import read_config

    own = folder is not None and (folder / model / "config.json").is_file()
    return AutoConfig.for_model(**read_config(str(folder / model) if own and folder else model).values)


def _job(cell: Cell) -> Any:
    """Cells with the same key share an outline: large models are traced once for all lengths."""
    model, _, way, tokens = cell
    return (model, way, tokens) if model in TRACED_AT_LENGTH else (model, way)


def predict(job: tuple[Cell, str | None]) -> str:
    """One cell's outline as JSON: small models at their very length, large ones fitted as `plan` does it."""
    import torch

    from sparsetrain.hf.study.recipe_trace import outline

    torch.set_num_threads(1)
    cell, folder = job
    model, _, _, tokens = cell
    config = open_config(model, Path(folder) if folder else None)
    exact = (tokens,) if model in TRACED_AT_LENGTH else None
    return outline(make_recipe(cell), config, bf16=True, gpu=True, lengths=exact).to_json()


def place() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build(recipe: Any, config: Any) -> tuple[Any, Any]:
    """The network on the device with random weights, converted and in LoRA, and a function that runs its loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from sparsetrain import plan, sparsify
    from sparsetrain.hf.model.checkpointing import recompute
    from sparsetrain.hf.model.models import add_lora
    from sparsetrain.hf.study.recipe_trace import example_batch, training_step, without_dropout
    from sparsetrain.surgery.method import blank_state

    without_dropout(config, recipe)
    kind: Any = AutoModelForSequenceClassification if recipe.task == "classify" else AutoModelForCausalLM
    with torch.device(place()):
        dtype = torch.float32 if recipe.trains_all else torch.bfloat16
        network: Any = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    handle = None
    if recipe.methods:
        handle = sparsify(network, *recipe.configs, state=blank_state(plan(network, *recipe.configs).edits))
    network = add_lora(network, recipe, handle, ["classifier"] if recipe.task == "classify" else [])
    network.to(place()).train()
    if recipe.gradient_checkpointing != "none":
        recompute(network)
    batch = example_batch(recipe, config, recipe.seq_len, rows=1)
    on_gpu = {name: tensor.to(place()) for name, tensor in batch.items()}
    return network, training_step(network, on_gpu, recipe.trains_all)


def measure(recipe: Any, config: Any, steps: int = 3) -> dict[str, Any]:
    """Two steps to warm up, then the static parts, saved activations, the allocator's peak and the shortest step."""
    import torch

    from sparsetrain.measure.memory import saved_activations, static_memory

    on_gpu = place() == "cuda"
    before = torch.cuda.memory_allocated()  # 0 without a GPU
    network, step = build(recipe, config)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def train() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    train()
    train()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [train() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() - before
    step().backward()
    static = static_memory(network, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return {
        "parameters": static.parameters_trainable + static.parameters_frozen,
        "gradients": static.gradients,
        "optimizer": static.optimizer_trainable + static.optimizer_frozen,
        "saved": saved_activations(network, step).by_component,
        "step_s": min(times),
    } | ({"peak": peak} if on_gpu else {})


def try_to(recipe: Any, config: Any) -> dict[str, Any]:
    """A cell, or that it ran out of memory; nothing of it stays on the GPU."""
    import torch

    try:
        return measure(recipe, config)
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


class Predictions:
    """Outlines of all cells, made by processes of their own while the GPU measures; cells may share one."""

    def __init__(self, cells: list[Cell], folder: str | None, workers: int) -> None:
        jobs = {_job(cell): (cell, folder) for cell in cells}
        if not workers:
            self.outlines = {key: functools.partial(predict, job) for key, job in jobs.items()}
            return
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self.outlines = {key: self.pool.submit(predict, job).result for key, job in jobs.items()}

    def of(self, cell: Cell) -> dict[str, Any]:
        from sparsetrain.planner.outline import Outline
        from sparsetrain.planner.roofline import step_seconds

        found = Outline.from_json(self.outlines[_job(cell)]())
        tokens = cell[3]
        peak = found.peak(tokens)
        return {
            "parameters": found.static.parameters_trainable + found.static.parameters_frozen,
            "gradients": found.static.gradients,
            "optimizer": found.static.optimizer,
            "saved": peak.saved_in_full,
            "peak": peak.total,
            "phase": peak.phase,
            "how": found.how(tokens),
            "step_s": step_seconds(found, rates(), tokens=tokens, dtype="bf16"),
        }


@functools.cache
def rates() -> Any:
    from sparsetrain.measure.rates import measure_rates
    from sparsetrain.planner.machines import MachineRates

    return MachineRates.from_dict(measure_rates(place(), seconds=0.3).to_dict())


def run_cell(cell: Cell, predictions: Predictions, folder: Path | None) -> dict[str, Any]:
    predicted = predictions.of(cell)
    measured = try_to(make_recipe(cell), open_config(cell[0], folder))
    row = {"predicted": predicted, "measured": measured}
    if "peak" not in measured:
        return row
    exact = all(predicted[name] == measured[name] for name in ("parameters", "gradients", "optimizer"))
    return row | {"static_exact": exact, "errors": compare(predicted, measured)}


def key(cell: Cell) -> str:
    model, _, way, tokens = cell
    return f"{model} / {way} / {tokens}"


def cells(asked: runner.Asked) -> list[runner.Cell]:
    folder = asked.settings["configs"]
    chosen = [cell for cell in (CELLS if asked.settings["workers"] else [TRIED]) if asked.only in key(cell)]
    predictions = functools.cache(lambda: Predictions(chosen, folder, asked.settings["workers"]))
    own = Path(folder) if folder else None
    return [runner.Cell(key(cell), lambda cell=cell: run_cell(cell, predictions(), own)) for cell in chosen]


BENCHMARKS = [
    runner.Benchmark(
        name="planner_accuracy_gpu",
        measures="memory and time of a training step as the planner predicts them, against the CUDA allocator",
        cells=cells,
        settings={"configs": None, "workers": 8},
        quick={"workers": 0},
        dtype="bfloat16; float32 where all weights train",
        under="cells",
        shows=("static_exact",),
        about=lambda asked: {"rates": rates().to_dict()},
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        needs_gpu=True,
    )
]
