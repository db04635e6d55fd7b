"""What a report says first: who won, three bars (time, memory, quality), and what each side answers."""

from __future__ import annotations

from typing import Any

from sparsetrain.core.metrics import METRICS
from sparsetrain.core.units import bytes_text, seconds_text
from sparsetrain.measure.advice import by_checkpointing
from sparsetrain.measure.called import called, in_words
from sparsetrain.measure.curves import run_seconds, setup_seconds
from sparsetrain.measure.judge import LABELS
from sparsetrain.measure.markup import Bar, Bars, Chip, Group, Heading, Piece, Quote, Section, Table, Text
from sparsetrain.measure.schema import RUNS, Judgement, Report, Run

WON = {"sparse": "sparse wins", "dense": "dense wins", "tie": "tie", "unknown": "unknown"}
RECOMPUTED = "dense + checkpointing"


def verdict(report: Report) -> Section:
    """Headline, bars, and every judgement with its numbers."""
    parts: list[Piece] = [Text(report["headline"], "headline")]
    if report["advice"]:
        parts.append(Text(report["advice"], "advice"))
    judgements = {j["quantity"]: j for j in report["judgements"]}
    if judgements:
        runs = report["runs"]
        drawn = (_time(report, judgements), _memory(runs, judgements), _quality(runs, judgements))
        parts.append(Group("bars", [block for block in drawn if block]))
        rows = [(LABELS[q], _chip(j, runs), j["text"]) for q, j in judgements.items()]
        parts.append(Table(("Quantity", "Result", "Numbers"), rows, "judgements"))
    return Section("Verdict", "verdict", [*parts, *(Text(note, "note") for note in report["notes"])])


def _chip(judgement: Judgement, runs: dict[str, Run]) -> Chip:
    if by_checkpointing(judgement):
        return Chip("checkpointing", f"{RECOMPUTED} wins")
    return Chip(judgement["winner"], in_words(WON[judgement["winner"]], runs))


def _block(title: str, judgement: Judgement, runs: dict[str, Run], rows: list[Bar], words: str) -> Group | None:
    if not rows:
        return None
    return Group("block", [Heading(title, _chip(judgement, runs)), Bars(rows), Text(words)])


def _time(report: Report, judgements: dict[str, Judgement]) -> Group | None:
    """The whole runs where they are of the same length, set-up apart; else a step."""
    judgement, runs = judgements.get("time_per_step"), report["runs"]
    if judgement is None:
        return None
    steps = len(runs["dense"]["steps"])
    whole = steps == len(runs["sparse"]["steps"])
    setup = setup_seconds(runs["sparse"]) if whole else 0.0
    d, s = (run_seconds(runs[name]) if whole else judgement[name] or 0.0 for name in RUNS)
    rows = [Bar("dense", {"dense": d}, seconds_text(d))]
    if beside := report.get("checkpointing"):
        c = d * beside["time_ratio"]
        rows.append(Bar(RECOMPUTED, {"checkpointing": c}, f"about {seconds_text(c)}"))
    rows.append(Bar(called("sparse", runs), {"setup": setup, "sparse": s - setup}, seconds_text(s)))
    words = [f"set-up {seconds_text(setup)}, the light part" if setup else "no set-up"]
    if beside:
        words.append(f"{RECOMPUTED} from {beside['num_pairs']} steps beside dense ones")
    title = f"Time of {steps:,} steps" if whole else "Time per step"
    return _block(title, judgement, runs, rows, f"Less is better; {'; '.join(words)}.")


def _memory(runs: dict[str, Run], judgements: dict[str, Judgement]) -> Group | None:
    judgement = judgements.get("peak_memory")
    if judgement is None:
        return None
    found = {
        "dense": judgement["dense"],
        "checkpointing": judgement.get("checkpointing"),
        "sparse": judgement["sparse"],
    }
    rows = [
        Bar(RECOMPUTED, {name: value}, f"about {bytes_text(value)}")
        if name == "checkpointing" and value is not None
        else Bar(called(name, runs), {name: value or 0.0}, bytes_text(value))
        for name, value in found.items()
        if value is not None
    ]
    return _block("Peak memory", judgement, runs, rows, "Less is better; each side in a process of its own.")


def _quality(runs: dict[str, Run], judgements: dict[str, Judgement]) -> Group | None:
    judgement = judgements.get("quality")
    if judgement is None:
        return None
    metric = METRICS[judgement["unit"]]
    stages: dict[str, Any] = runs["dense"].get(metric.name) or {}  # type: ignore[assignment]
    before = next((stages[stage] for stage in ("dense", "untrained") if stages.get(stage) is not None), None)
    rows = [] if before is None else [Bar("before training", {"before": before}, metric.text(before))]
    for name in RUNS:
        value = judgement[name]
        rows.append(
            Bar(called(name, runs), {name: value or 0.0}, "not a number" if value is None else metric.text(value))
        )
    words = f"{'More' if metric.more_is_better else 'Less'} is better; of the model as it is saved, on held-out rows."
    return _block(metric.title, judgement, runs, rows, words)


def samples(runs: dict[str, Run]) -> Section | None:
    """What each side answers to the same held-out prompts."""
    asked = {name: runs[name].get("samples") or [] for name in RUNS if name in runs}
    count = max(map(len, asked.values()), default=0)
    if not count:
        return None
    boxes = []
    for i in range(count):  # a side that ran out of time has fewer
        present = {name: row[i] for name, row in asked.items() if i < len(row)}
        first = next(iter(present.values()))
        said = [("prompt, its end", "", "prompt", first["prompt"]), ("the data say", "", "", first["reference"])]
        said += [(f"{called(name, runs)} says", name, "", each["completion"]) for name, each in present.items()]
        parts: list[Piece] = []
        for title, who, kind, text in said:
            parts += [Heading(title, who=who), Quote(text.strip() or "(nothing)", kind)]
        boxes.append(Group("sample", parts))
    words = "Greedy, at most 48 tokens; the prompts are evenly spaced over the held-out rows, chosen by nobody."
    return Section("What the trained models say", "samples", [Text(words), *boxes])
