"""A profile for people: lines for tables, one picture, and one HTML page. Sides are `Profile`s as plain values."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsetrain.core.units import bytes_text, number_text, seconds_text
from sparsetrain.measure.bars import stacked
from sparsetrain.measure.colours import INK, light, part_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.live import PARTS
from sparsetrain.measure.markup import Figure, Group, Section, Table, Text, document
from sparsetrain.measure.plots import Line, chart, draw_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sides = dict[str, dict[str, Any]]
Parts = dict[str, dict[str, float]]
Rows = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


def tables(sides: Sides, layers: bool = False) -> list[Rows]:
    """(title, columns, rows): memory held, saved activations and time by component, and by layer if asked."""
    names = list(sides)
    found = [
        ("Memory", ["what", *names], _memory_rows(sides)),
        ("Saved for the backward, by component", ["component", *names], _saved_rows(sides)),
        (
            "Time of a step, by component",
            ["component", *(f"{name} {phase}" for name in names for phase in ("forward", "backward"))],
            _time_rows(sides),
        ),
    ]
    if layers:
        columns = ["layer", *(f"{name} {what}" for name in names for what in ("saved", "forward", "backward"))]
        found.append(("By layer", columns, _layer_rows(sides)))
    return found


def _memory_rows(sides: Sides) -> list[list[str]]:
    def row(label: str, value: Any) -> list[str]:
        return [label, *(bytes_text(value(side)) for side in sides.values())]

    static = ("parameters_frozen", "parameters_trainable", "buffers", "gradients")
    rows = [row(name.replace("_", ", "), lambda side, name=name: side["static"][name]) for name in static]
    rows += [
        row("optimizer state", lambda s: s["static"]["optimizer_trainable"] + s["static"]["optimizer_frozen"]),
        row("saved activations", lambda s: s["saved"]["total"]),
        row("temporary, at most", lambda s: s["live"]["temporary_peak_bytes"]),
        row("peak of all tensors", lambda s: sum(s["live"]["peak"]["bytes_by_part"].values())),
    ]
    rows.append(["  reached in", *(_where(side["live"]) for side in sides.values())])
    if any(side["process"]["gpu_allocated_peak_bytes"] for side in sides.values()):
        rows.append(row("peak allocated on the GPU", lambda s: s["process"]["gpu_allocated_peak_bytes"]))
        rows.append(row("peak reserved on the GPU", lambda s: s["process"]["gpu_reserved_peak_bytes"]))
    rows.append(row("process before the step", lambda s: s.get("resident_before")))
    rows.append(row("process, peak resident", lambda s: s["process"]["rss_peak_bytes"]))
    return rows


def _where(live: dict[str, Any]) -> str:
    layer = "" if live["peak_layer"] is None else f" of layer {live['peak_layer']}"
    return f"{live['peak']['phase']}, {part_name(live['peak_component'])}{layer}"


def _saved_rows(sides: Sides) -> list[list[str]]:
    rows = []
    for part in COMPONENTS:
        values = [side["saved"]["by_component"][part] for side in sides.values()]
        if any(values):
            rows.append([part_name(part), *map(bytes_text, values)])
    return [*rows, ["all", *(bytes_text(side["saved"]["total"]) for side in sides.values())]]


def _time_rows(sides: Sides) -> list[list[str]]:
    times = [side["time"] for side in sides.values()]
    rows = []
    for part in COMPONENTS:
        values = [time["by_component"][phase][part] for time in times for phase in ("forward", "backward")]
        if any(values):
            rows.append([part_name(part), *map(seconds_text, values)])
    sums = [time["by_phase"][phase] for time in times for phase in ("forward", "backward")]
    rows.append(["all", *map(seconds_text, sums)])
    rows.append(["optimizer", *(text for time in times for text in (seconds_text(time["by_phase"]["optimizer"]), ""))])
    return [*rows, ["step", *(text for time in times for text in (seconds_text(time["step_s"]), ""))]]


def _layer_rows(sides: Sides) -> list[list[str]]:
    layers = sorted({int(layer) for side in sides.values() for layer in side["time"]["by_layer"]})
    rows = []
    for layer in layers:
        row = [str(layer)]
        for side in sides.values():
            saved, time = (_by_layer(side[key]["by_layer"], layer) for key in ("saved", "time"))
            row.append(bytes_text(sum(saved.values())))
            row += [seconds_text(time.get(phase)) for phase in ("forward", "backward")]
        rows.append(row)
    return rows


def _by_layer(values: dict[Any, dict[str, Any]], layer: int) -> dict[str, Any]:
    return values.get(layer) or values.get(str(layer)) or {}  # JSON makes the keys text


@dataclass(frozen=True)
class Stack:
    """Stacked bars: label -> part -> value; `text` says a sum, and axes and their labels count in `unit`s."""

    title: str
    rows: Parts
    parts: Sequence[str]
    text: Callable[[Any], str]
    unit: tuple[float, str]


def _stacks(sides: Sides) -> list[Stack]:
    """What is drawn of each side, parts by the names of their colours."""
    at_peak: Parts = {name: side["live"]["peak"]["bytes_by_part"] for name, side in sides.items()}
    saved: Parts = {name: side["saved"]["by_component"] for name, side in sides.items()}
    phases = [(name, phase) for name in sides for phase in ("forward", "backward")]
    times = {f"{name}, {phase}": sides[name]["time"]["by_component"][phase] for name, phase in phases}
    colours = {"saved": "saved activations", "temporary": "rest"}
    held = {name: {colours.get(part, part): size for part, size in row.items()} for name, row in at_peak.items()}
    mib = (2.0**20, "MiB")
    found = [
        Stack("Tensors at the peak", held, [colours.get(part, part) for part in PARTS], bytes_text, mib),
        Stack("Saved for the backward", saved, COMPONENTS, bytes_text, mib),
        Stack("Time of a step", times, COMPONENTS, seconds_text, (1.0, "seconds")),
    ]
    return [replace(each, parts=_used(each)) for each in found]


def _used(stack: Stack) -> list[str]:
    return [part for part in stack.parts if any(row.get(part) for row in stack.rows.values())]


def _course(sides: Sides) -> list[Line]:
    """Live MiB of each side over the traced step."""
    lines = []
    for name, side in sides.items():
        points = side["history"] or [(m["at_s"], sum(m["bytes_by_part"].values())) for m in side["live"]["moments"]]
        lines.append(Line(name, [at for at, _ in points], [held / 2**20 for _, held in points]))
    return lines


def page(title: str, sides: Sides, notes: list[str]) -> str:
    """One HTML file, nothing loaded from outside."""
    figures = []
    for each in _stacks(sides):
        sums = {name: each.text(sum(row.values())) for name, row in each.rows.items()}
        figures.append(Figure(each.title, stacked(each.rows, each.parts, sums), ""))
    course = chart(_course(sides), COURSE[1], "MiB", from_zero="y")
    figures.append(Figure(COURSE[0], course, "MiB of all tensors.", {name: name for name in sides}))
    sections = [Section("Where it goes", "pictures", [Group("figures", figures)])]
    for number, (name, columns, rows) in enumerate(tables(sides, layers=True)):
        sections.append(Section(name, f"table-{number}", [Table(columns, rows, "numbers")]))
    sections.append(Section("Notes", "notes", [Text(note, "note") for note in notes]))
    return document(title, "sparsetrain profile of one step", sections)


COURSE = ("Live memory over the step", "seconds, under the tracer")


def picture(sides: Sides) -> bytes:
    """The page's figures as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    sheet = Sheet(figsize=(12, 7.8), dpi=130, layout="constrained")
    FigureCanvasAgg(sheet)  # no pyplot: nothing global is touched
    *places, last = sheet.subplots(2, 2).flat
    for axes, stack in zip(places, _stacks(sides), strict=True):
        _draw_stack(axes, stack)
    draw_lines(last, _course(sides), COURSE[1], "MiB", from_zero="y")
    last.legend(list(sides), frameon=False, fontsize=8)
    last.set_title(COURSE[0], loc="left", color=INK)
    made = io.BytesIO()
    sheet.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()


def _draw_stack(axes: Axes, stack: Stack) -> None:
    (unit, unit_name), ends = stack.unit, [0.0] * len(stack.rows)
    for part in stack.parts:
        widths = [row.get(part, 0) / unit for row in stack.rows.values()]
        axes.barh(list(stack.rows), widths, left=ends, color=light(part), edgecolor="white", label=part_name(part))
        ends = [end + width for end, width in zip(ends, widths)]
    for y, end in enumerate(ends):
        axes.text(end, y, f" {number_text(end, 3)}", va="center", fontsize=8.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(ends) or 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.set_xlabel(unit_name, color=INK)
    axes.set_title(stack.title, loc="left", color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=6, frameon=False, fontsize=8, columnspacing=1)
