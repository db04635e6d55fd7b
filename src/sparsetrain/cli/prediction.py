"""A prediction as `sparsetrain plan` prints it: the table of ways, what each exact tool costs, memory by length."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.cli.answer import Answer, table

IMPOSSIBLE = 1


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The flags of `plan` that ask for a prediction."""

    memory: str | None = None
    goal: str | None = None
    gpu: str | None = None
    fit: str | None = None
    write: Path | None = None
    plot: Path | None = None
    data: str | None = None

    @property
    def given(self) -> bool:
        return any(getattr(self, name) is not None for name in ("memory", "goal", "gpu", "fit", "write", "plot"))


def shown_prediction(found: Any, predictor: Any, goal: Goal, memory: int | None, yaml: str | None, rows: Any) -> Answer:
    data = {"model": predictor.model.name, **found.to_dict(), "traced": predictor.traced}
    data |= {"memory_bytes": memory, "recipe_yaml": yaml, "data": None if rows is None else rows.to_dict()}
    question = found.question
    title = (
        f"{predictor.model.name}: a training step of {question.batch} x {question.tokens:,} tokens, {question.dtype}, "
        f"{question.rates.machine}"
    )
    columns = _columns(found)
    lines = [[_cells(row)[name] for name in columns] for row in found.rows if row.peak is not None]
    right = tuple(i for i, name in enumerate(columns) if name not in (WAY, "peak in", "fits", "quality"))
    names = [name.replace("max ", "max\n") for name in columns]
    show: list[Any] = [lambda: table(f"{title}; GB", names, lines, right=right), *_quality(lines)]
    show += [*_about_rows(found.rows, predictor), *_exact(found.rows), *([] if rows is None else [rows.line()])]
    show += [lambda: _by_length(found)] if question.lengths else []
    show += [*_notes(found, memory), *_optimizer(predictor.base), ""]
    if found.picked is None:
        show.append(f"Nothing fits in {goal.memory or f'{(memory or 0) / 1e9:.1f} GB'}. Nearest possible:")
        show += [f"  {line}" for line in found.nearest]
        return Answer(data=data, show=show, code=IMPOSSIBLE)
    return Answer(data=data, show=show + _choice(found, goal))


def _quality(lines: list[list[str]]) -> list[str]:
    """What the last column means, where something in it is not exact."""
    if all(line[-1] == "exact" for line in lines):
        return []
    return [
        "quality: x1.2 is a perplexity 1.2 times the dense model's before any training, on record; ?: not recorded. "
        "What training by a method costs is in its page of results (docs/results)."
    ]


def _about_rows(rows: Any, predictor: Any) -> list[str]:
    """What the table has no column for: refusals, where a way is faster, what a step's time and memory stand for."""
    shown = [row for row in rows if row.peak is not None]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused:
            reasons.setdefault(row.refused, []).append(row.candidate.label)
    refused = [f"Refused: {', '.join(labels)}: {reason}." for reason, labels in reasons.items()]
    faster = [
        f"{row.candidate.label}: {_beside(row, shown)}"
        + (_untimed(row, predictor) or _where_faster(row.faster_at, row.than) + _guessed(row, predictor))
        for row in shown
        if row.candidate.values.get("methods") and not row.refused and row.faster_at is not None
    ]
    timed = [f"Step of {row.candidate.label}: {row.timed}." for row in rows if row.timed]
    begins = [
        f"{row.candidate.label} begins dense: memory and step are those of its dense phase."
        for row in shown
        if any(config.begins_dense for config in predictor.recipe(row.candidate).configs)
    ]
    unknown: dict[str, list[str]] = {}
    for row in shown:
        if row.candidate.untimed and row.peak is not None:
            unknown.setdefault(row.candidate.untimed, []).append(row.candidate.label)
    untimed = [f"{', '.join(labels)}: {reason}." for reason, labels in unknown.items()]
    return [*refused, *faster, *timed, *begins, *untimed]


def _beside(row: Any, shown: Any) -> str:
    """The peak beside that of the way which a row is compared with, where that isn't the first of the table."""
    than = next(other for other in shown if other.candidate.label == row.than)
    return "" if than is shown[0] else f"{row.peak.total / than.peak.total:.2f}x the peak of {row.than}; "


def _untimed(row: Any, predictor: Any) -> str:
    """Of a method that a run would time first, planned for another machine: no word of where it is faster."""
    if row.timed or predictor.here:
        return ""
    slower = any(config.refused_if_slower for config in predictor.recipe(row.candidate).configs)
    return "not timed on that machine; a run times it there first, and refuses what is slower." if slower else ""


def _guessed(row: Any, predictor: Any) -> str:
    """Of a method on a GPU on which no step of it is on record."""
    return "" if row.timed or not predictor.gpu else " By the roofline: no step of it was timed on that GPU."


def _optimizer(base: dict[str, Any]) -> list[str]:
    """Said of an optimizer whose state nobody here has counted."""
    from sparsetrain.planner.optimizers import DEFAULT, KINDS

    name = base.get("training", {}).get("optim", DEFAULT)
    return [] if name in KINDS else [f"The state of optim={name} is not known here; that of AdamW is planned."]


