"""The mask function: what transformers hands to our attention function as `attention_mask`.

For every key its sequence and its place there, int32 [b, s, 1, 2]: 2n numbers where the built-in masks hold n².
Causality and windows come from the module, and sequences packed into a row also from `position_ids`. It has four
dimensions because transformers hands on what has four as it is (`generate` makes masks before it calls the model).

Legend: b batch, t queries, s keys.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from sparsetrain.core.errors import Unsupported

_PACKED = {"cu_seq_lens_q", "seq_idx"}
"""Arguments that say how rows are packed."""
PADDING, UNWRITTEN = -1, -2
"""Places of padding, and of what a static cache has room for and does not hold yet."""


class Keys(NamedTuple):
    """segments, looks_at, places as `surgery.attention.AttentionCall` has them; num_keys: keys that are there."""

    segments: Tensor | None
    looks_at: Tensor | None
    places: Tensor | None
    num_keys: int


def sequences_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """int32 [b, kv_length, 1, 2], (sequence, place in it), or None when all keys are one sequence from its start.

    Sequences count from 1, and padding belongs to one too; `PADDING` or `UNWRITTEN` stands for its place. Keys that a
    sliding cache has dropped count as places. A mask that this cannot express (a custom mask function) comes back as
    the 4-D boolean mask; dense sites run with it and sparse sites refuse it.
    """
    q_offset = int(q_offset)
    written = q_offset + q_length - kv_offset
    expressible = not use_vmap and (written == kv_length or (written < kv_length and _is_causal(mask_function)))
    starts = None
    if (
        expressible
        and q_length == kv_length
        and mask_function
        not in (
            causal_mask_function,
            bidirectional_mask_function,
        )
    ):
        starts, expressible = _starts(mask_function, batch_size, kv_length, kv_offset, device)
    if not expressible:
        allow = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        shape = (batch_size, q_length, kv_length, q_offset, kv_offset)
        return sdpa_mask(*shape, mask_function, attention_mask, **allow, use_vmap=use_vmap, device=device)
    total = kv_offset + kv_length
    valid_bt = torch.ones(batch_size, total, dtype=torch.bool, device=device)
    if attention_mask is not None:
        mask = attention_mask[:, :total].to(torch.bool)
        valid_bt = F.pad(mask, (0, total - mask.shape[1])).expand(batch_size, -1)
    split = starts is not None and bool(starts.any())
    if kv_offset == 0 and written == kv_length and not split and valid_bt.all():
        return None
    place = (valid_bt.cumsum(1) - 1)[:, kv_offset:]
    valid = valid_bt[:, kv_offset:]
    sequence = torch.ones_like(place)
    if split:
        assert starts is not None
        begins = F.pad(starts, (1, 0), value=True)
        sequence = begins.cumsum(1)
        place = place - torch.where(begins, place + ~valid, 0).cummax(1).values
    place = torch.where(valid, place, PADDING)
    place[:, written:] = UNWRITTEN
    return torch.stack((sequence, place), -1)[:, :, None].to(torch.int32)


def is_ours(mask: Tensor) -> bool:
    """Is it from `sequences_mask`? Others hold booleans or floats."""
    return mask.dtype == torch.int32


def _is_causal(mask_function: Any) -> bool:
    """Does no query see the key after it?"""
    first, second = (torch.tensor([[i]]) for i in (0, 1))
    return not bool(mask_function(first, 0, first, second).any())


def _starts(mask_function: Any, batch: int, keys: int, offset: int, device: Any) -> tuple[Tensor, bool]:
    """(does a sequence begin at keys 1.. [b, s - 1], can sequences express the mask), from pairs of neighbours."""
    row = torch.arange(batch, device=device)[:, None]
    later = torch.arange(1, keys, device=device)[None] + offset
    if keys == 1:
        return torch.zeros(batch, 0, dtype=torch.bool, device=device), True
    back = mask_function(row, 0, later, later - 1).expand(batch, -1)
    ahead = mask_function(row, 0, later - 1, later).expand(batch, -1)
    # causal: no key ahead is visible; bidirectional: it is wherever the key behind is
    return ~back, bool((~ahead).all() or (ahead == back).all())


def keys_of(mask: Tensor | None, batch: int, queries: int, keys: int, kwargs: dict[str, Any]) -> Keys:
    """What a call's mask of `sequences_mask` and its packing say of its keys; another's mask says nothing here.

    All layers of a forward are given the same tensors, and the first one's answer is left with them: whether rows are
    packed is read on the host, and a GPU that was asked in every layer would wait for the host in every layer.

    Raises:
        Unsupported: the cache holds more keys than the mask was made for.
    """
    positions = kwargs.get("position_ids")
    told: Any = positions if mask is None else mask
    if queries != keys or told is None or torch.compiler.is_compiling() or _PACKED & kwargs.keys():
        return _keys_of(mask, batch, queries, keys, kwargs)
    given = (batch, queries, *((id(x), x._version) for x in (mask, positions) if x is not None))
    before = getattr(told, "_keys_of", None)
    if before is not None and before[0] == given and before[1]() is positions:
        return before[2]
    found = _keys_of(mask, batch, queries, keys, kwargs)
    told._keys_of = given, (lambda: None) if positions is None else weakref.ref(positions), found
    return found


def _keys_of(mask: Tensor | None, batch: int, queries: int, keys: int, kwargs: dict[str, Any]) -> Keys:
    if mask is not None and not is_ours(mask):
        return Keys(None, None, None, keys)
    if mask is None:
        packed = documents(batch, queries, kwargs, None) if queries == keys else None
        return Keys(packed, packed, None, keys)
    if keys > mask.shape[1]:
        raise Unsupported(
            f"the cache gave {keys} keys and transformers made a mask for {mask.shape[1]}. Use a cache of the "
            "transformers version that runs, and crop it after every forward, or generate with use_cache=False."
        )
    if queries < keys:
        keys -= int((mask[0, :, 0, 1] == UNWRITTEN).sum())
    sequence, place = mask[:, :keys, 0].unbind(-1)
    if queries != keys:
        return Keys(torch.where(place >= 0, sequence, 0), sequence[:, keys - queries :], place, keys)
    packed = documents(batch, queries, kwargs, place >= 0) if mask.shape[1] == keys else None
    if packed is not None:
        changed = (packed[:, 1:] != packed[:, :-1]) | (sequence[:, 1:] != sequence[:, :-1])
        sequence = F.pad(changed.cumsum(1, dtype=torch.int32), (1, 0)) + 1
    return Keys(torch.where(place >= 0, sequence, 0), sequence, None, keys)


def documents(batch: int, tokens: int, kwargs: dict[str, Any], valid_bt: Tensor | None) -> Tensor | None:
    """Sequence of every token [b, t], from 1, where rows are packed; None where they are not.

    From variable-length arguments, `seq_idx`, or `position_ids` that do not go up by one from token to token. Padding
    belongs to the sequence before it, whatever its position says, and does not end it: the next token may count it.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None and batch == 1:
        index = torch.arange(tokens, device=lengths.device)
        return torch.bucketize(index, lengths[1:].to(index.dtype), right=True)[None].to(torch.int32) + 1
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is not None and seq_idx.shape[-1] == tokens:
        return seq_idx.expand(batch, -1).to(torch.int32) + 1
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[-1] != tokens or tokens == 1:
        return None
    if valid_bt is None:
        starts = positions[:, 1:] != positions[:, :-1] + 1
    else:
        index = torch.arange(tokens, device=positions.device).expand(batch, -1)
        before = torch.where(valid_bt, index, -1).cummax(1).values[:, :-1]  # the last token before each
        positions = positions.expand(batch, -1)
        step = positions[:, 1:] - positions.gather(1, before.clamp(min=0))
        starts = valid_bt[:, 1:] & (before >= 0) & (step != 1) & (step != index[:, 1:] - before)
    if not starts.any():
        return None
    return (F.pad(starts.cumsum(1, dtype=torch.int32), (1, 0)) + 1).expand(batch, -1)


def visible_mask(
    queries: int,
    keys: int,
    segments: Tensor | None,
    looks_at: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """The dense boolean mask [b or 1, 1, queries, keys], or None where the attention's own causal flag says it all.

    As transformers has it: a padding query sees the tokens of the sequence beside it, as far as causality lets it; a
    query that sees nothing gets 0 from SDPA, and gives no gradient.
    """
    if segments is None and window is None and (not causal or queries == keys or queries == 1):
        return None
    j = torch.arange(keys, device=device)
    i = torch.arange(keys - queries, keys, device=device)
    distance = i[:, None] - j[None]
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        mask = mask & ((distance if causal else distance.abs()) < window)
    if segments is None or looks_at is None:
        return mask[None, None]
    return mask[None, None] & (looks_at[:, None, :, None] == segments[:, None, None])
