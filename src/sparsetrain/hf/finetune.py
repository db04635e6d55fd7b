"""finetune(): one recipe, from the pretrained model to a saved adapter, with its quality on record at every stage.

load → dense quality → calibrate and convert → quality → LoRA → train → quality → save. Training is transformers' own
Trainer; the same recipe, seed and machine give the same losses, also across an interruption and `resume`.
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

from sparsetrain.hf import assemble, checkpoint
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.evaluate import Collate, Quality, evaluate
from sparsetrain.hf.io import quiet, save
from sparsetrain.hf.journal import Journal
from sparsetrain.hf.manifest import disk_errors, write_json
from sparsetrain.hf.recipe import Recipe
from sparsetrain.hf.sidecar import read_state
from sparsetrain.hf.trainer import Report, SparsityCallback, silent
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import reset_peak, saved_activations, static_memory
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Run
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.plan import plan


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
    output, device = Path(recipe.output), assemble.pick_device(recipe)
    checkpoint.check_output(output, resume=recipe.resume)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    resumed = checkpoint.find_resumable(output, recipe, report) if recipe.resume else None
    journal = Journal(report, resumed)
    path, config = assemble.open_config(recipe, journal.report, (like or recipe).configs)
    planned = None
    if recipe.methods:
        planned = plan(assemble.empty_model(config, recipe.task), *recipe.configs, seq_tokens=recipe.seq_len)
    tokenizer = assemble.open_tokenizer(path)
    bundle = assemble.load_rows(recipe, tokenizer, config, journal.report)
    rows = checkpoint.data_fingerprint(bundle.train)
    if resumed is not None:
        checkpoint.check_data(resumed, rows)

    journal.phase("loading the model", 0.0)
    model, new_modules = assemble.load_model(path, config, recipe, bundle, assemble.pick_dtype(recipe, device))
    model = model.to(device)
    if resumed is None:
        known = dense_quality or _evaluate(model, recipe, bundle, journal, "evaluating the dense model")
        journal.quality("dense", known, step=None if recipe.methods else 0)
    handle = _convert(model, recipe, bundle, journal, resumed) if recipe.methods else None
    model = assemble.add_lora(model, recipe, handle, new_modules)

    about = _about(recipe, config)
    order = _Order(bundle.collate_fn)
    sample = bundle.collate_fn([bundle.train[i] for i in range(min(recipe.batch_size, len(bundle.train)))])
    ours = [*callbacks, journal.recorder, _EvalCallback(lambda: _evaluate(model, recipe, bundle), recipe, journal)]
    if resumed is None:
        ours.append(_SavedCallback(handle, sample, journal))
    if handle is not None:
        ours.append(SparsityCallback(handle, at_end=False, **about))
    ours.append(checkpoint.CheckpointCallback(recipe, rows, journal.progress, journal.report))
    trainer = Trainer(
        model=model,
        args=assemble.training_arguments(recipe, device, output, "attention_mask" in sample),
        train_dataset=bundle.train,
        data_collator=order,
        callbacks=ours,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    _train(trainer, recipe, resumed, device)
    journal.peaks(device)
    assert trainer.optimizer is not None
    journal.run["static_bytes"] = static_memory(model, trainer.optimizer).to_dict()
    trained = _evaluate(model, recipe, bundle, journal, "evaluating the trained model")
    journal.quality("after_training", trained, step=trainer.state.global_step)
    saved = output / ("adapter" if recipe.lora_r > 0 else "model")
    save(model, handle, saved, tokenizer=tokenizer, **about)
    total, trainable = assemble.num_parameters(model)
    result = Result(
        recipe=recipe,
        saved=saved,
        run=journal.run,
        data=bundle.description,
        plan=planned.rows() if planned is not None else [],
        sparsity=handle.report() if handle is not None else {},
        notes=journal.notes,
        parameters=total,
        trainable_parameters=trainable,
        data_order=order.digest if resumed is None else None,
        resumed_from=None if resumed is None else resumed.step,
        machine=describe_machine().to_dict(),
    )
    if write:
        write_report(run_report(result), output)
    write_json(output / checkpoint.RESULT, result.to_dict())
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


def _convert(
    model: Any, recipe: Recipe, bundle: DataBundle, journal: Journal, resumed: checkpoint.Checkpoint | None
) -> Handle:
    """Convert the model and record its quality; a continued run rebuilds it from the checkpoint's state."""
    if resumed is not None:
        return sparsify(model, *recipe.configs, state=read_state(resumed.path), seed=recipe.seed)
    began = time.perf_counter()
    batches = assemble.calibration_batches(recipe, bundle)
    device = next(model.parameters()).device
    batches = None if batches is None else [{k: v.to(device) for k, v in batch.items()} for batch in batches]
    handle = sparsify(model, *recipe.configs, calibration=batches, seed=recipe.seed, progress=journal.phase)
    journal.run["setup_s"] = time.perf_counter() - began
    distilled = any(getattr(config, "distill_steps", 0) for config in recipe.configs)
    quality = _evaluate(model, recipe, bundle, journal, "evaluating the converted model")
    journal.quality("after_distillation" if distilled else "after_conversion", quality, step=0)
    return handle


