"""Rows and tokenizer of a pretraining recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.data.tasks import TASKS as SEQUENCE_SETS
from sparsetrain.data.tasks import is_task
from sparsetrain.hf.assets import embedded_name, resolve_data, resolve_model
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.data.byte_tokens import byte_tokenizer
from sparsetrain.hf.data.tasks import load_task
from sparsetrain.hf.model.architectures import architecture_names, sequence_tokens
from sparsetrain.hf.train import readers
from sparsetrain.hf.train.rows import check_streaming, parts_of, step_rows
from sparsetrain.hf.train.tasks import RowsAsked, load_asked
from sparsetrain.planner.image_sizes import KEYS, image_shape
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.events import Report


def open_tokenizer(recipe: PretrainRecipe) -> Any:
    """The tokenizer that reads a recipe's text: its own, or bytes; None where rows are numbers already.

    Raises:
        ValueError: it cannot be read, or there is no text.
    """
    if task_of(recipe.task).images or is_task(recipe.data):
        if recipe.tokenizer is not None:
            raise ValueError(f"tokenizer={recipe.tokenizer}: {recipe.data} is no text. Leave it out.")
        return None
    if recipe.tokenizer is None:
        return byte_tokenizer()
    return readers.open_tokenizer(resolve_model(recipe.tokenizer))


def load_rows(recipe: PretrainRecipe, tokenizer: Any, config: Any, report: Report, *, fit: bool = False) -> DataBundle:
    """Training and held-out rows; no more text is tokenised than the steps need.

    Args:
        fit: bring pictures to the model's size, also where the recipe names none and it is a built-in one's.

    Raises:
        ValueError: data that is missing, malformed, too short for one row, or of another task.
    """

    def say(line: str) -> None:
        report({"event": "note", "text": line})

    eval_rows = max(1, recipe.eval_tokens // sequence_tokens(config, recipe))
    if is_task(recipe.data):
        return _task_rows(recipe, eval_rows)
    check_streaming(recipe)
    _check_name(recipe.data)
    _check_source(recipe)
    rows = step_rows(recipe)
    fit = fit or bool(KEYS & recipe.set.keys()) or recipe.model not in architecture_names()
    return load_asked(
        RowsAsked(
            recipe=recipe,
            source=resolve_data(recipe.data, progress=say),
            tokenizer=tokenizer,
            image=image_shape(config) if fit and task_of(recipe.task).images else None,
            step_rows=rows,
            step_tokens=None if rows is None else rows * recipe.seq_len,
            max_rows=recipe.train_rows,
            max_eval_rows=eval_rows,
            **parts_of(recipe, say),
        )
    )


def held_out(recipe: PretrainRecipe, tokenizer: Any, config: Any, report: Report) -> DataBundle:
    """The rows that a run of this recipe held out, read with as little of its training data as possible."""
    few = recipe.model_copy(update={"steps": 1, "epochs": None, "batch_size": 1, "grad_accum": 1})
    bundle = load_rows(few, tokenizer, config, report, fit=True)
    assert bundle.eval is not None
    return bundle


def _check_name(data: str) -> None:
    """Raise ValueError for a task's name with a slip of the pen, before the hub is asked for it."""
    near = suggest(data, SEQUENCE_SETS)
    if near and "/" not in data and embedded_name(data) is None and not Path(data).exists():
        known = ", ".join(SEQUENCE_SETS)
        raise ValueError(f"data={data} is no file, folder, embedded set or task.{near} Tasks: {known}.")


def _check_source(recipe: PretrainRecipe) -> None:
    task = task_of(recipe.task)
    if task.sequences > 1:
        raise ValueError(f"data={recipe.data} has no pairs. Use data=retrieval or lra-retrieval with task={task.name}.")
    if recipe.data == "fashion-mnist" and not task.images:
        raise ValueError(
            f"data=fashion-mnist are images, and task={recipe.task} reads tokens. Use task=image, or data=pixels with "
            "task=classify for the same images as sequences of 784 pixels."
        )


def _task_rows(recipe: PretrainRecipe, eval_rows: int) -> DataBundle:
    if given := recipe.parts_given:
        raise ValueError(
            f"{given[0]} is for data that is read from files or the hub, and {recipe.data} is a task's. Leave it out."
        )
    wanted = "pairs" if recipe.data.endswith("retrieval") else "classify"
    if recipe.task != wanted:
        raise ValueError(f"data={recipe.data} is for task={wanted}, and task={recipe.task} was asked. Use that.")
    return load_task(
        recipe.data,
        seq_len=recipe.seq_len,
        folder=recipe.data_folder,
        max_rows=recipe.train_rows,
        max_eval_rows=eval_rows,
        seed=recipe.seed,
    )
