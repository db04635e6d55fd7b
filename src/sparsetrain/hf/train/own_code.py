"""A model that is built by Python code of its own: said, and trained dense."""

from __future__ import annotations

from typing import Any

from sparsetrain.hf.model import opening
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.events import Report


def check_trust(recipe: Recipe, config: Any, report: Report) -> None:
    """Say that a model's own code runs; raise ValueError for methods on such a model, whose sites are not known."""
    if not recipe.trust_remote_code:
        return
    if not opening.code_of(config)["trust_remote_code"]:
        report({"event": "note", "text": f"trust_remote_code: {recipe.model} needs no code of its own, and none ran."})
        return
    kind = type(config).__name__
    report({"event": "note", "text": f"trust_remote_code: Python code that came with {recipe.model} runs ({kind})."})
    if recipe.methods:
        raise ValueError(
            f"{recipe.model} is built by code of its own, in which {recipe.methods[0].method} knows no sites. Train it "
            "dense: --preset dense."
        )
