"""Gradient checkpointing under the name that this transformers has: 5.23 deprecates the old one, and v6 drops it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from sparsetrain.planner.config_values import DIFFUSION
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report


def recompute(model: Any, reentrant: bool = False, offload: bool = False) -> None:
    """Let every block of the model be computed again in the backward, in place of keeping what it computed.

    Args:
        offload: the inputs of blocks, which are kept, wait in pinned memory of the CPU.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.config.use_cache = False  # transformers turns it off too, with a warning
    enable({"use_reentrant": reentrant}, **({"offload": True} if offload else {}))


def offloads(recipe: RunRecipe, device: torch.device) -> bool:
    """Do checkpointed inputs wait in the CPU's memory? On a CPU they are there already."""
    return getattr(recipe, "activation_offloading", False) and device.type != "cpu"


def check_offload(recipe: Recipe, config: Any, device: torch.device, report: Report) -> None:
    """Raise ValueError if what a model of this config keeps under checkpointing cannot wait in the CPU's memory, and
    say so where it is there already."""
    if not recipe.activation_offloading:
        return
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    if "offload" not in inspect.signature(enable).parameters:
        raise ValueError("activation_offloading=true needs transformers 5.23. Update it, or leave the key out.")
    if config.model_type == DIFFUSION:
        raise ValueError(
            "activation_offloading=true: a diffusion model recomputes its blocks from what stays on its device. Leave "
            "it out."
        )
    if not offloads(recipe, device):
        report({"event": "note", "text": "activation_offloading does nothing here: a CPU's memory is all there is."})


def checkpointing_arguments(kind: str, offload: bool = False) -> dict[str, Any]:
    """The Trainer's arguments for a recipe's `gradient_checkpointing` (none, non-reentrant or reentrant), with what is
    kept in the CPU's memory or not."""
    if kind == "none":
        return {}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {
        name: True,
        f"{name}_kwargs": {"use_reentrant": kind == "reentrant"} | ({"offload": True} if offload else {}),
    }
