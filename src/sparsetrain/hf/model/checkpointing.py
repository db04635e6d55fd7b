"""Gradient checkpointing under the name that this transformers has: 5.23 deprecates the old one, and v6 drops it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments


def recompute(model: Any, reentrant: bool = False) -> None:
    """Let every block of the model be computed again in the backward, in place of keeping what it computed."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.config.use_cache = False  # transformers turns it off too, with a warning
    enable({"use_reentrant": reentrant})


def checkpointing_arguments(kind: str) -> dict[str, Any]:
    """The Trainer's arguments for a recipe's `gradient_checkpointing`: none, non-reentrant or reentrant."""
    if kind == "none":
        return {}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": kind == "reentrant"}}
