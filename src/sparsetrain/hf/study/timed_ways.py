"""Ways to train one recipe, timed in turns on its own rows, with one model's weights in memory."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch

from sparsetrain.hf.assets import cache_folder
from sparsetrain.hf.study.training_step import TrainingStep, convert_step
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.parts import Parts
from sparsetrain.measure.in_turns import interval, time_in_turns
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import release_free_pages
from sparsetrain.planner.choosing import BASELINE, Asked, Speed, settled
from sparsetrain.planner.timings import key_of, load_speeds, store_speeds
from sparsetrain.planner.weighing import Weighed
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.events import Report
from sparsetrain.runs.spans import total_steps

SHARE = 0.05
"""Most of the run's expected time that timing takes."""
ROUNDS = 3
"""Rounds of which timing must expect the time, to begin; and from which on it may end as decided."""
BATCHES = 8
"""Different batches of the training rows that are timed, spread over them."""


class TimedWays:
    """The speeds of some ways beside the first: kept from an earlier run, or timed.

    Args:
        parts: of the dense recipe.
        recipes: label -> the recipe of a way, the dense one first.
        weighed: their shape, and what is predicted of it.
    """

    def __init__(
        self, parts: Parts[Recipe], recipes: dict[str, Recipe], weighed: Weighed, asked: Asked, report: Report
    ) -> None:
        self.parts, self.recipes, self.weighed, self.asked, self.report = parts, recipes, weighed, asked, report
        self.steps = total_steps(parts.recipe, len(parts.bundle.train))
        self.failed: dict[str, str] = {}

    def speeds(self, base: str, timed: bool = True) -> tuple[dict[str, Speed], dict[str, str]]:
        """Label -> speed where it is known by timing; label -> why a way could not be run."""
        place = cache_folder() / "speeds" / f"{key_of(self._about(base))}.json"
        kept = {} if self.asked.again else load_speeds(place)
        if self.recipes.keys() <= kept.keys():
            return {label: kept[label] for label in self.recipes}, {}
        if not timed or self._budget(self._predicted()) < ROUNDS * sum(self._predicted().values()):
            return {}, {}
        self.report({"event": "note", "text": f"timing {len(self.recipes)} ways to train on the data's own rows"})
        try:
            times = self._times()
        finally:
            release_free_pages()
            if self.parts.device.type == "cuda":
                torch.cuda.empty_cache()
        found = _speeds(base, times)
        if len(times[base]) >= ROUNDS and not self.failed:
            store_speeds(kept | found, place)
        return found, self.failed

    def _times(self) -> dict[str, list[float]]:
        began = time.perf_counter()
        model, new_modules = assemble.load_model(self.parts)
        steps: dict[str, TrainingStep] = {}
        batches = self._batches()
        for label, recipe in self.recipes.items():
            # all of them train factors of their own, beside weights that are there once
            own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
            try:
                step = convert_step(own, new_modules, replace(self.parts, recipe=recipe), self.report)
                step.batches = batches
                step()  # allocates, and makes the optimizer's state
            except Exception as error:  # one way's failure, out of memory too, costs the others nothing
                if not recipe.methods:
                    raise
                self.failed[label] = f"it failed here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                continue
            steps[label] = step
        if len(steps) < 2:
            return {label: [] for label in steps}

        def more(times: dict[str, list[float]]) -> bool:
            rounds = len(next(iter(times.values())))
            last = sum(seconds[-1] for seconds in times.values())
            if rounds >= ROUNDS and settled(_speeds(next(iter(times)), times)):
                return False
            budget = self._budget({label: min(seconds) for label, seconds in times.items()})
            return time.perf_counter() - began + last <= budget

        return time_in_turns(steps, more, device=self.parts.device)

    def _budget(self, step_s: dict[str, float]) -> float:
        """Seconds that timing may take, by what a dense step takes."""
        return min(self.asked.seconds, SHARE * self.steps * next(iter(step_s.values()), 0.0))

    def _predicted(self) -> dict[str, float]:
        ways = {way.label: way for way in self.weighed.ways}
        return {label: self.weighed.forecast.seconds(ways[label]) or 0.0 for label in self.recipes}

    def _batches(self) -> list[dict[str, Any]]:
        rows, size = self.parts.bundle.train, self.parts.recipe.batch_size
        wanted = min(len(rows), BATCHES * size)
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.parts.recipe.seed))[:wanted]
        chunks = [places[start : start + size].tolist() for start in range(0, wanted, size)]
        batches = [self.parts.bundle.collate_fn([rows[i] for i in chunk]) for chunk in chunks]
        return [{name: tensor.to(self.parts.device) for name, tensor in batch.items()} for batch in batches]

    def _about(self, base: str) -> dict[str, Any]:
        """What the speeds depend on."""
        recipe, facts, machine = self.parts.recipe, self.weighed.facts, describe_machine()
        keys = ("task", "lora_r", "lora_targets", "batch_size", "grad_accum", "gradient_checkpointing", "max_grad_norm")
        return {
            "base": base,
            "model": self.parts.config.to_dict(),
            "recipe": {key: getattr(recipe, key) for key in keys},
            "dtype": self.weighed.forecast.dtype,
            "tokens": [f"{facts.seq_len:.2g}", f"{facts.target_share or 0:.2g}", self.weighed.forecast.tokens],
            "machine": [self.parts.device.type, machine.cpu, machine.cores, machine.threads, machine.gpus],
            "versions": machine.versions,
        }


def _speeds(base: str, times: dict[str, list[float]]) -> dict[str, Speed]:
    found = {base: BASELINE}
    for label, seconds in times.items():
        if label != base:
            low, median, high = interval(times[base], seconds)
            found[label] = Speed(median=median, low=low, high=high, how="measured")
    return found
