"""What a sparse run beside a dense one leaves: its folder, and the report of both."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.report import build_report
from sparsetrain.measure.schema import Report
from sparsetrain.measure.timing import ratio
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import checkpoints
from sparsetrain.runs.layout import REPORT_VALUES, RESULT
from sparsetrain.runs.manifest import MANIFEST, read_json

SIDES = ("sparse", "dense")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both results as in their result.json, and the report that was written to `output`."""

    sparse: dict[str, Any]
    dense: dict[str, Any]
    report: Report
    output: Path


@contextlib.contextmanager
def leaving_nothing_useless(output: Path, new: bool) -> Iterator[None]:
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


def comparison_report(recipe: RunRecipe, results: dict[str, dict[str, Any]], title: str) -> Report:
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
        title=title,
        runs={side: results[side]["run"] for side in SIDES},
        recipe=recipe.model_dump(mode="json"),
        machine=describe_machine().to_dict() | {"threads": results["sparse"]["machine"]["threads"]},
        plan=results["sparse"]["plan"],
        timing=timing,
        notes=notes,
    )


def side_recipe(recipe: RunRecipe, side: str, dense: dict[str, Any]) -> RunRecipe:
    """One side's recipe. A side that was killed before its first whole checkpoint starts again.

    Args:
        dense: keys that the dense side has in place of the recipe's own, beside `methods`.
    """
    output = Path(recipe.output) / side
    changes: dict[str, Any] = {"output": str(output), "compare": "none"}
    if side == "dense":
        changes |= {"methods": (), **dense}
    if recipe.resume:
        changes["resume"] = any((path / MANIFEST).is_file() for path in checkpoints(output))
        if not changes["resume"] and not (output / RESULT).is_file():
            shutil.rmtree(output, ignore_errors=True)
    return recipe.model_copy(update=changes)


def check_resumable(output: Path, recipes: dict[str, RunRecipe], finished: list[str]) -> None:
    """Raise CheckpointError if a comparison cannot go on: finished, empty, or of another recipe."""
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


def check_same_rows(results: dict[str, dict[str, Any]]) -> None:
    """Raise RuntimeError if the sides have seen different rows."""
    orders = [results[side]["data_order"] for side in SIDES]
    if None not in orders and orders[0] != orders[1]:
        raise RuntimeError(
            f"the sides saw different rows (hashes {orders[0]} and {orders[1]}), so they cannot be compared. "
            "Something drew random numbers on one side only."
        )
