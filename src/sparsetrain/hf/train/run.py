"""One training run from a recipe to its output folder, whatever the job: what `finetune` and `pretrain` share.

Training is transformers' own Trainer; the same recipe, seed and machine give the same losses, also across an
interruption and `resume`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from sparsetrain.core import ranks
from sparsetrain.core.files import write_whole
from sparsetrain.data.digest import OrderedCollator, data_fingerprint
from sparsetrain.hf.model import models
from sparsetrain.hf.model.architectures import sequence_tokens
from sparsetrain.hf.model.io import save
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.average import Average
from sparsetrain.hf.train.best import take_best
from sparsetrain.hf.train.callbacks import SparsityCallback
from sparsetrain.hf.train.card import card_of
from sparsetrain.hf.train.checkpoint import CheckpointCallback, own_names, plain_states
from sparsetrain.hf.train.dashboards import tell_every
from sparsetrain.hf.train.finite import FiniteCallback
from sparsetrain.hf.train.held_out import KnownQuality, measure_quality
from sparsetrain.hf.train.job import Job as Job
from sparsetrain.hf.train.journal import EvalCallback, Journal, SavedCallback
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import first_batch
from sparsetrain.hf.train.samples import record_samples
from sparsetrain.hf.train.stages import StageCallback, enter_stage, leave_entry, load_weights
from sparsetrain.hf.train.tasks import use_task_loss
from sparsetrain.measure.ledger import size_of
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import reset_peak
from sparsetrain.measure.report import write_report
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import named, task_of
from sparsetrain.runs.checkpoints import Checkpoint, check_data, clear_interrupted, find_resumable
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.launch import check_same_model, claimed_once, shared_step
from sparsetrain.runs.layout import RECIPE, RESULT, checkpoint_folder
from sparsetrain.runs.manifest import disk_errors, write_json
from sparsetrain.runs.pictures import illustrate
from sparsetrain.runs.quality import Quality
from sparsetrain.runs.result import Result as Result
from sparsetrain.runs.result import run_report as run_report
from sparsetrain.runs.spans import Span, spans
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import method_of


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run that has been opened. rows: `data_fingerprint` of the training rows. callbacks: of the caller."""

    recipe: RunRecipe
    job: Job
    parts: Parts
    journal: Journal
    resumed: Checkpoint | None
    rows: str
    collator: OrderedCollator
    spans: tuple[Span, ...]
    callbacks: tuple[TrainerCallback, ...]
    average: Average | None

    @property
    def output(self) -> Path:
        return Path(self.recipe.output)

    @property
    def start(self) -> int:
        """Index of the stage in which this run starts."""
        return 0 if self.resumed is None else self.resumed.stage

    def arguments(self, handle: Handle | None = None) -> TrainingArguments:
        lr = assemble.learning_rate(self.recipe, handle)
        return assemble.training_arguments(self.parts, learning_rate=lr, **self.job.arguments)


def run(
    recipe: RunRecipe,
    job: Job,
    *,
    report: Report,
    callbacks: Iterable[TrainerCallback] = (),
    dense_quality: KnownQuality = None,
    write: bool = True,
    choice: Mapping[str, Any] | None = None,
) -> Result:
    """Train a recipe and write its output folder; arguments and errors as of `finetune`. Of several ranks the first one
    writes and tells, and each does all else."""
    with claimed_once(recipe, choice), disk_errors(recipe.output):
        course = _open(recipe, job, report if ranks.is_first() else silent, tuple(callbacks))
        model, handle, trainer = _train(course, dense_quality)
        result = _record(course, model, handle, trainer)
        if ranks.is_first():
            if write:
                write_report(run_report(result), course.output)
                illustrate(course.output, recipe.configs)
            write_json(course.output / RESULT, result.to_dict())  # last: it marks the run as finished
        ranks.wait()
    return result


