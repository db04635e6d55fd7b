"""report.html: one file, nothing loaded from outside, every text escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from sparsetrain.core.metrics import METRICS, TIE_ACCURACY, TIE_LOSS
from sparsetrain.core.units import bytes_text, seconds_text
from sparsetrain.measure import plots
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.curves import setup_seconds, step_seconds, tokens_per_second
from sparsetrain.measure.judge import LABELS, TIE_BYTES, TIE_TIME
from sparsetrain.measure.schema import RUNS, STAGES, Report, Run
from sparsetrain.measure.style import STYLE

_WON = {"sparse": "sparse wins", "dense": "dense wins", "tie": "tie", "unknown": "unknown"}
_STAGE_NAMES = {
    "dense": "Dense model, before anything",
    "untrained": "Random weights",
    "after_conversion": "After conversion",
    "after_distillation": "After distillation",
    "after_training": "After training",
}


def render_page(report: Report) -> str:
    """The whole page as text."""
    runs = report["runs"]
    sections = [
        _verdict(report),
        _curves(runs),
        _memory(runs),
        _quality(runs),
        _plan(report["plan"]),
        _settings("Recipe", "recipe", report["recipe"]),
        _settings("Machine", "machine", report["machine"]),
        _how(report),
    ]
    title = escape(report["title"])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<header><h1>{title}</h1><p>sparsetrain report, {escape(report['created'])}</p></header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    rows = [
        (
            escape(LABELS[j["quantity"]]),
            f'<span class="won {j["winner"]}">{_WON[j["winner"]]}</span>',
            escape(j["text"]),
        )
        for j in report["judgements"]
    ]
    parts = [f'<p class="headline">{escape(report["headline"])}</p>']
    if report["advice"]:
        parts.append(f'<p class="advice">{escape(report["advice"])}</p>')
    if rows:
        parts.append(_table(("Quantity", "Result", "Numbers"), rows, kind="judgements"))
    parts += [f'<p class="note">{escape(note)}</p>' for note in report["notes"]]
    return _section("Verdict", "verdict", *parts)


def _curves(runs: dict[str, Run]) -> str:
    if not any(run["steps"] for run in runs.values()):
        return ""
    held_out = all(len(run.get("evals") or []) >= 2 for run in runs.values())
    lines = "Dots: held-out loss. Faint: training loss, smoothed." if held_out else "Training loss; faint: every step."
    setup = " The time before the first step is set-up." if any(setup_seconds(run) for run in runs.values()) else ""
    figures = [
        _figure(plots.loss_by_step, runs, "Loss by step", lines),
        _figure(plots.loss_by_time, runs, "Loss by time", lines + setup),
        _figure(plots.step_times, runs, "Time per step", "Thin: every step. Thick: the median."),
        f"<div><h3>Run by run</h3>{_runs_table(runs)}</div>",
    ]
    return _section("Loss and time", "curves", f'<div class="figures">{"".join(figures)}</div>')


def _runs_table(runs: dict[str, Run]) -> str:
    present = {name: runs[name] for name in RUNS if name in runs}
    facts: dict[str, Callable[[Run], str]] = {
        "steps": lambda run: f"{len(run['steps']):,}",
        "tokens": lambda run: f"{sum(record['tokens'] for record in run['steps']):,}",
        "time per step": lambda run: seconds_text(step_seconds(run)),
        "tokens per second": lambda run: _count(tokens_per_second(run)),
        "set-up before training": lambda run: seconds_text(setup_seconds(run)) if setup_seconds(run) else "none",
        "training": lambda run: seconds_text(run["steps"][-1]["wall_s"]) if run["steps"] else "–",
    }
    rows = [[escape(fact), *(escape(show(run)) for run in present.values())] for fact, show in facts.items()]
    return _table(("", *present), rows, kind="numbers")


def _memory(runs: dict[str, Run]) -> str:
    saved = {name: value for name in RUNS if name in runs and (value := runs[name].get("saved_activation_bytes"))}
    parts = {name: value for name in RUNS if name in runs and (value := plots.memory_row(runs[name]))}
    figures, tables = [], []
    if saved:
        figures.append(
            _figure(
                plots.saved_by_component,
                runs,
                "Saved activations by component",
                "What one step's forward keeps for its backward; each storage once, weights excluded.",
            )
        )
        times = {name: value for name in saved if (value := runs[name].get("forward_time_s"))}
        tables.append(_component_table(saved, times))
    if parts:
        caption = "Known parts; the bar's end mark is the measured peak, the rest is what the parts do not explain."
        figures.append(_figure(plots.memory_parts, runs, "Peak memory", caption))
        tables.append(_parts_table(parts))
    if not figures:
        return ""
    return _section("Memory", "memory", f'<div class="figures">{"".join(figures)}</div>', *tables)


def _component_table(saved: dict[str, dict[str, int]], times: dict[str, dict[str, float]]) -> str:
    names = [name for name in COMPONENTS if any(name in row for row in saved.values())]
    head = ["Component", *(f"{run}, saved" for run in saved), *(["change"] if len(saved) == 2 else [])]
    head += [f"{run}, forward" for run in times]
    rows = []
    for name in [*names, "total"]:
        values = [sum(row.values()) if name == "total" else row.get(name, 0) for row in saved.values()]
        cells = [plots.part_name(name), *map(bytes_text, values), *([_change(*values)] if len(values) == 2 else [])]
        for row in times.values():
            cells.append(seconds_text(sum(row.values()) if name == "total" else row.get(name, 0.0)))
        rows.append([escape(cell) for cell in cells])
    return _table(head, rows, kind="numbers totals")


def _parts_table(parts: dict[str, dict[str, int]]) -> str:
    head = ["Part", *parts, *(["change"] if len(parts) == 2 else [])]
    rows = []
    for name in (*plots.MEMORY_PARTS, "peak"):
        values = [row.get(name) for row in parts.values()]
        if any(value is not None for value in values):
            both = [value or 0 for value in values]
            cells = [name, *map(bytes_text, values), *([_change(*both)] if len(both) == 2 else [])]
            rows.append([escape(cell) for cell in cells])
    return _table(head, rows, kind="numbers" + (" totals" if rows and rows[-1][0] == "peak" else ""))


def _quality(runs: dict[str, Run]) -> str:
    tables = []
    for metric in METRICS.values():
        stages: dict[str, Any] = {name: runs[name].get(metric.name) or {} for name in RUNS if name in runs}
        used = [stage for stage in STAGES if any(stage in row for row in stages.values())]
        if not used:
            continue
        rows = [
            [escape(_STAGE_NAMES[stage]), *(_cell(row, stage, metric.text) for row in stages.values())]
            for stage in used
        ]
        tables.append(_table((metric.title, *stages), rows, kind="numbers"))
    return _section("Quality at every stage", "quality", *tables) if tables else ""


def _cell(row: dict[str, Any], stage: str, show: Callable[[Any], str]) -> str:
    if stage not in row:
        return "–"
    return escape("not a number" if row[stage] is None else show(row[stage]))


def _plan(rows: list[dict[str, Any]]) -> str:
    """Sites with equal edits share a row; the full list is folded below."""
    if not rows:
        return ""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({k: v for k, v in row.items() if k != "site"}, default=str), []).append(row)
    head = ("Sites", "Method", "MFLOP per token", "Saved numbers per token", "Added parameters", "Note")
    table = _table(head, [_plan_row(group) for group in groups.values()])
    if len(groups) < len(rows):
        every = _table(head, [_plan_row([row]) for row in rows])
        table += f"<details><summary>All {len(rows)} sites</summary>{every}</details>"
    return _section("Plan", "plan", table)


def _plan_row(group: list[dict[str, Any]]) -> list[str]:
    row = group[0]
    sites = str(row.get("site", ""))
    if len(group) > 1:
        sites = f"{len(group)} sites: {sites} … {group[-1].get('site', '')}"
    cells = (
        sites,
        str(row.get("method", "")),
        f"{_count(row.get('mflop_before'), 3)} → {_count(row.get('mflop_after'), 3)}",
        f"{_count(row.get('saved_before'))} → {_count(row.get('saved_after'))}",
        _count(row.get("added_params")),
        str(row.get("note", "")),
    )
    return [escape(cell) for cell in cells]


def _settings(title: str, name: str, values: dict[str, Any]) -> str:
    if not values:
        return ""
    rows = [
        (escape(key), _value(bytes_text(value) if key.endswith("_bytes") else value)) for key, value in values.items()
    ]
    return _section(title, name, _table((), rows, kind="settings"))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return "<br>".join(f"{escape(str(key))}: {_value(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list):
        separator = "<br>" if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(_inline(item) for item in value) or "–"
    return escape(str(value))


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{key} {item}" for key, item in value.items()))
    return escape(str(value))


def _how(report: Report) -> str:
    lines = [
        f"A tie is a difference of at most {TIE_TIME:.0%} in time (3 % where steps were timed alternately), "
        f"{TIE_BYTES:.0%} in bytes, {TIE_LOSS} nats in loss (1 % of perplexity), {TIE_ACCURACY:.1%} of accuracy.",
        "Time per step is the median over the run, its first step left out; evaluation and saving are not in it.",
        "Loss at equal time interpolates each curve at the shorter run's end. The time of calibration, conversion "
        "and distillation counts as training time.",
        "Saved activations count each storage that the backward pass keeps, once and in full, without parameters "
        "and buffers. A storage that two components keep is counted where it was kept first.",
    ]
    if len(report["runs"]) == 2:
        lines.append("One seed: a small difference in loss or quality may be chance.")
        if report["timing"] is None:
            lines.append("The two runs were timed apart: other load on the machine may have changed one of them.")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return _section("How this was measured", "how", f"<ul>{items}</ul>")


def _section(title: str, name: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def _figure(draw: Callable[[dict[str, Run]], bytes], runs: dict[str, Run], title: str, caption: str) -> str:
    picture = base64.b64encode(draw(runs)).decode("ascii")
    return (
        f'<figure><h3>{escape(title)}</h3><img alt="{escape(title)}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Cells are HTML already; the head is text."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    return f'<div class="table"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _change(before: float, after: float) -> str:
    if not before:
        return "–"
    return f"{after / before - 1:+.0%}" if abs(after / before - 1) >= 0.005 else "same"


def _count(value: Any, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}" if isinstance(value, int | float) else "–"
