"""What a run's memory is made of, as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsetrain.core.units import bytes_text
from sparsetrain.measure.called import called
from sparsetrain.measure.colours import part_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.markup import Bar, Bars
from sparsetrain.measure.schema import RUNS, Run

MEMORY_PARTS = ("libraries and data", "weights", "gradients", "optimizer", "saved activations", "rest")


def saved_by_component(runs: dict[str, Run]) -> Bars:
    """Saved activations of one step, stacked by component."""
    sides = {called(name, runs): runs[name] for name in RUNS if name in runs}
    rows = {name: saved for name, run in sides.items() if (saved := run.get("saved_activation_bytes"))}
    parts = [name for name in COMPONENTS if any(row.get(name) for row in rows.values())]
    return stacked(rows, parts, {})


def memory_parts(runs: dict[str, Run]) -> Bars:
    """What a process holds before its model, weights, gradients, optimizer state, saved activations and the rest, up to
    the measured peak."""
    sides = {called(name, runs): runs[name] for name in RUNS if name in runs}
    rows = {name: row for name, run in sides.items() if (row := memory_row(run))}
    peaks = {name: f"peak {bytes_text(row['peak'])}" for name, row in rows.items() if "peak" in row}
    parts = [part for part in MEMORY_PARTS if any(row.get(part) for row in rows.values())]
    sums = {name: bytes_text(sum(row.get(part, 0) for part in parts)) for name, row in rows.items()}
    return stacked(rows, parts, sums | peaks)


def stacked(rows: Mapping[str, Mapping[str, float]], parts: Sequence[str], said: Mapping[str, str]) -> Bars:
    """Rows of parts (label -> part -> length) and their legend. said: label -> words; else the sum in bytes."""
    drawn = [
        Bar(name, {part: row.get(part, 0) for part in parts}, said.get(name, bytes_text(sum(row.values()))))
        for name, row in rows.items()
    ]
    return Bars(drawn, {part: part_name(part) for part in parts})


def memory_row(run: Run) -> dict[str, int]:
    """Bytes by part, `peak` where it was measured, and `rest`: what the peak holds beyond the parts."""
    static = run.get("static_bytes") or {}
    row = {
        "libraries and data": 0 if run.get("peak_gpu_bytes") else run.get("resident_before") or 0,
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
