"""predictor_of(): what predicts a model's ways to train, from its config alone. No weights, no GPU; cached.

This module stays light: transformers and PEFT are imported when a recipe has to be traced, not for a cached answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsetrain.planner.model_config import ModelConfig
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.predictor import Found, Predictor, Tracer
from sparsetrain.recipes.finetune import Recipe


def predictor_of(
    model: ModelConfig, base: dict[str, Any], *, bf16: bool, gpu: bool = False, here: bool = False, **known: Any
) -> Predictor:
    """A predictor that traces on the empty model; arguments as of `Predictor`, its cache too."""

    def one(recipe: Recipe) -> Outline:
        from sparsetrain.hf.model.opening import make_config
        from sparsetrain.hf.study.recipe_trace import outline

        return outline(recipe, make_config(model.values, model.name), bf16=bf16, gpu=gpu, here=here)

    def several(recipes: list[Recipe]) -> Iterator[tuple[int, Found]]:
        from sparsetrain.hf.model.opening import make_config
        from sparsetrain.hf.study.trace_pool import trace_all

        make_config(model.values, model.name)  # a model that cannot be made is an error, and no refusal of a recipe
        return trace_all(recipes, model, bf16=bf16, gpu=gpu, here=here)

    return Predictor(model, base, Tracer(one=one, several=several), bf16=bf16, gpu=gpu, here=here, **known)
