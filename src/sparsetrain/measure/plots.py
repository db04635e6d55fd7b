"""The report's curves as SVG, whose colours and font are those of the page: it follows the reader's theme."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from sparsetrain.measure.colours import COLOURS, FAINT, INK, css_name, light
from sparsetrain.measure.curves import eval_curve, smoothing_window, step_seconds, train_curve
from sparsetrain.measure.schema import RUNS, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 30
"""Points below which each is marked, and none is smoothed away."""
WIDTH, HEIGHT = 400, 236


@dataclass(frozen=True)
class Line:
    """A line of a chart, in the colour of a meaning. faint: behind the others."""

    meaning: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def loss_by_step(runs: dict[str, Run]) -> Markup:
    """Held-out loss over training loss, by optimizer step."""
    return chart(_losses(runs, "step", 1.0), "optimizer step", "loss, nats")


def loss_by_time(runs: dict[str, Run]) -> Markup:
    """The same over seconds of training, the sparse run's set-up included."""
    end = max((curve.x[-1] for run in runs.values() if (curve := train_curve(run, "wall_s")).x), default=0.0)
    unit, name = (60.0, "minutes") if end > 600 else (1.0, "seconds")
    # from 0 on: the set-up before the first point is to be seen
    return chart(_losses(runs, "wall_s", unit), f"time, {name}", "loss, nats", from_zero="x")


def loss_by_flops(runs: dict[str, Run]) -> Markup:
    """The same over FLOPs spent, the models of all stages charged; runs as of `ledger.charged`."""
    end = max((run["steps"][-1]["flops"] for run in runs.values() if run["steps"]), default=0.0)  # type: ignore
    unit, name = next((u, n) for u, n in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (0, "")) if end >= u)
    return chart(_losses(runs, "flops", unit or 1.0), f"training FLOPs spent, {name}", "loss, nats", from_zero="x")


def loss_by_tokens(runs: dict[str, Run]) -> Markup:
    """The same over tokens."""
    return chart(_losses(runs, "tokens_seen", 1e3), "thousand tokens", "loss, nats", from_zero="x")


def step_times(runs: dict[str, Run]) -> Markup:
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


def chart(lines: Sequence[Line], xlabel: str, ylabel: str, *, from_zero: str = "", top: float = math.inf) -> Markup:
    """Lines over two axes, as SVG; nothing where no point is finite. Arguments as of `draw_lines`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not any(math.isfinite(x) and math.isfinite(y) for line in lines for x, y in zip(line.x, line.y, strict=True)):
        return Markup("")
    # text as text; equal parts have equal names in every chart of a page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsetrain", "font.size": 12}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        figure.patch.set_visible(False)
        draw_lines(figure.add_subplot(), lines, xlabel, ylabel, from_zero=from_zero, top=top)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = out.getvalue().partition("<svg ")[2].partition(">")[2]
    for name, (bright, _) in COLOURS.items():
        drawn = drawn.replace(bright, f"var(--{css_name(name)})")
    drawn = drawn.replace(INK, "var(--soft)").replace(FAINT, "var(--line)")
    label = escape(f"{ylabel} by {xlabel}")
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{drawn}')


def draw_lines(
    axes: Axes, lines: Sequence[Line], xlabel: str, ylabel: str, *, from_zero: str = "", top: float = math.inf
) -> None:
    """Lines with a gap where a value is not finite, and marks where points are few.

    Args:
        from_zero: the axes, of "xy", that begin at 0. top: what is higher is cut off.
    """
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT)
    axes.tick_params(length=0, labelcolor=INK)
    axes.locator_params(nbins=6)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    for line in lines:
        few = 2 < len(line.x) < FEW or (len(line.x) <= 2 and not line.faint)
        y = [value if math.isfinite(value) else math.nan for value in line.y]
        drawn = axes.plot(line.x, y, color=light(line.meaning), marker="o" if few else "", clip_on=math.isfinite(top))[
            0
        ]
        drawn.set(linewidth=1.2 if line.faint else 2, alpha=0.4 if line.faint else 1)
        drawn.set(markersize=4 if line.faint else 6, gid=css_name(line.meaning) + ("-faint" if line.faint else ""))
    if math.isfinite(top):
        axes.set_ylim(top=min(top, axes.get_ylim()[1]))
    if "x" in from_zero:
        axes.set_xlim(left=0)
    if "y" in from_zero:
        axes.set_ylim(bottom=0)


def _present(runs: dict[str, Run]) -> list[str]:
    return [name for name in RUNS if name in runs]
