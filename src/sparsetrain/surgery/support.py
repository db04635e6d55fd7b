"""What each method works with, as data: method × family × feature, checked before a run and rendered into the docs.

A method names only what it cannot do (`Method.limits`, beside its registration), a family likewise (`Anatomy.limits`).
Whatever neither names is claimed, and `tests/methods/test_contract.py` holds the claim. `UNPROVEN` are features that no
test here exercises: asked for, they are refused rather than hoped for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.core.config import MethodConfig, registered_methods
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
    "classify": "sequence or image classification",
    "mlm": "masked language modelling",
    "export": "dense-layout weights and a sidecar that rebuild the model",
    "cost": "the plan's FLOPs are those a counter measures",
    "fsdp2": "sharding over GPUs by fully_shard",
    "four_bit": "4-bit quantised base weights (bitsandbytes)",
}

UNPROVEN: dict[str, str] = {
    "fsdp2": "sharded parameters have not been tried with any method. Train on one device",
}


def why_not(method: str, feature: str, family_limits: Mapping[str, str] | None = None) -> str | None:
    """Why a method cannot do a feature on a family; None if it can.

    Raises:
        ValueError: no such method or feature.
    """
    if feature not in FEATURES:
        raise ValueError(f"unknown feature {feature!r}. Features: {', '.join(FEATURES)}.")
    kind = registered_methods().get(method)
    if kind is None:
        raise ValueError(f"unknown method {method!r}. Methods: {', '.join(registered_methods())}.")
    limits = method_of(kind).limits  # type: ignore[arg-type]
    return UNPROVEN.get(feature) or limits.get(feature) or (family_limits or {}).get(feature)


def check_support(configs: Iterable[MethodConfig], anatomy: Anatomy, features: Iterable[str]) -> None:
    """Refuse what is not supported, before anything is changed or trained.

    Args:
        configs: the recipe.
        anatomy: of the model: its family and the family's limits.
        features: what the run asks for, among `FEATURES`.

    Raises:
        ValueError: a method cannot do a feature on this family; the message says why.
    """
    asked = list(features)
    for config in configs:
        limits = method_of(config).limits
        if reason := limits.get(anatomy.family):
            raise ValueError(f"{config.method} does not take {anatomy.family} models: {reason}.")
        for feature in asked:
            if reason := why_not(config.method, feature, anatomy.limits):
                raise ValueError(
                    f"{config.method} on {anatomy.family} was asked for {feature} ({FEATURES[feature]}): {reason}."
                )


def features_of(model: nn.Module) -> list[str]:
    """The features that a loaded model itself brings: quantised weights, shards."""
    found = []
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    if getattr(model, "is_loaded_in_4bit", False) or "Params4bit" in kinds:
        found.append("four_bit")
    if "DTensor" in kinds or any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        found.append("fsdp2")
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
