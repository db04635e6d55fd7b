"""What each method works with, as data: method × family × feature, checked before a run and rendered into the docs.

A method names only what it cannot do (`Method.limits`, beside its registration), a family likewise (`Anatomy.limits`).
Whatever neither names is claimed, and `tests/methods/test_contract.py` holds the claim. `UNPROVEN` are features that no
test here exercises: asked for, they are refused rather than hoped for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.core.config import MethodConfig, method_config, registered_methods
from sparsetrain.surgery.method import method_of

FEATURES: dict[str, str] = {
    "cpu": "runs on a CPU",
    "gpu": "runs on a GPU (the reference, where there is no kernel yet)",
    "padding": "padded batches with an attention mask",
    "packing": "several documents in a row, by restarting position_ids",
    "checkpointing": "gradient checkpointing, non-reentrant",
    "checkpointing_reentrant": "gradient checkpointing, reentrant",
    "autocast": "bf16 autocast over fp32 weights",
    "compile": "torch.compile, with graph breaks where sizes follow the data",
    "lora": "LoRA (PEFT) on the model's linears beside it",
    "classify": "sequence or image classification",
    "mlm": "masked language modelling",
    "export": "dense-layout weights and a sidecar that rebuild the model",
    "cost": "the plan's FLOPs are those a counter measures",
    "ddp": "data parallel over ranks: torchrun, accelerate launch, DDP",
    "fsdp2": "sharding in a loop of one's own: fully_shard",
    "fsdp": "sharding by a trainer: accelerate's FSDP plugin",
    "deepspeed": "sharding over GPUs: DeepSpeed ZeRO",
    "tensor_parallel": "weights split over GPUs: tensor parallelism, Megatron-LM",
    "context_parallel": "sequences split over GPUs: context and sequence parallelism",
    "four_bit": "4-bit quantised base weights (bitsandbytes)",
    "eight_bit": "8-bit quantised base weights (bitsandbytes)",
}

UNPROVEN: dict[str, str] = {
    "fsdp": "accelerate shards on GPUs alone, where no method has been tried so. Train with DDP, or on one device",
    "deepspeed": "sharded parameters have not been tried with any method. Train with DDP, or on one device",
    "tensor_parallel": "split weights have not been tried with any method. Train with DDP, or on one device",
    "context_parallel": "torch's ring is for GPUs alone and Ulysses for DeepSpeed, both with SDPA or Flash, and no "
    "method has been tried so; what selects tokens, keys or patterns would go by a rank's part of a sequence. Train "
    "with DDP, or on one device",
}
SWITCHES: dict[str, str] = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "tensor_parallel",
}
SIZES: dict[str, str] = {
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "fsdp",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor_parallel",
    "PARALLELISM_CONFIG_CP_SIZE": "context_parallel",
    "PARALLELISM_CONFIG_SP_SIZE": "context_parallel",
}
"""How accelerate is asked, by its launcher, its config file or a plugin: variables that are true, or above 1. On a CPU
it would pass over them and train unsharded."""


def why_not(method: str, feature: str, family_limits: Mapping[str, str] | None = None) -> str | None:
    """Why a method cannot do a feature on a family; None if it can.

    Raises:
        ValueError: no such method or feature.
    """
    if feature not in FEATURES:
        raise ValueError(f"unknown feature {feature!r}. Features: {', '.join(FEATURES)}.")
    limits = method_of(method_config(method)).limits
    return UNPROVEN.get(feature) or limits.get(feature) or (family_limits or {}).get(feature)


def check_support(
    configs: Iterable[MethodConfig], anatomy: Anatomy, features: Iterable[str] | Mapping[str, str]
) -> None:
    """Refuse what is not supported, before anything is changed or trained.

    Args:
        configs: the recipe.
        anatomy: of the model: its family and the family's limits.
        features: what the run asks for, among `FEATURES`, and by what, if that is known.

    Raises:
        ValueError: a method cannot do a feature on this family; the message says why.
    """
    asked = features if isinstance(features, Mapping) else dict.fromkeys(features, "")
    for config in configs:
        limits = method_of(config).limits
        if reason := limits.get(anatomy.family):
            raise ValueError(f"{config.method} does not take {anatomy.family} models: {reason}.")
        for feature, by in asked.items():
            if reason := why_not(config.method, feature, anatomy.limits):
                raise ValueError(
                    f"{config.method} on {anatomy.family} was asked for {feature} ({FEATURES[feature]})"
                    f"{f' by {by}' if by else ''}: {reason}."
                )


def features_of(model: nn.Module) -> dict[str, str]:
    """The features that a loaded model brings, or the process that trains it: quantised weights, shards. Feature ->
    what asks for it."""
    found = sharding_asked(os.environ)
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    kinds |= {type(parameter.data).__name__ for parameter in model.parameters()}
    if getattr(model, "is_loaded_in_4bit", False) or "Params4bit" in kinds:
        found["four_bit"] = "its weights"
    if getattr(model, "is_loaded_in_8bit", False) or "Int8Params" in kinds:
        found["eight_bit"] = "its weights"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        found["tensor_parallel"] = f"its tp_size={model._tp_size}"
    elif "DTensor" in kinds:
        found["fsdp2"] = "its sharded parameters"
    if "FlatParameter" in kinds or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        found["fsdp"] = "FullyShardedDataParallel around its modules"
    return found


def sharding_asked(environment: Mapping[str, str]) -> dict[str, str]:
    """What accelerate is asked for by environment variables: feature -> the variable."""
    found = {}
    for name, feature in SWITCHES.items():
        if environment.get(name, "").strip().lower() in ("1", "true", "yes", "y", "on", "t"):
            found[feature] = f"{name}={environment[name]}"
    for name, feature in SIZES.items():
        value = environment.get(name, "").strip()
        if value not in ("", "0", "1"):
            found[feature] = f"{name}={value}"
    return found


def support_rows(families: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """One row a method: feature -> `yes`, `no`, or `not FAMILY, …`, with the reasons.

    Args:
        families: family -> its limits.
    """
    rows = []
    for method, kind in registered_methods().items():
        limits = method_of(kind).limits  # type: ignore[arg-type]
        row: dict[str, Any] = {"method": method, "features": {}, "reasons": {}}
        for feature in FEATURES:
            if reason := why_not(method, feature):
                row["features"][feature], row["reasons"][feature] = "no", reason
                continue
            without = [name for name, found in families.items() if feature in found and name not in limits]
            row["features"][feature] = f"yes, not {', '.join(without)}" if without else "yes"
        row["refused_families"] = {name: limits[name] for name in families if name in limits}
        rows.append(row)
    return rows
