"""The number format of a run: what `dtype: auto` takes on its device, decided once and then part of its recipe.

How a run computes in bf16. Frozen weights are kept in bf16, and activations are bf16. What is trained is fp32: LoRA's
factors (PEFT casts their input up and their output down), what methods add, AdamW's moments; where all weights are
trained they are fp32 masters under autocast. Losses are computed from fp32 logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sparsetrain.core import ranks
from sparsetrain.core.formats import asked_of_all
from sparsetrain.hf.assets import cache_folder
from sparsetrain.hf.train.assemble import pick_device
from sparsetrain.measure.rates import formats_of
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import mark_of, own_checkpoints
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.layout import RUN
from sparsetrain.runs.manifest import json_in

R = TypeVar("R", bound=RunRecipe)


def with_dtype(recipe: R, report: Report = silent) -> R:
    """The recipe with the format that it computes in, so that a run continued or evaluated elsewhere keeps it.

    auto takes what the run has that is to be continued; else what $SPARSETRAIN_DTYPE says; else the format that its
    device multiplies fastest in (bf16 where it is 1.3 times fp32), as timed once a boot; `report` is told.

    Raises:
        ValueError: the device is not there, or the environment names no format.
    """
    if recipe.dtype != "auto":
        return recipe
    if (begun := _begun(recipe)) is not None:
        return recipe.model_copy(update={"dtype": begun})
    if (asked := asked_of_all()) is not None:
        return recipe.model_copy(update={"dtype": asked})
    pick_device(recipe)
    found = ranks.by_first(lambda: formats_of(recipe.device, cache_folder() / "machine"))
    if ranks.is_first():
        report({"event": "note", "text": f"{found.why}."})
    return recipe.model_copy(update={"dtype": found.fastest})


def _begun(recipe: RunRecipe) -> str | None:
    """What the run in the recipe's output is computed in, if it is to be continued; `auto` of one that was begun when
    a recipe kept that word: fp32 on a CPU, bf16 on a GPU that has it."""
    output = Path(recipe.output)
    marks = [json_in(output / RUN), *map(mark_of, own_checkpoints(output))] if recipe.resume else []
    values = [mark["training_values"] for mark in marks if isinstance(mark, dict) and "training_values" in mark]
    found = [each.get("dtype") for each in values if isinstance(each, dict)]
    return next((dtype for dtype in found if dtype in ("auto", "fp32", "bf16")), None)
