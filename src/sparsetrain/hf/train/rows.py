"""A run's rows, and batches of them: read from data, drawn for calibration, for distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from sparsetrain.data.collate import Collator
from sparsetrain.data.ids import CheckedIds
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.data.vocabulary import vocabulary_rows
from sparsetrain.hf.assets import resolve_data
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.data.bundle import Progress
from sparsetrain.hf.model.architectures import sequence_tokens
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.model.pair import of_texts
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.tasks import RowsAsked, load_asked
from sparsetrain.planner.image_sizes import image_shape
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.events import Report
from sparsetrain.runs.launch import asked_ranks
from sparsetrain.surgery.method import Read, RowFacts, method_of


def load_rows(recipe: Recipe, tokenizer: Any, config: Any, report: Report) -> DataBundle:
    """Training and held-out rows for the recipe's task; no more text is tokenised than the steps need.

    Raises:
        ValueError: data that is missing, empty, malformed, or too short for one row.
    """

    def say(line: str) -> None:
        report({"event": "note", "text": line})

    check_streaming(recipe)
    rows = step_rows(recipe)
    # calibration rows are spread over eight times as many: on 8,192 tokens from 4 places a conversion cost 1.47 times
    # the perplexity of other files, from 8 places 1.16
    calibration_rows = 8 * -(-recipe.calibration_tokens // recipe.seq_len)
    return _with_ids_checked(
        recipe,
        config,
        RowsAsked(
            recipe=recipe,
            source=resolve_data(recipe.data, progress=say),
            tokenizer=tokenizer,
            step_rows=rows,
            step_tokens=None if rows is None else max(rows, calibration_rows, 1) * recipe.seq_len,
            image=image_shape(config) if task_of(recipe.task).images else None,
            context=context_length(config),
            max_eval_rows=eval_images(recipe, config),
            **parts_of(recipe, say),
        ),
    )


def check_streaming(recipe: RunRecipe) -> None:
    """Raise ValueError if a stream of rows is to be read by several ranks."""
    if recipe.streaming and asked_ranks() > 1:
        raise ValueError(
            "streaming: one process reads the rows, and several ranks were started. Start one, or leave streaming out."
        )


def hub_of(recipe: RunRecipe) -> dict[str, Any]:
    """Which part of the data is trained on, as loaders take it."""
    keys = {"dataset_config": "dataset_config", "split": "dataset_train_split", "revision": "dataset_revision"}
    return {name: getattr(recipe, key) for name, key in keys.items()}


def parts_of(recipe: RunRecipe, progress: Progress | None = None) -> dict[str, Any]:
    """What `RowsAsked` is told of the parts of the data: which are trained on, and which are held out."""
    return {
        "hub": hub_of(recipe),
        "eval_source": None if recipe.eval_data is None else resolve_data(recipe.eval_data, progress=progress),
        "eval_split": recipe.dataset_test_split,
        "progress": progress,
    }


def eval_images(recipe: RunRecipe, config: Any) -> int | None:
    """Held-out images that hold `eval_tokens`; None where rows are no images."""
    return max(1, recipe.eval_tokens // sequence_tokens(config, recipe)) if task_of(recipe.task).images else None


def all_rows(recipe: RunRecipe, tokenizer: Any, config: Any, report: Report) -> DataBundle:
    """Every row of the recipe's data as training rows, text up to `eval_tokens`, pictures of both parts: for data that
    was not trained on.

    Raises:
        ValueError: as `load_rows`; the data is streamed.
    """
    if recipe.streaming:
        raise ValueError(f"--all holds every row, and {recipe.data} was streamed as too large for that. Leave it out.")
    bundle = _with_ids_checked(
        recipe,
        config,
        RowsAsked(
            recipe=recipe,
            source=recipe.data,
            tokenizer=tokenizer,
            image=image_shape(config) if task_of(recipe.task).images else None,
            step_tokens=max(recipe.eval_tokens, recipe.seq_len),
            context=context_length(config),
            eval_ratio=0.0,
            hub=hub_of(recipe),
            progress=lambda line: report({"event": "note", "text": line}),
        ),
    )
    # of pictures some are held out whatever is asked
    return bundle if bundle.eval is None else replace(bundle, train=concatenate_datasets([bundle.train, bundle.eval]))


def _with_ids_checked(recipe: RunRecipe, config: Any, asked: RowsAsked) -> DataBundle:
    """The rows asked for, whose batches name a token that the model has no row for."""
    bundle, known = load_asked(asked), vocabulary_rows(config)
    if known is None:
        return bundle
    return replace(bundle, collate_fn=CheckedIds(bundle.collate_fn, known, recipe.model))


def step_rows(recipe: RunRecipe) -> int | None:
    """Rows that the steps read; None where the recipe counts epochs."""
    return None if recipe.steps is None else recipe.steps * recipe.batch_size * recipe.grad_accum


def refuse_rows(recipe: RunRecipe, bundle: DataBundle | None = None) -> None:
    """Raise ValueError if a method of the recipe cannot train on such rows; called before they are read and after."""
    task = task_of(recipe.task)
    facts = RowFacts(
        task=task.name,
        seq_len=recipe.seq_len,
        labelled=task.labelled,
        one_sequence=not task.images and task.sequences == 1,
        reads_texts=task.texts or (not task.images and task.sequences == 1),
    )
    if bundle is not None and "input_ids" in bundle.train.column_names:
        facts = replace(
            facts,
            lengths=lambda: lengths_of(bundle.train, "input_ids"),
            eval_lengths=lambda: [
                length
                for part in (bundle.train, bundle.eval)
                for name in ("input_ids", "input_ids_b")
                if part is not None and name in part.column_names
                for length in lengths_of(part, name)
            ],
        )
    for config in recipe.configs:
        if reason := method_of(config).refuse(config, facts):
            raise ValueError(f"{config.method}: {reason}.")


def lengths_of(rows: Dataset, column: str) -> list[int]:
    """Tokens of each row."""
    return list(map(len, rows[column]))


def reads_longest(recipe: RunRecipe) -> bool:
    """Whether a method of the recipe must see the longest rows, where rows differ in length."""
    return task_of(recipe.task).padded and any(method_of(c).reads_longest(c) for c in recipe.configs)


def calibration_batches(parts: Parts) -> list[dict[str, Tensor]] | None:
    """Training rows that hold `calibration_tokens`, evenly spaced over the data, without labels; None for none."""
    rows, recipe = parts.bundle.train, parts.recipe
    wanted = min(len(rows), -(-recipe.calibration_tokens // recipe.seq_len))
    places = [i * len(rows) // wanted for i in range(wanted)]
    if places and reads_longest(recipe):
        lengths = lengths_of(rows, "input_ids")
        places[-1] = lengths.index(max(lengths))
    batches: list[dict[str, Tensor]] = []
    for start in range(0, wanted, recipe.batch_size):
        batch = parts.bundle.collate_fn([rows[i] for i in places[start : start + recipe.batch_size]])
        batches.append({name: tensor.to(parts.device) for name, tensor in batch.items() if name != "labels"})
    return batches or None


def text_reader(parts: Parts) -> Read | None:
    """What makes a batch of texts for a method that starts from texts; None for a model without a tokenizer."""
    task = task_of(parts.recipe.task)
    if parts.tokenizer is None or (task.images and not task.texts):
        return None
    tokens = parts.recipe.seq_len
    if task.images:  # rows are none of the texts, which have lengths of their own
        tokens = context_length(parts.config) or tokens
    return reader(of_texts(parts.tokenizer), tokens, parts.device)


def reader(tokenizer: Any, max_tokens: int, device: torch.device | str) -> Read:
    """Texts -> a padded batch with its mask, each text cut to `max_tokens`, as rows are."""

    def read(texts: Sequence[str]) -> dict[str, Tensor]:
        rows = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        batch = Collator(padding_id(tokenizer))([{"input_ids": ids} for ids in rows])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    return read


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
