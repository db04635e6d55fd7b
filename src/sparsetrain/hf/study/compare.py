"""A sparse run beside the strongest dense one, in turns, step by step.

Each side is a process of its own that runs the ordinary `finetune` or `pretrain` (`hf.study.turns`), so each has its
own peak of memory, and both meet the same state of the machine. The dense side begins, so that a first loss is seen
while the sparse side has yet to convert its model. When both are done, dense with gradient checkpointing is timed
beside dense, and more pairs of steps are where those of the run do not say who is faster (`runs.extra_turns`).

The dense side has the same LoRA or start, optimizer, seed, rows and order of rows, and SDPA attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.core.files import write_whole
from sparsetrain.hf.study.turns import WORK
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.jobs import JOBS, job_of
from sparsetrain.measure.report import write_report
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.claim import claimed, finish
from sparsetrain.runs.comparison import (
    Comparison,
    check_same_rows,
    comparison_report,
    finished_sides,
    leaving_nothing_useless,
    paired_steps,
    side_recipe,
)
from sparsetrain.runs.events import Report as Tell
from sparsetrain.runs.events import silent
from sparsetrain.runs.extra_turns import extra_turns
from sparsetrain.runs.layout import RECIPE, RESULT, SIDES
from sparsetrain.runs.lock import LOCK, wait_released
from sparsetrain.runs.manifest import disk_errors, read_json
from sparsetrain.runs.pictures import illustrate
from sparsetrain.runs.sides import ORPHANED_S
from sparsetrain.runs.switch import judged_switch, with_predicted_switch
from sparsetrain.runs.tuned import tuned_rate
from sparsetrain.runs.turns import train_in_turns


def compare(recipe: RunRecipe, *, report: Tell = silent, choice: Mapping[str, Any] | None = None) -> Comparison:
    """Train `recipe` and its dense counterpart in turns; write `report.json` and `report.html` into its output.

    Each side's own files are in `output/sparse` and `output/dense`. With `resume`, each goes on from its own newest
    whole checkpoint.

    Args:
        recipe: a recipe with methods.
        report: told the events of both sides; each event has a `side`.
        choice: as of `finetune`.

    Raises:
        ValueError: the recipe has no methods; and as `finetune`. When one side fails, the other is stopped.
        RuntimeError: a side died (its last words are in the message), or the sides saw different rows.
    """
    if not recipe.methods:
        raise ValueError("compare=dense needs something to compare with dense: give --method or --preset.")
    recipe = with_dtype(recipe, report)
    output = Path(recipe.output)
    with claimed(output, recipe, "comparison", choice), disk_errors(output):
        made = _compared(recipe, output, report)
        finish(output, recipe, "comparison")
    return made


def _compared(recipe: RunRecipe, output: Path, report: Tell) -> Comparison:
    kind = JOBS[job_of(recipe)]
    recipe, said = with_predicted_switch(recipe, kind, report)
    rate, tried = tuned_rate(recipe, kind, report)
    dense = {**kind.dense, **({} if rate is None else {"lr": rate})}
    recipes = {side: side_recipe(recipe, side, dense) for side in SIDES}
    finished = finished_sides(output, recipes) if recipe.resume else []
    like = {"job": job_of(recipe), "like": recipe.model_dump(mode="json")}
    jobs = {side: {**like, "recipe": recipes[side].model_dump(mode="json")} for side in SIDES if side not in finished}
    for side in SIDES:  # those of a killed comparison end when they see that it is gone
        wait_released(output / side / LOCK, ORPHANED_S)
    with leaving_nothing_useless(output, new=not recipe.resume):
        train_in_turns(WORK, jobs, report)
    results = {side: read_json(Path(recipes[side].output) / RESULT) for side in SIDES}
    check_same_rows(results)
    trained_s = sum(results[side]["run"]["steps"][-1]["wall_s"] for side in SIDES)
    pairs = paired_steps(recipe, results)
    extra = extra_turns(WORK, like, recipe, dense, pairs, trained_s, report)
    extra.notes.extend(tried)
    made = comparison_report(recipe, results, kind.title(recipe), extra)
    made["notes"] += [] if said is None else [said["text"], judged_switch(said, made)]
    write_report(made, output)
    illustrate(output, recipe.configs)
    write_whole(output / RECIPE, recipe.to_yaml())
    return Comparison(sparse=results["sparse"], dense=results["dense"], report=made, output=output)
