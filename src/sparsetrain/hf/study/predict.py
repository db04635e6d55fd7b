"""predict(): the plan of a training run from a model's config alone. No weights, no GPU; cached.

This module stays light: transformers and PEFT are imported when a recipe has to be traced, not for a cached answer.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from sparsetrain.core.config import MethodConfig, plain_values, registered_methods
from sparsetrain.hf.model.model_config import ModelConfig
from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.outline import Outline, load_outline, store_outline
from sparsetrain.planner.search import Answer, Candidate, Question, answer
from sparsetrain.recipes.finetune import PRESETS, Recipe

RESERVE_BYTES = {"cpu": 450_000_000, "gpu": 600_000_000}
"""What a process holds beside tensors: interpreter and libraries on a CPU, context and kernels on a GPU."""


def candidates(base: dict[str, Any]) -> list[Candidate]:
    """The ways to train that are compared, safest first; further methods of the registry come with their defaults.

    Args:
        base: recipe keys that hold for all of them; `methods` and `gradient_checkpointing` are what is compared.
    """
    again = {"gradient_checkpointing": "non-reentrant"}
    recorded: dict[str, MethodConfig] = {config.method: config for config in PRESETS["spt"]}
    methods = registered_methods()
    made = {name: recorded.get(name) or kind() for name, kind in methods.items()}
    plain = {name: plain_values(config) for name, config in made.items()}
    all_weights = base.get("lora_r") == 0
    train = "all weights" if all_weights else "LoRA"
    found = [
        Candidate(label=train, values={"methods": []}),
        Candidate(label=f"{train} + checkpointing", values={"methods": [], **again}),
    ]
    if not all_weights:
        found.append(Candidate(label="all weights", values={"methods": [], "lora_r": 0}, pickable=False))
    tokens = plain.pop("token_selection", None)
    if tokens is not None:
        chunked = plain_values(methods["token_selection"].dense_limit())
        found += [
            Candidate(label=f"{train} + chunked loss", values={"methods": [chunked]}),
            Candidate(label=f"{train} + chunked loss + checkpointing", values={"methods": [chunked], **again}),
            Candidate(label="token_selection", values={"methods": [tokens]}),
            Candidate(label="token_selection + checkpointing", values={"methods": [tokens], **again}),
        ]
    found += [Candidate(label=name, values={"methods": [values]}) for name, values in plain.items()]
    spt = [plain_values(config) for config in PRESETS["spt"]]
    found.append(Candidate(label="spt", values={"methods": spt}))
    if tokens is not None:
        found.append(Candidate(label="token_selection + spt", values={"methods": [tokens, *spt]}))
    return found


class Predictor:
    """Outlines of recipes on one model, from the cache where they are there.

    Args:
        model: what is trained.
        base: recipe keys of all candidates (model, task, lora_r, …).
        bf16: as `outline`.
        cache: folder of stored outlines; None: none.
        gpu: trace for a GPU, and refuse what runs well on a CPU alone.
    """

    def __init__(
        self, model: ModelConfig, base: dict[str, Any], *, bf16: bool, cache: Path | None, gpu: bool = False
    ) -> None:
        self.model, self.base, self.bf16, self.cache, self.gpu = model, base, bf16, cache, gpu
        self.traced = 0
        self._known: dict[str, Outline | ValueError] = {}

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
        if self.gpu and (reason := unable(ops_of(recipe), gpu=True)):  # known before anything is traced
            raise ValueError(reason)
        found = self._found(recipe)
        if isinstance(found, ValueError):
            raise found
        if found is not None:
            return found
        from transformers import AutoConfig

        from sparsetrain.hf.study.outline import outline

        found = outline(recipe, AutoConfig.for_model(**self.model.values), bf16=self.bf16, gpu=self.gpu)
        self._keep(recipe, found)
        return found

    def prepare(self, wanted: list[Candidate]) -> None:
        """Trace what is not known of these candidates, several at once."""
        recipes = [self.recipe(candidate) for candidate in wanted]
        recipes = [r for r in recipes if not (self.gpu and unable(ops_of(r), gpu=True)) and self._found(r) is None]
        if len(recipes) < 2:
            return
        from sparsetrain.hf.study.trace_pool import trace_all

        for i, found in trace_all(recipes, self.model.values, bf16=self.bf16, gpu=self.gpu):
            self._keep(recipes[i], found)

    def _found(self, recipe: Recipe) -> Outline | ValueError | None:
        key = self._key(recipe)
        if key not in self._known and self.cache is not None:
            stored = load_outline(self.cache / f"{key}.json")
            if stored is not None:
                self._known[key] = stored
        return self._known.get(key)

    def _keep(self, recipe: Recipe, found: Outline | ValueError) -> None:
        key = self._key(recipe)
        self._known[key] = found
        self.traced += 1
        if self.cache is not None and isinstance(found, Outline):
            store_outline(found, self.cache / f"{key}.json")

    def _key(self, recipe: Recipe) -> str:
        """Names what an outline depends on: the model, how it is trained, and the code that was traced."""
        trained = {key: getattr(recipe, key) for key in ("task", "lora_r", "lora_targets", "lora_alpha", "methods")}
        trained |= {"again": recipe.gradient_checkpointing != "none", "bf16": self.bf16, "gpu": self.gpu}
        trained["config"] = self.model.values
        trained["methods"] = [plain_values(config) for config in recipe.configs]
        trained["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        trained["code"] = _code()
        return hashlib.sha256(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """A hash of sizes and times of the package's files, so that a changed kernel or method is traced again."""
    root = Path(__file__).parents[2]
    files = sorted(path for path in root.rglob("*.py") if "cli" not in path.parts)
    stamps = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def ops_of(recipe: Recipe) -> tuple[str, ...]:
    """The operations that a recipe's methods call: what their modules import from `ops`, read without importing."""
    found = set()
    for config in recipe.configs:
        module = util.find_spec(f"{type(config).__module__.rpartition('.')[0]}.module")
        assert module is not None and module.origin is not None
        for node in ast.walk(ast.parse(Path(module.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsetrain.ops."):
                found.add(str(node.module).split(".")[2])
    return tuple(sorted(found))


def unable(ops: tuple[str, ...], *, gpu: bool) -> str | None:
    """Why operations cannot run well on a GPU: they have a CPU kernel and no Triton one."""
    missing = [op for op in ops if gpu and _has(op, "torch") and not _has(op, "triton")]
    if not missing:
        return None
    return f"{' and '.join(missing)}: no GPU kernel in this version, and the reference form is slower than dense"


def _has(op: str, backend: str) -> bool:
    return (Path(__file__).parents[2] / "ops" / op / f"{backend}.py").is_file()


def is_cpu(rates: MachineRates) -> bool:
    """Whether the rates are those of a CPU: only there exponentials have a rate of their own."""
    return rates.exp_per_s is not None


def dense_and(recipe: Recipe, base: dict[str, Any]) -> list[Candidate]:
    """The recipe's own methods beside dense training, each with and without checkpointing."""
    again = {"gradient_checkpointing": "non-reentrant"}
    dense = [c for c in candidates(base) if not c.values["methods"]]
    name = " + ".join(config.method for config in recipe.configs) or "dense"
    own = {"methods": [plain_values(config) for config in recipe.configs]}
    return [
        *dense,
        Candidate(label=name, values=own),
        Candidate(label=f"{name} + checkpointing", values=own | again),
    ]


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
    asked = only or candidates(predictor.base)
    predictor.prepare(asked)
    return answer(
        question,
        asked,
        predictor.outline,
        predictor.methods,
        lambda outline: unable(outline.ops, gpu=predictor.gpu),
        fit=fit,
        speedup=lambda candidate: measured_speedup(predictor.recipe(candidate), predictor.model, question),
    )


def measured_speedup(recipe: Recipe, model: ModelConfig, question: Question) -> tuple[float, str] | None:
    """Dense step / this recipe's step, where `bench` timed the same methods on blocks as wide.

    The nearest length counts, within a factor of two of what is asked. A method that begins dense was timed after its
    dense phase, which is not what most of its steps are.
    """
    configs = [plain_values(config) for config in recipe.configs]
    asked = {
        "configs": configs,
        "hidden": model.values.get("text_config", model.values).get("hidden_size"),
        "lora_r": recipe.lora_r,
        "checkpointing": recipe.gradient_checkpointing != "none",
        "batch_size": question.batch,
    }
    rows = question.rates.methods.get("+".join(config["method"] for config in configs), [])
    same = [row for row in rows if all(row.get(key) == value for key, value in asked.items())]
    near = [row for row in same if 0.5 <= row["tokens"] / question.tokens <= 2 and row["step_speedup"]]
    if begins_dense(recipe) or not near:
        return None
    best = min(near, key=lambda row: abs(row["tokens"] - question.tokens))
    return best["step_speedup"], f"{best['step_speedup']:.2f}x dense, measured at {best['tokens']:,} tokens"


def begins_dense(recipe: Recipe) -> list[str]:
    """The methods that train dense before they turn sparse."""
    return [config.method for config in recipe.configs if getattr(config, "max_dense_steps", 0) is None]


def usable_bytes(memory_bytes: int, rates: MachineRates) -> int:
    """What is left for tensors of a memory limit."""
    return max(0, memory_bytes - RESERVE_BYTES["cpu" if is_cpu(rates) else "gpu"])


def recipe_yaml(answer: Answer, predictor: Predictor, data: str | None) -> str:
    """The picked recipe as a file for `finetune --recipe`; without `data`, that flag has to be given there."""
    import yaml

    assert answer.picked is not None
    recipe = predictor.recipe(answer.picked.candidate)
    values = recipe.model_dump(exclude_none=True, exclude={"resume", "data", "output"})
    defaults = Recipe.from_values({"model": "m", "data": "d", "methods": []}).model_dump()
    kept = {key: value for key, value in values.items() if key in ("model", "methods") or value != defaults.get(key)}
    tokens, batch = answer.shape
    kept |= {"seq_len": tokens, "batch_size": batch, "grad_accum": answer.question.grad_accum}
    if data is not None:
        kept["data"] = data
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def answer_values(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    """Plain values of an answer, for JSON."""
    question = asdict(answer.question)
    return {
        "model": predictor.model.name,
        "question": question,
        "rows": [row.to_dict() for row in answer.rows],
        "picked": None if answer.picked is None else answer.picked.candidate.label,
        "reasons": list(answer.reasons),
        "nearest": list(answer.nearest),
        "refused": {row.candidate.label: row.refused for row in answer.rows if row.refused},
        "traced": predictor.traced,
    }
