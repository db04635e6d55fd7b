"""A run's rows, and batches of them: read from data, drawn for calibration, for distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsetrain.hf.assets import resolve_data
from sparsetrain.hf.data import DataBundle, load_classify, load_sft, load_text
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.pattern_reach import cuts_patterns, longest_row
from sparsetrain.methods import TokenSelection
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report


def load_rows(recipe: Recipe, tokenizer: Any, config: Any, report: Report) -> DataBundle:
    """Training and held-out rows for the recipe's task; no more text is tokenised than the steps need.

    Raises:
        ValueError: data that is missing, empty, malformed, or too short for one row.
    """

    def say(line: str) -> None:
        report({"event": "note", "text": line})

    source = resolve_data(recipe.data, progress=say)
    common: dict[str, Any] = {"seed": recipe.seed, "max_position_embeddings": context_length(config), "progress": say}
    rows = None if recipe.steps is None else recipe.steps * recipe.batch_size * recipe.grad_accum
    check_selection(recipe)
    if recipe.task == "classify":
        bundle = load_classify(source, tokenizer, recipe.seq_len, text_column=recipe.text_column, **common)
        return long_enough(bundle, recipe)
    if recipe.task == "sft":
        return long_enough(load_sft(source, tokenizer, recipe.seq_len, max_rows=rows, **common), recipe)
    # calibration rows are spread over eight times as many: on 8,192 tokens from 4 places a conversion cost 1.47 times
    # the perplexity of other files, from 8 places 1.16
    calibration_rows = 8 * -(-recipe.calibration_tokens // recipe.seq_len)
    return load_text(
        source,
        tokenizer,
        recipe.seq_len,
        text_column=recipe.text_column,
        max_tokens=None if rows is None else max(rows, calibration_rows, 1) * recipe.seq_len,
        max_eval_tokens=max(recipe.eval_tokens, recipe.seq_len),
        **common,
    )


def check_selection(recipe: RunRecipe) -> None:
    """Raise ValueError if a token selection asks for what this task's rows do not have."""
    for config in recipe.configs:
        if not isinstance(config, TokenSelection):
            continue
        if config.pool == "scored":
            raise ValueError(
                "token_selection: pool='scored' takes the scores that come with each batch as token_scores, and rows "
                "read from data have none. Use pool=all or targets, or train from Python."
            )
        if recipe.task == "classify" and (config.needs_scores or config.pool == "targets"):
            raise ValueError(
                f"token_selection: pool={config.pool!r}, policy={config.policy!r} need a label a token, and "
                "task=classify has one a text. Use pool=all with policy=random or prefix."
            )
        if (config.num_tokens or 0) > recipe.seq_len:
            config.count(recipe.seq_len)


def long_enough(bundle: DataBundle, recipe: RunRecipe) -> DataBundle:
    """The rows, none of them shorter than the `num_tokens` of a token selection.

    Raises:
        ValueError: one is.
    """
    for config in recipe.configs:
        if isinstance(config, TokenSelection) and config.num_tokens is not None:
            config.count(min(len(row) for row in bundle.train["input_ids"]))
    return bundle


def calibration_batches(parts: Parts) -> list[dict[str, Tensor]] | None:
    """Training rows that hold `calibration_tokens`, evenly spaced over the data, without labels; None for none."""
    rows, recipe = parts.bundle.train, parts.recipe
    wanted = min(len(rows), -(-recipe.calibration_tokens // recipe.seq_len))
    places = [i * len(rows) // wanted for i in range(wanted)]
    if places and cuts_patterns(recipe):
        places[-1] = longest_row(parts.bundle)
    batches: list[dict[str, Tensor]] = []
    for start in range(0, wanted, recipe.batch_size):
        batch = parts.bundle.collate_fn([rows[i] for i in places[start : start + recipe.batch_size]])
        batches.append({name: tensor.to(parts.device) for name, tensor in batch.items() if name != "labels"})
    return batches or None


def drawn_batches(parts: Parts, count: int) -> Iterator[dict[str, Tensor]]:
    """`count` batches of training rows in random order, seeded by the recipe, without labels; again from the first row
    when all were drawn."""
    rows, size = parts.bundle.train, parts.recipe.batch_size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(parts.recipe.seed)).tolist()
    for i in range(count):
        batch = parts.bundle.collate_fn([rows[order[(i * size + j) % len(order)]] for j in range(size)])
        yield {name: tensor.to(parts.device) for name, tensor in batch.items() if name != "labels"}


def first_batch(parts: Parts) -> dict[str, Tensor]:
    """The first training batch."""
    rows = parts.bundle.train
    return parts.bundle.collate_fn([rows[i] for i in range(min(parts.recipe.batch_size, len(rows)))])
