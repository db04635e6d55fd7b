"""The attention function, registered with its mask function (`attention_mask.py`) as a pair under one name of ours.

transformers asks the mask function for whatever the attention function wants as `attention_mask`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from sparsetrain.core.anatomy import Undo, describe, submodule
from sparsetrain.core.errors import Unsupported
from sparsetrain.hf.model.attention_mask import is_ours, keys_of, sequences_mask, visible_mask
from sparsetrain.surgery.attention import AttentionCall, stand_in_of

NAME = "sparsetrain_attention"
_COLLECTED = getattr(output_capturing, "_active_collector", None)
"""Names of what the forward that runs collects of its layers, in transformers 5."""
_UNKNOWN = {"softcap": "capped scores (softcap)", "s_aux": "attention sinks (s_aux)"}
"""What some families ask of an attention besides: left out it would be another model."""


def install_attention(model: nn.Module) -> Undo:
    """Let every attention of `model` call our function; modules without a stand-in stay dense.

    Raises:
        ValueError: transformers cannot change the attention of this model.
    """
    config: Any = model.config
    before = config._attn_implementation
    if before == NAME:
        return lambda: None
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, sequences_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model).__name__} keeps its attention implementation {before!r}, so no sparse attention would run: "
            "transformers cannot set another one on it. Leave this model's attention dense."
        )
    hooks = [
        submodule(model, site.name).register_forward_pre_hook(check_implementation)
        for site in describe(model).attentions
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)  # type: ignore[operator]

    return undo


def check_implementation(attention: nn.Module, _args: Any) -> None:
    """Raise ValueError if a converted model's attention is about to call another function than ours."""
    found = getattr(getattr(attention, "config", None), "_attn_implementation", NAME)
    if found != NAME:
        raise ValueError(
            f"the attention implementation was set to {found!r} after sparsify(), so the sparse attention and the "
            "selection of tokens would be left out. Set it before sparsify(), or call handle.restore() first."
        )


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [b, h, t, d], key and value [b, g, s, d] -> ([b, t, h, d], None).

    Raises:
        ValueError: attention maps are asked for.
        Unsupported: a sparse attention is asked for what it cannot do: a custom mask, dropout.
    """
    if _COLLECTED is not None and "attentions" in (_COLLECTED.get() or ()):
        raise ValueError(
            "output_attentions=True asks for attention maps, and a converted model forms none. Leave it out; for maps, "
            "load the model unconverted with attn_implementation='eager'."
        )
    _refuse_unknown(module, kwargs)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _in_one_dtype(query, key, value)
    b, _, tokens, _ = query.shape
    segments, looks_at, places, num_keys = keys_of(attention_mask, b, tokens, key.shape[2], kwargs)
    key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    window = sliding_window if sliding_window is not None and sliding_window < num_keys else None

    custom = attention_mask is not None and not is_ours(attention_mask)

    def dense() -> Tensor:
        mask = attention_mask
        if not custom:
            mask = visible_mask(tokens, num_keys, segments, looks_at, causal, window, query.device)
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal and mask is None
        )
        return out.transpose(1, 2)

    stand_in = stand_in_of(module)
    if stand_in is None:
        return dense().transpose(1, 2).contiguous(), None
    if attention_mask is not None and custom:
        raise Unsupported(
            f"sparse attention was given a custom 4-D mask of shape {tuple(attention_mask.shape)}. It takes padding "
            "masks [batch, tokens], packed position_ids and sliding windows. Give it one of these."
        )
    if dropout > 0:
        raise Unsupported(
            f"sparse attention has no attention dropout, and the model asks for {dropout}. Load the model with "
            "attention dropout 0 (attention_dropout=0.0; BERT: attention_probs_dropout_prob=0.0)."
        )
    call = AttentionCall(query, key, value, causal, scale, segments, window, dense, looks_at, places)
    return stand_in(call).transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, asked: dict[str, Any]) -> None:
    for name, what in _UNKNOWN.items():
        if asked.get(name) is not None:
            raise Unsupported(
                f"{type(module).__name__} asks its attention for {what}, which ours lacks. Leave it dense."
            )


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast with fp32 weights, rotary embeddings leave q and k in fp32 beside a bf16 v, which a cache then
    joins to fp32; dense attention computes in autocast's dtype either way."""
    dtype, device = value.dtype, value.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
