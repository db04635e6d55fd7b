"""Predicted against measured time of whole training steps on this CPU: the roofline with rates measured just before.

    python bench/planner/step_time.py --json bench/results

Real weights, all layers, random tokens; the shortest of three steps after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="DIR")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    from sparsetrain.hf.data.random_tokens import RANDOM
    from sparsetrain.measure.machine import describe_machine
    from sparsetrain.measure.rates import measure_rates
    from sparsetrain.planner.machines import MachineRates
    from sparsetrain.recipes.finetune import Recipe

    rates = MachineRates.from_dict(measure_rates("cpu", seconds=0.3).to_dict())
    rows = {}
    for name, methods in RECIPES.items():
        values = {"model": options.model, "data": RANDOM, "methods": methods, "seq_len": options.tokens}
        recipe = Recipe.from_values(values | {"calibration_tokens": 512, "device": "cpu"})
        rows[name] = {"roofline_s": predicted(recipe, rates), "measured_s": measured(recipe)}
        print(name, rows[name], flush=True)
    result = {"model": options.model, "tokens": options.tokens, "rows": rows, "rates": rates.to_dict()}
    result["machine"] = describe_machine().to_dict()
    if options.json:
        (options.json / "planner_steps.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
