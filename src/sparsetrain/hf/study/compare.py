"""A sparse run beside the strongest dense one, in turns, step by step.

Each side is a process of its own that runs the ordinary `finetune` or `pretrain` (`hf.study.turns`), so each has its
own peak of memory, and both meet the same state of the machine. The dense side begins, so that a first loss is seen
while the sparse side has yet to convert its model.

The dense side has the same LoRA or start, optimizer, seed, rows and order of rows, and SDPA attention.
"""

from __future__ import annotations

from pathlib import Path

from sparsetrain.hf.study.turns import WORK
from sparsetrain.hf.train.jobs import JOBS, job_of
from sparsetrain.measure.report import write_report
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import check_output
from sparsetrain.runs.comparison import (
    SIDES,
    Comparison,
    check_resumable,
    check_same_rows,
    comparison_report,
    leaving_nothing_useless,
    side_recipe,
)
from sparsetrain.runs.events import Report as Tell
from sparsetrain.runs.events import silent
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.manifest import read_json
from sparsetrain.runs.pictures import illustrate
from sparsetrain.runs.turns import train_in_turns


def compare(recipe: RunRecipe, *, report: Tell = silent) -> Comparison:
    """Train `recipe` and its dense counterpart in turns; write `report.json` and `report.html` into its output.

    Each side's own files are in `output/sparse` and `output/dense`. With `resume`, each goes on from its own newest
    whole checkpoint.

    Args:
        recipe: a recipe with methods.
        report: told the events of both sides; each event has a `side`.

    Raises:
        ValueError: the recipe has no methods; and as `finetune`. When one side fails, the other is stopped.
        RuntimeError: a side died (its last words are in the message), or the sides saw different rows.
    """
    if not recipe.methods:
        raise ValueError("compare=dense needs something to compare with dense: give --method or --preset.")
    output = Path(recipe.output)
    check_output(output, resume=recipe.resume)
    kind = JOBS[job_of(recipe)]
    recipes = {side: side_recipe(recipe, side, kind.dense) for side in SIDES}
    finished = [side for side in SIDES if recipe.resume and (output / side / RESULT).is_file()]
    if recipe.resume:
        check_resumable(output, recipes, finished)
    like = {"job": job_of(recipe), "like": recipe.model_dump(mode="json")}
    jobs = {side: {**like, "recipe": recipes[side].model_dump(mode="json")} for side in SIDES if side not in finished}
    with leaving_nothing_useless(output, new=not recipe.resume):
        train_in_turns(WORK, jobs, report)
    results = {side: read_json(Path(recipes[side].output) / RESULT) for side in SIDES}
    check_same_rows(results)
    made = comparison_report(recipe, results, kind.title(recipe))
    write_report(made, output)
    illustrate(output, recipe.configs)
    recipe.to_yaml(output / "recipe.yaml")
    return Comparison(sparse=results["sparse"], dense=results["dense"], report=made, output=output)
