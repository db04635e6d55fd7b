"""Super-Tuning (arXiv 2607.09287, PEFT's) in the runs of `bench.methods.sara`: SaRA's nearest neighbour.

It trains the largest entries of each weight, or the smallest (`bottom`), as many of each tensor where SaRA has one
threshold over all; its values are added to a weight in the forward, and nothing is adjusted on the way. Same model,
rows, steps and settings as there, and a tenth of the entries; it stands in LoRA's place.

    python -m bench run super_tuning --output DIR [--cells 'python*'] [--minutes 60]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bench.methods import sara
from bench.runner import Asked, Benchmark, Cell, in_own_process

GIVEN = {"lora_r": 1, "lr": 3e-4, "methods": []}
"""Rank: there is an adapter; of what kind says `super_tuning`."""
ARMS: dict[str, dict[str, Any]] = {"super-tuning": GIVEN, "super-tuning bottom": GIVEN}
FURTHER = {f"{arm} lr=1e-3": {**GIVEN, "lr": 1e-3} for arm in ARMS}
"""On the first seed alone."""


@contextlib.contextmanager
def super_tuning(select_top: bool) -> Iterator[None]:
    """Inside, what a run makes as LoRA is Super-Tuning of a tenth of the entries of the same linears."""
    from unittest.mock import patch

    from peft import SupertuningConfig

    from sparsetrain.hf.model import models
    from sparsetrain.recipes.tasks import task_of

    def config(recipe: Any, modules_to_save: Any = None, **_lora: Any) -> Any:
        return SupertuningConfig(
            sparsity=0.9,
            select_top=select_top,
            target_modules=recipe.lora_targets,
            task_type=task_of(recipe.task).adapter,
            modules_to_save=modules_to_save,
        )

    with patch.object(models, "lora_config", config):
        yield


def train(values: dict[str, Any], select_top: bool, threads: int) -> dict[str, Any]:
    """One run."""
    with super_tuning(select_top):
        return sara.train(values, False, threads)


def cells(asked: Asked) -> list[Cell]:
    settings, found = asked.settings, []
    runs = [(data, arm, seed) for seed in asked.seeds for data in sara.DATA for arm in ARMS]
    runs += [(data, arm, asked.seeds[0]) for data in sara.DATA for arm in FURTHER]
    for data, arm, seed in runs:
        values = sara.recipe_values(data, (ARMS | FURTHER)[arm], seed, settings)
        given = (values, "bottom" not in arm, asked.threads)
        found.append(Cell(f"{data} {arm} {seed}", lambda given=given: in_own_process(f"{__name__}:train", *given)))
    return found


BENCHMARKS = [
    Benchmark(
        name="super_tuning",
        measures="PEFT's Super-Tuning of a tenth of the entries, in the runs of SaRA's benchmark: loss and step time",
        cells=cells,
        settings={key: sara.BENCHMARKS[0].settings[key] for key in ("steps", "eval_tokens", "dtype")},
        quick={key: sara.BENCHMARKS[0].quick[key] for key in ("steps", "eval_tokens")},
        seeds=sara.BENCHMARKS[0].seeds,
        threads=sara.BENCHMARKS[0].threads,
        shows=("loss", "trained", "lr", "step_s"),
    )
]
