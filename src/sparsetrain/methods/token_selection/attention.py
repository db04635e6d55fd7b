"""Attention in a block's two passes: of all rows without gradient, then of the selected rows with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsetrain.methods.token_selection.notes import Context, FoundKeys, Notes
from sparsetrain.ops.selected_rows import KeyValues, attention_of_all, selected_attention
from sparsetrain.surgery.attention import AttentionCall, SparseAttention, StandIn


class AttentionOfAllRows:
    """Answers for the attention during the first pass."""

    def __init__(self, notes: Notes, sparse: StandIn | None) -> None:
        self.notes, self.sparse = notes, sparse

    def __call__(self, call: AttentionCall) -> Tensor:
        notes = self.notes
        notes.everything = key_values(call)
        notes.context = trained_keys(call) if notes.trains_keys else None
        notes.with_loss = attaches_loss(self.sparse, call)
        if notes.ends_at_attention:
            raise FoundKeys
        if self.sparse is not None:
            with notes.pause():
                return self.sparse(call)
        out = attend_to_all(call, notes.everything)
        notes.attended = notes.rows.gather(out.transpose(1, 2)).transpose(1, 2)
        return out


def attend_to_all(call: AttentionCall, everything: KeyValues) -> Tensor:
    """The dense attention of all rows, without gradient, by whoever is faster."""
    out = attention_of_all(call.q, everything)
    return call.dense() if out is None else out


class AttentionOfSelectedRows:
    """The same during the second pass. Where other rows attend sparsely, selected rows attend to every key."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def __call__(self, call: AttentionCall) -> Tensor:
        notes = self.notes
        assert notes.everything is not None, "the second pass attends where the first did not"
        known, notes.attended = notes.attended, None
        notes.diverged = notes.diverged or notes.diverges or known is None
        context, notes.context = notes.context, None
        out = selected_attention(call.q, call.k, call.v, notes.everything, notes.rows, known=known, context=context)
        with_loss, notes.with_loss = notes.with_loss, None
        return out if with_loss is None else with_loss(out)


def attaches_loss(sparse: StandIn | None, call: AttentionCall) -> Callable[[Tensor], Tensor] | None:
    """What attaches a sparse attention's auxiliary loss to an output; None without a sparse attention.

    A codebook serves all rows, selected or not, so its loss is of all queries and keys; no gradient reaches those.
    """
    if not isinstance(sparse, SparseAttention):
        return None
    return partial(sparse.with_auxiliary_loss, call=replace(call, q=call.q.detach(), k=call.k.detach()))


def key_values(call: AttentionCall) -> KeyValues:
    """Keys and values of all rows of a call, and who may see them."""
    k, v = _compact(call.k.detach()), _compact(call.v.detach())
    return KeyValues(k, v, call.causal, call.scale, call.segments, call.window, call.looks_at)


def trained_keys(call: AttentionCall) -> Context | None:
    """Keys and values of a call with their graph, None if they have none; gradient is off from here on."""
    torch.set_grad_enabled(False)
    return (call.k, call.v) if call.k.requires_grad or call.v.requires_grad else None


def _compact(x: Tensor) -> Tensor:
    """x without the rest of a larger storage that it is a view of (GPT-2 makes q, k and v in one product)."""
    shared = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if shared else x
