"""report.json and report.html: what a run (or a sparse run against a dense one) did, measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sparsetrain.core.files import plain, to_json, write_whole
from sparsetrain.core.metrics import METRICS
from sparsetrain.core.units import bytes_text, number_text, seconds_text
from sparsetrain.measure.advice import advice, headline
from sparsetrain.measure.called import called, in_words
from sparsetrain.measure.curves import loss_curves, step_seconds, tokens_per_second
from sparsetrain.measure.judge import judge
from sparsetrain.measure.ledger import ledger, stage_memory
from sparsetrain.measure.page import render_page
from sparsetrain.measure.schema import RUNS, SCHEMA, STAGES, Checkpointing, Report, Run

_MARKS = {"sparse": "+", "dense": "-", "tie": "=", "unknown": "?"}


def build_report(
    *,
    title: str,
    runs: dict[str, Run],
    recipe: dict[str, Any] | None = None,
    machine: dict[str, Any] | None = None,
    plan: Iterable[dict[str, Any]] | None = None,
    timing: dict[str, Any] | None = None,
    checkpointing: Checkpointing | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """Put the parts together and judge who won.

    Args:
        title: what was trained, in a line.
        runs: "dense", "sparse" or both -> its records, as in `schema.Run`; with one run nothing is compared.
        recipe: the settings, plain values.
        machine: `describe_machine().to_dict()`.
        plan: `Plan.rows()`.
        timing: `Ratio.to_dict()` of dense and sparse steps timed alternately, if that was done.
        checkpointing: what dense with gradient checkpointing takes, if that was measured.
        notes: sentences to print with the results (what stood down, what was skipped).

    Raises:
        ValueError: no run, or a run under another name.
    """
    if not runs or not set(runs) <= set(RUNS):
        raise ValueError(f"runs are named {sorted(runs)}. Give one or both of {', '.join(map(repr, RUNS))}.")
    judgements = judge(runs, timing, checkpointing)
    for judgement in judgements:
        judgement["text"] = in_words(judgement["text"], runs)
    report: Report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": title,
        "headline": in_words(headline(judgements) if judgements else _single_headline(runs), runs),
        "advice": in_words(advice(judgements), runs),
        "judgements": judgements,
        "runs": runs,
        "recipe": recipe or {},
        "machine": machine or {},
        "plan": list(plan or ()),
        "timing": timing,
        "checkpointing": checkpointing,
        "notes": list(notes),
    }
    if (found := ledger(runs)) is not None:
        report["ledger"] = found
    return report


def write_report(report: Report, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, each whole or not at all; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = cast(Report, plain(report))
    page = render_page(values, folder)
    paths = folder / "report.json", folder / "report.html"
    write_whole(paths[0], to_json(values, indent=1) + "\n")
    write_whole(paths[1], page)
    return paths


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read report.json.

    Raises:
        ValueError: the file is no report, or of a newer layout.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Give the report.json that a run wrote.") from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path} has the report layout {found!r}; this version reads {SCHEMA}. Run the command again.")
    return cast(Report, report)


def render_text(report: Report) -> list[str]:
    """The console's summary: a headline, one line a quantity (+ sparse won, - dense won, = tie), the runs, a sample."""
    lines = [report["headline"]]
    if report["advice"]:
        lines.append(report["advice"])
    lines += [f"  {_MARKS[j['winner']]} {j['text']}" for j in report["judgements"]]
    if found := report.get("ledger"):
        lines.append(f"  {found['text']}")
    for name in RUNS:
        if name in report["runs"]:
            lines += _run_lines(called(name, report["runs"]), report["runs"][name])
    return lines + _sample_lines(report["runs"])


def _sample_lines(runs: dict[str, Run]) -> list[str]:
    """The first held-out prompt and what each side answers, a line each; the page has them in full."""
    asked = {name: found[0] for name in RUNS if name in runs and (found := runs[name].get("samples"))}
    if not asked:
        return []
    first = next(iter(asked.values()))
    said = {"a held-out prompt": "… " + _short(first["prompt"], end=True), "the data say": _short(first["reference"])}
    said |= {f"{called(name, runs)} says": _short(sample["completion"]) for name, sample in asked.items()}
    return [f"  {who}: {words or '(nothing)'}" for who, words in said.items()]


def _short(text: str, most: int = 72, *, end: bool = False) -> str:
    """A line of text, cut where it is longer; printable, since a model may say anything to a terminal."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    if len(line) <= most:
        return line
    return line[-most:] if end else line[:most] + " …"


def _run_lines(name: str, run: Run) -> list[str]:
    facts = [f"{len(run['steps'])} steps"]
    if (seconds := step_seconds(run)) is not None:
        facts.append(f"{seconds_text(seconds)} a step")
    if (speed := tokens_per_second(run)) is not None:
        facts.append(f"{speed:,.0f} tokens/s")
    if saved := run.get("saved_activation_bytes"):
        facts.append(f"{bytes_text(sum(saved.values()))} of saved activations")
    if peak := run.get("peak_gpu_bytes") or run.get("peak_rss_bytes"):
        facts.append(f"peak {bytes_text(peak)}")
    lines = [f"  {name}: {', '.join(facts)}"]
    for metric in METRICS.values():
        stages: dict[str, Any] = run.get(metric.name) or {}  # type: ignore[assignment]
        if found := [f"{stage.replace('_', ' ')} {metric.text(stages[stage])}" for stage in STAGES if stage in stages]:
            lines.append(f"  {name} {metric.name}: {', '.join(found)}")
    return lines + _stage_lines(name, run)


def _stage_lines(name: str, run: Run) -> list[str]:
    """What each stage took, and what it was planned to take."""
    lines = []
    for i, (stage, cost) in enumerate(zip(run.get("stages") or [], run.get("stage_costs") or [], strict=False), 1):
        steps = [row for row in run["steps"] if stage["from_step"] < row["step"] <= stage["to_step"]]
        took, (held, planned) = sum(row["step_time_s"] for row in steps), stage_memory(cost)
        found = f"  {name}, stage {i}, {stage['name']}: {seconds_text(took)} and {bytes_text(held)}"
        if planned is not None and (forecast := cost.get("planned")) is not None:
            found += f"; planned {seconds_text(forecast['time_s'])} and {bytes_text(planned)}"
        lines.append(found)
    return lines


def _single_headline(runs: dict[str, Run]) -> str:
    (name, run) = next(iter(runs.items()))
    curves, what = loss_curves({name: run}, "step")
    curve = curves[name]
    if not curve.x:
        return f"One {name} run without a step."
    took = f"One {name} run: {what} {number_text(curve.y[0])} → {number_text(curve.y[-1])} in {curve.x[-1]:.0f} steps"
    if name == "dense":
        return f"{took}."
    return f"{took}. Nothing is compared; run with compare=dense to see what the sparsity gains."
