"""A sparse run beside the strongest dense one, in turns, step by step.

Each side is a process of its own that runs the ordinary `finetune` or `pretrain` (`hf.study.turns`), so each has its
own peak of memory, and both meet the same state of the machine. The dense side begins, so that a first loss is seen
while the sparse side has yet to convert its model.

The dense side has the same LoRA or start, optimizer, seed, rows and order of rows, and SDPA attention.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.study.turns import train_in_turns
from sparsetrain.hf.train.jobs import JOBS, job_of
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.report import build_report, write_report
from sparsetrain.measure.schema import Report
from sparsetrain.measure.timing import ratio
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import check_output, checkpoints
from sparsetrain.runs.events import Report as Tell
from sparsetrain.runs.events import silent
from sparsetrain.runs.layout import REPORT_VALUES, RESULT
from sparsetrain.runs.manifest import MANIFEST, read_json
from sparsetrain.runs.pictures import illustrate

SIDES = ("sparse", "dense")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both results as in their result.json, and the report that was written to `output`."""

    sparse: dict[str, Any]
    dense: dict[str, Any]
    report: Report
    output: Path


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
    recipes = {side: _side_recipe(recipe, side) for side in SIDES}
    finished = [side for side in SIDES if recipe.resume and (output / side / RESULT).is_file()]
    if recipe.resume:
        _check_resumable(output, recipes, finished)
    like = {"job": job_of(recipe), "like": recipe.model_dump(mode="json")}
    jobs = {side: {**like, "recipe": recipes[side].model_dump(mode="json")} for side in SIDES if side not in finished}
    with _leaving_nothing_useless(output, new=not recipe.resume):
        train_in_turns(jobs, report)
    results = {side: read_json(Path(recipes[side].output) / RESULT) for side in SIDES}
    _check_same_rows(results)
    made = comparison_report(recipe, results)
    write_report(made, output)
    illustrate(output, recipe.configs)
    recipe.to_yaml(output / "recipe.yaml")
    return Comparison(sparse=results["sparse"], dense=results["dense"], report=made, output=output)


@contextlib.contextmanager
def _leaving_nothing_useless(output: Path, new: bool) -> Iterator[None]:
    """When a new comparison ends before a whole checkpoint or a finished side, remove what it wrote."""
    existed = output.exists()
    try:
        yield
    except BaseException:
        folders = [output / side for side in SIDES]
        useful = [path / MANIFEST for folder in folders for path in checkpoints(folder)]
        useful += [folder / RESULT for folder in folders]  # a side that is done
        if new and not any(path.is_file() for path in useful):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):  # not there, or with something of another's in it
                    output.rmdir()
        raise


def comparison_report(recipe: RunRecipe, results: dict[str, dict[str, Any]]) -> Report:
    """The measure report of two results."""
    times = {side: {row["step"]: row["step_time_s"] for row in results[side]["run"]["steps"]} for side in SIDES}
    both = sorted(times["sparse"].keys() & times["dense"].keys())[1:]  # the first step allocates
    timing = None
    if len(both) >= 3:
        timing = ratio([times["dense"][step] for step in both], [times["sparse"][step] for step in both]).to_dict()
    notes = [results["sparse"]["data"]]
    notes += [f"{side}: {note}" for side in SIDES for note in results[side]["notes"]]
    if results["sparse"]["data_order"]:
        notes.append(f"Both sides saw the same rows in the same order (hash {results['sparse']['data_order']}).")
    return build_report(
        title=JOBS[job_of(recipe)].title(recipe),
        runs={side: results[side]["run"] for side in SIDES},
        recipe=recipe.model_dump(mode="json"),
        machine=describe_machine().to_dict() | {"threads": results["sparse"]["machine"]["threads"]},
        plan=results["sparse"]["plan"],
        timing=timing,
        notes=notes,
    )


def _side_recipe(recipe: RunRecipe, side: str) -> RunRecipe:
    """One side's recipe. A side that was killed before its first whole checkpoint starts again."""
    output = Path(recipe.output) / side
    changes: dict[str, Any] = {"output": str(output), "compare": "none"}
    if side == "dense":
        changes |= {"methods": (), **JOBS[job_of(recipe)].dense}
    if recipe.resume:
        changes["resume"] = any((path / MANIFEST).is_file() for path in checkpoints(output))
        if not changes["resume"] and not (output / RESULT).is_file():
            shutil.rmtree(output, ignore_errors=True)
    return recipe.model_copy(update=changes)


def _check_resumable(output: Path, recipes: dict[str, RunRecipe], finished: list[str]) -> None:
    if (output / REPORT_VALUES).is_file():
        raise CheckpointError(f"{output} holds a finished comparison ({REPORT_VALUES}). Choose another output.")
    if not finished and not any(recipe.resume for recipe in recipes.values()):
        raise CheckpointError(
            f"{output} holds no whole checkpoint of either side, so nothing can go on. Remove it, or choose another "
            "output."
        )
    for side in finished:
        earlier = read_json(output / side / RESULT)["recipe"]
        differences = recipes[side].differences(type(recipes[side])(**earlier).training_values())
        if differences:
            raise CheckpointError(f"the {side} side was finished with another recipe ({'; '.join(differences)}).")


def _check_same_rows(results: dict[str, dict[str, Any]]) -> None:
    orders = [results[side]["data_order"] for side in SIDES]
    if None not in orders and orders[0] != orders[1]:
        raise RuntimeError(
            f"the sides saw different rows (hashes {orders[0]} and {orders[1]}), so they cannot be compared. "
            "Something drew random numbers on one side only."
        )
