"""Outlines of recipes on one model: asked of a tracer once, then of the cache; and what they predict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsetrain.core.config import plain_values
from sparsetrain.core.remembered import name_here
from sparsetrain.planner.candidates import KEYS, candidates
from sparsetrain.planner.kernels import ops_of, unable
from sparsetrain.planner.measured import measured_speedup
from sparsetrain.planner.model_config import ModelConfig
from sparsetrain.planner.nearest import nearest
from sparsetrain.planner.optimizers import DEFAULT
from sparsetrain.planner.outline import Outline, load_outline, store_outline
from sparsetrain.planner.search import Answer, Candidate, Question, answer
from sparsetrain.recipes.finetune import Recipe

Found = Outline | ValueError
"""What a trace gives: an outline, or why the recipe does not fit the model."""


@dataclass(frozen=True, kw_only=True)
class Tracer:
    """What makes outlines of recipes on one model.

    one: (recipe) -> its outline; raises ValueError if it does not fit the model.
    several: (recipes) -> (index, what was found), as they get ready; what it leaves out is asked of `one`.
    """

    one: Callable[[Recipe], Outline]
    several: Callable[[list[Recipe]], Iterator[tuple[int, Found]]]


class Predictor:
    """Outlines of recipes on one model, from the cache where they are there.

    Args:
        model: what is trained.
        tracer: for this model, `bf16` and `gpu`.
        base: recipe keys of all candidates (model, task, lora_r, …).
        bf16: weights (LoRA) or autocast (all weights) in bf16.
        cache: folder of stored outlines; None: none.
        gpu: trace for a GPU, and refuse what was not timed on one, unless it is in `timed`.
        timed: methods, joined by +, of which the machine's rates hold steps; at which shapes is seen later.
        here: it is for this machine, on which a run would refuse what it times as slower.
    """

    def __init__(
        self,
        model: ModelConfig,
        base: dict[str, Any],
        tracer: Tracer,
        *,
        bf16: bool,
        cache: Path | None,
        gpu: bool = False,
        timed: Collection[str] = (),
        here: bool = False,
    ) -> None:
        self.model, self.base, self.tracer, self.timed = model, base, tracer, timed
        self.bf16, self.cache, self.gpu, self.here = bf16, cache, gpu, here
        self.traced = 0
        self._known: dict[str, Found] = {}

    def recipe(self, candidate: Candidate) -> Recipe:
        return Recipe.from_values({"data": "none", **self.base, "model": self.model.name, **candidate.values})

    def methods(self, candidate: Candidate) -> list[dict[str, Any]]:
        return [plain_values(config) for config in self.recipe(candidate).configs]

    def outline(self, candidate: Candidate) -> Outline:
        """Trace a candidate, or read what an earlier process traced.

        Raises:
            ValueError: the recipe does not fit the model.
        """
        recipe = self.recipe(candidate)
        if (reason := self._refused(recipe)) is not None:
            raise ValueError(reason)
        found = self._found(recipe)
        if isinstance(found, ValueError):
            raise found
        if found is not None:
            return found
        found = self.tracer.one(recipe)
        self._keep(recipe, found)
        return found

    def prepare(self, wanted: list[Candidate]) -> None:
        """Trace what is not known of these candidates, several at once."""
        recipes = [self.recipe(candidate) for candidate in wanted]
        recipes = [recipe for recipe in recipes if self._refused(recipe) is None and self._found(recipe) is None]
        if len(recipes) < 2:
            return
        for i, found in self.tracer.several(recipes):
            self._keep(recipes[i], found)

    def _refused(self, recipe: Recipe) -> str | None:
        """Why a recipe is not worth a trace: no step with these methods is on record, at any shape."""
        known = "+".join(config.method for config in recipe.configs) in self.timed
        return None if known else unable(ops_of(recipe), gpu=self.gpu)

    def _found(self, recipe: Recipe) -> Found | None:
        key = self._key(recipe)
        if key not in self._known and self.cache is not None:
            stored = load_outline(self.cache / f"{key}.json")
            if stored is not None:
                self._known[key] = stored
        return self._known.get(key)

    def _keep(self, recipe: Recipe, found: Found) -> None:
        key = self._key(recipe)
        self._known[key] = found
        self.traced += 1
        if self.cache is not None and isinstance(found, Outline):
            store_outline(found, self.cache / f"{key}.json")

    def _key(self, recipe: Recipe) -> str:
        """Names what an outline depends on: the model, how it is trained, and the code that was traced."""
        keys = (*KEYS, "activation_offloading", "tiled_mlp")
        trained = {key: getattr(recipe, key) for key in keys} | {"training": recipe.training.get("optim", DEFAULT)}
        trained |= {"again": recipe.gradient_checkpointing != "none", "bf16": self.bf16, "gpu": self.gpu}
        if self.here and any(config.refused_if_slower for config in recipe.configs):
            trained["here"] = name_here("timed")
        trained["config"] = self.model.values
        trained["methods"] = [plain_values(config) for config in recipe.configs]
        trained["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        trained["code"] = _code()
        return hashlib.sha256(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """A hash of sizes and times of the package's files, so that a changed kernel or method is traced again."""
    root = Path(__file__).parents[1]
    files = sorted(path for path in root.rglob("*.py") if "cli" not in path.parts)
    stamps = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def predict(
    predictor: Predictor, question: Question, only: list[Candidate] | None = None, *, fit: str | None = None
) -> Answer:
    """Predict memory and time of every candidate, and pick.

    Args:
        predictor: of the model.
        question: the goal.
        only: the candidates, the first of which is the baseline; by default all of `candidates`.
        fit: `seq` or `batch`: pick for the longest sequence or the largest batch instead, which the picked row holds.
    """
    asked = only or candidates(predictor.base, gpu=predictor.gpu)
    predictor.prepare(asked)
    found = answer(
        question,
        asked,
        predictor.outline,
        predictor.methods,
        lambda outline: unable(outline.ops, gpu=predictor.gpu),
        fit=fit,
        speedup=lambda candidate, tokens: (
            measured_speedup(predictor.recipe(candidate), predictor.model.hidden_size, replace(question, tokens=tokens))
            if question.rates.methods
            else None
        ),
    )
    return found if found.picked is not None else replace(found, nearest=nearest(found.rows, question))
