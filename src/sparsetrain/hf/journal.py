"""What a run records as it goes: its quality at every stage, its steps, its memory. Survives an interruption."""

from __future__ import annotations

from typing import Any

import torch

from sparsetrain.hf.checkpoint import Checkpoint
from sparsetrain.hf.evaluate import Quality
from sparsetrain.hf.trainer import Event, Report, StepRecorder
from sparsetrain.measure.memory import peak_memory
from sparsetrain.measure.schema import Run


class Journal:
    """The records of one run, laid out as `measure.schema.Run`, and the notes made on the way.

    Args:
        report: told of everything that is recorded.
        resumed: the checkpoint that is continued; its records come first.
    """

    def __init__(self, report: Report, resumed: Checkpoint | None = None) -> None:
        progress: dict[str, Any] = resumed.progress if resumed is not None else {}
        self._report = report
        self.run: Run = progress.get("run", {"steps": [], "evals": []})
        self.notes: list[str] = progress.get("notes", [])
        self.recorder = StepRecorder(report, self.run["steps"])  # type: ignore[arg-type]
        self.run["steps"] = self.recorder.records  # type: ignore[typeddict-item]

    def report(self, event: Event) -> None:
        """Pass an event on; notes are kept for the report as well."""
        if event["event"] == "note" and event["text"] not in self.notes:
            self.notes.append(event["text"])
        self._report(event)

    def phase(self, name: str, share: float) -> None:
        self.report({"event": "phase", "name": name, "share": share})

    def quality(self, stage: str, quality: Quality, *, step: int | None = None) -> None:
        """Record the held-out quality of a stage; with `step`, as a point of the curve too."""
        self.run.setdefault(quality.metric, {})[stage] = quality.value  # type: ignore[misc]
        if step is not None:
            self.point(quality, step)
        event = {"stage": stage, "metric": quality.metric, "value": quality.value, "quality": quality.to_dict()}
        self.report({"event": "quality", **event})

    def point(self, quality: Quality, step: int) -> None:
        """Record a point of the held-out curve."""
        point: Any = {"step": step, "wall_s": self.recorder.wall_s, "loss": quality.loss, quality.metric: quality.value}
        self.run.setdefault("evals", []).append(point)

    def peaks(self, device: torch.device) -> None:
        """Record the peak of memory since it was last reset; a continued run keeps the larger."""
        peak = peak_memory(device)
        for key, found in (("peak_rss_bytes", peak.rss_peak_bytes), ("peak_gpu_bytes", peak.gpu_allocated_peak_bytes)):
            before = self.run.get(key)
            if found is not None:
                self.run[key] = max(found, before or 0)  # type: ignore[literal-required]

    def progress(self) -> dict[str, Any]:
        """What a checkpoint stores, for `resumed` of a later run."""
        return {"run": dict(self.run), "notes": list(self.notes)}
