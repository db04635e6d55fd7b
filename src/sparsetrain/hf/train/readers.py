"""What a model brings for reading its rows, and whether code of its own runs."""

from __future__ import annotations

from typing import Any

from sparsetrain.data.chat_templates import use_template
from sparsetrain.data.vocabulary import check_vocabulary
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model import opening
from sparsetrain.hf.model.pair import PairReader
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.events import Report


def check_trust(recipe: Recipe, config: Any, report: Report) -> None:
    """Say that a model's own code runs; raise ValueError for methods on such a model, whose sites are not known."""
    if not recipe.trust_remote_code:
        return
    if not opening.code_of(config)["trust_remote_code"]:
        report({"event": "note", "text": f"trust_remote_code: {recipe.model} needs no code of its own, and none ran."})
        return
    kind = type(config).__name__
    report({"event": "note", "text": f"trust_remote_code: Python code that came with {recipe.model} runs ({kind})."})
    if recipe.methods:
        raise ValueError(
            f"{recipe.model} is built by code of its own, in which {recipe.methods[0].method} knows no sites. Train it "
            "dense: --preset dense."
        )


def open_reader(recipe: Recipe, path: str, config: Any, report: Report) -> Any:
    """What makes rows of the task's data: a tokenizer, with the recipe's chat template, an image processor, or both for
    a pair of encoders; None where images go in as they are.

    Raises:
        ValueError: it cannot be read, or does not fit the model.
    """
    task = task_of(recipe.task)
    if task.texts:
        tokenizer = open_tokenizer(path, config, trust=recipe.trust_remote_code)
        return PairReader(tokenizer, opening.open_image_processor(path, config))
    if not task.images:
        tokenizer = open_tokenizer(path, config, trust=recipe.trust_remote_code)
        if recipe.chat_template_path is not None:
            for note in use_template(tokenizer, recipe.chat_template_path, lambda x: open_tokenizer(resolve_model(x))):
                report({"event": "note", "text": note})
        return tokenizer
    return opening.open_image_processor(path, config) if task.labelled else None


def open_tokenizer(path: str, config: Any = None, *, trust: bool = False) -> Any:
    """The tokenizer of a model's folder, checked against the model's config; trust: its own code may run.

    Raises:
        ValueError: there is none, it is damaged, or it has more tokens than the model.
    """
    try:
        tokenizer = opening.open_tokenizer(path, trust=trust)
    except FileNotFoundError as error:
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from None
    if config is not None:
        check_vocabulary(tokenizer, config, path)
    return tokenizer
