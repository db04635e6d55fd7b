"""Gradient checkpointing under the name that this transformers has: 5.23 deprecates the old one, and v6 drops it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from sparsetrain.planner.config_values import DIFFUSION


def recompute(model: Any, reentrant: bool = False, offload: bool = False) -> None:
    """Let every block of the model be computed again in the backward, in place of keeping what it computed.

    Args:
        offload: the inputs of blocks, which are kept, wait in pinned memory of the CPU.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.config.use_cache = False  # transformers turns it off too, with a warning
    enable({"use_reentrant": reentrant}, **({"offload": True} if offload else {}))


def check_offload(model: Any) -> None:
    """Raise ValueError if what this model keeps under checkpointing cannot wait in the CPU's memory."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    if "offload" not in inspect.signature(enable).parameters:
        raise ValueError("activation_offloading=true needs transformers 5.23. Update it, or leave the key out.")
    if getattr(getattr(model, "config", None), "model_type", None) == DIFFUSION:
        raise ValueError(
            "activation_offloading=true: a diffusion model recomputes its blocks from what stays on its device. Leave "
            "it out."
        )


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
