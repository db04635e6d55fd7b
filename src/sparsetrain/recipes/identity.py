"""What of a recipe changes the training result: for a fingerprint, so that no run goes on with another recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsetrain.core.config import plain_values
from sparsetrain.recipes.passed_keys import WATCHING
from sparsetrain.recipes.values import flat

if TYPE_CHECKING:
    from sparsetrain.recipes.run import RunRecipe

# what may differ between a run and its continuation: where and how often things are written, how progress is watched
NOT_TRAINING = frozenset(
    {
        "output",
        "resume",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_tokens",
        "compare",
        "compare_lr",
        "find_switch",
        "preset",
    }
    | {"threads", "device", "gradient_checkpointing", "activation_offloading", "tiled_mlp"}
)

LATER = (
    *("training", "lora", "lora_dtype", "early_stopping", "model_revision", "load_in_4bit", "packing"),
    *("eval_data", "dataset_config", "dataset_train_split", "dataset_test_split", "streaming", "stream_rows"),
    *("trust_remote_code", "dataset_revision", "load_in_8bit"),
    *("chat_template_path", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
"""Keys that came later: left out while they have their defaults, as in the checkpoints of versions without them."""


def training_values(recipe: RunRecipe) -> dict[str, Any]:
    """The keys that change the training result, as JSON values."""
    decides = recipe.early_stopping or recipe.load_best_model_at_end  # evaluations do
    watched = NOT_TRAINING - {"eval_every", "eval_tokens"} if decides else NOT_TRAINING
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in watched}
    if values["ema_decay"] is None and not recipe.averages:
        del values["ema_decay"]  # as in the checkpoints of versions that kept no average
    if "training" in values:
        values["training"] = {key: value for key, value in values["training"].items() if key not in WATCHING}
    for key in LATER:
        if key in values and values[key] == type(recipe).model_fields[key].get_default(call_default_factory=True):
            del values[key]
    # in full, so that a default that changes between versions counts as a difference
    return values | {"methods": [plain_values(config) for config in recipe.configs]}


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Where `there` differs from `here`, both `training_values`: 'lr: 0.0001 there, 0.0002 here', …"""
    own, other = flat(here), flat(there)
    if own["methods"] != other["methods"]:  # then their keys cannot be compared one by one
        own, other = ({k: v for k, v in side.items() if not k.startswith("methods.")} for side in (own, other))
    return [
        f"{key}: {other.get(key)!r} there, {own.get(key)!r} here"
        for key in sorted(own.keys() | other.keys())
        if own.get(key) != other.get(key)
    ]
