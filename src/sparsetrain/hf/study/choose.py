"""choose(): the way to train that pays for this data, model and machine, in place of `preset: auto`.

What is weighed and by which rules is the planner's (`choosing`, `weighing`); here rows are read, and what may be taken
is timed in turns with dense training on them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetrain.core.config import MethodConfig
from sparsetrain.core.units import bytes_text
from sparsetrain.data.collate import IGNORED_LABEL
from sparsetrain.hf.assets import cache_folder
from sparsetrain.hf.model.io import quiet
from sparsetrain.hf.model.model_config import read_config
from sparsetrain.hf.study.predict import predictor_of
from sparsetrain.hf.study.timed_ways import TimedWays
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import lengths_of, refuse_rows
from sparsetrain.measure.machine import describe_machine, free_bytes
from sparsetrain.planner.candidates import KEYS
from sparsetrain.planner.choosing import Asked, Option, Speed, pick, table, untried
from sparsetrain.planner.forecast import Forecast
from sparsetrain.planner.quality import Facts, deployed_records
from sparsetrain.planner.this_machine import this_machine
from sparsetrain.planner.weighing import Rows, Weighed, nothing_fits, weigh, with_speeds
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.checkpoints import check_output
from sparsetrain.runs.choice import recorded_choice
from sparsetrain.runs.events import Report, silent

LOOKED_AT = 2048
"""Rows, spread over the data, whose targets are counted."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """recipe: with what was taken. values: as choice.json holds them. opened: the dense parts, if rows were read."""

    recipe: Recipe
    values: dict[str, Any]
    opened: Parts[Recipe] | None = None


@quiet()
def choose(recipe: Recipe, asked: Asked | None = None, *, report: Report = silent, timed: bool = True) -> Choice:
    """Choose the methods, and whether activations are recomputed, for a recipe with `preset: auto`.

    With `resume`, what was chosen when the run began is taken again.

    Args:
        asked: memory, tolerance, goal and time of the choice.
        report: told what is being done, and at last the table of what was weighed, as notes.
        timed: time what may be taken; else steps are of the record or predicted, and no weights are read.

    Raises:
        ValueError: nothing fits the memory (with what comes nearest); or as `finetune` for recipe, model and data.
    """
    asked = asked or Asked()
    check_output(recipe.output, resume=recipe.resume)
    if recipe.resume and (known := recorded_choice(Path(recipe.output))) is not None:
        report({"event": "note", "text": f"As chosen when the run began: {known['taken']}."})
        way = {key: known[key] for key in ("recomputes", "offloads", "pieces") if key in known}
        return Choice(recipe=decided(recipe, known["methods"], Option(**way)), values=known)
    began = time.perf_counter()
    recipe = with_dtype(recipe, report)
    report({"event": "phase", "name": "choosing how to train", "share": 0.0})
    rows = _Rows(recipe, report)
    weighed = weigh(
        deployed_records(),
        _facts(recipe),
        _forecast(recipe, asked),
        asked,
        recomputes=recipe.gradient_checkpointing != "none",
        read_rows=rows.read,
        check=rows.check,
    )

    def measure(ways: list[Option], base: Option) -> tuple[dict[str, Speed], dict[str, str]]:
        assert rows.parts is not None, "rows are read before anything with methods is able"
        recipes = {way.label: decided(recipe, way.methods, way) for way in ways}
        return TimedWays(rows.parts, recipes, weighed, asked, report).speeds(base.label, timed)

    taken, found = pick(with_speeds(weighed, measure), asked)
    if taken is None:
        raise ValueError(nothing_fits(weighed, asked))
    values = {"taken": taken.label, "methods": taken.to_dict()["methods"], "recomputes": taken.recomputes}
    values |= {"offloads": taken.offloads, "pieces": taken.pieces}
    values |= {"reason": taken.reason, "options": [way.to_dict() for way in found], "facts": asdict(weighed.facts)}
    values |= {"asked": asdict(asked), "usable_bytes": weighed.forecast.usable_bytes, "timed": timed}
    values |= {"seconds": time.perf_counter() - began, "machine": describe_machine().to_dict()}
    for line in _lines(weighed, found, taken, timed, asked):
        report({"event": "note", "text": line})
    return Choice(recipe=decided(recipe, taken.methods, taken), values=values, opened=rows.parts)


def decided(recipe: Recipe, methods: Any, way: Option) -> Recipe:
    """The recipe with methods in place of the preset, and the exact tools that it asks for or the way has."""
    changes = way.exact
    if recipe.gradient_checkpointing != "none":
        changes.pop("gradient_checkpointing", None)
    return recipe.decided(methods, **changes)


def _facts(recipe: Recipe) -> Facts:
    """What is known before rows are read: packed rows are full, and each of their tokens is a target."""
    packed = not task_of(recipe.task).padded
    return Facts(
        task=recipe.task,
        trained="all weights" if recipe.trains_all else "lora",
        deployed=recipe.deploy,
        seq_len=recipe.seq_len if packed else None,
        target_share=1.0 if packed else None,
    )


def _forecast(recipe: Recipe, asked: Asked) -> Forecast:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = assemble.pick_device(recipe)
    path, _ = assemble.open_config(recipe, lambda _event: None, ())
    bf16, gpu = assemble.computes_bf16(recipe, device), device.type == "cuda"
    kept = (*KEYS, "activation_offloading", "tiled_mlp", "seed", "dtype")
    base = {key: getattr(recipe, key) for key in kept}
    base |= {"seq_len": recipe.seq_len, "batch_size": recipe.batch_size, "grad_accum": recipe.grad_accum}
    rates = this_machine(cache_folder() / "machine")
    return Forecast(
        predictor=predictor_of(read_config(path), base, bf16=bf16, cache=cache_folder() / "outlines", gpu=gpu),
        rates=rates,
        tokens=recipe.seq_len,
        batch=recipe.batch_size,
        grad_accum=recipe.grad_accum,
        dtype="bf16" if bf16 else "fp32",
        usable_bytes=rates.usable_bytes(asked.memory_bytes) if asked.memory_bytes else free_bytes(device),
    )


class _Rows:
    """The rows of a recipe, read when they are asked for, as the dense recipe's parts."""

    def __init__(self, recipe: Recipe, report: Report) -> None:
        self.recipe, self.report = recipe, report
        self.parts: Parts[Recipe] | None = None

    def read(self) -> Rows:
        self.parts = assemble.open_parts(decided(self.recipe, (), Option()), self.report)
        rows = self.parts.bundle.train
        some = rows.select(range(0, len(rows), -(-len(rows) // LOOKED_AT)))
        share = None
        if "labels" in some.column_names and isinstance(some[0]["labels"], list):
            targets = sum(label != IGNORED_LABEL for row in some["labels"] for label in row)
            share = targets / sum(lengths_of(some, "input_ids"))
        return Rows(lengths=lengths_of(rows, "input_ids"), target_share=share)

    def check(self, methods: tuple[MethodConfig, ...]) -> None:
        """Raise ValueError if methods cannot do what the recipe asks of them, on these rows."""
        assert self.parts is not None
        recipe = decided(self.recipe, methods, Option())
        assemble.check_and_plan(recipe, self.parts.config, self.parts.device)
        refuse_rows(recipe, self.parts.bundle)


def _lines(weighed: Weighed, found: list[Option], taken: Option, timed: bool, asked: Asked) -> list[str]:
    facts, usable = weighed.facts, bytes_text(weighed.forecast.usable_bytes)
    share = "" if facts.target_share is None else f", {facts.target_share:.0%} of them targets"
    rows = "" if facts.seq_len is None else f"rows of some {facts.seq_len:,.0f} tokens{share}; "
    head = f"How to train (preset auto): {rows}{usable} of memory"
    if not timed:
        head += "; nothing is timed, steps are of the record or predicted: the run may choose otherwise"
    if not taken.methods:
        last = f"{taken.label[0].upper()}{taken.label[1:]} is the best choice for this model, data and machine."
    else:
        last = f"Chosen: {taken.label}, deployed dense: {taken.reason}."
    hint = None if taken.methods else untried(deployed_records(), facts, asked)
    return [head, *table(found, taken), last, *([hint] if hint else [])]
