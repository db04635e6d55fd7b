"""What `sparsetrain plan` answers when a goal is given: will it fit, how long is a step, and which recipe to take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.live import to_stderr
from sparsetrain.cli.prediction import Goal, shown_prediction
from sparsetrain.core.fields import shown
from sparsetrain.core.files import write_whole

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "K": 1e3, "M": 1e6, "G": 1e9}
LONGEST = 2**17
"""Tokens up to which memory is shown for a model that sets no limit, or one beyond."""


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
    from sparsetrain.recipes.tasks import task_of

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
    known = {"cache": cache_folder() / "outlines", "gpu": not rates.is_cpu, "here": goal.gpu is None}
    known |= {"timed": tuple(rates.methods)}
    predictor = predictor_of(model, base, bf16=bf16, **known)
    rows = _rows(recipe, model, goal)
    tokens = _row_tokens(recipe, model)
    question = Question(
        tokens=tokens if rows is None or rows.sampled else min(tokens, rows.longest),
        batch=recipe.batch_size,
        grad_accum=recipe.grad_accum,
        memory_bytes=None if memory is None else rates.usable_bytes(memory),
        goal=goal.goal or "fit",
        dtype="bf16" if bf16 else "fp32",
        rates=rates,
        context=None if task_of(recipe.task).images else model.context,
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
    _write(found, goal, model.name, memory, yaml)
    return shown_prediction(found, predictor, goal, memory, yaml, rows)


def _write(found: Any, goal: Goal, name: str, memory: int | None, yaml: str | None) -> None:
    """The picked recipe and the picture, where they were asked for."""
    for place in (goal.write, goal.plot):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
    if goal.write is not None and yaml is not None:
        write_whole(goal.write, yaml)
    if goal.plot is not None:
        from sparsetrain.planner.picture import draw

        asked = found.question
        draw(found, goal.plot, title=f"{name}, {asked.tokens:,} tokens, batch {asked.batch}", limit=memory)


def _rows(recipe: Any, model: Any, goal: Goal) -> Any:
    """How long the rows of --data are; None where none was given, or they are not known."""
    if goal.data is None or recipe.data == "none":
        return None
    from sparsetrain.hf.study.data_rows import data_rows

    return data_rows(recipe, model, to_stderr_line)


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
