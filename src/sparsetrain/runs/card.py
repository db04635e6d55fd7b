"""The README.md of a trained model: what it was made of and how, how good it was at each stage, and how to load it.

It names no place on the machine: a folder there is nobody else's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsetrain.core.metrics import METRICS
from sparsetrain.measure.schema import STAGES, Run
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import task_of

CARD = "README.md"
_STAGE_NAMES = {"untrained": "before training", "dense": "before training", "after_conversion": "after conversion"}
_PIPELINES = {"transformers:AutoModelForCausalLM": "text-generation", "transformers:AutoModelForMaskedLM": "fill-mask",
              "transformers:AutoModelForSequenceClassification": "text-classification",
              "transformers:AutoModelForImageClassification": "image-classification"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a model was trained from.

    hub: its name on the hub; "" where it has none. says: what it is, in words. get: how others get it, in a sentence.
    place: what a call of `from_pretrained` names.
    """

    hub: str = ""
    says: str
    get: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a card says beside the recipe.

    run: as in `Result`. counts: of the data. rows: `data_fingerprint` of the training rows. plain: others load it
    without sparsetrain.
    """

    recipe: RunRecipe
    origin: Origin
    run: Run
    counts: Mapping[str, int]
    rows: str
    machine: Mapping[str, Any]
    parameters: int
    trainable: int
    adapter: bool
    plain: bool


def model_card(about: Trained) -> str:
    """The card, as Markdown under its YAML head."""
    task = task_of(about.recipe.task)
    methods = [config.method for config in about.recipe.configs]
    head: dict[str, Any] = {"library_name": "peft" if about.adapter else "transformers"}
    head |= {"base_model": about.origin.hub} if about.origin.hub else {}
    head |= {"pipeline_tag": _PIPELINES[task.model]} if task.model in _PIPELINES else {}
    head["tags"] = ["sparsetrain", *(["lora"] if getattr(about.recipe, "lora_r", 0) else []), *methods]
    how = " and ".join(methods) or "no sparse method"
    what = "An adapter to" if about.adapter else "A model trained from"
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            f"# {'Adapter' if about.adapter else 'Model'} trained with sparsetrain",
            f"{what} {about.origin.says}, trained on {_source(about.recipe)} with {how}. "
            f"{about.trainable:,} of {about.parameters:,} parameters were trained.",
            *("## How to load it", _loading(about)),
            *("## Quality", _quality(about.run)),
            *("## Data", _data(about)),
            *("## Recipe", f"```yaml\n{_recipe(about.recipe)}```"),
            *("## Machine", _machine(about.machine)),
        ]
    ) + "\n"  # fmt: skip


def public_name(source: str) -> str:
    """A name as others may read it: of a path its last part alone."""
    text = str(source)
    local = os.path.isabs(text) or text.startswith((".", "~")) or os.path.lexists(text)
    return f"`{Path(text).name or 'a folder'}`" if local else f"`{text}`"


def _loading(about: Trained) -> str:
    task = task_of(about.recipe.task)
    library, _, name = task.model.partition(":")
    ours = 'from sparsetrain.hf.model.io import load\n\nloaded = load("FOLDER")  # .model, .tokenizer'
    parts = ["`FOLDER` is the folder that this file lies in."]
    if about.adapter:
        parts.append(about.origin.get)
    if about.plain and library == "transformers" and about.adapter:
        parts.append(f"```python\nfrom peft import PeftModel\nfrom transformers import {name}\n\n"
                     f'base = {name}.from_pretrained("{about.origin.place}")\n'
                     'model = PeftModel.from_pretrained(base, "FOLDER")\n```')  # fmt: skip
    elif about.plain and library == "transformers":
        parts.append(f'```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")\n```')
    else:
        parts.append("Its outputs are those of the sparse model, which plain transformers and PEFT do not compute.")
    parts.append(f"With sparsetrain, wherever the model that it was trained from is found:\n\n```python\n{ours}\n```")
    if task.causal:
        parts.append(
            "`sparsetrain chat FOLDER` tries it; `sparsetrain export FOLDER --output DIR` writes full weights."
        )
    return "\n\n".join(parts)


def _quality(run: Run) -> str:
    """A row a stage; the held-out data, which others do not have, is why there are two of them."""
    found: dict[str, Any] = {name: run[name] for name in METRICS if name in run}  # type: ignore[literal-required]
    if not found:
        return "Nothing was measured."
    rows = [["on held-out data", *(METRICS[name].title.lower() for name in found)]]
    rows.append(["---"] * len(rows[0]))
    for stage in STAGES:
        if any(stage in values for values in found.values()):
            named = _STAGE_NAMES.get(stage, stage.replace("_", " "))
            rows.append([named, *(METRICS[name].text(values.get(stage)) for name, values in found.items())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _data(about: Trained) -> str:
    counted = ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in about.counts.items())
    text = f"{_source(about.recipe)}. {counted.capitalize()}." if counted else _source(about.recipe)
    return f"{text}\n\nHash of the training rows as the model was given them: `{about.rows}`."


def _source(recipe: RunRecipe) -> str:
    """The training data, and which revision of it."""
    at = "" if recipe.dataset_revision is None else f" at revision `{recipe.dataset_revision}`"
    return public_name(recipe.data) + at


def _recipe(recipe: RunRecipe) -> str:
    """The keys that were not left as they are, but for places."""
    given = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude={"output", "resume"})
    plain = {key: public_name(value).strip("`") if isinstance(value, str) else value for key, value in given.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _machine(machine: Mapping[str, Any]) -> str:
    cards = ", ".join(str(card.get("name")) for card in machine.get("gpus", ()))
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    return f"{cards or machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('system')}. {versions}."
