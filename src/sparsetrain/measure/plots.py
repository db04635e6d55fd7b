"""The report's plots, as PNG bytes. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsetrain.core.units import bytes_text, number_text, seconds_text
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.curves import Curve, eval_curve, smoothing_window, step_seconds, train_curve
from sparsetrain.measure.schema import RUNS, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"dense": "#6b7280", "sparse": "#0b66c3"}
PARTS = {
    "attention": "#0b66c3",
    "ffn": "#e07a1f",
    "norms": "#7a9e3e",
    "embedding": "#8e6bbf",
    "head_and_loss": "#c2407d",
    "adapters": "#14919b",
    "other": "#9aa3ad",
    "weights": "#34495e",
    "gradients": "#c2407d",
    "optimizer": "#8e6bbf",
    "saved activations": "#e07a1f",
    "rest": "#d5dae0",
}
MEMORY_PARTS = ("weights", "gradients", "optimizer", "saved activations", "rest")
_INK, _FAINT = "#1f2933", "#e4e7eb"


def loss_by_step(runs: dict[str, Run]) -> bytes:
    """Held-out loss (dots) over the smoothed training loss; without it, smoothed over raw training loss."""
    return _losses(runs, "step", "optimizer step", 1.0)


def loss_by_time(runs: dict[str, Run]) -> bytes:
    """The same over seconds of training, the sparse run's set-up included."""
    end = max((curve.x[-1] for run in runs.values() if (curve := train_curve(run, "wall_s")).x), default=0.0)
    minutes = end > 600
    return _losses(runs, "wall_s", f"time, {'minutes' if minutes else 'seconds'}", 60.0 if minutes else 1.0)


def step_times(runs: dict[str, Run]) -> bytes:
    """Seconds of every step, and each run's median."""
    figure, axes = _canvas()
    top = 0.0
    for name in _present(runs):
        records = runs[name]["steps"]
        times = [record["step_time_s"] for record in records]
        steps = [record["step"] for record in records]
        median = step_seconds(runs[name])
        if median is None:
            continue
        axes.plot(steps, times, color=COLOURS[name], alpha=0.5, linewidth=1)
        axes.plot([steps[0], steps[-1]], [median, median], color=COLOURS[name], linewidth=1.8)
        _label(axes, median, f"{name} {seconds_text(median)}", COLOURS[name])
        # one slow step (the first, a checkpoint) must not flatten the rest
        top = max(top, 1.6 * median, 1.1 * sorted(times)[int(0.95 * (len(times) - 1))])
    axes.set_ylim(0, top or None)
    _spread_labels(axes)
    return _finish(figure, axes, "optimizer step", "seconds per step")


def saved_by_component(runs: dict[str, Run]) -> bytes:
    """Saved activations of one step, stacked by component."""
    rows = {name: dict(saved) for name in _present(runs) if (saved := runs[name].get("saved_activation_bytes"))}
    return _stacked(rows, [name for name in COMPONENTS if any(row.get(name) for row in rows.values())], {})


def memory_parts(runs: dict[str, Run]) -> bytes:
    """Weights, gradients, optimizer state, saved activations and the rest, against the measured peak."""
    rows: dict[str, dict[str, int]] = {}
    peaks: dict[str, int] = {}
    for name in _present(runs):
        parts = memory_row(runs[name])
        if peak := parts.pop("peak", 0):
            peaks[name] = peak
        if parts:
            rows[name] = parts
    return _stacked(rows, [part for part in MEMORY_PARTS if any(row.get(part) for row in rows.values())], peaks)


def memory_row(run: Run) -> dict[str, int]:
    """Bytes by part, `peak` where it was measured, and `rest`: what the peak holds beyond the parts."""
    static = run.get("static_bytes") or {}
    row = {
        "weights": sum(static.get(key, 0) for key in ("parameters_trainable", "parameters_frozen", "buffers")),
        "gradients": static.get("gradients", 0),
        "optimizer": static.get("optimizer_trainable", 0) + static.get("optimizer_frozen", 0),
        "saved activations": sum((run.get("saved_activation_bytes") or {}).values()),
    }
    row = {part: num_bytes for part, num_bytes in row.items() if num_bytes}
    if peak := run.get("peak_gpu_bytes") or run.get("peak_rss_bytes"):
        # the parts need not be there at one time, so the peak may lie below their sum
        row["rest"] = max(0, peak - sum(row.values()))
        row["peak"] = peak
    return row


def curves(sites: Mapping[str, Sequence[tuple[float, float]]], y: str) -> bytes:
    """Something by step: each site faint, their mean strong. `sites`: site -> (step, value), at least one; y: what."""
    figure, axes = _canvas()
    for curve in sites.values():
        axes.plot([step for step, _ in curve], [rate for _, rate in curve], color=COLOURS["sparse"], alpha=0.3)
    together = list(zip(*sites.values()))
    steps = [rows[0][0] for rows in together]
    mean = [sum(rate for _, rate in rows) / len(rows) for rows in together]
    axes.plot(steps, mean, color=COLOURS["sparse"], linewidth=1.8)
    _label(axes, mean[-1], f"mean {number_text(mean[-1])}", COLOURS["sparse"])
    return _finish(figure, axes, "optimizer step", y)


