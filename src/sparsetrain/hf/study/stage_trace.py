"""What each stage of a run will cost, before it starts: FLOPs, time and peak memory of the model that it trains.

A step is traced without weights, as `recipe_trace` does it, on the run's own first batch.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from sparsetrain.core.backend import planning_for
from sparsetrain.hf.assets import cache_folder
from sparsetrain.hf.study.recipe_trace import ThinStep
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.jobs import JOBS, job_of
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import first_batch
from sparsetrain.measure.ledger import size_of
from sparsetrain.measure.schema import StageRecord
from sparsetrain.planner.hollow_model import convert_empty
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.preview import StageForecast
from sparsetrain.planner.roofline import step_seconds
from sparsetrain.planner.thin_model import thin_out
from sparsetrain.planner.this_machine import this_machine
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.spans import spans
from sparsetrain.surgery.grow import growth_method
from sparsetrain.surgery.method import Grown, growth_of


def planned_stages(recipe: RunRecipe, parts: Parts[Any]) -> list[StageForecast]:
    """What each stage of a run will take; nothing of a run of one stage."""
    job = JOBS[job_of(recipe)]
    if growth_of(recipe.configs) is None:
        return []
    made, tokens = job.empty_models(parts.config, recipe), job.row_tokens(parts.config, recipe)
    return stage_forecasts(parts, stage_records(recipe, parts, made, tokens), made, tokens)


def stage_records(recipe: RunRecipe, parts: Parts[Any], made: list[Grown], tokens: int) -> list[StageRecord]:
    """The stages of a run, as it will record them; none of a run of one stage.

    Args:
        made: the model of each, on the meta device. tokens: of a row.
    """
    growth = growth_of(recipe.configs)
    if growth is None:
        return []
    found = spans(growth_method(growth).stages(growth), recipe, len(parts.bundle.train))
    return [span.record(size_of(grown.model, tokens)) for span, grown in zip(found, made, strict=True)]


def stage_forecasts(
    parts: Parts[Any], stages: list[StageRecord], made: list[Grown], row_tokens: int
) -> list[StageForecast]:
    """One a stage; equal models, converted alike, are traced once.

    Args:
        made: the model of each stage, on the meta device, and what is installed in it.
        row_tokens: tokens of a row.
    """
    known: dict[str, StageForecast] = {}
    found: list[StageForecast] = []
    rows = parts.recipe.batch_size * parts.recipe.grad_accum
    for stage, grown in zip(stages, made, strict=True):
        key = repr((grown.model.config, grown.edits))
        if key not in known:
            known[key] = _step(parts, grown, row_tokens)
        steps = stage["to_step"] - stage["from_step"]
        flops = float(steps * rows * row_tokens * stage["flops_per_token"])
        found.append({**known[key], "flops": flops, "time_s": steps * known[key]["step_s"]})
    return found


def _step(parts: Parts[Any], grown: Grown, row_tokens: int) -> StageForecast:
    """Of one step; `flops` and `time_s` are those of a stage, and left at 0."""
    recipe, gpu = parts.recipe, parts.device.type == "cuda"
    bf16 = assemble.computes_bf16(recipe, parts.device)
    model = copy.deepcopy(grown.model)  # a stage may go on with the model of the one before
    with warnings.catch_warnings(), planning_for("cuda" if gpu else "cpu"):
        warnings.simplefilter("ignore")
        convert_empty(model, recipe, False, grown.edits)
        thin = ThinStep(model, thin_out(model), recipe, cast=bf16, gpu=gpu)
        trace = thin.trace(first_batch(parts))
        static, trained = thin.static()
    outline = Outline(
        traces={row_tokens: trace},
        layout=thin.layout,
        static=static,
        ops=(),
        parameters=static.parameters_trainable // 4,
        trained=trained,
    )
    rates = this_machine(cache_folder() / "machine")
    seconds = step_seconds(
        outline, rates, tokens=row_tokens, grad_accum=recipe.grad_accum, dtype="bf16" if bf16 else "fp32"
    )
    peak = outline.peak(row_tokens, accumulates=recipe.grad_accum > 1)
    held = static.parameters_trainable + static.parameters_frozen + static.buffers
    return {
        "flops": 0.0,
        "step_s": seconds,
        "time_s": 0.0,
        "peak_bytes": peak.total,
        "static_bytes": float(held + static.gradients + static.optimizer),
        "saved_bytes": sum(peak.saved_in_full.values()),
    }
