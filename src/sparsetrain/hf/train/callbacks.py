"""Callbacks for transformers' Trainer: schedules and sidecar, and a record of every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core import ranks
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.units import bytes_text
from sparsetrain.hf.model.any_trainer import drives
from sparsetrain.hf.train.checks import (
    asked_of_trainer,
    check_arguments,
    check_forwards,
    check_reference,
    check_trainable,
)
from sparsetrain.hf.train.continued import continued, note_where_states_are_read, taken_from
from sparsetrain.measure.memory import peak_memory, reset_peak
from sparsetrain.runs.events import Report, log_note, silent
from sparsetrain.runs.layout import checkpoint_folder
from sparsetrain.runs.sidecar import SIDECAR, write_sidecar
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.buckets import GradientBuckets
from sparsetrain.surgery.support import check_support, features_of


class SparsityCallback(TrainerCallback):
    """Drives a converted model's schedules and keeps its sidecar with every checkpoint.

    The schedule is a function of `state.global_step` alone, so a resumed run continues it. A Trainer has one by itself
    (`hf.model.any_trainer`); with options, pass it: `Trainer(model, callbacks=[handle.callback(report=…)], ...)`. A run
    that goes on from a checkpoint, or ends with its best one, goes on with the patterns, permutations and masks of that
    checkpoint.

    Args:
        handle: what `sparsify` returned.
        asked_for: it goes before the one that a Trainer has by itself.
        at_end: write the sidecar into `output_dir` at the end of training, where no saved model has brought its own.
        report: told, as notes (by default logged), what the methods say at the start, what one changed for good, and
            the peak of memory before and after it: it counts from the last change, since a dense phase would hide it.
        before_reset: called at a change, before the peak starts anew.
        about: entries for the sidecar.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        asked_for: bool = True,
        at_end: bool = True,
        report: Report = log_note,
        before_reset: Callable[[], None] = lambda: None,
        **about: Any,
    ) -> None:
        self.handle, self.at_end, self.asked_for = handle, at_end, asked_for
        note_where_states_are_read()
        handle.about.update(about)  # whoever saves the model writes them
        self.report, self.before_reset = report, before_reset
        self._restarted: int | None = None
        self._peak_before: int | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        drives(control, self.handle, self, asked_for=self.asked_for)
        self._check_asked(args, kwargs)  # when the trainer is made, not after its rows were prepared

    def _check_asked(self, args: TrainingArguments, given: dict[str, Any]) -> None:
        asked = asked_of_trainer(args) | features_of(given.get("model") or self.handle.model)
        check_support(self.handle.configs, self.handle.anatomy, asked)
        check_arguments(self.handle, args)
        check_reference(self.handle, args, given.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        drives(control, self.handle, self, asked_for=self.asked_for)
        self._check_asked(args, kwargs)
        check_forwards(self.handle)
        check_trainable(self.handle)
        for _, site in self.handle.installed:
            site.trained_with(args)
        if args.fp16 and not args.max_grad_norm and self.handle.adjusts_gradients:
            raise ValueError(
                "fp16 without clipping leaves the gradients scaled until the optimizer step, and a method adds a decay "
                "to them. Set max_grad_norm, train in bf16, or set the method's decay to 0."
            )
        for note in continued(self.handle, args, state) if state.global_step > 0 else ():
            self.report({"event": "note", "text": note})
        self._restarted = None  # a Trainer makes its schedule anew for each run
        self._reducer = GradientBuckets(kwargs["model"])
        self._step(args, state, kwargs)
        for note in self.handle.notes():
            self.report({"event": "note", "text": note})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step(args, state, kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle.adjust_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs.get("optimizer")
        self.handle.updated(None if optimizer is None else float(optimizer.param_groups[0]["lr"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = checkpoint_folder(args.output_dir, state.global_step)
        model = kwargs.get("model", self.handle.model)
        written = hasattr(model, "save_pretrained") and (folder / SIDECAR).is_file()
        # a checkpoint of a model that is deployed dense holds what it goes on with, too
        if ranks.is_first() and (self.handle.deploys_dense or not written):
            write_sidecar(folder, model, self.handle, **self.handle.about)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        after = _peak(args.device)
        if self._peak_before is not None and after is not None:
            text = f"Peak memory: {bytes_text(self._peak_before)} before the change, {bytes_text(after)} after it."
            self.report({"event": "note", "text": text})
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and Path(best).is_dir():
            for note in taken_from(self.handle, Path(best)):  # the Trainer has loaded its weights
                self.report({"event": "note", "text": note})
        self.handle.settle()
        if self.at_end and ranks.is_first() and args.output_dir and not (Path(args.output_dir) / SIDECAR).is_file():
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_sidecar(args.output_dir, kwargs.get("model", self.handle.model), self.handle, **self.handle.about)

    def _step(self, args: TrainingArguments, state: TrainerState, given: dict[str, Any]) -> None:
        # said, and not left to the gradient of the model's loss: a trainer may compute its loss from logits
        scheduler, scale = given.get("lr_scheduler"), gradient_scale(given.get("optimizer"))
        changes = self.handle.step(state.global_step, state.max_steps, scale / args.gradient_accumulation_steps)
        for line in changes:
            self.report({"event": "note", "text": line})
        if changes:
            self._reducer.rebuild()
            self.before_reset()
            before = _peak(args.device)
            self._peak_before = before if reset_peak(args.device) else None
        at = self.handle.restart_step
        if at is not None and at != self._restarted:
            restart_schedule(scheduler, at, state.global_step)
            self._restarted = at


class Sparsifies(SparsityCallback):
    """Converts the model of a trainer that somebody else makes and gives callbacks to (LLaMA-Factory's `run_exp`).

    Args:
        configs: the recipe.
        options: as of `sparsify`.
    """

    def __init__(self, *configs: MethodConfig, **options: Any) -> None:
        self._configs, self._options = configs, options

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().__init__(sparsify(kwargs["model"], *self._configs, **self._options))
        super().on_init_end(args, state, control, **kwargs)


def gradient_scale(optimizer: Any) -> float:
    """What a gradient scaler multiplies the loss by (fp16); 1 without one. accelerate keeps it with the optimizer."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def _peak(device: torch.device) -> int | None:
    found = peak_memory(device)
    return found.gpu_allocated_peak_bytes or found.rss_peak_bytes


def restart_schedule(scheduler: Any, at: int, step: int) -> None:
    """Let a learning-rate schedule count from step `at`: its factor at step s becomes that of step s - at.

    Raises:
        ValueError: the schedule is not a function of the step alone.
    """
    while hasattr(scheduler, "scheduler"):  # as accelerate holds it
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"restart_lr needs a schedule that is a function of the step, and this run has {type(scheduler).__name__}. "
            "Use the Trainer's linear, cosine or constant schedule, or set restart_lr=False."
        )

    def counted_from(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda s: factor(s - at if s >= at else s)

    # a plain function, so that the scheduler's state dict leaves it out and stays loadable
    scheduler.lr_lambdas = [counted_from(factor) for factor in scheduler.lr_lambdas]
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


class StepRecorder(TrainerCallback):
    """Records every optimizer step: loss, time, tokens, memory. Evaluation, saving and waiting are not in the times.

    Needs `logging_steps=1` and `include_num_input_tokens_seen`.

    Args:
        report: told of each step.
        records: the steps of the run that is continued.
    """

    def __init__(self, report: Report = silent, records: list[dict[str, Any]] | None = None) -> None:
        self.report = report
        self.records: list[dict[str, Any]] = list(records or [])
        self.tokens_per_input = 1.0  # the Trainer counts numbers of the main input: an image's are its pixels
        self.before_step_s = 0.0  # training time outside steps, counted in `wall_s` with the next one
        self._began = self._seconds = 0.0
        self._tokens_before = 0

    @property
    def wall_s(self) -> float:
        """Training time so far."""
        return self.records[-1]["wall_s"] if self.records else 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens_before = int(state.num_input_tokens_seen)
        self._began = _now(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds = _now(args.device) - self._began

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        memory = peak_memory(args.device)
        record = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "step_time_s": self._seconds,
            "tokens": round((int(state.num_input_tokens_seen) - self._tokens_before) * self.tokens_per_input),
            "wall_s": self.wall_s + self._seconds + self.before_step_s,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "memory_bytes": memory.gpu_allocated_peak_bytes or memory.rss_bytes,
        }
        self.before_step_s = 0.0
        self.records.append(record)
        self.report({"event": "step", "steps": state.max_steps, **record})


def _now(device: torch.device) -> float:
    """The clock, read when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
