"""report.html: one file, nothing loaded from outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.metrics import METRICS
from sparsetrain.core.units import bytes_text, number_text, seconds_text
from sparsetrain.measure import plots
from sparsetrain.measure.bars import MEMORY_PARTS, memory_parts, memory_row, saved_by_component
from sparsetrain.measure.called import called
from sparsetrain.measure.colours import part_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.curves import setup_seconds, step_seconds, tokens_per_second
from sparsetrain.measure.first_screen import samples, verdict
from sparsetrain.measure.judge import TIE_BYTES
from sparsetrain.measure.ledger import charged, flops_text, size_text, stage_memory
from sparsetrain.measure.markup import Bullets, Figure, Fold, Group, Heading, Picture, Section, Table, document
from sparsetrain.measure.schema import RUNS, STAGES, Report, Run
from sparsetrain.measure.timing import LEVEL, MARGIN

_STAGE_NAMES = {
    "dense": "Dense model, before anything",
    "untrained": "Random weights",
    "after_conversion": "After conversion",
    "after_distillation": "After distillation",
    "after_training": "After training",
}


def render_page(report: Report, folder: Path | None = None) -> str:
    """The whole page as text. folder: the run's, for the pictures that the report names by their files."""
    runs = report["runs"]
    sections = [
        verdict(report),
        samples(runs),
        _curves(runs),
        _memory(runs),
        _quality(runs),
        _plan(report["plan"]),
        _settings("Recipe", "recipe", report["recipe"]),
        _settings("Machine", "machine", report["machine"]),
        _how(report),
        *([] if folder is None else pictures(report, folder)),
    ]
    return document(report["title"], f"sparsetrain report, {report['created']}", sections)


def pictures(report: Report, folder: Path) -> list[Section]:
    """What the trained models make, side by side, and the pictures of the run's methods."""
    runs = report["runs"]
    made = [
        (path, f"{called(name, runs)}: {title}" if len(runs) > 1 else title)
        for name in RUNS
        if name in runs
        for file, title in (runs[name].get("pictures") or {}).items()
        for path in [folder / name / file if len(runs) > 1 else folder / file]
    ]
    shown = {"made": ("What the trained models make", made)}
    for name, gallery in report.get("galleries", {}).items():
        shown[name] = (gallery["heading"], [(folder / file, title) for file, title in gallery["files"].items()])
    return [Section(heading, name, _drawn(files)) for name, (heading, files) in shown.items()]


def _drawn(files: list[tuple[Path, str]]) -> list[Group]:
    """The files that are still there."""
    found = [Figure("", Picture(path.read_bytes(), title), title) for path, title in files if path.is_file()]
    return [Group("figures", found)] if found else []


def _curves(runs: dict[str, Run]) -> Section | None:
    if not any(run["steps"] for run in runs.values()):
        return None
    few = all(len(run["steps"]) < plots.FEW for run in runs.values())
    training = "training loss" if few else "training loss, smoothed"
    lines = "Training loss" + ("." if few else "; faint: every step.")
    if plots.has_held_out(runs):
        lines = f"Strong: held-out loss of the model as it is saved. Faint: {training}, of the model as it trains."
    setup = " The time before the first step is set-up." if any(setup_seconds(run) for run in runs.values()) else ""
    ends = {name: f"{called(name, runs)} {number_text(_last_loss(runs[name]))}" for name in RUNS if name in runs}
    paces = {name: f"{called(name, runs)} {seconds_text(step_seconds(runs[name]))}" for name in RUNS if name in runs}
    costs = charged(runs)
    figures = [
        Figure("Loss by step", plots.loss_by_step(runs), lines, ends),
        *_by_cost(costs, lines, ends),
        Figure("Loss by time", plots.loss_by_time(runs), lines + setup, ends),
        Figure("Time per step", plots.step_times(runs), "Faint: every step. Strong: the median.", paces),
        Group("block", [Heading("Run by run"), _runs_table(runs)]),
    ]
    stages = [_stages(called(name, runs), run) for name, run in costs.items() if run.get("stages")]
    return Section("Loss and time", "curves", [Group("figures", figures), *stages])


def _by_cost(costs: dict[str, Run], lines: str, ends: dict[str, str]) -> list[Figure]:
    """Loss by FLOPs and by tokens, where the model changed on the way."""
    if not costs:
        return []
    counted = " FLOPs of every stage's model are counted, embeddings and head left out."
    return [
        Figure("Loss by FLOPs", plots.loss_by_flops(costs), lines + counted, ends),
        Figure("Loss by tokens", plots.loss_by_tokens(costs), lines, ends),
    ]


