"""finetune(): one recipe, from the pretrained model to a saved adapter, with its quality on record at every stage.

load → dense quality → calibrate and convert → quality → LoRA → train → quality → save. Training is transformers' own
Trainer; the same recipe, seed and machine give the same losses, also across an interruption and `resume`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsetrain.hf import assemble, checkpoint
from sparsetrain.hf.assemble import Parts
from sparsetrain.hf.evaluate import Quality, evaluate
from sparsetrain.hf.io import quiet, save
from sparsetrain.hf.journal import EvalCallback, Journal, OrderedCollator, SavedCallback
from sparsetrain.hf.manifest import disk_errors, write_json
from sparsetrain.hf.recipe import Recipe
from sparsetrain.hf.sidecar import read_state
from sparsetrain.hf.trainer import Report, SparsityCallback, silent
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import reset_peak, static_memory
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Run
from sparsetrain.surgery.apply import Handle, sparsify


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run did.

    run: quality by stage, steps, memory, as `measure.schema.Run`.
    saved: the folder of the adapter or model.
    data_order: a hash of the rows in the order they were trained on; None for a continued run.
    """

    recipe: Recipe
    saved: Path
    run: Run
    data: str
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


@quiet()
def finetune(
    recipe: Recipe,
    *,
    report: Report = silent,
    callbacks: Iterable[TrainerCallback] = (),
    like: Recipe | None = None,
    dense_quality: Quality | None = None,
    write: bool = True,
) -> Result:
    """Train a recipe and write its output folder.

    `output` then holds `adapter/` (or `model/` when all weights were trained) with its sidecar, `checkpoint-N/`,
    `recipe.yaml`, `result.json` and, with `write`, `report.json` and `report.html`.

    Args:
        recipe: what to do; its `compare` is for `hf.compare`.
        report: told what happens, as it happens (events: see `hf.trainer`).
        callbacks: further callbacks of the Trainer, called before ours.
        like: a sparse recipe that this dense run is compared with; attention dropout is as there.
        dense_quality: of the pretrained model, where another run has measured it on the same rows.
        write: write the report.

    Raises:
        ValueError, PlanError: the recipe does not fit the model or the data; nothing was written.
        CheckpointError: `resume` without a checkpoint that can be continued.
        OSError: the disk is full; the last checkpoint is whole.
        RuntimeError: training diverged.
    """
    output = Path(recipe.output)
    checkpoint.check_output(output, resume=recipe.resume)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    resumed = checkpoint.find_resumable(output, recipe, report) if recipe.resume else None
    journal = Journal(report, resumed)
    parts = assemble.open_parts(recipe, journal.report, like)
    rows = checkpoint.data_fingerprint(parts.bundle.train)
    if resumed is not None:
        checkpoint.check_data(resumed, rows)
    model, handle = _build(parts, journal, resumed, dense_quality)
    about = _about(parts)
    collator = OrderedCollator(parts.bundle.collate_fn)
    trainer = Trainer(
        model=model,
        args=assemble.training_arguments(parts),
        train_dataset=parts.bundle.train,
        data_collator=collator,
        processing_class=parts.tokenizer,
        callbacks=[
            *callbacks,
            journal.recorder,
            EvalCallback(lambda: _evaluate(model, handle, parts), recipe.eval_every, journal),
            *([SavedCallback(handle, parts.sample, journal)] if resumed is None else []),
            *([SparsityCallback(handle, at_end=False, report=journal.report, **about)] if handle is not None else []),
            checkpoint.CheckpointCallback(
                recipe, rows, journal.progress, journal.report
            ),  # completes what others wrote
        ],
    )
    trainer.remove_callback(PrinterCallback)
    _train(trainer, parts, resumed)
    journal.peaks(parts.device)
    optimizer: Any = trainer.optimizer
    journal.run["static_bytes"] = static_memory(model, optimizer).to_dict()
    trained = _evaluate(model, handle, parts, journal, "evaluating the trained model")
    journal.quality("after_training", trained, step=trainer.state.global_step)
    saved = output / ("adapter" if recipe.lora_r > 0 else "model")
    save(model, handle, saved, tokenizer=parts.tokenizer, **about)
    total, trainable = assemble.num_parameters(model)
    result = Result(
        recipe=recipe,
        saved=saved,
        run=journal.run,
        data=parts.bundle.description,
        plan=parts.plan.rows() if parts.plan is not None else [],
        sparsity=handle.report() if handle is not None else {},
        notes=journal.notes,
        parameters=total,
        trainable_parameters=trainable,
        data_order=collator.digest if resumed is None else None,
        resumed_from=None if resumed is None else resumed.step,
        machine=describe_machine().to_dict(),
    )
    if write:
        write_report(run_report(result), output)
    write_json(output / checkpoint.RESULT, result.to_dict())  # last: it marks the run as finished
    return result


