"""Rows and tokenizer of a pretraining recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.hf.assets import embedded_name, resolve_data, resolve_model
from sparsetrain.hf.data import DataBundle, load_classify, load_images, load_text
from sparsetrain.hf.data.byte_tokens import byte_tokenizer
from sparsetrain.hf.data.tasks import TASKS, load_task
from sparsetrain.hf.model.architectures import sequence_tokens
from sparsetrain.hf.train import assemble
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.runs.events import Report


def is_task(name: str) -> bool:
    """Whether a name is that of a generated or loaded task of long sequences."""
    return name in TASKS or name.startswith("lra-")


def open_tokenizer(recipe: PretrainRecipe) -> Any:
    """The tokenizer that reads a recipe's text: its own, or bytes; None where rows are numbers already.

    Raises:
        ValueError: it cannot be read, or there is no text.
    """
    if recipe.task == "image" or is_task(recipe.data):
        if recipe.tokenizer is not None:
            raise ValueError(f"tokenizer={recipe.tokenizer}: {recipe.data} is no text. Leave it out.")
        return None
    if recipe.tokenizer is None:
        return byte_tokenizer()
    return assemble.open_tokenizer(resolve_model(recipe.tokenizer))


def load_rows(recipe: PretrainRecipe, tokenizer: Any, row_tokens: int, report: Report) -> DataBundle:
    """Training and held-out rows of at most `row_tokens`; no more text is tokenised than the steps need.

    Raises:
        ValueError: data that is missing, malformed, too short for one row, or of another task.
    """

    def say(line: str) -> None:
        report({"event": "note", "text": line})

    eval_rows = max(1, recipe.eval_tokens // row_tokens)
    limits: dict[str, Any] = {"max_rows": recipe.train_rows, "max_eval_rows": eval_rows, "seed": recipe.seed}
    if is_task(recipe.data):
        return _task_rows(recipe, limits)
    _check_name(recipe.data)
    _check_source(recipe)
    source = resolve_data(recipe.data, progress=say)
    if recipe.task == "image":
        return load_images(source, **limits)
    if recipe.task == "classify":
        columns = {"text_column": recipe.text_column}
        return load_classify(source, tokenizer, recipe.seq_len, progress=say, **columns, **limits)
    rows = None if recipe.steps is None else recipe.steps * recipe.batch_size * recipe.grad_accum
    return load_text(
        source,
        tokenizer,
        recipe.seq_len,
        text_column=recipe.text_column,
        max_tokens=None if rows is None else rows * recipe.seq_len,
        max_eval_tokens=max(recipe.eval_tokens, recipe.seq_len),
        seed=recipe.seed,
        progress=say,
    )


def held_out(recipe: PretrainRecipe, tokenizer: Any, config: Any, report: Report) -> DataBundle:
    """The rows that a run of this recipe held out, read with as little of its training data as possible."""
    few = recipe.model_copy(update={"steps": 1, "epochs": None, "batch_size": 1, "grad_accum": 1})
    bundle = load_rows(few, tokenizer, sequence_tokens(config, recipe), report)
    assert bundle.eval is not None
    return bundle


def _check_name(data: str) -> None:
    """Raise ValueError for a task's name with a slip of the pen, before the hub is asked for it."""
    near = suggest(data, TASKS)
    if near and "/" not in data and embedded_name(data) is None and not Path(data).exists():
        raise ValueError(f"data={data} is no file, folder, embedded set or task.{near} Tasks: {', '.join(TASKS)}.")


def _check_source(recipe: PretrainRecipe) -> None:
    if recipe.task == "pairs":
        raise ValueError(f"data={recipe.data} has no pairs. Use data=retrieval or lra-retrieval with task=pairs.")
    if recipe.data == "fashion-mnist" and recipe.task != "image":
        raise ValueError(
            f"data=fashion-mnist are images, and task={recipe.task} reads tokens. Use task=image, or data=pixels with "
            "task=classify for the same images as sequences of 784 pixels."
        )


def _task_rows(recipe: PretrainRecipe, limits: dict[str, Any]) -> DataBundle:
    wanted = "pairs" if recipe.data.endswith("retrieval") else "classify"
    if recipe.task != wanted:
        raise ValueError(f"data={recipe.data} is for task={wanted}, and task={recipe.task} was asked. Use that.")
    return load_task(recipe.data, seq_len=recipe.seq_len, folder=recipe.data_folder, **limits)
