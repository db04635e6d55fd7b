"""The attention function and the mask function, registered as a pair under one name of ours.

transformers asks the mask function for whatever the attention function wants as `attention_mask`. Ours returns
segment ids [b, s]: 0 where a key is padding, else the number of the packed sequence it belongs to, or None when every
key is visible but for causality. That is n numbers where the built-in masks hold n². Causality and windows come from
the module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from sparsetrain.core.anatomy import Undo, describe, submodule
from sparsetrain.core.errors import Unsupported
from sparsetrain.surgery.attention import AttentionCall, stand_in_of

NAME = "sparsetrain_attention"


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
    AttentionMaskInterface.register(NAME, segments_mask)
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


def segments_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Segment ids [b, kv_length] int32 (0 = padding), or None when all keys are one unpadded segment.

    A mask that segments cannot express (a custom mask function, a static cache) comes back as the 4-D boolean mask;
    dense sites run with it and sparse sites refuse it.
    """
    aligned = q_offset + q_length == kv_offset + kv_length
    starts = None
    expressible = aligned and not use_vmap
    if (
        expressible
        and q_length == kv_length
        and mask_function not in (causal_mask_function, bidirectional_mask_function)
    ):
        b = torch.arange(batch_size, device=device)[:, None]
        later = torch.arange(1, kv_length, device=device)[None] + kv_offset
        if kv_length > 1:
            back = mask_function(b, 0, later, later - 1).expand(batch_size, -1)
            ahead = mask_function(b, 0, later - 1, later).expand(batch_size, -1)
            # causal: no key ahead is visible; bidirectional: it is wherever the key behind is
            expressible = bool((~ahead).all() or (ahead == back).all())
            starts = ~back
    if not expressible:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    valid = None
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if valid.shape[1] < kv_length:
            valid = nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
    if (starts is None or not starts.any()) and (valid is None or valid.all()):
        return None
    segments = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if starts is not None:
        segments[:, 1:] += starts.cumsum(1, dtype=torch.int32)
    return segments if valid is None else segments * valid


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
    """Attention as transformers calls it: query [b, h, t, d], key and value [b, g, s, d] -> ([b, t, h, d], None)."""
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # under autocast with fp32 weights, rotary embeddings leave q and k in fp32 beside a bf16 v
    query, key = query.to(value.dtype), key.to(value.dtype)
    segments = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    if attention_mask is None and query.shape[2] == key.shape[2]:
        segments = packed_segments(query.shape[0], query.shape[2], kwargs)
    window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None

    def dense() -> Tensor:
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        if mask is None:
            mask = visible_mask(query.shape[2], key.shape[2], segments, causal, window, query.device)
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal and mask is None
        )
        return out.transpose(1, 2)

    stand_in = stand_in_of(module)
    if stand_in is None:
        return dense().transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.ndim == 4:
        raise Unsupported(
            f"sparse attention was given a custom 4-D mask of shape {tuple(attention_mask.shape)}. It takes padding "
            "masks [batch, tokens], packed position_ids and sliding windows; use a dynamic cache for generation."
        )
    if dropout > 0:
        raise Unsupported(
            f"sparse attention has no attention dropout, and the model asks for {dropout}. Load the model with "
            "attention dropout 0 (attention_dropout=0.0; BERT: attention_probs_dropout_prob=0.0)."
        )
    call = AttentionCall(query, key, value, causal, scale, segments, window, dense)
    return stand_in(call).transpose(1, 2).contiguous(), None


def packed_segments(batch: int, tokens: int, kwargs: dict[str, Any]) -> Tensor | None:
    """Segment ids [b, t] of packed rows, from variable-length arguments, `seq_idx` or restarting `position_ids`."""
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and batch == 1:
        positions = torch.arange(tokens, device=lengths.device)
        return torch.bucketize(positions, lengths[1:].to(positions.dtype), right=True)[None].to(torch.int32) + 1
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is not None and seq_idx.shape[-1] == tokens:
        return seq_idx.expand(batch, -1).to(torch.int32) + 1
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[-1] == tokens and tokens > 1:
        starts = positions[:, 1:] != positions[:, :-1] + 1
        if starts.any():
            ids = nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0)) + 1
            return ids.expand(batch, -1)
    return None


def visible_mask(
    queries: int, keys: int, segments: Tensor | None, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """The dense boolean mask [b or 1, 1, queries, keys], or None where the attention's own causal flag says it all."""
    if segments is None and window is None and (not causal or queries == keys or queries == 1):
        return None
    j = torch.arange(keys, device=device)
    i = torch.arange(keys - queries, keys, device=device)
    distance = i[:, None] - j[None]
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= (distance if causal else distance.abs()) < window
    mask = mask[None, None]
    if segments is not None:
        own = segments[:, None, keys - queries :, None]
        mask = mask & (own == segments[:, None, None]) & (own > 0)
        # a padded query sees nothing; SDPA would return NaN for it, so let it see itself
        mask = mask | ((own == 0) & (distance == 0))
    return mask
