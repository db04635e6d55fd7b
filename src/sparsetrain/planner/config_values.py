"""What a stranger's config.json may say: sizes that a model can have, and nothing that makes a library fetch or run.

Checked on plain values, before transformers makes a config, a module or a tensor of them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.quote import quoted

MOST_BYTES = 8 * 2**20

DIFFUSION = "diffusion"
"""The family of what diffusers saves, whose configs name a class and no family."""

_LAYERS = ("n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "moe_intermediate_size", "encoder_ffn_dim",
          "decoder_ffn_dim", "shared_expert_intermediate_size")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")

SIZES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 1_000)),
    **dict.fromkeys(_LAYERS, (0, 1_000)),
    **dict.fromkeys(_WIDTHS, (1, 2**17)),
    **dict.fromkeys(_INNER, (1, 2**21)),
    **dict.fromkeys(_HEADS, (1, 2**12)),
    **dict.fromkeys(_POSITIONS, (1, 2**28)),
    **dict.fromkeys(_EXPERTS, (0, 2**15)),
    "vocab_size": (1, 2**24),
    "type_vocab_size": (0, 2**16),
    "head_dim": (0, 2**14),
    "num_labels": (0, 2**20),
    "classifier_width": (1, 2**17),
    "num_channels": (1, 2**12),
    "image_size": (1, 2**16),
    "patch_size": (1, 2**16),
    "sample_size": (1, 2**16),
    "in_channels": (1, 2**12),
    "noise_steps": (1, 2**20),
}
"""Key -> (least, most). The largest public models stay well within. Of a list, each item is checked."""

NOT_OURS = {
    "quantization_config": "its weights are quantised, which needs a package of the format",
    "compression_config": "its weights are compressed, which needs a package of the format",
    "fusion_config": "it asks transformers to replace modules while loading",
    "kernel_config": "it asks for kernels from elsewhere",
    "transformers_weights": "it names another file as its weights",
    "distributed_config": "it asks to be spread over processes",
}
"""Key -> what a model with it would need to be loaded; its shapes alone can be planned for."""
_FETCHES = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "auto_map",
    "custom_pipelines",
)
"""Keys that name code, on the hub or in the folder. We choose the attention ourselves, and run no code of a model."""


def config_values(path: Path) -> dict[str, Any]:
    """What a config.json holds, without the keys that name code.

    Raises:
        ValueError: it cannot be read, or is no config of a model that can be built.
    """
    values = of_diffusers(read_plain_object(path, MOST_BYTES))
    if not isinstance(values.get("model_type"), str):
        raise ValueError(f"{quoted(str(path))} is no model config: it has no model_type.")
    check_values(values, str(path))
    return without_code(values)


def of_diffusers(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that diffusers wrote, as a config of ours has them; others as they are."""
    if "model_type" in values or not isinstance(values.get("_class_name"), str):
        return values
    kept = {key: value for key, value in values.items() if not key.startswith("_")}
    # diffusers adds noise by a linear schedule where none is named, and hides labels by itself
    kept = {"noise_schedule": "linear"} | kept
    return kept | {"model_type": DIFFUSION, "denoiser": values["_class_name"], "architectures": ["DiffusionModel"]}


def without_code(values: dict[str, Any]) -> dict[str, Any]:
    """The values, and those of the configs inside, without the keys that name code."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _FETCHES
    }


def check_values(values: dict[str, Any], where: str) -> None:
    """Raise ValueError if a size is none: text, a fraction, NaN, negative, or far beyond any model."""
    for key, value in values.items():
        if isinstance(value, dict):
            if key.endswith("_config") or key.startswith("rope_"):
                check_values(value, f"{where}, {key}")
        elif key in ("text_config", "vision_config", "quantization_config") and value is not None:
            raise ValueError(f"{quoted(where)}: {key}={quoted(value)} is no table of values. It is damaged.")
        elif key in SIZES:
            _check_size(key, value, where)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(key, value, where)
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(
            f"{quoted(where)}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}. Correct one."
        )
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{quoted(where)}: architectures={quoted(names)} is no list of names. Correct it.")


def refuse_foreign(values: dict[str, Any], name: str) -> None:
    """Raise ValueError if a model's weights need more than a safetensors file and the classes of transformers."""
    for inner in (values, *(value for value in values.values() if isinstance(value, dict))):
        for key, reason in NOT_OURS.items():
            if inner.get(key):
                raise ValueError(
                    f"{quoted(name)} cannot be loaded: its config has {key}={quoted(inner[key], 60)}: {reason}. "
                    "Use a copy with plain bf16, fp16 or fp32 weights."
                )


def _check_number(key: str, value: float, where: str) -> None:
    """What a model divides by is above 0, and a share lies in [0, 1]; nothing is NaN."""
    ranges = {r"(_eps|_epsilon)$": (1e-38, 1.0), r"dropout|pdrop$": (0.0, 1.0), r"rope_theta$": (1e-3, 1e15)}
    low, high = next((ends for name, ends in ranges.items() if re.search(name, key)), (-math.inf, math.inf))
    if not low <= value <= high:
        raise ValueError(f"{quoted(where)}: {quoted(key)}={value} is out of range. It lies in [{low:g}, {high:g}].")


def _check_size(key: str, value: Any, where: str) -> None:
    least, most = SIZES[key]
    for size in value if isinstance(value, list) else [value]:
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int | float) or size != size // 1:
            raise ValueError(f"{quoted(where)}: {key}={quoted(size)} is no whole number. Give one.")
        if not least <= size <= most:
            raise ValueError(
                f"{quoted(where)}: {key}={quoted(size)} is out of range. A model's lies in [{least}, {most:,}]."
            )
