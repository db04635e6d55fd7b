"""What each stage of a run will cost, before it starts: FLOPs, time and peak memory of the model that it trains.

A step is traced without weights, as `recipe_trace` does it, on the run's own first batch.
"""

from __future__ import annotations

import warnings
from typing import Any

from sparsetrain.core.backend import planning_for
from sparsetrain.hf.assets import cache_folder
from sparsetrain.hf.study.recipe_trace import ThinStep
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import first_batch
from sparsetrain.measure.schema import StageRecord
from sparsetrain.planner.hollow_model import convert_empty
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.preview import StageForecast
from sparsetrain.planner.roofline import step_seconds
from sparsetrain.planner.thin_model import thin_out
from sparsetrain.planner.this_machine import this_machine


def stage_forecasts(
    parts: Parts[Any], stages: list[StageRecord], models: list[Any], row_tokens: int
) -> list[StageForecast]:
    """One a stage; models of equal size are traced once.

    Args:
        models: the model of each stage, on the meta device; they are used up.
        row_tokens: tokens of a row.
    """
    known: dict[str, tuple[float, float]] = {}
    found: list[StageForecast] = []
    rows = parts.recipe.batch_size * parts.recipe.grad_accum
    for stage, model in zip(stages, models, strict=True):
        key = repr(model.config)
        if key not in known:
            known[key] = _step(parts, model, row_tokens)
        step_s, peak = known[key]
        steps = stage["to_step"] - stage["from_step"]
        flops = steps * rows * row_tokens * stage["flops_per_token"]
        found.append({"flops": flops, "step_s": step_s, "time_s": steps * step_s, "peak_bytes": peak})
    return found


def _step(parts: Parts[Any], model: Any, row_tokens: int) -> tuple[float, float]:
    """(seconds of a step, bytes at its peak)."""
    recipe, gpu = parts.recipe, parts.device.type == "cuda"
    bf16 = assemble.computes_bf16(recipe, parts.device)
    with warnings.catch_warnings(), planning_for("cuda" if gpu else "cpu"):
        warnings.simplefilter("ignore")
        convert_empty(model, recipe, False)
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
    return seconds, outline.peak(row_tokens, accumulates=recipe.grad_accum > 1).total