def run_report(result: Result) -> Any:
    """The `measure` report of a single run."""
    return build_report(
        title=title(result.recipe),
        runs={result.kind: result.run},
        recipe=result.recipe.model_dump(mode="json"),
        machine=result.machine,
        plan=result.plan,
        notes=[result.data, *result.notes],
    )


def title(recipe: Recipe) -> str:
    """What was trained, in a line."""
    methods = " + ".join(config.method for config in recipe.configs) or "dense"
    how = f"LoRA r={recipe.lora_r}" if recipe.lora_r else "all weights"
    return f"{recipe.model} on {recipe.data}, {methods}, {how}, {recipe.seq_len} tokens"


def _build(
    parts: Parts, journal: Journal, resumed: checkpoint.Checkpoint | None, dense_quality: Quality | None
) -> tuple[Any, Handle | None]:
    """The model, converted and with LoRA, its quality recorded at each stage; a continued run is rebuilt."""
    recipe = parts.recipe
    journal.phase("loading the model", 0.0)
    model, new_modules = assemble.load_model(parts)
    if new_modules:
        journal.report({"event": "note", "text": f"New in the model, and trained: {', '.join(new_modules)}."})
    if resumed is None:
        known = dense_quality or _evaluate(model, None, parts, journal, "evaluating the dense model")
        journal.quality("dense", known, step=None if recipe.methods else 0)
    handle = None
    if recipe.methods and resumed is not None:
        handle = sparsify(model, *recipe.configs, state=read_state(resumed.path), seed=recipe.seed)
    elif recipe.methods:
        began = time.perf_counter()
        batches = assemble.calibration_batches(parts)
        handle = sparsify(model, *recipe.configs, calibration=batches, seed=recipe.seed, progress=journal.phase)
        journal.run["setup_s"] = time.perf_counter() - began
        quality = _evaluate(model, handle, parts, journal, "evaluating the converted model")
        journal.quality("after_conversion", quality, step=0)
    return assemble.add_lora(model, recipe, handle, new_modules), handle


def _train(trainer: Trainer, parts: Parts, resumed: checkpoint.Checkpoint | None) -> None:
    output = Path(parts.recipe.output)
    with disk_errors(output):
        checkpoint.clear_interrupted(output)
        parts.recipe.to_yaml(output / "recipe.yaml")
        set_seed(parts.recipe.seed)
        reset_peak(parts.device)
        try:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.path))
        except BaseException:
            checkpoint.clear_interrupted(output)
            raise


def _evaluate(
    model: Any, handle: Handle | None, parts: Parts, journal: Journal | None = None, name: str = ""
) -> Quality:
    if handle is not None:
        handle.settle()  # past any warm-up: the quality is that of the sparse model; training sets its own step
    assert parts.bundle.eval is not None
    return evaluate(
        model,
        parts.bundle.eval,
        parts.bundle.collate_fn,
        task=parts.recipe.task,
        batch_size=parts.recipe.batch_size,
        max_tokens=parts.recipe.eval_tokens,
        progress=None if journal is None else lambda share: journal.phase(name, share),
    )


def _about(parts: Parts) -> dict[str, Any]:
    """Entries of the sidecar that let `load` rebuild the model around an adapter."""
    recipe, config = parts.recipe, parts.config
    options: dict[str, Any] = {name: 0.0 for name in assemble.ATTENTION_DROPOUT if getattr(config, name, None) == 0.0}
    if recipe.task == "classify":
        options |= {"id2label": config.id2label, "label2id": config.label2id}
        options |= {"pad_token_id": config.pad_token_id, "ignore_mismatched_sizes": True}
    return {
        "base_model": recipe.model,
        "task": recipe.task,
        "model_options": options,
        "fingerprint": recipe.fingerprint(),
    }