def _stages(name: str, run: Run) -> Table:
    """What each stage trained, and what it cost."""
    rows = []
    for i, stage in enumerate(run.get("stages") or []):
        steps = [row for row in run["steps"] if stage["from_step"] < row["step"] <= stage["to_step"]]
        tokens, seconds = sum(row["tokens"] for row in steps), sum(row["step_time_s"] for row in steps)
        cells = (stage["name"], size_text(stage), f"{len(steps):,}", f"{tokens:,}")
        rows.append([*cells, flops_text(tokens * stage["flops_per_token"]), *_planned_and_measured(run, i, seconds)])
    names = (f"Stages of {name}", "model", "steps", "tokens", "FLOPs", "time", "planned", "memory", "planned")
    return Table(names, rows, "numbers")


def _planned_and_measured(run: Run, stage: int, seconds: float) -> list[str]:
    """Time and memory of a stage, each beside its plan. Memory is what lasts and what a step keeps for its backward,
    or a GPU's peak."""
    costs = run.get("stage_costs") or []
    if stage >= len(costs):
        return [seconds_text(seconds), "", "", ""]
    (held, planned), forecast = stage_memory(costs[stage]), costs[stage].get("planned")
    time = "" if forecast is None else seconds_text(forecast["time_s"])
    return [seconds_text(seconds), time, bytes_text(held), "" if planned is None else bytes_text(planned)]


def _last_loss(run: Run) -> float | None:
    """Held-out after training where it was measured, else of the last step."""
    points = run.get("evals") or []
    last = points[-1] if len(points) > 1 else (run["steps"] or [{"loss": None}])[-1]
    return last["loss"]


def _runs_table(runs: dict[str, Run]) -> Table:
    present = {called(name, runs): runs[name] for name in RUNS if name in runs}
    facts: dict[str, Callable[[Run], str]] = {
        "steps": lambda run: f"{len(run['steps']):,}",
        "tokens": lambda run: f"{sum(record['tokens'] for record in run['steps']):,}",
        "time per step": lambda run: seconds_text(step_seconds(run)),
        "tokens per second": lambda run: _count(tokens_per_second(run)),
        "set-up before training": lambda run: seconds_text(setup_seconds(run)) if setup_seconds(run) else "none",
        "training": lambda run: seconds_text(run["steps"][-1]["wall_s"]) if run["steps"] else "–",
    }
    rows = [[fact, *map(show, present.values())] for fact, show in facts.items()]
    return Table(("", *present), rows, "numbers")


def _memory(runs: dict[str, Run]) -> Section | None:
    sides = {called(name, runs): runs[name] for name in RUNS if name in runs}
    saved = {name: value for name, run in sides.items() if (value := run.get("saved_activation_bytes"))}
    parts = {name: value for name, run in sides.items() if (value := memory_row(run))}
    figures, tables = [], []
    if saved:
        caption = "What one step's forward keeps for its backward; each storage once, weights excluded."
        figures.append(Figure("Saved activations by component", saved_by_component(runs), caption))
        times = {name: value for name in saved if (value := sides[name].get("forward_time_s"))}
        tables.append(_component_table(saved, times))
    if parts:
        caption = "Known parts; the rest is what they do not explain of the measured peak."
        figures.append(Figure("Peak memory", memory_parts(runs), caption))
        tables.append(_parts_table(parts))
    return Section("Memory", "memory", [Group("figures", figures), *tables]) if figures else None


def _component_table(saved: dict[str, dict[str, int]], times: dict[str, dict[str, float]]) -> Table:
    names = [name for name in COMPONENTS if any(name in row for row in saved.values())]
    head = ["Component", *(f"{run}, saved" for run in saved), *(["change"] if len(saved) == 2 else [])]
    head += [f"{run}, forward" for run in times]
    rows = []
    for name in [*names, "total"]:
        values = [sum(row.values()) if name == "total" else row.get(name, 0) for row in saved.values()]
        cells = [part_name(name), *map(bytes_text, values), *([_change(*values)] if len(values) == 2 else [])]
        for row in times.values():
            cells.append(seconds_text(sum(row.values()) if name == "total" else row.get(name, 0.0)))
        rows.append(cells)
    return Table(head, rows, "numbers totals")


def _parts_table(parts: dict[str, dict[str, int]]) -> Table:
    head = ["Part", *parts, *(["change"] if len(parts) == 2 else [])]
    rows = []
    for name in (*MEMORY_PARTS, "peak"):
        values = [row.get(name) for row in parts.values()]
        if any(value is not None for value in values):
            both = [value or 0 for value in values]
            rows.append([name, *map(bytes_text, values), *([_change(*both)] if len(both) == 2 else [])])
    return Table(head, rows, "numbers" + (" totals" if rows and rows[-1][0] == "peak" else ""))


