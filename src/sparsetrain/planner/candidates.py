"""The ways to train that a plan compares, as recipe keys; and the picked one as a recipe file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from sparsetrain.core.config import MethodConfig, plain_values, registered_methods
from sparsetrain.planner.search import Answer, Candidate
from sparsetrain.recipes.finetune import Recipe, without_lora
from sparsetrain.recipes.presets import PRESETS, ROUNDED, SAFEST, STUDIED_PRESET, TOGETHER, Way

KEYS = (
    "task",
    "lora_r",
    "lora_alpha",
    "lora_targets",
    "lora_dtype",
    "lora",
    "training",
    "load_in_4bit",
    "load_in_8bit",
)
"""Recipe keys that hold for all ways that are compared, and that their memory depends on."""
ALL_WEIGHTS = "all weights"
_WITHOUT_LORA: dict[str, Any] = {
    "lora_r": 0,
    "lora_dtype": "fp32",
    "lora": {},
    "load_in_4bit": False,
    "load_in_8bit": False,
}


def candidates(base: dict[str, Any], *, gpu: bool = False) -> list[Candidate]:
    """The ways to train that are compared, safest first.

    A method that the package's ways do not name alone comes as the preset that is studied has it, or with its defaults.
    One that trains without LoRA unless it is asked for comes without, and is compared with training all weights.
    A model that grows is trained from random weights, so there is nothing to fine-tune with it.

    Args:
        base: recipe keys that hold for all of them; `methods`, `gradient_checkpointing`, `activation_offloading` and
            `tiled_mlp` are what is compared.
        gpu: training is on one.
    """
    named = {way.methods[0].method for way in SAFEST if len(way.methods) == 1}
    recorded: dict[str, MethodConfig] = {config.method: config for config in PRESETS[STUDIED_PRESET]}
    others = {name: recorded.get(name) or kind() for name, kind in registered_methods().items() if name not in named}
    alone = {name: config for name, config in others.items() if not config.grows}
    ways = [*SAFEST, *(Way(label=name, methods=(config,)) for name, config in alone.items()), *TOGETHER]
    all_weights = base.get("lora_r") == 0
    train = ALL_WEIGHTS if all_weights else "LoRA"
    ways = [way for way in ways if gpu or not way.offloads]
    if gpu and not (base.get("load_in_4bit") or base.get("load_in_8bit")) and "optim" not in base.get("training", {}):
        place = 1 + max(i for i, way in enumerate(ways) if not way.methods)
        given = base.get("lora_dtype", "fp32")  # which all of them have then
        asked = [way for way in ROUNDED if way.label.startswith(train) and way.lora_dtype != given]
        ways[place:place] = asked
    found = []
    for way in ways:
        if way.all_weights and all_weights:
            continue
        own = without_lora(way.methods) and not all_weights
        made = _candidate(way, train, without_lora=own or way.all_weights)
        found.append(replace(made, beside=ALL_WEIGHTS) if own else made)
    return found


def dense_and(recipe: Recipe, base: dict[str, Any], *, gpu: bool = False) -> list[Candidate]:
    """The recipe's own methods beside dense training, each with and without checkpointing."""
    dense = [candidate for candidate in candidates(base, gpu=gpu) if not candidate.values["methods"]]
    name = " + ".join(config.method for config in recipe.configs) or "dense"
    own = [
        Way(label=name, methods=recipe.configs),
        Way(label=f"{name} + checkpointing", methods=recipe.configs, recomputes=True),
    ]
    return [*dense, *(_candidate(way, "") for way in own)]


def _candidate(way: Way, train: str, *, without_lora: bool = False) -> Candidate:
    values: dict[str, Any] = {"methods": [plain_values(config) for config in way.methods]}
    values |= {"gradient_checkpointing": "non-reentrant"} if way.recomputes else {}
    values |= {"activation_offloading": True} if way.offloads else {}
    values |= {"tiled_mlp": way.pieces} if way.pieces > 1 else {}
    values |= {"load_in_4bit": True} if way.four_bit else {}
    values |= {"optim": way.optim} if way.optim else {}
    values |= {"lora_dtype": way.lora_dtype} if way.lora_dtype else {}
    values |= _WITHOUT_LORA if without_lora else {}
    label = way.label.replace("{train}", train)
    return Candidate(label=label, values=values, pickable=not way.all_weights, rounds=way.rounds, untimed=way.untimed)


def recipe_yaml(answer: Answer, recipe: Recipe, data: str | None) -> str:
    """The picked recipe as a file for `finetune --recipe`, at the shape of the answer.

    Args:
        recipe: the picked candidate's.
        data: without it, that flag has to be given there.
    """
    values = recipe.model_dump(exclude_none=True, exclude={"resume", "data", "output"})
    defaults = Recipe.from_values({"model": "m", "data": "d", "methods": []}).model_dump()
    kept = {key: value for key, value in values.items() if key in ("model", "methods") or value != defaults.get(key)}
    tokens, batch = answer.shape
    kept |= {"seq_len": tokens, "batch_size": batch, "grad_accum": answer.question.grad_accum}
    if data is not None:
        kept["data"] = data
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
