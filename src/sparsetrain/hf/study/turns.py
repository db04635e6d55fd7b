"""A side that trains in turns with another (`runs.turns`), in its own process.

It runs the ordinary `finetune` or `pretrain` with one more callback, which waits at the start of every step.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.hf.study.stage_trace import planned_stages
from sparsetrain.hf.train.jobs import JOBS
from sparsetrain.measure.memory import peak_memory
from sparsetrain.runs.quality import Quality
from sparsetrain.runs.sides import Line
from sparsetrain.runs.turns import ASKS, MEASURE, TURN

WORK = f"{__name__}:train_side"


def train_side(job: dict[str, Any], line: Line) -> None:
    """Train one side's recipe, in turns; the sparse side asks for the dense model's quality before it measures it.

    Args:
        job: {job, recipe, like}: a name of `JOBS`, the side's recipe, and the recipe of the comparison.
    """

    def ask() -> Quality | None:
        line.tell({"event": ASKS})
        known = line.wait()
        return None if known is None else Quality.from_dict(known)

    kind = JOBS[job["job"]]
    planned = {"forecast": planned_stages} if job["job"] == "pretrain" else {}
    kind.train(
        kind.recipe(**job["recipe"]),
        report=line.tell,
        callbacks=[_TurnCallback(line)],
        like=kind.recipe(**job["like"]),
        dense_quality=ask if job["recipe"]["methods"] else None,
        write=False,
        **planned,
    )


class _TurnCallback(TrainerCallback):
    """Gives the turn back at the start of each step, and waits for the next one. It must be the first callback."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._measure = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        peak = peak_memory(args.device)
        peaks = {"peak_rss_bytes": peak.rss_peak_bytes, "peak_gpu_bytes": peak.gpu_allocated_peak_bytes}
        self.line.tell({"event": TURN, "peaks": peaks})
        self._measure = self.line.wait() == MEASURE

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = self._measure