def _losses(runs: dict[str, Run], by: str, xlabel: str, unit: float) -> bytes:
    figure, axes = _canvas()
    held_out = all(len(run.get("evals") or []) >= 2 for run in runs.values())
    seen: list[float] = []
    for name in _present(runs):
        raw, smooth = train_curve(runs[name], by), train_curve(runs[name], by, smoothing_window(runs[name]))
        main, faint = (eval_curve(runs[name], by), smooth) if held_out else (smooth, raw)
        colour = COLOURS[name]
        axes.plot(_scaled(faint, unit), faint.y, color=colour, alpha=0.35, linewidth=1)
        marker = "o" if held_out else ""
        axes.plot(_scaled(main, unit), main.y, color=colour, linewidth=1.8, marker=marker, markersize=4)
        if main.x and math.isfinite(main.y[-1]):
            _label(axes, main.y[-1], f"{name} {number_text(main.y[-1])}", colour)
        seen += [y for y in smooth.y + main.y if math.isfinite(y)]
    if seen:
        low, high = min(seen), max(seen)
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    if by == "wall_s":
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # the set-up before the first point is to be seen
    _spread_labels(axes)
    return _finish(figure, axes, xlabel, "loss, nats")


def _stacked(rows: dict[str, dict[str, int]], parts: list[str], peaks: dict[str, int]) -> bytes:
    """One horizontal bar a run; segments wide enough carry their bytes, the total stands at the end."""
    figure, axes = _canvas(height=1.5 + 0.75 * max(1, len(rows)))
    longest = max([sum(row.values()) for row in rows.values()] + list(peaks.values()), default=0) or 1
    scale, unit = (1024**3, "GiB") if longest >= 1024**3 else (1024**2, "MiB")
    for y, (name, row) in enumerate(rows.items()):
        left = 0.0
        for part in parts:
            width = row.get(part, 0)
            axes.barh(y, width / scale, left=left / scale, height=0.62, color=PARTS[part], edgecolor="white")
            if width > 0.11 * longest:
                ink = _INK if part == "rest" else "white"
                text = bytes_text(width)
                axes.text((left + width / 2) / scale, y, text, ha="center", va="center", color=ink, fontsize=8)
            left += width
        end = f"{bytes_text(left)}"
        if name in peaks:
            axes.plot([peaks[name] / scale] * 2, [y - 0.4, y + 0.4], color=_INK, linewidth=2)
            end = f"peak {bytes_text(peaks[name])}"
            left = max(left, peaks[name])
        axes.text((left + 0.012 * longest) / scale, y, end, va="center", fontsize=9, fontweight="bold", color=_INK)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.24 * longest / scale)
    handles: list[Any] = [axes.barh(0, 0, color=PARTS[part]) for part in parts]
    names, columns = [part_name(part) for part in parts], min(4, max(1, len(parts)))
    figure.legend(handles, names, loc="upper center", ncols=columns, frameon=False, fontsize=8.5)
    rows_of_legend = math.ceil(len(parts) / 4)
    height = figure.get_figheight()
    figure.subplots_adjust(top=1 - (0.12 + 0.24 * rows_of_legend) / height, bottom=0.55 / height, left=0.1, right=0.98)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=_FAINT)
    return _finish(figure, axes, unit, "")


def part_name(part: str) -> str:
    return "FFN" if part == "ffn" else part.replace("_", " ")


def _present(runs: dict[str, Run]) -> list[str]:
    return [name for name in RUNS if name in runs]


def _scaled(curve: Curve, unit: float) -> list[float]:
    return [x / unit for x in curve.x]


def _canvas(height: float = 3.5) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, height), dpi=160)
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.11, right=0.8, top=0.96, bottom=0.15)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_FAINT)
    return figure, axes


def _label(axes: Axes, y: float, text: str, colour: str) -> None:
    """A line's name and last value, in the right margin at the line's height."""
    axes.annotate(
        text,
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=9,
        fontweight="bold",
        annotation_clip=False,
    )


def _spread_labels(axes: Axes) -> None:
    """Move the two labels apart where they would lie over one another: 9 pt text needs 12 points."""
    if len(axes.texts) != 2:
        return
    below, above = sorted(axes.texts, key=lambda label: label.xy[1])  # type: ignore[attr-defined]
    low, high = axes.get_ylim()
    points = 0.81 * axes.figure.get_figheight() * 72 / (high - low)  # type: ignore[union-attr]
    missing = 12 - (above.xy[1] - below.xy[1]) * points  # type: ignore[attr-defined]
    if missing > 0:
        below.set_position((6, -missing / 2))
        above.set_position((6, missing / 2))


def _finish(figure: Figure, axes: Axes, xlabel: str, ylabel: str) -> bytes:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3ad")
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.set_xlabel(xlabel, fontsize=9.5, color=_INK)
    axes.set_ylabel(ylabel, fontsize=9.5, color=_INK)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
