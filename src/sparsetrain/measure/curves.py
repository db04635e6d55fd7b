"""Loss curves read off a run: by step, by time, smoothed, interpolated."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetrain.measure.schema import Run


@dataclass(frozen=True)
class Curve:
    """y over increasing x."""

    x: list[float]
    y: list[float]

    def at(self, x: float) -> float | None:
        """Linear interpolation; None before the first point or after the last."""
        if not self.x or not self.x[0] <= x <= self.x[-1]:
            return None
        i = bisect_left(self.x, x)
        if self.x[i] == x:
            return self.y[i]
        share = (x - self.x[i - 1]) / (self.x[i] - self.x[i - 1])
        return self.y[i - 1] + share * (self.y[i] - self.y[i - 1])


def number(value: float | None) -> float:
    """The value, NaN for null."""
    return math.nan if value is None else float(value)


def setup_seconds(run: Run) -> float:
    return float(run.get("setup_s") or 0.0)


def run_seconds(run: Run) -> float:
    """Set-up and training: what a run has taken in all."""
    return setup_seconds(run) + (run["steps"][-1]["wall_s"] if run["steps"] else 0.0)


def eval_curve(run: Run, by: str) -> Curve:
    """Held-out loss by "step" or another key of a point, or by "wall_s" with the set-up included."""
    offset = setup_seconds(run) if by == "wall_s" else 0.0
    points = run.get("evals") or []
    return Curve([point[by] + offset for point in points], [number(point["loss"]) for point in points])


@dataclass(frozen=True)
class HeldOut:
    """A held-out loss at `x`, a step or seconds. by_row: as of `EvalPoint`. at_end: of a run that was over then."""

    x: float
    loss: float
    by_row: dict[str, list[float]]
    at_end: bool
    step: int


def held_out_at(run: Run, by: str, x: float) -> HeldOut | None:
    """The held-out loss of a run at `x`: of the first evaluation after it, where that is near; else on the line between
    two that are near. None where the run was evaluated at neither time: a straight line over half a run would make the
    loss of a run that learns fast at first look worse than it was.

    Near: within a twentieth of `x` or one and a half steps after it, a tenth before it, or two fifths between the two.
    """
    points, curve = run.get("evals") or [], eval_curve(run, by)
    after = bisect_left(curve.x, x)
    if after == len(points):
        return None
    last = run["steps"][-1]["step"] if run["steps"] else 0
    gap = curve.x[after] - x
    # an evaluation that is due at a time falls behind the step in which it passes
    a_step = 1.0 if by == "step" else step_seconds(run) or 0.0
    if gap <= max(0.05 * x, 1.5 * a_step) or curve.x[after] == x:
        point = points[after]
        return HeldOut(curve.x[after], curve.y[after], point.get("by_row") or {}, point["step"] >= last, point["step"])
    if after == 0 or not (x - curve.x[after - 1] <= 0.1 * x or curve.x[after] - curve.x[after - 1] <= 0.4 * x):
        return None
    share = (x - curve.x[after - 1]) / (curve.x[after] - curve.x[after - 1])
    left, right = (points[i].get("by_row") or {} for i in (after - 1, after))
    rows = {name: [a + share * (b - a) for a, b in zip(left[name], right[name])] for name in left.keys() & right.keys()}
    loss = curve.at(x)
    assert loss is not None
    return HeldOut(x, loss, rows, False, points[after - 1]["step"])


def train_curve(run: Run, by: str, window: int = 1) -> Curve:
    """Training loss by "step", "wall_s" or another key of a step, each point the mean of the last `window` steps."""
    offset = setup_seconds(run) if by == "wall_s" else 0.0
    records = run["steps"]
    losses = [number(record["loss"]) for record in records]
    return Curve([record[by] + offset for record in records], trailing_mean(losses, window))


def smoothing_window(run: Run) -> int:
    """A fifth of the run, at most 20 steps: the loss of one batch says little."""
    return max(1, min(20, len(run["steps"]) // 5))


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    means = []
    for i in range(len(values)):
        last = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(last) / len(last))
    return means


def loss_curves(runs: dict[str, Run], by: str) -> tuple[dict[str, Curve], str]:
    """The curves to compare the runs by, and what they show: held-out loss where every run has it, else training."""
    if all(len(run.get("evals") or []) >= 2 for run in runs.values()):
        return {name: eval_curve(run, by) for name, run in runs.items()}, "held-out loss"
    window = min(smoothing_window(run) for run in runs.values())
    curves = {name: train_curve(run, by, window) for name, run in runs.items()}
    return curves, f"training loss (mean of the last {window} steps)" if window > 1 else "training loss"


def step_seconds(run: Run) -> float | None:
    """Median time of a step, the first left out where there are more: it allocates, and compiles on a GPU."""
    times = [record["step_time_s"] for record in run["steps"]]
    return statistics.median(times[1:] or times) if times else None


def tokens_per_second(run: Run) -> float | None:
    """Tokens over time, the first step left out where there are more."""
    records = run["steps"][1:] or run["steps"]
    seconds = sum(record["step_time_s"] for record in records)
    return sum(record["tokens"] for record in records) / seconds if seconds else None