def _train(trainer: Trainer, recipe: Recipe, resumed: checkpoint.Checkpoint | None, device: torch.device) -> None:
    output = Path(recipe.output)
    with disk_errors(output):
        checkpoint.clear_interrupted(output)
        recipe.to_yaml(output / "recipe.yaml")
        set_seed(recipe.seed)
        reset_peak(device)
        try:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.path))
        except BaseException:
            checkpoint.clear_interrupted(output)
            raise


def _evaluate(
    model: Any, recipe: Recipe, bundle: DataBundle, journal: Journal | None = None, name: str = ""
) -> Quality:
    assert bundle.eval is not None
    return evaluate(
        model,
        bundle.eval,
        bundle.collate_fn,
        task=recipe.task,
        batch_size=recipe.batch_size,
        max_tokens=recipe.eval_tokens,
        progress=None if journal is None else lambda share: journal.phase(name, share),
    )


def _about(recipe: Recipe, config: Any) -> dict[str, Any]:
    """Entries of the sidecar that let `load` rebuild the model around an adapter."""
    options: dict[str, Any] = {}
    if recipe.task == "classify":
        options = {"id2label": config.id2label, "label2id": config.label2id}
        options |= {"pad_token_id": config.pad_token_id, "ignore_mismatched_sizes": True}
    options |= {name: 0.0 for name in assemble.ATTENTION_DROPOUT if getattr(config, name, None) == 0.0}
    return {
        "base_model": recipe.model,
        "task": recipe.task,
        "model_options": options,
        "fingerprint": recipe.fingerprint(),
    }


class _EvalCallback(TrainerCallback):
    """Evaluates every `eval_every` steps, outside the timed part of a step."""

    def __init__(self, evaluate_now: Any, recipe: Recipe, journal: Journal) -> None:
        self.evaluate_now, self.every, self.journal = evaluate_now, recipe.eval_every, journal

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps
        if due and "loss" in (kwargs.get("logs") or {}):
            quality = self.evaluate_now()
            self.journal.point(quality, state.global_step)
            event = {"stage": f"step {state.global_step}", "metric": quality.metric, "value": quality.value}
            self.journal.report({"event": "quality", **event})


class _SavedCallback(TrainerCallback):
    """Counts what a training forward keeps for its backward, as it is after the warm-up, when training begins."""

    def __init__(self, handle: Handle | None, sample: dict[str, Tensor], journal: Journal) -> None:
        self.handle, self.sample, self.journal = handle, sample, journal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, device = kwargs["model"], args.device
        batch = {name: tensor.to(device) for name, tensor in self.sample.items()}
        model.train()
        if self.handle is not None:
            self.handle.step(state.max_steps, state.max_steps)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            saved = saved_activations(model, lambda: model(**batch).loss)
        self.journal.run["saved_activation_bytes"] = dict(saved.by_component)
        self.journal.run["saved_by_layer"] = saved.by_layer


class _Order:
    """A collator that hashes the rows it is given, so that two runs can be shown to have seen the same."""

    def __init__(self, collate_fn: Collate) -> None:
        self.collate_fn = collate_fn
        self._crc = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            self._crc = zlib.crc32(repr(list(row["input_ids"])).encode(), self._crc)
        return self.collate_fn(rows)

    @property
    def digest(self) -> str:
        return f"{self._crc:08x}"
