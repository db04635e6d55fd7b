"""Predicted against measured time of whole training steps on this CPU: the roofline with rates measured just before.

Real weights, all layers, random tokens; the shortest of three steps after one to warm up.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from bench.runner import Benchmark, Cell

RECIPES: dict[str, list[dict[str, Any]]] = {
    "LoRA": [],
    "token_selection": [{"method": "token_selection"}],
    "routed_ffn": [{"method": "routed_ffn"}],
}


def measured(recipe: Any) -> float:
    from sparsetrain.hf.study.training_step import build_step, open_measured_parts

    step = build_step(open_measured_parts(recipe))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def predicted(recipe: Any, rates: Any) -> float:
    from transformers import AutoConfig

    from sparsetrain.hf.model.model_config import read_config
    from sparsetrain.hf.study.recipe_trace import outline
    from sparsetrain.planner.roofline import step_seconds

    config = AutoConfig.for_model(**read_config(recipe.model).values)
    found = outline(recipe, config, bf16=False, lengths=(recipe.seq_len,))
    return step_seconds(found, rates, tokens=recipe.seq_len, dtype="fp32")


@functools.cache
def rates() -> Any:
    from sparsetrain.measure.rates import measure_rates
    from sparsetrain.planner.machines import MachineRates

    return MachineRates.from_dict(measure_rates("cpu", seconds=0.3).to_dict())


def both(name: str, settings: dict[str, Any]) -> dict[str, float]:
    from sparsetrain.hf.data.random_tokens import RANDOM
    from sparsetrain.recipes.finetune import Recipe

    values = {"model": settings["model"], "data": RANDOM, "methods": RECIPES[name], "seq_len": settings["tokens"]}
    recipe = Recipe.from_values(values | {"calibration_tokens": 512, "device": "cpu"})
    return {"roofline_s": predicted(recipe, rates()), "measured_s": measured(recipe)}


BENCHMARKS = [
    Benchmark(
        name="planner_steps",
        measures="time of a training step as the roofline predicts it, against measured steps on this CPU",
        cells=lambda asked: [Cell(name, lambda name=name: both(name, asked.settings)) for name in RECIPES],
        settings={"model": "smollm2-135m", "tokens": 512},
        quick={"tokens": 128},
        under="rows",
        shows=("roofline_s", "measured_s"),
        about=lambda asked: {**asked.settings, "rates": rates().to_dict()},
    )
]