def _quality(runs: dict[str, Run]) -> Section:
    tables = []
    for metric in METRICS.values():
        stages: dict[str, Any] = {
            called(name, runs): runs[name].get(metric.name) or {} for name in RUNS if name in runs
        }
        used = [stage for stage in STAGES if any(stage in row for row in stages.values())]
        if not used:
            continue
        rows = [[_STAGE_NAMES[stage], *(_cell(row, stage, metric.text) for row in stages.values())] for stage in used]
        tables.append(Table((metric.title, *stages), rows, "numbers"))
    return Section("Quality at every stage", "quality", tables)


def _cell(row: dict[str, Any], stage: str, show: Callable[[Any], str]) -> str:
    if stage not in row:
        return "–"
    return "not a number" if row[stage] is None else show(row[stage])


def _plan(rows: list[dict[str, Any]]) -> Section | None:
    """Sites with equal edits share a row; the full list is folded below."""
    if not rows:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({k: v for k, v in row.items() if k != "site"}, default=str), []).append(row)
    head = ("Sites", "Method", "MFLOP per token", "Saved numbers per token", "Added parameters", "Note")
    drawn: list[Table | Fold] = [Table(head, [_plan_row(group) for group in groups.values()])]
    if len(groups) < len(rows):
        drawn.append(Fold(f"All {len(rows)} sites", [Table(head, [_plan_row([row]) for row in rows])]))
    return Section("Plan", "plan", drawn)


def _plan_row(group: list[dict[str, Any]]) -> list[str]:
    row = group[0]
    sites = str(row.get("site", ""))
    if len(group) > 1:
        sites = f"{len(group)} sites: {sites} … {group[-1].get('site', '')}"
    return [
        sites,
        str(row.get("method", "")),
        f"{_count(row.get('mflop_before'), 3)} → {_count(row.get('mflop_after'), 3)}",
        f"{_count(row.get('saved_before'))} → {_count(row.get('saved_after'))}",
        _count(row.get("added_params")),
        str(row.get("note", "")),
    ]


def _settings(title: str, name: str, values: dict[str, Any]) -> Section | None:
    if not values:
        return None
    rows = [(key, _value(bytes_text(value) if key.endswith("_bytes") else value)) for key, value in values.items()]
    unset = (None, False, "none", [], {}) if name == "recipe" else ()
    off = [row for row, value in zip(rows, values.values(), strict=True) if value in unset]
    fold = [Fold(f"{len(off)} settings that are off", [Table((), off, "settings")])] if off else []
    return Section(title, name, [Table((), [row for row in rows if row not in off], "settings"), *fold])


def _value(value: Any) -> str:
    """In words; the style sheet keeps its lines."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_value(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list):
        separator = "\n" if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(map(_inline, value)) or "–"
    return str(value)


def _inline(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _how(report: Report) -> Section:
    lines = [
        f"Time per step: a side wins where the {LEVEL:.0%} interval of the speed-up (Wilcoxon's signed-rank interval "
        f"of steps that were timed in turns) lies beyond {MARGIN:.0%}; else it is a tie. While that was undecided, up "
        "to 12 more pairs were timed after the runs. Steps in which the sparse side trains dense are left out.",
        "Loss and quality: of the model as it is saved and used. A side wins where the 95 % interval of the mean "
        "difference, over the same held-out rows, does not hold 0. It counts the rows, not the seeds: another seed may "
        "differ by more.",
        "Loss at equal time is that of the two models when the shorter run ends, set-up counted. The longer run was "
        "evaluated then in the middle of its schedule: one that is planned for that time lowers its learning rate "
        "sooner, and may do better.",
        f"Bytes: a difference of at most {TIE_BYTES:.0%} is a tie. Peak memory is compared with the leaner of dense "
        "and dense with gradient checkpointing (non-reentrant). That one ran a few steps beside dense, in a process of "
        "its own; its share of dense's peak there, and its pace, are applied to the whole run.",
        "Time in the runs is that of the steps; evaluation and saving are not in it. Calibration, conversion and "
        "distillation are, as set-up.",
        "Saved activations count each storage that the backward pass keeps, once and in full, without parameters "
        "and buffers. A storage that two components keep is counted where it was kept first.",
    ]
    if len(report["runs"]) == 2 and report["timing"] is None:
        lines.append("Too few steps were timed in turns: other load on the machine may have changed one of them.")
    return Section("How this was measured", "how", [Bullets(lines)])


def _change(before: float, after: float) -> str:
    if not before:
        return "–"
    return f"{after / before - 1:+.0%}" if abs(after / before - 1) >= 0.005 else "same"


def _count(value: Any, decimals: int = 0) -> str:
    return f"{value:,.{decimals}f}" if isinstance(value, int | float) else "–"
