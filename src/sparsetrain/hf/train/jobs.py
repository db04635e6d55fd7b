"""The table of jobs."""

from __future__ import annotations

from sparsetrain.hf.model import architectures, models
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train import finetune as finetuning
from sparsetrain.hf.train import pretrain as pretraining
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.job import JobKind
from sparsetrain.surgery.method import Grown

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
