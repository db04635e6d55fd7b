"""What a run records as it goes: its quality at every stage, its steps, its memory. Survives an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core.units import number_text
from sparsetrain.hf.train.callbacks import StepRecorder
from sparsetrain.hf.train.finite import auxiliary_losses
from sparsetrain.hf.train.tasks import training_loss
from sparsetrain.measure.curves import number
from sparsetrain.measure.ledger import size_text
from sparsetrain.measure.memory import peak_memory, saved_activations, static_memory
from sparsetrain.measure.schema import Run, StageCost, StageRecord
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.best import best_of, kept_step
from sparsetrain.runs.checkpoints import Checkpoint
from sparsetrain.runs.events import Event, Report
from sparsetrain.runs.quality import Quality
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import method_of


class Journal:
    """The records of one run, laid out as `measure.schema.Run`, and the notes made on the way.

    Args:
        report: told of everything that is recorded.
        resumed: the checkpoint that is continued; its records come first.

    `planned` may be set: what each stage was planned to take, as `planner.preview.StageForecast`.
    """

    def __init__(self, report: Report, resumed: Checkpoint | None = None) -> None:
        progress: dict[str, Any] = resumed.progress if resumed is not None else {}
        self._report = report
        self.run: Run = progress.get("run", {"steps": [], "evals": []})
        self.notes: list[str] = progress.get("notes", [])
        self.auxiliary: dict[str, dict[str, float]] = progress.get("auxiliary", {})
        self.recorder = StepRecorder(report, self.run["steps"])  # type: ignore[arg-type]
        self.run["steps"] = self.recorder.records  # type: ignore[typeddict-item]
        self.planned: Sequence[Mapping[str, Any]] = ()
        self._stage: int | None = None

    def opened(self, tokens_per_input: float) -> None:
        """The data are there, and no model yet: record what the process holds so far."""
        self.recorder.tokens_per_input = tokens_per_input
        self.run.setdefault("resident_before", peak_memory().rss_bytes)

    def report(self, event: Event) -> None:
        """Pass an event on; notes are kept for the report as well."""
        if event["event"] == "note" and event["text"] not in self.notes:
            self.notes.append(event["text"])
        self._report(event)

    def phase(self, name: str, share: float) -> None:
        self.report({"event": "phase", "name": name, "share": share})

    def stage(self, index: int, record: StageRecord, of: int) -> None:
        """Say that a stage begins or goes on, and record it once."""
        self._stage = index
        stages = self.run.setdefault("stages", [])
        stages[index:] = [record]
        told = {"name": record["name"], "index": index, "of": of, "size": size_text(record)}
        self.report({"event": "stage", **told})

    @contextmanager
    def switching(self) -> Iterator[None]:
        """Count what it takes to begin a stage, with its first step: that is no time between two trainings."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.recorder.before_step_s += took
        self.run["switch_s"] = self.run.get("switch_s", 0.0) + took

    def quality(self, stage: str, quality: Quality, *, step: int | None = None) -> None:
        """Record the held-out quality of a stage; with `step`, as a point of the curve too."""
        self.run["metric"] = quality.metric
        for name, value in quality.metrics.items():
            self.run.setdefault(name, {})[stage] = value  # type: ignore[misc]
        if step is not None:
            self.point(quality, step)
        event = {"stage": stage, "metric": quality.metric, "value": quality.value, "quality": quality.to_dict()}
        self.report({"event": "quality", **event})

    def point(self, quality: Quality, step: int) -> None:
        """Record a point of the held-out curve."""
        point: Any = {"step": step, "wall_s": self.recorder.wall_s, "loss": quality.loss, **quality.metrics}
        point |= {"by_row": dict(quality.by_row)} if quality.by_row else {}
        self.run.setdefault("evals", []).append(point)

    def peaks(self, device: torch.device) -> None:
        """Record the peak of memory since it was last reset; a continued run keeps the larger."""
        peak = peak_memory(device)
        for key, found in (("peak_rss_bytes", peak.rss_peak_bytes), ("peak_gpu_bytes", peak.gpu_allocated_peak_bytes)):
            before = self.run.get(key)
            if found is not None:
                self.run[key] = max(found, before or 0)  # type: ignore[literal-required]

    def between_steps(self, model: Any, optimizer: Any, handle: Handle | None) -> None:
        """Record what training holds between two steps, and the auxiliary losses of the last one, by site."""
        static = self.run["static_bytes"] = static_memory(model, optimizer).to_dict()
        self.auxiliary = auxiliary_losses(handle)
        if self._stage is not None:
            self._stage_cost(self._stage, static, next(model.parameters()).device)

    def _stage_cost(self, index: int, static: dict[str, int], device: torch.device) -> None:
        """Record what the stage holds; its gradients are freed between steps, and are as large as what they are of."""
        gradients = static["gradients"] or static["parameters_trainable"]
        cost: StageCost = {
            "static_bytes": static["total"] - static["gradients"] + gradients,
            "saved_bytes": sum(self.run.get("saved_activation_bytes", {}).values()),
            "peak_bytes": peak_memory(device).gpu_allocated_peak_bytes,
        }
        if index < len(self.planned):
            cost["planned"] = {key: self.planned[index][key] for key in ("time_s", *cost)}
        self.run.setdefault("stage_costs", [])[index:] = [cost]

    def progress(self, model: Any, optimizer: Any, handle: Handle | None) -> dict[str, Any]:
        """What a checkpoint stores, for `resumed` of a later run; all of the run's records after the last step."""
        self.between_steps(model, optimizer, handle)
        self.peaks(next(model.parameters()).device)
        return {"run": dict(self.run), "notes": list(self.notes), "auxiliary": self.auxiliary}

    def sparsity(self, handle: Handle | None) -> dict[str, Any]:
        """The report of a converted model, with the auxiliary losses of its last step."""
        if handle is None:
            return {}
        found = handle.report()
        for site, losses in self.auxiliary.items():
            found["stats"][site] = found["stats"].get(site, {}) | losses
        return found


