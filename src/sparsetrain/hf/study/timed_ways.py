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
"""Most of the run's expected time that timing takes; loading the weights is part of it."""
ROUNDS = 3
"""Rounds from which on timing may end as decided, and its result is kept for later runs."""
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
        if not timed or SHARE * self.steps < len(self.recipes) or not self.asked.seconds:
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
        """Seconds of the steps of each way, in rounds; of the first alone where the run is too short to try others."""
        began = time.perf_counter()
        model, new_modules = assemble.load_model(self.parts)
        base, *others = self.recipes
        steps = {base: self._step(model, new_modules, self.recipes[base])}
        spent = time.perf_counter() - began
        if 2 * spent > self.asked.seconds:  # on a machine this slow, or this busy, another step takes as long
            return {base: []}
        steps[base]()
        dense_s = time.perf_counter() - began - spent
        least = dense_s * (1 + 2 * len(others))  # a first step and a timed one of each, hardly slower than dense
        if spent + dense_s + least > self._budget(dense_s):
            return {base: []}
        for label in others:
            try:
                steps[label] = self._step(model, new_modules, self.recipes[label])
            except Exception as error:  # one way's failure, out of memory too, costs the others nothing
                self.failed[label] = f"it failed here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if len(steps) < 2:
            return {base: []}
        batches = self._batches()
        for step in steps.values():  # every round is of the same batch
            step.begin_with(batches)

        def more(times: dict[str, list[float]]) -> bool:
            if len(times[base]) >= ROUNDS and settled(_speeds(base, times)):
                return False
            spent, last = time.perf_counter() - began, sum(seconds[-1] for seconds in times.values())
            return spent + last <= self._budget(min(times[base]))

        return time_in_turns(steps, more, device=self.parts.device)

    def _step(self, model: Any, new_modules: list[str], recipe: Recipe) -> TrainingStep:
        """The step of one way, beside weights that all of them share, after a first one that allocates."""
        own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        step = convert_step(own, new_modules, replace(self.parts, recipe=recipe), self.report)
        step()
        return step

    def _budget(self, dense_s: float) -> float:
        """Seconds that timing may take, where a dense step takes `dense_s`."""
        return min(self.asked.seconds, SHARE * self.steps * dense_s)

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
        keys += ("lora_dtype", "activation_offloading", "tiled_mlp")
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
