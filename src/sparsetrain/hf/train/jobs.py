"""The table of jobs: what trains a recipe of each kind, and what can be said of it before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.hf.model import architectures, models
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train import finetune as finetuning
from sparsetrain.hf.train import pretrain as pretraining
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.run import Result
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report
from sparsetrain.surgery.method import Grown


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job.

    recipe: the class of its recipes. train: trains one. title: what is trained, in a line.
    open_parts: (recipe, report) -> everything but the weights.
    empty_models: (config, recipe) -> its models without weights, one a stage, with what a stage installs in its own.
    adapted: (one of them, recipe) -> as it is trained.
    row_tokens: (config, recipe) -> tokens of a row.
    dense: recipe keys that a dense counterpart has in place of its own, beside `methods`.
    """

    recipe: type[RunRecipe]
    train: Callable[..., Result]
    title: Callable[[Any], str]
    open_parts: Callable[[Any, Report], Parts[Any]]
    empty_models: Callable[[Any, Any], list[Grown]]
    adapted: Callable[[Any, Any], Any]
    row_tokens: Callable[[Any, Any], int]
    dense: dict[str, Any] = field(default_factory=dict)


JOBS: dict[str, JobKind] = {
    "finetune": JobKind(
        recipe=Recipe,
        train=finetuning.finetune,
        title=finetuning.title,
        open_parts=assemble.open_parts,
        empty_models=lambda config, recipe: [Grown(model=models.empty_model(config, recipe.task))],
        adapted=lambda model, recipe: models.add_lora(model, recipe, None, []),
        row_tokens=architectures.sequence_tokens,
        dense={"distill_steps": 0},
    ),
    "pretrain": JobKind(
        recipe=PretrainRecipe,
        train=pretraining.pretrain,
        title=pretraining.title,
        open_parts=pretraining.open_parts,
        empty_models=pretraining.stage_models,
        adapted=lambda model, _recipe: model,
        row_tokens=architectures.sequence_tokens,
    ),
}


def job_of(recipe: RunRecipe) -> str:
    """The name of the job that a recipe is for."""
    return next(name for name, job in JOBS.items() if isinstance(recipe, job.recipe))
