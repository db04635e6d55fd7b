"""The plan as a picture: stacked bars of predicted peak memory, one for each way to train."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.core.files import scratch_file
from sparsetrain.measure.colours import COLOURS, light
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.planner.memory import PeakBytes
from sparsetrain.planner.search import Answer

GIGA = 1e9


def draw(answer: Answer, path: Path, *, title: str, limit: int | None) -> None:
    """Write a picture (PNG, SVG or PDF by its ending) of the rows that could be predicted.

    Args:
        limit: bytes at which a line is drawn.
    """
    from matplotlib.figure import Figure

    rows = [row for row in answer.rows if row.peak is not None]
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for name in ("weights", "optimizer", "gradients", *COMPONENTS, "temporary"):
        sizes = [_part(row.peak, name) / GIGA for row in rows]
        if max(sizes, default=0.0) > 0:
            label = name if name in ("weights", "optimizer", "gradients", "temporary") else f"saved: {name}"
            axes.barh(range(len(rows)), sizes, left=left, color=light(name if name in COLOURS else "rest"), label=label)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    picked = answer.picked
    names = [f"{row.candidate.label}{'  (take)' if row is picked else ''}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GB at the peak of a training step")
    axes.set_title(title, loc="left", fontsize=11)
    if limit is not None:
        axes.axvline(limit / GIGA, color="#a4211a", linewidth=1, linestyle="--")
    axes.legend(fontsize=8, frameon=False)
    with scratch_file(path) as scratch:
        figure.savefig(scratch, format=path.suffix[1:] or "png")


def _part(peak: PeakBytes | None, name: str) -> float:
    assert peak is not None
    fixed = {"weights": peak.parameters + peak.buffers, "optimizer": peak.optimizer, "gradients": peak.gradients}
    return fixed.get(name, peak.temporary if name == "temporary" else peak.saved.get(name, 0.0))
