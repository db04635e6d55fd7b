"""Horizontal bars in HTML: they take the width that there is, and their text is text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from sparsetrain.core.units import bytes_text
from sparsetrain.measure.colours import css_name, part_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.schema import RUNS, Run

MEMORY_PARTS = ("weights", "gradients", "optimizer", "saved activations", "rest")


@dataclass(frozen=True)
class Bar:
    """One bar: a label, its parts (meaning -> length, in order), and its value in words."""

    label: str
    parts: Mapping[str, float] = field(default_factory=dict)
    value: str = ""

    @property
    def length(self) -> float:
        return sum(self.parts.values())


def bars(rows: Sequence[Bar]) -> str:
    """Bars below each other, from 0 to the longest."""
    longest = max((row.length for row in rows), default=0.0) or 1.0
    return "".join(_bar(row, longest) for row in rows)


def _bar(row: Bar, longest: float) -> str:
    segments = "".join(
        f'<i class="{css_name(meaning)}" style="width:{100 * length / longest:.2f}%"></i>'
        for meaning, length in row.parts.items()
        if length > 0
    )
    words = f"<div><span>{escape(row.label)}</span><b>{escape(row.value)}</b></div>"
    return f'<div class="bar-row">{words}<div class="track">{segments}</div></div>'


def legend(entries: Mapping[str, str]) -> str:
    """Meaning -> words, each behind a mark of its colour."""
    items = "".join(f'<li class="{css_name(meaning)}">{escape(text)}</li>' for meaning, text in entries.items())
    return f'<ul class="legend">{items}</ul>'


def saved_by_component(runs: dict[str, Run]) -> str:
    """Saved activations of one step, stacked by component."""
    rows = {name: saved for name in RUNS if name in runs and (saved := runs[name].get("saved_activation_bytes"))}
    parts = [name for name in COMPONENTS if any(row.get(name) for row in rows.values())]
    return _stacked({name: {part: row.get(part, 0) for part in parts} for name, row in rows.items()}, parts, {})


def memory_parts(runs: dict[str, Run]) -> str:
    """Weights, gradients, optimizer state, saved activations and the rest, up to the measured peak."""
    rows = {name: row for name in RUNS if name in runs and (row := memory_row(runs[name]))}
    peaks = {name: f"peak {bytes_text(row['peak'])}" for name, row in rows.items() if "peak" in row}
    parts = [part for part in MEMORY_PARTS if any(row.get(part) for row in rows.values())]
    return _stacked({name: {part: row.get(part, 0) for part in parts} for name, row in rows.items()}, parts, peaks)


def _stacked(rows: Mapping[str, Mapping[str, int]], parts: Sequence[str], said: Mapping[str, str]) -> str:
    drawn = [Bar(name, row, said.get(name, bytes_text(sum(row.values())))) for name, row in rows.items()]
    return bars(drawn) + legend({part: part_name(part) for part in parts})


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
