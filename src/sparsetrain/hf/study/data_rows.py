"""data_rows(): how long the rows of a data set are for a model, which decides the memory of a step and when it ends.

The longest row is in some batch of every epoch: a run that is planned for the mean row dies there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsetrain.planner.model_config import ModelConfig
from sparsetrain.planner.row_lengths import RowLengths
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import MOST
from sparsetrain.recipes.tasks import task_of


def data_rows(recipe: Recipe, model: ModelConfig, say: Callable[[str], None]) -> RowLengths | None:
    """Tokens of the recipe's rows, held-out ones too, uncut; None, with a line that says why, where they are not known.

    Args:
        say: told what is going on, and why rows are not read.
    """
    task = task_of(recipe.task)
    if task.images:
        return None
    if not task.padded or recipe.packing:
        say(f"Rows are packed, so each holds seq_len={recipe.seq_len:,} tokens whatever the data.")
        return None
    if model.folder is None:
        say(f"The rows of {recipe.data} are not read: {model.name} is a config alone, without a tokenizer.")
        return None
    try:
        return _read(recipe, model, say)
    except (ValueError, OSError) as error:
        say(f"The rows of {recipe.data} cannot be read, so full ones are planned: {str(error).splitlines()[0]}")
        return None


def _read(recipe: Recipe, model: ModelConfig, say: Callable[[str], None]) -> RowLengths:
    from sparsetrain.hf.model.opening import make_config
    from sparsetrain.hf.train.readers import open_reader
    from sparsetrain.hf.train.rows import lengths_of, load_rows

    config: Any = make_config(model.values, model.name)
    uncut = recipe.model_copy(update={"seq_len": model.context or MOST, "steps": None, "epochs": 1.0})
    assert model.folder is not None
    reader = open_reader(recipe, model.folder, config, lambda event: say(event["text"]))
    bundle = load_rows(uncut, reader, config, lambda event: say(event["text"]))
    sides = [rows for rows in (bundle.train, bundle.eval) if rows is not None]
    return RowLengths.of([n for rows in sides for n in lengths_of(rows, "input_ids")], recipe.seq_len, recipe.streaming)
