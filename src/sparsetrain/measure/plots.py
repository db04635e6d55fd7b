"""The report's curves, as SVG that takes its colours from the page: text follows the reader's font and theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sparsetrain.measure.colours import css_name
from sparsetrain.measure.curves import eval_curve, smoothing_window, step_seconds, train_curve
from sparsetrain.measure.schema import RUNS, Run

FEW = 30
"""Points below which each is marked, and none is smoothed away."""
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 8, 40


@dataclass(frozen=True)
class Line:
    """A line of a chart, in the colour of a meaning. faint: behind the others."""

    meaning: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def loss_by_step(runs: dict[str, Run]) -> str:
    """Held-out loss over training loss, by optimizer step."""
    return chart(_losses(runs, "step", 1.0), "optimizer step", "loss, nats")


def loss_by_time(runs: dict[str, Run]) -> str:
    """The same over seconds of training, the sparse run's set-up included."""
    end = max((curve.x[-1] for run in runs.values() if (curve := train_curve(run, "wall_s")).x), default=0.0)
    unit, name = (60.0, "minutes") if end > 600 else (1.0, "seconds")
    # from 0 on: the set-up before the first point is to be seen
    return chart(_losses(runs, "wall_s", unit), f"time, {name}", "loss, nats", from_zero="x")


def loss_by_flops(runs: dict[str, Run]) -> str:
    """The same over FLOPs spent, the models of all stages charged; runs as of `ledger.charged`."""
    end = max((run["steps"][-1]["flops"] for run in runs.values() if run["steps"]), default=0.0)  # type: ignore
    unit, name = next((u, n) for u, n in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (0, "")) if end >= u)
    return chart(_losses(runs, "flops", unit or 1.0), f"training FLOPs spent, {name}", "loss, nats", from_zero="x")


def loss_by_tokens(runs: dict[str, Run]) -> str:
    """The same over tokens."""
    return chart(_losses(runs, "tokens_seen", 1e3), "thousand tokens", "loss, nats", from_zero="x")


def step_times(runs: dict[str, Run]) -> str:
    """Seconds of every step, and each run's median."""
    lines, top = [], 0.0
    for name in _present(runs):
        records, median = runs[name]["steps"], step_seconds(runs[name])
        if median is None:
            continue
        times = [record["step_time_s"] for record in records]
        steps = [float(record["step"]) for record in records]
        lines += [Line(name, steps, times, faint=True), Line(name, [steps[0], steps[-1]], [median, median])]
        # one slow step (the first, a checkpoint) must not flatten the rest
        top = max(top, 1.6 * median, 1.1 * sorted(times)[int(0.95 * (len(times) - 1))])
    return chart(lines, "optimizer step", "seconds per step", from_zero="y", top=top)


def _losses(runs: dict[str, Run], by: str, unit: float) -> list[Line]:
    held_out = has_held_out(runs)
    lines = []
    for name in _present(runs):
        run = runs[name]
        few = len(run["steps"]) < FEW
        raw = train_curve(run, by)
        smooth = raw if few else train_curve(run, by, smoothing_window(run))
        main, behind = (eval_curve(run, by), smooth) if held_out else (smooth, raw)
        for curve, faint in ((behind, True), (main, False)):
            if not faint or behind is not main:
                lines.append(Line(name, [x / unit for x in curve.x], curve.y, faint))
    return lines


def has_held_out(runs: dict[str, Run]) -> bool:
    """Each run was evaluated twice at least, so there are curves of it."""
    return all(len(run.get("evals") or []) >= 2 for run in runs.values())


def chart(lines: Sequence[Line], xlabel: str, ylabel: str, *, from_zero: str = "", top: float = math.inf) -> str:
    """Lines over two axes. `from_zero`: the axes, of "xy", that begin at 0; `top`: what is higher is cut off."""
    points = [p for line in lines for p in zip(line.x, line.y, strict=True) if all(map(math.isfinite, p))]
    if not points:
        return ""
    x_ticks = ticks(min([x for x, _ in points] + [0.0] * ("x" in from_zero)), max(x for x, _ in points))
    highest = min(max(y for _, y in points), top)
    y_ticks = ticks(min([y for _, y in points] + [0.0] * ("y" in from_zero)), highest)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]), (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - min(up, 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        (left, at), (right, _) = place(x_ticks[0], y), place(x_ticks[-1], y)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{tick_text(y, y_ticks)}</text>')
    for x in x_ticks:
        at, bottom = place(x, y_ticks[0])
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{tick_text(x, x_ticks)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>')
    for line in lines:
        parts.append(_drawn(line, place))
    label = escape(f"{ylabel} by {xlabel}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _drawn(line: Line, place) -> str:  # type: ignore[no-untyped-def]
    """A polyline with a gap where a value is not finite, and marks where points are few."""
    kind, pen, path, marks = css_name(line.meaning) + (" faint" if line.faint else ""), "M", "", ""
    few = 2 < len(line.x) < FEW or (len(line.x) <= 2 and not line.faint)
    for x, y in zip(line.x, line.y, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        across, down = place(x, y)
        path += f"{pen}{across:.1f} {down:.1f}"
        pen = "L"
        if few:
            marks += f'<circle class="dot {kind}" cx="{across:.1f}" cy="{down:.1f}" r="{2.5 if line.faint else 3.5}"/>'
    return f'<path class="line {kind}" d="{path}"/>{marks}'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at most `most`, the first at or below `low` and the last at or above `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [step * i for i in range(first, max(last, first + 1) + 1)]
    raise AssertionError("unreachable")


def tick_text(value: float, among: Sequence[float]) -> str:
    """With as many decimals as the distance of the ticks asks for."""
    decimals = max(0, -math.floor(math.log10(among[1] - among[0]) + 1e-9))
    return f"{value:,.{decimals}f}"


def _present(runs: dict[str, Run]) -> list[str]:
    return [name for name in RUNS if name in runs]
