"""preview(): what a recipe would do, without reading weights or writing a file (`--dry-run`)."""

from __future__ import annotations

from pathlib import Path

from sparsetrain.hf.assets import ASSETS, asset_status
from sparsetrain.hf.model import models
from sparsetrain.hf.study.stage_trace import stage_forecasts, stage_records
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.jobs import JOBS, job_of
from sparsetrain.planner.preview import Preview
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import find_resumable
from sparsetrain.runs.claim import check_claim
from sparsetrain.runs.events import Event, Report, silent
from sparsetrain.runs.spans import total_steps


def preview(recipe: RunRecipe, *, report: Report = silent) -> Preview:
    """Check a recipe against its model and data, and say what it would do. No weights are read, nothing is written.

    Raises:
        ValueError, PlanError, CheckpointError: as `finetune` and `pretrain`; also for an embedded model that is not
            fetched yet.
    """
    notes: list[str] = []

    def note(event: Event) -> None:
        if event["event"] == "note":
            notes.append(event["text"])
        report(event)

    recipe = with_dtype(recipe, note)
    check_claim(Path(recipe.output), recipe, "run" if recipe.compare == "none" else "comparison")
    check_fetched(recipe)
    resumed = find_resumable(recipe.output, recipe, note) if recipe.resume and recipe.compare == "none" else None
    job = JOBS[job_of(recipe)]
    parts = job.open_parts(recipe, note)
    made = job.empty_models(parts.config, recipe)
    model, tokens = made[-1].model, job.row_tokens(parts.config, recipe)
    weights, _ = models.num_parameters(model)
    added = sum(row["added_params"] for row in parts.plan.rows()) if parts.plan is not None else 0
    total, trainable = models.num_parameters(job.adapted(model, recipe))
    stages = stage_records(recipe, parts, made, tokens)
    rows_per_step = recipe.batch_size * recipe.grad_accum
    return Preview(
        recipe=recipe,
        plan=parts.plan,
        data=parts.bundle.description,
        parameters=total + added,
        trainable_parameters=trainable + added,
        weight_bytes=weights * assemble.pick_dtype(recipe, parts.device).itemsize,
        optimizer_bytes=(trainable + added) * 8,
        steps=total_steps(recipe, len(parts.bundle.train)),
        tokens_per_step=rows_per_step * tokens,
        device=str(parts.device),
        counts=parts.bundle.counts,
        resume_step=None if resumed is None else resumed.step,
        stages=stages,
        forecasts=stage_forecasts(parts, stages, made, tokens) if stages else [],
        notes=notes,
    )


def check_fetched(recipe: RunRecipe) -> None:
    """Raise ValueError for an embedded model or data set that is not fetched yet."""
    for name in filter(None, (recipe.model, recipe.data, recipe.eval_data)):
        if name in ASSETS and asset_status(name).state == "absent":
            raise ValueError(f"{name} is not fetched yet. Run: sparsetrain models fetch {name}")
