"""Ending a run with the weights of its best evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsetrain.core.units import number_text
from sparsetrain.hf.train.average import Average
from sparsetrain.hf.train.continued import taken_from
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.stages import load_weights
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.best import best_of, kept_step
from sparsetrain.runs.layout import checkpoint_folder
from sparsetrain.runs.manifest import verify_manifest
from sparsetrain.surgery.apply import Handle


def take_best(
    model: Any, handle: Handle | None, average: Average | None, recipe: RunRecipe, journal: Journal
) -> int | None:
    """Give a trained model the weights of its best evaluation, of that step; None where it keeps its last ones.

    Raises:
        CheckpointError: the checkpoint of that step is not there, or damaged.
    """
    points = journal.run.get("evals", [])
    step, best = kept_step(recipe, points), best_of(recipe)
    if step is None:
        return None
    values = {point["step"]: number_text(point[best.metric]) for point in points}  # type: ignore[literal-required]
    last = points[-1]["step"]
    if step == last:
        journal.report({"event": "note", "text": f"The last weights have the {best.text()}, {values[step]}."})
        return None
    folder = checkpoint_folder(Path(recipe.output), step)
    verify_manifest(folder)
    load_weights(model, folder)
    for note in taken_from(handle, folder) if handle is not None else ():
        journal.report({"event": "note", "text": note})
    if average is not None:
        average.begin(model, handle, folder)
        average.take(model)
    elif handle is not None:
        handle.updated()
    text = (
        f"The weights are those of step {step}, with the {best.text()}, {values[step]}; step {last} had {values[last]}."
    )
    journal.report({"event": "note", "text": text})
    return step
