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
from sparsetrain.runs.checkpoints import own_checkpoints
from sparsetrain.runs.extra_turns import Extra, Pairs
from sparsetrain.runs.layout import RESULT, SIDES
from sparsetrain.runs.manifest import MANIFEST, read_json
from sparsetrain.surgery.deploy import deployment


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
        useful = [path / MANIFEST for folder in folders for path in own_checkpoints(folder)]
        useful += [folder / RESULT for folder in folders]  # a side that is done
        if new and not any(path.is_file() for path in useful):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):  # not there, or with something of another's in it
                    output.rmdir()
        raise


def paired_steps(recipe: RunRecipe, results: dict[str, dict[str, Any]]) -> Pairs:
    """Seconds of the steps that both sides took in turns, but for the first, which allocates.

    Where the sparse side trains dense at the beginning and the end, these steps are left out: a step of the method is
    what is timed, and the time of the whole run is told beside it.
    """
    times = {side: {row["step"]: row["step_time_s"] for row in results[side]["run"]["steps"]} for side in SIDES}
    both = sorted(times["sparse"].keys() & times["dense"].keys())[1:]
    deployed = deployment(getattr(recipe, "deployment", "sparse"))
    total = max(times["sparse"], default=0)
    if deployed is not None:
        sparse = [s for s in both if not any(deployed.is_dense(config, s - 1, total) for config in recipe.configs)]
        both = sparse or both
    return [times["dense"][step] for step in both], [times["sparse"][step] for step in both]


def comparison_report(
    recipe: RunRecipe, results: dict[str, dict[str, Any]], title: str, extra: Extra | None = None
) -> Report:
    """The measure report of two results, and of what was timed after them."""
    extra = extra or Extra()
    pairs = [run + more for run, more in zip(paired_steps(recipe, results), extra.pairs, strict=True)]
    timing = ratio(*pairs).to_dict() if len(pairs[0]) >= 3 else None
    notes = [results["sparse"]["data"]]
    notes += [f"{side}: {note}" for side in SIDES for note in results[side]["notes"]]
    notes += extra.notes
    if results["sparse"]["data_order"]:
        notes.append(f"Both sides saw the same rows in the same order (hash {results['sparse']['data_order']}).")
    return build_report(
        title=title,
        runs={side: results[side]["run"] for side in SIDES},
        recipe=recipe.model_dump(mode="json"),
        machine=describe_machine().to_dict() | {"threads": results["sparse"]["machine"]["threads"]},
        plan=results["sparse"]["plan"],
        timing=timing,
        checkpointing=extra.checkpointing,
        notes=notes,
    )


def side_recipe(recipe: RunRecipe, side: str, dense: dict[str, Any]) -> RunRecipe:
    """One side's recipe, which goes on or starts again where the comparison does.

    Args:
        dense: keys that the dense side has in place of the recipe's own, beside `methods`.
    """
    changes: dict[str, Any] = {"output": str(Path(recipe.output) / side), "compare": "none"}
    unasked = {"compare_lr": (), "find_switch": 0}
    changes |= {key: value for key, value in unasked.items() if key in type(recipe).model_fields}
    if side == "dense":
        changes |= {"methods": (), **dense}
    return recipe.model_copy(update=changes)


def finished_sides(output: Path, recipes: dict[str, RunRecipe]) -> list[str]:
    """The sides that are done.

    Raises:
        CheckpointError: one was finished with another recipe, or its result cannot be read.
    """
    finished = [side for side in SIDES if (output / side / RESULT).is_file()]
    for side in finished:
        path = output / side / RESULT
        try:
            earlier = type(recipes[side])(**read_json(path)["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no result of a run ({error}). Choose another output.") from None
        if differences := recipes[side].differences(earlier.training_values()):
            raise CheckpointError(f"the {side} side was finished with another recipe ({'; '.join(differences)}).")
    return finished


def check_same_rows(results: dict[str, dict[str, Any]]) -> None:
    """Raise RuntimeError if the sides have seen different rows."""
    orders = [results[side]["data_order"] for side in SIDES]
    if None not in orders and orders[0] != orders[1]:
        raise RuntimeError(
            f"the sides saw different rows (hashes {orders[0]} and {orders[1]}), so they cannot be compared. "
            "Something drew random numbers on one side only."
        )
