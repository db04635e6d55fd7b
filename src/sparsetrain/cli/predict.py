"""What `sparsetrain plan` answers when a goal is given: will it fit, how long is a step, and which recipe to take."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.live import to_stderr
from sparsetrain.core.fields import shown
from sparsetrain.core.files import write_whole

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "K": 1e3, "M": 1e6, "G": 1e9}
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


def parse_bytes(text: str) -> int:
    """'24GB', '16 GiB', '800M' -> bytes. GB are 10^9 bytes, GiB 2^30.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text[:100])
    unit = _UNITS.get(match.group(2).upper()) if match else None
    size = float(match.group(1)) * unit if match and unit is not None else 0.0
    if not 1 <= size < 2**63:
        raise ValueError(f"--memory {shown(text)} is no size. Write for example 24GB, 16GiB or 800MB.")
    return int(size)


def predicted(asked: dict[str, Any], goal: Goal, given_methods: bool) -> Answer:
    """Predict, pick, write and draw.

    Args:
        asked: recipe keys.
        goal: what was asked of the plan.
        given_methods: the recipe's own methods are compared with dense training, in place of every method.
    """
    from sparsetrain.hf.assets import cache_folder
    from sparsetrain.hf.model.model_config import read_config
    from sparsetrain.hf.study.predict import predictor_of
    from sparsetrain.planner.candidates import KEYS, dense_and, recipe_yaml
    from sparsetrain.planner.machines import machine_rates
    from sparsetrain.planner.nearest import nearest_in_bf16
    from sparsetrain.planner.predictor import predict
    from sparsetrain.planner.search import Question
    from sparsetrain.planner.this_machine import this_machine

    _check(goal)
    rates = this_machine(cache_folder() / "machine") if goal.gpu is None else machine_rates(goal.gpu)
    memory = rates.memory_bytes if goal.memory is None else parse_bytes(goal.memory)
    if goal.fit and memory is None:
        raise ValueError(f"--fit {goal.fit} needs --memory: how much may training use, for example --memory 24GB?")
    recipe = _recipe(asked)
    bf16 = _dtype(recipe, rates, named=goal.gpu is not None) == "bf16"
    model = read_config(recipe.model, to_stderr_line)
    base = {key: getattr(recipe, key) for key in (*KEYS, "seed", "dtype")}
    base |= {"seq_len": recipe.seq_len, "batch_size": recipe.batch_size, "grad_accum": recipe.grad_accum}
    known = {"cache": cache_folder() / "outlines", "gpu": not rates.is_cpu}
    predictor = predictor_of(model, base, bf16=bf16, **known)
    rows = None
    if goal.data is not None and recipe.data != "none":
        from sparsetrain.hf.study.data_rows import data_rows

        rows = data_rows(recipe, model, to_stderr_line)
    tokens = _row_tokens(recipe, model)
    question = Question(
        tokens=tokens if rows is None else min(tokens, rows.longest),
        batch=recipe.batch_size,
        grad_accum=recipe.grad_accum,
        memory_bytes=None if memory is None else rates.usable_bytes(memory),
        goal=goal.goal or "fit",
        dtype="bf16" if bf16 else "fp32",
        rates=rates,
        context=model.context,
        lengths=_lengths(recipe, model.context, rows),
    )
    only = dense_and(recipe, base, gpu=not rates.is_cpu) if given_methods else None
    found = predict(predictor, question, only, fit=goal.fit)
    if found.picked is None and not bf16:
        halved = predictor_of(model, base | {"dtype": "bf16"}, bf16=True, **known)
        other = predict(halved, replace(question, dtype="bf16"), only, fit=goal.fit)
        found = replace(found, nearest=nearest_in_bf16(other))
    picked = found.picked
    yaml = None if picked is None else recipe_yaml(found, predictor.recipe(picked.candidate), goal.data)
    for place in (goal.write, goal.plot):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
    if goal.write is not None and yaml is not None:
        write_whole(goal.write, yaml)
    if goal.plot is not None:
        from sparsetrain.planner.picture import draw

        draw(found, goal.plot, title=f"{model.name}, {question.tokens:,} tokens, batch {question.batch}", limit=memory)
    return _shown(found, predictor, goal, memory, yaml, rows)


