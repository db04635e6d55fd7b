"""finetune(): one recipe, from the pretrained model to a saved adapter, with its quality on record at every stage.

load -> dense quality -> calibrate and convert -> quality -> LoRA -> train -> quality -> save. Training is transformers'
own Trainer; the same recipe, seed and machine give the same losses, also across an interruption and `resume`.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsetrain.hf.assemble import (
    add_lora,
    calibration_batches,
    empty_model,
    load_model,
    load_rows,
    num_parameters,
    open_config,
    open_tokenizer,
    pick_device,
    pick_dtype,
    training_arguments,
)
from sparsetrain.hf.checkpoint import (
    RESULT,
    Checkpoint,
    CheckpointCallback,
    check_data,
    check_output,
    clear_interrupted,
    data_fingerprint,
    find_resumable,
)
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.evaluate import Quality, evaluate
from sparsetrain.hf.io import save
from sparsetrain.hf.manifest import disk_errors, write_json
from sparsetrain.hf.recipe import Recipe
from sparsetrain.hf.sidecar import read_state
from sparsetrain.hf.trainer import Event, Report, SparsityCallback, StepRecorder, silent
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import peak_memory, reset_peak, saved_activations, static_memory
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Run
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.plan import plan


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run did. `run` is laid out as `measure.schema.Run`; `saved` is the folder of the adapter or model."""

    recipe: Recipe
    saved: Path
    run: Run
    description: str
    plan: list[dict[str, Any]]
    sparsity: dict[str, Any]
    notes: list[str]
    parameters: int
    trainable_parameters: int
    data_order: str | None
    resumed_from: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`sparse` or `dense`."""
        return "sparse" if self.recipe.methods else "dense"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in result.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"recipe": self.recipe.model_dump(mode="json"), "saved": str(self.saved), "kind": self.kind}


def finetune(
    recipe: Recipe,
    *,
    report: Report = silent,
    callbacks: Iterable[TrainerCallback] = (),
    dense_quality: dict[str, Any] | None = None,
    sparse_attention: bool = False,
    write: bool = True,
) -> Result:
    """Train a recipe and write its output folder.

    `output` then holds: `adapter/` or `model/` (the trained weights and their sidecar), `checkpoint-N/`, `recipe.yaml`,
    `result.json` and, with `write`, `report.json` and `report.html`.

    Args:
        recipe: what to do; its `compare` is ignored here (see `hf.compare`).
        report: told what happens, as it happens (see `hf.trainer`).
        callbacks: further callbacks for the Trainer, called before ours.
        dense_quality: `Quality.to_dict()` of the pretrained model, if another run has measured it on the same rows.
        sparse_attention: turn attention dropout off as for sparse attention, for a dense run to compare with one.
        write: write the report.

    Raises:
        ValueError, PlanError: the recipe does not fit the model or the data; nothing is written.
        CheckpointError: `resume` without a checkpoint that can be continued.
        OSError: the disk is full; the last checkpoint is whole.
        RuntimeError: training diverged.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run = _Run(recipe, report)
    output = Path(recipe.output)
    check_output(output, resume=recipe.resume)
    device = pick_device(recipe)
    run.resumed = find_resumable(output, recipe, run.report) if recipe.resume else None
    path, config = open_config(recipe, run.report, recipe.configs or _attention_only(sparse_attention))
    planned = plan(empty_model(config, recipe.task), *recipe.configs, seq_tokens=recipe.seq_len) if recipe.methods else None
    tokenizer = open_tokenizer(path)
    bundle = load_rows(recipe, tokenizer, config, run.report)
    data = data_fingerprint(bundle.train)
    if run.resumed is not None:
        check_data(run.resumed, data)
        run.continue_from(run.resumed)

    run.phase("loading the model", 0.0)
    model, new_modules = load_model(path, config, recipe, bundle, pick_dtype(recipe, device))
    model = model.to(device)
    if run.resumed is None:
        run.dense_quality(model, bundle, dense_quality)
    handle = _convert(model, run, bundle, device) if recipe.methods else None
    model = add_lora(model, recipe, handle, new_modules)
    if recipe.gradient_checkpointing != "none" and recipe.lora_r > 0:
        model.enable_input_require_grads()  # reentrant checkpointing sees no trainable input otherwise

    order = _Order(bundle.collate_fn)
    about = _about(recipe, bundle, config)
    recorder = StepRecorder(run.report, run.run["steps"])  # type: ignore[arg-type]
    run.run["steps"] = recorder.records  # type: ignore[typeddict-item]
    sample = bundle.collate_fn([bundle.train[i] for i in range(min(recipe.batch_size, len(bundle.train)))])
    arguments = training_arguments(recipe, device, output, "attention_mask" in sample)
    ours: list[TrainerCallback] = [*callbacks, recorder, _EvalCallback(run, recorder, bundle)]
    if handle is not None:
        ours.append(SparsityCallback(handle, at_end=False, **about))
    ours.append(CheckpointCallback(recipe, data, lambda: run.progress(recorder), run.report))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=bundle.train, data_collator=order, callbacks=ours,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if "saved_activation_bytes" not in run.run:
        run.measure_saved(model, handle, sample, device)

    clear_interrupted(output)
    recipe.to_yaml(output / "recipe.yaml")
    set_seed(recipe.seed)
    reset_peak(device)
    _train(trainer, run.resumed, output)
    run.peaks(device)
    run.run["static_bytes"] = static_memory(model, trainer.optimizer)  .to_dict()
    run.trained_quality(model, bundle, recorder)
    saved = output / ("adapter" if recipe.lora_r > 0 else "model")
    save(model, handle, saved, tokenizer=tokenizer, **about)
    parameters, trainable = num_parameters(model)
    result = Result(
        recipe=recipe,
        saved=saved,
        run=run.run,
        description=bundle.description,
        plan=planned.rows() if planned is not None else [],
        sparsity=handle.report() if handle is not None else {},
        notes=run.notes,
        parameters=parameters,
        trainable_parameters=trainable,
        data_order=None if run.resumed is not None else order.digest,
        resumed_from=None if run.resumed is None else run.resumed.step,
        machine=describe_machine().to_dict(),
    )
    if write:
        write_report(result_report(result), output)
    write_json(output / RESULT, result.to_dict())
    return result