class EvalCallback(TrainerCallback):
    """Evaluates every `eval_every` steps (0: never), and where a callback before it has asked for it, outside the timed
    part of a step.

    Args:
        recipe: whose `early_stopping` says when training ends, and `load_best_model_at_end` that a new best evaluation
            is a checkpoint.

    `log`, if it is set, is the Trainer's, which tells dashboards.
    """

    def __init__(self, evaluate_now: Callable[[int], Quality], journal: Journal, recipe: RunRecipe) -> None:
        self.evaluate_now, self.journal, self.recipe, self.best = evaluate_now, journal, recipe, best_of(recipe)
        self.log: Callable[[dict[str, float]], None] | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" not in (kwargs.get("logs") or {}):
            return
        every = self.recipe.eval_every
        due = control.should_evaluate or (every and state.global_step % every == 0)
        control.should_evaluate = False  # the Trainer has no rows of its own to evaluate on
        if due and state.global_step < state.max_steps:
            quality = self.evaluate_now(state.global_step)
            self.journal.point(quality, state.global_step)
            event = {"stage": f"step {state.global_step}", "metric": quality.metric, "value": quality.value}
            self.journal.report({"event": "quality", **event})
            if self.log is not None:
                self.log({"eval_loss": quality.loss, **{f"eval_{name}": x for name, x in quality.metrics.items()}})
            control.should_training_stop |= self._is_enough(state.global_step)
            control.should_save |= kept_step(self.recipe, self.journal.run.get("evals", [])) == state.global_step

    def _is_enough(self, step: int) -> bool:
        """Of the recorded curve alone, so that a continued run ends where an uninterrupted one does."""
        points = self.journal.run.get("evals", [])
        best = self.best.first(points)
        since = len(points) - 1 - best
        if not self.recipe.early_stopping or since < self.recipe.early_stopping:
            return False
        reached = number_text(number(points[best][self.best.metric]))
        low = f"the {self.best.text()}, {reached}, was that of step {points[best]['step']}"
        kept = "" if self.recipe.load_best_model_at_end else " The last weights are kept."
        text = f"Stopped early after step {step}: {low}, {since} evaluations ago.{kept}"
        self.journal.report({"event": "note", "text": text})
        return True


class SavedCallback(TrainerCallback):
    """Counts what a training forward keeps for its backward, as it is after the warm-up, when training begins."""

    def __init__(self, handle: Handle | None, sample: dict[str, Tensor], journal: Journal, task: str) -> None:
        self.handle, self.sample, self.journal, self.task = handle, sample, journal, task

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, device = kwargs["model"], args.device
        batch = {name: tensor.to(device) for name, tensor in self.sample.items()}
        model.train()
        if self.handle is not None:
            self.handle.settle()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            saved = saved_activations(model, lambda: training_loss(model, batch, self.task))
            notes = self._notes(model, batch)
        self.journal.run["saved_activation_bytes"] = dict(saved.by_component)
        self.journal.run["saved_by_layer"] = saved.by_layer
        for note in notes:
            self.journal.report({"event": "note", "text": note})

    def _notes(self, model: Any, batch: dict[str, Tensor]) -> list[str]:
        """What the methods measure of a step."""
        if self.handle is None:
            return []
        hooks = [hook for config in self.handle.configs if (hook := method_of(config).measure) is not None]
        return [note for hook in hooks for note in hook(self.handle, model, batch, saved_activations)]