def _exact(rows: Any) -> list[str]:
    """What each exact tool costs in time and gives in memory, beside the first row."""
    exact = [row for row in rows if row.risk.exact and row.candidate.pickable and row.peak is not None]
    first = exact[0] if exact else None
    return [
        f"{row.candidate.label}: exact; {row.step_s / first.step_s:.2f}x the step and "
        f"{row.peak.total / first.peak.total:.2f}x the peak of {first.candidate.label}"
        + (f"; {row.peak.host / 1e9:.2f} GB wait in the CPU's memory." if row.peak.host else ".")
        for row in exact[1:]
        if first is not None and row.step_s is not None and first.step_s
    ]


def _by_length(found: Any) -> Any:
    """The table of peak memory by context length: of the exact ways, and of the picked one."""
    lengths = list(found.question.lengths)
    room = MOST_LENGTHS if shutil.get_terminal_size().columns >= WIDE else FEW_LENGTHS
    while len(lengths) > room:  # what was asked, the first and the last stay
        lengths.remove(next(n for n in lengths[1:] if n != found.question.tokens))
    rows = [row for row in found.rows if row.peak is not None and (row.risk.exact or row is found.picked)]
    cells = [[_name(row), *(f"{size / 1e9:.2f}" for n, size in row.by_length if n in lengths)] for row in rows]
    title = f"Memory by context length: GB at the peak of a step of {found.question.batch} such rows"
    return table(title, [WAY, *(f"{n:,}" for n in lengths)], cells, right=tuple(range(1, len(lengths) + 1)))


def _name(row: Any) -> str:
    return row.candidate.label.replace("checkpointing", "ckpt")


def _where_faster(stretches: Any, than: str) -> str:
    from sparsetrain.planner.roofline import LENGTHS, WINS

    longest = LENGTHS[-1]
    if not stretches:
        return f"at no length up to {longest:,} tokens more than {1 - WINS:.0%} faster than {than}."
    parts = [f"from {first:,}" + (f" to {last:,}" if last < longest else "") for first, last in stretches]
    return f"faster than {than} {' and '.join(parts)} tokens."


def _notes(found: Any, memory: int | None) -> list[str]:
    """How far the figures can be trusted."""
    question = found.question
    rates = question.rates
    notes = []
    if question.context and question.tokens > question.context:
        notes.append(
            f"{question.tokens:,} tokens are beyond this model's context of {question.context:,}: it needs rescaled "
            "positions (rope_scaling in its config) before it can train there."
        )
    if memory is not None:
        kept = memory - rates.usable_bytes(memory)
        notes.append(f"Of {memory / 1e9:.1f} GB, {kept / 1e9:.2f} are left to the libraries (and the GPU's context).")
    measured = "measured on this machine" if rates.measured else "not measured here"
    notes.append(f"Times: roofline of {rates.machine}, {measured}: read their order. {rates.source}")
    if shutil.get_terminal_size().columns < WIDE:
        notes.append(f"In a terminal of {WIDE} columns, and with --json, every component has its number.")
    hows = sorted({row.how for row in found.rows if row.how})
    return [*notes, f"Memory: one block of each kind traced without weights ({'; '.join(hows)})."]


def _choice(found: Any, goal: Goal) -> list[str]:
    picked = found.picked
    show = [f"Take: {picked.candidate.label}.", *(f"  {line}" for line in found.reasons)]
    show += [f"  Quality risk: {line}" for line in picked.risk.texts or ("none, training is exact.",)]
    if goal.fit:
        what, got = ("Longest sequence", picked.longest) if goal.fit == "seq" else ("Largest batch", picked.largest)
        show.append(f"  {what} that fits: {got:,}.")
    if goal.write is not None:
        data_flag = "" if goal.data else " --data YOUR_DATA"
        show.append(f"Written to {goal.write}. Train it: sparsetrain finetune --recipe {goal.write}{data_flag}")
    return show


WAY = "way to train"
WIDE = 120
MOST_LENGTHS, FEW_LENGTHS = 9, 5
"""Columns of the table by context length, in a wide terminal and in a narrow one."""


def _columns(found: Any) -> tuple[str, ...]:
    """The columns of the table: all in a wide terminal, in a narrow one those that decide."""
    wide = shutil.get_terminal_size().columns >= WIDE
    parts = ("weights", "grads + AdamW", "saved", "temporary", "peak in") if wide else ("saved",)
    limited = ("max seq", "max batch", "fits") if found.question.memory_bytes is not None else ()
    return (WAY, "peak", *parts, "step", *limited, "quality")


def _cells(row: Any) -> dict[str, str]:
    from sparsetrain.core.units import seconds_text

    peak = row.peak
    sizes = {
        "peak": peak.total,
        "weights": peak.parameters + peak.buffers,
        "grads + AdamW": peak.gradients + peak.optimizer,
        "saved": sum(peak.saved.values()),
        "temporary": peak.temporary,
    }
    return {
        WAY: _name(row),
        **{name: f"{size / 1e9:.2f}" for name, size in sizes.items()},
        "peak in": str(peak.phase),
        "step": seconds_text(row.step_s),
        "max seq": f"{row.longest or 0:,}",
        "max batch": f"{row.largest or 0:,}",
        "fits": "refused" if row.refused else "yes" if row.fits else "no",
        "quality": "exact" if row.risk.exact else "?" if row.risk.ratio is None else f"x{row.risk.ratio:.3g}",
    }
