"""Is a model whole? Every weight is there, of its size and finite, and a language model looks back only.

transformers fills what it does not find with random numbers and goes on; the quality of such a model means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.quote import quoted

_SPARE = 50_000_000
"""Entries of a head that files need not hold: 1024 x 50k."""


def check_layers(stored: Mapping[str, tuple[int, ...]], config: Any, name: str) -> None:
    """Raise ValueError if a config has more layers than its files have tensors; before one of them is built."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise ValueError(
            f"the config of {quoted(name)} describes {layers:,} layers, and its files hold {len(stored):,} tensors: "
            "they are not of one model. Get both again."
        )


def check_stored(stored: Mapping[str, tuple[int, ...]], empty: Any, name: str) -> None:
    """Raise ValueError if a model's config describes far more weights than its files hold.

    Called before a weight is loaded: what is missing would be made at random, in memory that nobody has.
    """
    held = sum(math.prod(shape) for shape in stored.values())
    asked = sum(parameter.numel() for parameter in empty.parameters())
    if asked > 2 * held + _SPARE:
        raise ValueError(
            f"the config of {quoted(name)} describes {asked:,} parameters, and its files hold {held:,}: they are not "
            "of one model. Get both again."
        )
    check_causal(empty, name)


def check_loaded(model: Any, info: Mapping[str, Any], name: str, *, new_head: bool, cut: bool) -> list[str]:
    """The modules that got random weights, after all others were found in the files, in their sizes and finite.

    Args:
        info: what transformers says of the loading.
        new_head, cut: as in `weights.load_weights`.

    Raises:
        ValueError: weights that are missing, of another size, of further layers, or not finite.
    """
    sizes = {key if isinstance(key, str) else key[0]: key for key in info.get("mismatched_keys", ())}
    lacking = sorted({*info["missing_keys"], *sizes})
    if wrong := [key for key in lacking if not (new_head and _of_head(key, model))]:
        found = sizes.get(wrong[0])
        what = f"no weights for {_some(wrong)}" if found is None else f"{wrong[0]} in another size{_sizes(found)}"
        raise ValueError(
            f"{quoted(name)} has {what}, so it is no trained {type(model).__name__}: they would be random. "
            f"{_advice(model)}"
        )
    if not cut and (further := _further_layers(model, info.get("unexpected_keys", ()))):
        raise ValueError(
            f"{quoted(name)} holds weights of further layers ({_some(further)}) than its config has. One of the two is "
            "of another model; get both again."
        )
    check_finite(model.named_parameters(), name)
    return sorted({key.rpartition(".")[0] for key in lacking})


def check_causal(model: Any, name: str) -> None:
    """Raise ValueError if a model that shall predict the next token is an encoder: it would see what it predicts."""
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and _is_encoder(model.config):
        raise ValueError(
            f"{quoted(name)} ({model.config.model_type}) is an encoder, which sees tokens on both sides, so it is no "
            "trained language model. Use a causal language model, or task=classify."
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Raise ValueError if one of the tensors holds NaN or infinity."""
    for key, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # the extremes are NaN if any entry is, and need no second tensor of that size
        if not all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach())):
            raise ValueError(
                f"{quoted(name)} holds NaN or infinity in {quoted(key)}: its training diverged, or the file is "
                "damaged. Use an earlier checkpoint, or get it again."
            )


def _is_encoder(config: Any) -> bool:
    """Has the family a masked-token head too, and does the config not make a decoder of it?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    # XLM's and FlauBERT's key is `causal`
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in MASKED and not decodes and not getattr(config, "is_encoder_decoder", False)


def _of_head(key: str, model: Any) -> bool:
    """Is it a weight outside the trunk? The pooler counts as such: models that fill in words have none."""
    prefix = f"{model.base_model_prefix}."
    return not key.startswith(prefix) or ".pooler." in key


def _further_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """The unexpected names that differ from a weight of the model in a number alone."""
    known = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    return sorted(key for key in unexpected for form in [re.sub(r"\d+", "#", key)]
                  if "#" in form and (form in known or prefix + form in known))  # fmt: skip


def _sizes(found: Any) -> str:
    """' ([2, 3] there, [4, 3] asked)', where transformers says so."""
    if isinstance(found, tuple) and len(found) == 3:
        return f" ({list(found[1])} there, {list(found[2])} by its config)"
    return ""


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return quoted(shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more")


def _advice(model: Any) -> str:
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "Use a causal language model (not an encoder, nor a model with another head), or get its files again."
    return "Use a model that was trained for the task, or get its files again."
