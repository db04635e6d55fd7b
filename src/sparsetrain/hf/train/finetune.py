"""finetune(): one recipe, from the pretrained model to a saved adapter, with its quality on record at every stage.

load → dense quality → calibrate and convert → quality → LoRA → (distil → quality) → train → quality → save.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from sparsetrain.hf.model import models
from sparsetrain.hf.model.io import quiet
from sparsetrain.hf.model.saving import model_options
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.held_out import KnownQuality, dense_start, measure_quality
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.on_ranks import on_ranks
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import calibration_batches, drawn_batches, text_reader
from sparsetrain.hf.train.run import Job, Result, run
from sparsetrain.hf.train.run import run_report as run_report
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.checkpoints import Checkpoint
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.sidecar import read_state
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.method import method_of


@quiet()
@on_ranks
def finetune(
    recipe: Recipe,
    *,
    report: Report = silent,
    callbacks: Iterable[TrainerCallback] = (),
    like: Recipe | None = None,
    dense_quality: KnownQuality = None,
    write: bool = True,
    choice: Mapping[str, Any] | None = None,
    opened: Parts[Recipe] | None = None,
) -> Result:
    """Train a recipe and write its output folder.

    `output` then holds `adapter/` (or `model/` when all weights were trained) with its sidecar, `checkpoint-N/`,
    `recipe.yaml`, `result.json` and, with `write`, `report.json` and `report.html`.

    Args:
        recipe: what to do; its `compare` is for `hf.compare`.
        report: told what happens, as it happens (events: see `runs.events`).
        callbacks: further callbacks of the Trainer, called before ours.
        like: the recipe of the comparison that this run is a side of: attention dropout is as there, and what the
            trained model answers to held-out prompts is recorded.
        dense_quality: of the pretrained model, where another run has measured it on the same rows; a function is
            asked when it is needed.
        write: write the report.
        choice: what `choose` weighed for this recipe; `choice.json` is written from it.
        opened: parts of a recipe that differs in its methods alone, whose rows are taken.

    Raises:
        ValueError, PlanError: preset=auto, and nothing is chosen yet; or the recipe does not fit the model or the
            data. Nothing was written.
        CheckpointError: `resume` without a checkpoint that can be continued.
        OSError: the disk is full; the last checkpoint is whole.
        RuntimeError: training diverged.
    """
    if recipe.preset is not None:
        raise ValueError(
            "preset=auto is chosen before training. Take `hf.study.choose.choose(recipe).recipe`, or give methods."
        )
    recipe = with_dtype(recipe, report)
    job = Job(
        open_parts=lambda tell: assemble.open_parts(recipe, tell, like, opened),
        build=lambda *given: _build(recipe, *given),
        about=_about,
        title=title(recipe),
        saved="adapter" if recipe.lora_r > 0 else "model",
        samples=like is not None and task_of(recipe.task).causal,
    )
    return run(recipe, job, report=report, callbacks=callbacks, dense_quality=dense_quality, write=write, choice=choice)


def title(recipe: Recipe) -> str:
    """What was trained, in a line."""
    methods = " + ".join(config.method for config in recipe.configs) or "dense"
    how = f"LoRA r={recipe.lora_r}" if recipe.lora_r else "all weights" if recipe.trains_all else "its own parameters"
    return f"{recipe.model} on {recipe.data}, {methods}, {how}, {recipe.seq_len} tokens"


def _build(
    recipe: Recipe, parts: Parts, journal: Journal, resumed: Checkpoint | None, dense_quality: KnownQuality
) -> tuple[Any, Handle | None]:
    """The model, converted and with LoRA, its quality recorded at each stage; a continued run is rebuilt."""
    journal.phase("loading the model", 0.0)
    model, new_modules = assemble.load_model(parts)
    if new := [name for name in models.trained_of(model, recipe, new_modules) if name in new_modules]:
        journal.report({"event": "note", "text": f"New in the model, and trained: {', '.join(new)}."})
    if resumed is None:
        known = dense_start(dense_quality, model, parts, journal, "evaluating the dense model")
        journal.quality("dense", known, step=None if recipe.methods and recipe.deploy == "sparse" else 0)
    handle = None
    if recipe.methods and resumed is not None:
        state = read_state(resumed.path)
        handle = sparsify(model, *recipe.configs, state=state, seed=recipe.seed, deploy=recipe.deployment)
    elif recipe.methods:
        began = time.perf_counter()
        batches = calibration_batches(parts)
        given: Any = {"seed": recipe.seed, "progress": journal.phase, "deploy": recipe.deployment}
        given["read"] = text_reader(parts)
        handle = sparsify(model, *recipe.configs, calibration=batches, **given)
        journal.run["setup_s"] = time.perf_counter() - began
        if recipe.deploy == "sparse":
            quality = measure_quality(model, handle, parts, journal, "evaluating the converted model")
            journal.quality("after_conversion", quality, step=None if recipe.distill_steps else 0)
    model = models.add_lora(model, recipe, handle, new_modules)
    if recipe.distill_steps and resumed is None:
        began = time.perf_counter()
        for stage in filter(None, (method_of(config).after_adapter for config in recipe.configs)):
            batches = drawn_batches(parts, recipe.distill_steps)
            stage(model, batches, recipe.distill_steps, recipe.distill_lr, journal.phase)
        journal.run["setup_s"] = journal.run.get("setup_s", 0.0) + time.perf_counter() - began
        quality = measure_quality(model, handle, parts, journal, "evaluating the distilled model")
        journal.quality("after_distillation", quality, step=0)
    return model, handle


def _about(parts: Parts) -> dict[str, Any]:
    """Entries of the sidecar that let `load` rebuild the model around an adapter."""
    recipe = parts.recipe
    return {
        "base_model": recipe.model,
        **({} if recipe.model_revision is None else {"base_revision": recipe.model_revision}),
        **{key: True for key in ("trust_remote_code", "load_in_4bit", "load_in_8bit") if getattr(recipe, key)},
        "task": recipe.task,
        "model_options": model_options(parts.config, task_of(recipe.task)),
        "fingerprint": recipe.fingerprint(),
    }
