"""One training run from a recipe to its output folder, whatever the job: what `finetune` and `pretrain` share.

Training is transformers' own Trainer; the same recipe, seed and machine give the same losses, also across an
interruption and `resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsetrain.hf.model import models
from sparsetrain.hf.model.io import save
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.callbacks import SparsityCallback
from sparsetrain.hf.train.checkpoint import CheckpointCallback, data_fingerprint
from sparsetrain.hf.train.evaluate import Quality, evaluate
from sparsetrain.hf.train.journal import EvalCallback, Journal, OrderedCollator, SavedCallback
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import first_batch
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import reset_peak, static_memory
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Run
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import Checkpoint, check_data, check_output, clear_interrupted, find_resumable
from sparsetrain.runs.events import Report
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.manifest import disk_errors, write_json
from sparsetrain.runs.pictures import illustrate
from sparsetrain.surgery.apply import Handle

KnownQuality = Quality | Callable[[], Quality | None] | None
"""The dense model's quality where another run has measured it; a function is asked when it is needed."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run did.

    run: quality by stage, steps, memory, as `measure.schema.Run`.
    saved: the folder of the adapter or model.
    data_order: a hash of the rows in the order they were trained on; None for a continued run.
    """

    recipe: RunRecipe
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

    title: str = ""

    @property
    def kind(self) -> str:
        """`sparse` or `dense`."""
        return "sparse" if self.recipe.methods else "dense"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in result.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"recipe": self.recipe.model_dump(mode="json"), "saved": str(self.saved), "kind": self.kind}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What differs between jobs.

    open_parts: (report) -> everything but the weights, checked against each other.
    build: (parts, journal, resumed, known dense quality) -> the converted model and its handle, None if dense.
    about: (parts) -> entries of the sidecar.
    title: what is trained, in a line.
    saved: the folder, inside the output, of what was trained.
    arguments: further arguments of the Trainer.
    callbacks: further callbacks, called before ours.
    """

    open_parts: Callable[[Report], Parts]
    build: Callable[[Parts, Journal, Checkpoint | None, KnownQuality], tuple[Any, Handle | None]]
    about: Callable[[Parts], dict[str, Any]]
    title: str
    saved: str
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[TrainerCallback, ...] = ()


def run(
    recipe: RunRecipe,
    job: Job,
    *,
    report: Report,
    callbacks: Iterable[TrainerCallback] = (),
    dense_quality: KnownQuality = None,
    write: bool = True,
) -> Result:
    """Train a recipe and write its output folder; arguments and errors as of `finetune`."""
    output = Path(recipe.output)
    check_output(output, resume=recipe.resume)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    resumed = find_resumable(output, recipe, report) if recipe.resume else None
    journal = Journal(report, resumed)
    parts = job.open_parts(journal.report)
    journal.recorder.tokens_per_input = parts.tokens_per_input
    rows = data_fingerprint(parts.bundle.train)
    if resumed is not None:
        check_data(resumed, rows)
    model, handle = job.build(parts, journal, resumed, dense_quality)
    about = job.about(parts)
    collator = OrderedCollator(parts.bundle.collate_fn)
    trainer = Trainer(
        model=model,
        args=assemble.training_arguments(parts, **job.arguments),
        train_dataset=parts.bundle.train,
        data_collator=collator,
        processing_class=parts.tokenizer,
        callbacks=[
            *callbacks,
            *job.callbacks,
            journal.recorder,
            EvalCallback(lambda: measure_quality(model, handle, parts), recipe.eval_every, journal),
            *([SavedCallback(handle, first_batch(parts), journal)] if resumed is None else []),
            *([_sparsity(handle, parts, journal, about)] if handle is not None else []),
            CheckpointCallback(recipe, rows, journal.progress, journal.report),  # completes what others wrote
        ],
    )
    trainer.remove_callback(PrinterCallback)
    _train(trainer, parts, resumed)
    journal.peaks(parts.device)
    optimizer: Any = trainer.optimizer
    journal.run["static_bytes"] = static_memory(model, optimizer).to_dict()
    trained = measure_quality(model, handle, parts, journal, "evaluating the trained model")
    journal.quality("after_training", trained, step=trainer.state.global_step)
    saved = output / job.saved
    save(model, handle, saved, tokenizer=parts.tokenizer, **about)
    total, trainable = models.num_parameters(model)
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
        title=job.title,
    )
    if write:
        write_report(run_report(result), output)
        illustrate(output, recipe.configs)
    write_json(output / RESULT, result.to_dict())  # last: it marks the run as finished
    return result


def run_report(result: Result) -> Any:
    """The `measure` report of a single run."""
    return build_report(
        title=result.title,
        runs={result.kind: result.run},
        recipe=result.recipe.model_dump(mode="json"),
        machine=result.machine,
        plan=result.plan,
        notes=[result.data, *result.notes],
    )


def _sparsity(handle: Handle, parts: Parts, journal: Journal, about: dict[str, Any]) -> SparsityCallback:
    def keep_peaks() -> None:
        journal.peaks(parts.device)

    return SparsityCallback(handle, at_end=False, report=journal.report, before_reset=keep_peaks, **about)


def _train(trainer: Trainer, parts: Parts, resumed: Checkpoint | None) -> None:
    output = Path(parts.recipe.output)
    with disk_errors(output):
        clear_interrupted(output)
        parts.recipe.to_yaml(output / "recipe.yaml")
        set_seed(parts.recipe.seed)
        reset_peak(parts.device)
        try:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.path))
        except BaseException:
            clear_interrupted(output)
            raise


def dense_start(known: KnownQuality, model: Any, parts: Parts, journal: Journal, name: str) -> Quality:
    """The dense model's quality: as known, or measured."""
    return (known() if callable(known) else known) or measure_quality(model, None, parts, journal, name)


def measure_quality(
    model: Any, handle: Handle | None, parts: Parts, journal: Journal | None = None, name: str = ""
) -> Quality:
    """The held-out quality; with a journal, its progress is told under `name`."""
    if handle is not None:
        handle.settle()  # past any warm-up: the quality is that of the sparse model; training sets its own step
    assert parts.bundle.eval is not None
    return evaluate(
        model,
        parts.bundle.eval,
        parts.bundle.collate_fn,
        task=parts.recipe.task,
        batch_size=parts.recipe.batch_size,
        max_tokens=None if parts.recipe.task == "image" else parts.recipe.eval_tokens,
        progress=None if journal is None else lambda share: journal.phase(name, share),
    )