def _open(recipe: RunRecipe, job: Job, report: Report, callbacks: tuple[TrainerCallback, ...]) -> Course:
    """Everything but the weights; nothing is written."""
    shared_step(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    resumed = ranks.by_first(lambda: find_resumable(recipe.output, recipe, report)) if recipe.resume else None
    if resumed is not None and not resumed.path.is_dir():
        raise ValueError(f"{resumed.path} is not there on every node. Put output on storage that all nodes share.")
    journal = Journal(report, resumed)
    parts = job.open_parts(journal.report)
    journal.opened(parts.tokens_per_input)
    rows = data_fingerprint(parts.bundle.train)
    ranks.check_same("set of training rows", rows, "Give all nodes the same data, and the same version of sparsetrain.")
    if resumed is not None:
        check_data(resumed, rows)
    journal.planned = [] if job.forecast is None else job.forecast(parts)
    return Course(
        recipe=recipe,
        job=job,
        parts=parts,
        journal=journal,
        resumed=resumed,
        rows=rows,
        collator=OrderedCollator(parts.bundle.collate_fn),
        spans=spans(job.stages, recipe, len(parts.bundle.train)),
        callbacks=callbacks,
        average=Average(recipe.averages) if recipe.averages else None,
    )


def _train(course: Course, dense_quality: KnownQuality) -> tuple[Any, Handle | None, Trainer | None]:
    """Train each stage that is left, from what the one before has left: (model, its handle, its Trainer). Where the
    last checkpoint is of the last step, nothing is left to train, and there is no Trainer."""
    resumed, trainer = course.resumed, None
    model, handle = course.job.build(course.parts, course.journal, resumed, dense_quality)
    if handle is not None and any(edit.replaces for edit in handle.plan.edits):
        handle.commit()  # a run never goes back, and the weights that were replaced need memory
    check_same_model(model, handle)
    if setup_s := course.journal.run.get("setup_s"):
        course.journal.report({"event": "setup", "seconds": setup_s})
    left = None if resumed is None else resumed.path
    if ranks.is_first():
        clear_interrupted(course.output)
        write_whole(course.output / RECIPE, course.recipe.to_yaml())
    ranks.wait()
    for span in course.spans[course.start :]:
        if span.index > course.start:
            assert course.job.enter is not None and left is not None
            trainer = None  # frees the optimizer of the stage before: its state is in the checkpoint
            with course.journal.switching():
                model, handle, left = enter_stage(
                    course.job.enter, span, course.parts, course.journal, model, handle, left, course.arguments()
                )
        elif resumed is not None and resumed.step >= span.last:
            load_weights(model, resumed.path)
            if course.average is not None:
                course.average.begin(model, handle, resumed.path)
            if span.last == span.total:
                leave_entry(course.output)
                _as_trained(course, handle)
            continue
        if span.of > 1:
            size = size_of(model, sequence_tokens(course.parts.config, course.recipe))
            course.journal.stage(span.index, span.record(size), span.of)
        if course.average is not None:  # each stage has a model of its own
            course.average.begin(model, handle, left if span.index == course.start else None)
        trainer = _trainer(course, span, model, handle)
        _train_stage(course, trainer, left)
        left = checkpoint_folder(course.output, span.last)
    return model, handle, trainer


def _as_trained(course: Course, handle: Handle | None) -> None:
    """Leave the methods' schedules where the last step of the whole run does."""
    if handle is not None:
        total = course.spans[-1].total
        for line in handle.step(total - 1, total):
            course.journal.report({"event": "note", "text": line})


def _trainer(course: Course, span: Span, model: Any, handle: Handle | None) -> Trainer:
    parts, journal = course.parts, course.journal
    about = course.job.about(parts)
    begins = course.resumed is None or span.index > course.start

    def progress(model: Any, optimizer: Any) -> dict[str, Any]:
        return journal.progress(model, optimizer, handle)

    evaluates = EvalCallback(lambda step: _measured(course, model, handle, step), journal, course.recipe)
    trainer = Trainer(
        model=model,
        args=course.arguments(handle),
        train_dataset=parts.bundle.trained_on,
        data_collator=course.collator,
        processing_class=None if task_of(course.recipe.task).images else parts.tokenizer,  # of rows of text
        callbacks=[
            *course.callbacks,
            *course.job.callbacks,
            FiniteCallback(handle),
            journal.recorder,
            *([course.average] if course.average is not None else []),
            evaluates,
            *([SavedCallback(handle, first_batch(parts), journal, course.recipe.task)] if begins else []),
            *([StageCallback(span)] if span.of > 1 else []),
            *([_sparsity(handle, parts, journal, about)] if handle is not None else []),
            # completes what others wrote
            CheckpointCallback(course.recipe, course.rows, progress, journal.report, span.place),
        ],
    )
    if trainer.args.report_to:
        evaluates.log = trainer.log
        tell_every(trainer, course.recipe.training.get("logging_steps", 1))
    trainer.remove_callback(PrinterCallback)
    use_task_loss(trainer, course.recipe.task)
    return trainer


def _train_stage(course: Course, trainer: Trainer, left: Path | None) -> None:
    """Train from a checkpoint, or from the start."""
    set_seed(course.recipe.seed)
    reset_peak(course.parts.device)
    try:
        with plain_states(left), own_names(trainer.model):
            trainer.train(resume_from_checkpoint=None if left is None else str(left))
    except BaseException:
        if ranks.is_first():
            clear_interrupted(course.output)
        leave_entry(course.output)
        raise
    course.journal.peaks(course.parts.device)


def _measured(course: Course, model: Any, handle: Handle | None, step: int) -> Quality:
    with nullcontext() if course.average is None else course.average.taken(model):
        return measure_quality(model, handle, course.parts, step=step)


def _record(course: Course, model: Any, handle: Handle | None, trainer: Trainer | None) -> Result:
    """Measure and save what was trained."""
    parts, journal, job = course.parts, course.journal, course.job
    if trainer is not None:
        journal.between_steps(model, trainer.optimizer, handle)
    if course.average is not None:
        course.average.take(model)
    last = course.spans[-1].total if trainer is None else trainer.state.global_step  # it may have ended early
    trained = measure_quality(model, handle, parts, journal, "evaluating the trained model", step=last)
    journal.point(trained, last)
    if (best := take_best(model, handle, course.average, course.recipe, journal)) is not None:
        trained = measure_quality(model, handle, parts, journal, "evaluating the best model", step=best)
    journal.quality("after_training", trained)
    if job.samples:
        record_samples(model, parts, journal)
    if (place := task_of(course.recipe.task).shows) is not None and ranks.is_first():
        journal.run.update(named(place)(model, parts, course.output, journal.report))
    saved, machine = course.output / job.saved, describe_machine().to_dict()
    if ranks.is_first():
        card = card_of(model, handle, parts, journal.run, course.rows, machine, job.saved == "adapter")
        save(model, handle, saved, tokenizer=parts.tokenizer, card=card, **job.about(parts))
        for leave in filter(None, (method_of(config).leave for config in (handle.configs if handle else ()))):
            for text in leave(handle, course.output):
                journal.report({"event": "note", "text": text})
    total, trainable = models.num_parameters(model)
    whole = course.resumed is None and len(course.spans) == 1 and ranks.total() == 1
    return Result(
        recipe=course.recipe,
        saved=saved,
        run=journal.run,
        data=parts.bundle.description,
        plan=parts.plan.rows() if parts.plan is not None else [],
        sparsity=journal.sparsity(handle),
        notes=[*dict.fromkeys((*journal.notes, *(handle.notes() if handle else ())))],
        parameters=total,
        trainable_parameters=trainable,
        data_order=course.collator.digest if whole else None,
        resumed_from=None if course.resumed is None else course.resumed.step,
        machine=machine,
        title=job.title,
    )


def _sparsity(handle: Handle, parts: Parts, journal: Journal, about: dict[str, Any]) -> SparsityCallback:
    def keep_peaks() -> None:
        journal.peaks(parts.device)

    return SparsityCallback(handle, at_end=False, report=journal.report, before_reset=keep_peaks, **about)
