"""Who learned more: held-out loss at equal steps and at equal time, and the quality after training.

The rows that both were evaluated on decide, pair by pair; the models are the deployed ones. Where an earlier version or
a task recorded no rows, a margin stands in, and the text says so.
"""

from __future__ import annotations

import math
from typing import Any

from sparsetrain.core.metrics import METRICS, TIE_LOSS, Metric
from sparsetrain.core.units import number_text, seconds_text
from sparsetrain.measure.curves import HeldOut, held_out_at, loss_curves, number, run_seconds, setup_seconds
from sparsetrain.measure.intervals import mean_interval
from sparsetrain.measure.judgement import judgement
from sparsetrain.measure.schema import Judgement, Run

Rows = dict[str, list[float]]


def equal_steps(runs: dict[str, Run]) -> Judgement | None:
    curves, what = loss_curves(runs, "step")
    if not all(curve.x for curve in curves.values()):
        return None
    step = min(curve.x[-1] for curve in curves.values())
    if what == "held-out loss":
        d, s = (held_out_at(runs[name], "step", step) for name in ("dense", "sparse"))
        if d is None or s is None:
            return None
        return _held_out("loss_at_equal_steps", d, s, f"Held-out loss after {step:.0f} steps")
    values = [curves[name].at(step) for name in ("dense", "sparse")]
    if values[0] is None or values[1] is None:
        return None
    text = f"{what[0].upper()}{what[1:]} after {step:.0f} steps: {number_text(values[1])} sparse, "
    text += f"{number_text(values[0])} dense{_difference(values[1] - values[0])}; there is no held-out loss."
    return judgement("loss_at_equal_steps", "nats", values[0], values[1], text, margin=TIE_LOSS)


def equal_time(runs: dict[str, Run]) -> Judgement | None:
    """Where the shorter run ends: what it came to, beside what the longer one was then."""
    if not all(len(run.get("evals") or []) >= 2 and run["steps"] for run in runs.values()):
        return None
    ends = {name: run_seconds(run) for name, run in runs.items()}
    shorter = min(ends, key=lambda name: ends[name])
    longer = "sparse" if shorter == "dense" else "dense"
    setup, end = setup_seconds(runs["sparse"]), ends[shorter]
    included = f", {seconds_text(setup)} of set-up included" if setup else ""
    at = {name: held_out_at(run, "wall_s", end) for name, run in runs.items()}
    d, s, other = at["dense"], at["sparse"], at[longer]
    if d is not None and s is not None:
        # a run that is still on its way has yet to lower its learning rate, and a run planned for the time would have
        under_way = ""
        if other is not None and not other.at_end:
            of = f"step {other.step} of {runs[longer]['steps'][-1]['step']}"
            under_way = f" The {longer} run was in the middle of its schedule then, at {of}."
        return _held_out("loss_at_equal_time", d, s, f"Held-out loss after {seconds_text(end)}{included}", under_way)
    short, began = at[shorter], setup_seconds(runs[longer])
    if short is not None and end < began:
        late = f"before the {longer} run had begun ({seconds_text(began)} of set-up)"
        text = f"The {shorter} run was over ({seconds_text(end)}) {late}."
        values = {shorter: short.loss, longer: math.nan}
        return judgement("loss_at_equal_time", "nats", values["dense"], values["sparse"], text)
    text = (
        f"Held-out loss at equal time is not known: the {longer} run was not evaluated near {seconds_text(end)}. "
        "Evaluate more often (--eval-every)."
    )
    return judgement("loss_at_equal_time", "nats", math.nan, math.nan, text)


def _held_out(quantity: str, dense: HeldOut, sparse: HeldOut, what: str, after: str = "") -> Judgement:
    d, s = dense.loss, sparse.loss
    interval = _rows_interval(dense.by_row, sparse.by_row, "loss")
    sure = _no_interval(f"{TIE_LOSS} nats") if interval is None else f", {_between(interval, '+.3f')}"
    text = f"{what}: {number_text(s)} sparse, {number_text(d)} dense{_difference(s - d)}{sure}.{after}"
    return judgement(quantity, "nats", d, s, text, margin=TIE_LOSS, interval=interval)


def _rows_interval(dense: Rows, sparse: Rows, column: str) -> tuple[float, float] | None:
    """Of the mean of sparse - dense over the same held-out rows; None where they are not the same, or too few."""
    if column not in dense or column not in sparse or dense["count"] != sparse["count"]:
        return None
    return mean_interval([s - d for s, d in zip(sparse[column], dense[column], strict=True)], dense["count"])


def quality(dense: Run, sparse: Run) -> Judgement | None:
    """The metric that the runs' task is judged by; the first of the table where an earlier version did not say it."""
    said = sparse.get("metric")
    for name in [said] if said in METRICS else METRICS:
        d, s = (_stage(run, name) for run in (dense, sparse))
        if d is None or s is None:
            continue
        metric = METRICS[name]
        rows = [((run.get("evals") or [{}])[-1].get("by_row") or {}) for run in (dense, sparse)]  # type: ignore[typeddict-item]
        interval = _rows_interval(rows[0], rows[1], "loss" if metric.of_loss else name)
        apart = _apart(metric, d, s, interval)
        text = f"{metric.title} after training: {metric.text(s)} sparse, {metric.text(d)} dense{apart}."
        more = metric.more_is_better
        return judgement("quality", name, d, s, text, margin=metric.margin(d), interval=interval, more_is_better=more)
    return None


def _apart(metric: Metric, dense: float, sparse: float, interval: tuple[float, float] | None) -> str:
    """How far apart, and how surely: in per cent where it follows from the loss, else in the metric's own unit."""
    ratio = sparse / dense if dense else math.nan
    by = "" if metric.is_share or not math.isfinite(ratio) else f" ({ratio - 1:+.1%})"
    if interval is None:
        margin = f"{metric.tie:.1%}" + (" points" if metric.is_share else "")
        return by + (_no_interval(margin) if math.isfinite(sparse) and math.isfinite(dense) else "")
    if metric.of_loss is not None:
        interval = (math.expm1(interval[0]), math.expm1(interval[1]))
    return f"{by}, {_between(interval, '+.1%' if metric.of_loss or metric.is_share else '+.4g')}"


def _between(interval: tuple[float, float], form: str) -> str:
    return f"95% interval {interval[0]:{form}} to {interval[1]:{form}} over the held-out rows"


def _no_interval(margin: str) -> str:
    return f" (too few rows for an interval: up to {margin} is a tie)"


def _stage(run: Run, metric: str) -> float | None:
    """The metric after training: from the stages, else from the last evaluation; NaN where it diverged."""
    stages: dict[str, Any] = run.get(metric) or {}  # type: ignore[assignment]
    if "after_training" in stages:
        return number(stages["after_training"])
    evals = run.get("evals") or []
    return number(evals[-1][metric]) if evals and metric in evals[-1] else None


def _difference(value: float) -> str:
    return f" ({value:+.3f})" if math.isfinite(value) else ""
