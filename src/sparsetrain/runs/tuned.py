"""The dense side of a comparison at the learning rate that suits it best, of those that a recipe names."""

from __future__ import annotations

import math
from pathlib import Path

from sparsetrain.core.units import number_text
from sparsetrain.measure.curves import number
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import own_checkpoints
from sparsetrain.runs.comparison import side_recipe
from sparsetrain.runs.events import Event, Report
from sparsetrain.runs.job import JobKind
from sparsetrain.runs.layout import RESULT
from sparsetrain.runs.manifest import read_json

RATES = "dense-lr"
"""Folder of these runs, inside the comparison's."""


def tuned_rate(recipe: RunRecipe, kind: JobKind, report: Report) -> tuple[float | None, list[str]]:
    """(the rate that ends with the lowest held-out loss, a note of all); None where the recipe names none.

    Each is a whole dense run. One that is finished is not trained again, and one that was stopped goes on.
    """
    rates: tuple[float, ...] = getattr(recipe, "compare_lr", ())
    if not rates:
        return None, []
    losses = {rate: _held_out(recipe, kind, rate, report) for rate in dict.fromkeys(rates)}
    best = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    told = ", ".join(f"{number_text(loss)} at {rate:g}" for rate, loss in losses.items())
    text = f"Dense ends with a held-out loss of {told}: it is compared at lr={best:g}, the other side at {recipe.lr:g}."
    report({"event": "note", "text": text})
    return best, [text]


def _held_out(recipe: RunRecipe, kind: JobKind, rate: float, report: Report) -> float:
    folder = Path(recipe.output) / RATES / f"{rate:g}"
    asked = side_recipe(recipe, "dense", {**kind.dense, "lr": rate}).model_copy(
        update={"output": str(folder), "resume": bool(own_checkpoints(folder))}
    )
    if recipe.resume and (folder / RESULT).is_file():
        result = read_json(folder / RESULT)
        if not asked.differences(type(asked)(**result["recipe"]).training_values()):
            return number(result["run"]["evals"][-1]["loss"])

    def beside(event: Event) -> None:
        report({**event, "side": f"dense, lr {rate:g}"})

    return number(kind.train(asked, like=recipe, report=beside, write=False).run["evals"][-1]["loss"])  # type: ignore
