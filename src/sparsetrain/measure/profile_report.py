"""A profile for people: lines for tables, one picture, and one HTML page. Sides are `Profile`s as plain values."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from sparsetrain.core.units import bytes_text, number_text, seconds_text
from sparsetrain.measure.colours import FAINT, INK, light, part_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.live import PARTS
from sparsetrain.measure.style import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sides = dict[str, dict[str, Any]]
Table = tuple[str, list[str], list[list[str]]]


def tables(sides: Sides, layers: bool = False) -> list[Table]:
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


def picture(sides: Sides) -> bytes:
    """A PNG: memory at the peak, saved activations and time as stacked bars, and live memory over the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.8), dpi=130)
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    at_peak = {name: side["live"]["peak"]["bytes_by_part"] for name, side in sides.items()}
    saved = {name: side["saved"]["by_component"] for name, side in sides.items()}
    times = {
        f"{name}\n{phase}": side["time"]["by_component"][phase]
        for name, side in sides.items()
        for phase in ("forward", "backward")
    }
    _bars(grid[0][0], "Tensors at the peak", at_peak, PARTS, 2**20, "MiB")
    _bars(grid[0][1], "Saved for the backward", saved, COMPONENTS, 2**20, "MiB")
    _bars(grid[1][0], "Time of a step", times, COMPONENTS, 1.0, "seconds")
    _timeline(grid[1][1], sides)
    figure.subplots_adjust(left=0.09, right=0.98, top=0.86, bottom=0.08, hspace=0.62, wspace=0.24)
    made = io.BytesIO()
    figure.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()


def _bars(
    axes: Axes,
    title: str,
    rows: dict[str, dict[str, Any]],
    parts: Iterable[str],
    unit: float,
    unit_name: str,
) -> None:
    shown = [part for part in parts if any(row.get(part) for row in rows.values())]
    longest = max((sum(row.values()) for row in rows.values()), default=0) or 1
    for y, row in enumerate(rows.values()):
        left = 0.0
        for part in shown:
            width = row.get(part, 0)
            axes.barh(
                y,
                width / unit,
                left=left / unit,
                height=0.62,
                color=_colour(part),
                edgecolor="white",
            )
            left += width
        axes.text((left + 0.01 * longest) / unit, y, number_text(left / unit, 3), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * longest / unit)
    handles: list[Any] = [axes.barh(0, 0, color=_colour(part)) for part in shown]
    names = [part_name(part) for part in shown]
    axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    _dress(axes, title, unit_name, 1.28 if len(shown) > 4 else 1.19)


def _colour(part: str) -> str:
    return light({"saved": "saved activations", "temporary": "rest"}.get(part, part))


def _timeline(axes: Axes, sides: Sides) -> None:
    """Live bytes of each side; where the backward begins is marked."""
    for name, side in sides.items():
        history = side["history"]
        moments = side["live"]["moments"]
        points = history or [(m["at_s"], sum(m["bytes_by_part"].values())) for m in moments]
        colour = light(name)
        axes.plot([s for s, _ in points], [held / 2**20 for _, held in points], color=colour, linewidth=1.4, label=name)
        begins = next((m["at_s"] for m in moments if m["phase"] == "backward"), None)
        if begins is not None and not history:
            axes.axvline(begins, color=colour, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    _dress(axes, "Live memory over the step (dotted: the backward begins)", "seconds, under the tracer", 1.18)
    axes.set_ylabel("MiB", fontsize=9)


def _dress(axes: Axes, title: str, xlabel: str, height: float) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.text(0, height, title, transform=axes.transAxes, fontsize=10.5, fontweight="bold", color=INK)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)


def page(title: str, sides: Sides, notes: list[str]) -> str:
    """One HTML file, nothing loaded from outside."""
    image = base64.b64encode(picture(sides)).decode()
    parts = [f'<section><figure><img alt="{escape(title)}" src="data:image/png;base64,{image}"></figure></section>']
    for name, columns, rows in tables(sides, layers=True):
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        parts.append(f'<section><h2>{escape(name)}</h2><div class="table">{table}</div></section>')
    parts.append("<section>" + "".join(f'<p class="note">{escape(note)}</p>' for note in notes) + "</section>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1></header>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