def _lengths(recipe: Any, context: int | None, rows: Any) -> tuple[int, ...]:
    """The lengths of the table by context length: powers of two up to the model's context, what was asked, and the
    longest row of the data; none for images."""
    from sparsetrain.recipes.tasks import task_of

    if task_of(recipe.task).images:
        return ()
    most = min(context or LONGEST, LONGEST)
    asked = {recipe.seq_len} if rows is None else {recipe.seq_len, rows.longest}
    return tuple(sorted({n for n in (2**power for power in range(9, 18)) if n <= most} | asked))


def _row_tokens(recipe: Any, model: Any) -> int:
    from sparsetrain.recipes.tasks import task_of

    if not task_of(recipe.task).images:
        return recipe.seq_len
    from sparsetrain.hf.model.architectures import sequence_tokens
    from sparsetrain.hf.model.opening import make_config

    return sequence_tokens(make_config(model.values, model.name), recipe)


def _dtype(recipe: Any, rates: Any, *, named: bool) -> str:
    """The format that a run of the recipe takes on the machine."""
    from sparsetrain.core.formats import asked_of_all, fastest

    if recipe.dtype != "auto":
        return recipe.dtype
    return (None if named else asked_of_all()) or fastest(rates.gemm_flops)


def _check(goal: Goal) -> None:
    from sparsetrain.core.config import suggest
    from sparsetrain.planner.search import GOALS
    from sparsetrain.runs.places import check_file

    for name, value, choices in (("--goal", goal.goal, GOALS), ("--fit", goal.fit, ("seq", "batch"))):
        if value is not None and value not in choices:
            raise ValueError(
                f"{name} {shown(value)} is unknown.{suggest(value, choices)} Choose from {', '.join(choices)}."
            )
    if goal.write is not None:
        check_file(goal.write, "--write", (".yaml", ".yml"))
    if goal.plot is not None:
        check_file(goal.plot, "--plot", (".png", ".svg", ".pdf"))


def to_stderr_line(line: str) -> None:
    to_stderr({"event": "note", "text": line})


def _recipe(asked: dict[str, Any]) -> Any:
    from sparsetrain.recipes.finetune import Recipe

    return Recipe.from_values({"data": "none", **asked})


def _shown(found: Any, predictor: Any, goal: Goal, memory: int | None, yaml: str | None, rows: Any) -> Answer:
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
    show: list[Any] = [lambda: table(f"{title}; GB", list(columns), lines, right=right)]
    show += [*_about_rows(found.rows, predictor), *_exact(found.rows), *([] if rows is None else [rows.line()])]
    show += [lambda: _by_length(found)] if question.lengths else []
    show += [*_notes(found, memory), ""]
    if found.picked is None:
        show.append(f"Nothing fits in {goal.memory or f'{(memory or 0) / 1e9:.1f} GB'}. Nearest possible:")
        show += [f"  {line}" for line in found.nearest]
        return Answer(data=data, show=show, code=IMPOSSIBLE)
    return Answer(data=data, show=show + _choice(found, goal))


def _about_rows(rows: Any, predictor: Any) -> list[str]:
    """What the table has no column for: refusals, where a way is faster, what a step's time and memory stand for."""
    shown = [row for row in rows if row.peak is not None]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.refused:
            reasons.setdefault(row.refused, []).append(row.candidate.label)
    refused = [f"Refused: {', '.join(labels)}: {reason}." for reason, labels in reasons.items()]
    faster = [
        f"{row.candidate.label}: {_where_faster(row.faster_at, shown[0].candidate.label)}"
        for row in shown
        if row.candidate.values.get("methods") and not row.refused
    ]
    timed = [f"Step of {row.candidate.label}: {row.timed}." for row in rows if row.timed]
    begins = [
        f"{row.candidate.label} begins dense: memory and step are those of its dense phase."
        for row in shown
        if any(config.begins_dense for config in predictor.recipe(row.candidate).configs)
    ]
    return [*refused, *faster, *timed, *begins]


def _exact(rows: Any) -> list[str]:
    """What each exact tool costs in time and gives in memory, beside the first row."""
    first, *others = [row for row in rows if row.risk.exact and row.candidate.pickable and row.peak is not None]
    return [
        f"{row.candidate.label}: exact; {row.step_s / first.step_s:.2f}x the step and "
        f"{row.peak.total / first.peak.total:.2f}x the peak of {first.candidate.label}"
        + (f"; {row.peak.host / 1e9:.2f} GB wait in the CPU's memory." if row.peak.host else ".")
        for row in others
        if row.step_s is not None and first.step_s
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
LONGEST = 2**17
"""Tokens up to which memory is shown for a model that sets no limit, or one beyond."""


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
