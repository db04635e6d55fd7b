"""What an attention is asked, and how a module comes to answer it in place of the dense attention.

The model's attention function looks for a stand-in on the attention module and calls it with an `AttentionCall`.

Legend: b batch, h query heads, g key/value heads, t queries, s keys, d head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Undo, describe, submodule
from sparsetrain.core.found_once import found_once
from sparsetrain.ops.selected_rows import KeyValues, attention_of_queries
from sparsetrain.surgery.site import Site

CHILD = "sparse_attention"
"""Name of the stand-in on an attention module; the attention function that an adapter installs asks for it."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention.

    Args:
        q, k, v: [b, h, t, d], [b, g, s, d], [b, g, s, d].
        causal: a query sees no later key; the last query is at the last key.
        scale: of the logits.
        segments: int [b, s], 0 = padding, equal ids = one sequence; None: all keys are one sequence.
        window: sliding window in tokens, or None.
        dense: gives the dense attention of this call, [b, h, t, d].
        looks_at: int [b, t], the sequence whose keys a query sees: its own, and for padding the one beside it. None:
            segments is None.
        places: int [b, s], every key's place in its own sequence, given beside a cache, which may have dropped the
            first keys; None: counted from the first key of the sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float
    segments: Tensor | None
    window: int | None
    dense: Callable[[], Tensor]
    looks_at: Tensor | None = None
    places: Tensor | None = None

    def gathered(self, aligned: Any) -> AttentionCall:
        """The same call with every sequence moved to a block boundary (`ops.segments.align_segments`)."""
        q, k, v = (aligned.gather(x) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, segments=aligned.segments_bw, looks_at=None, places=None)

    def with_padding(self, out: Tensor) -> Tensor:
        """out [b, h, t, d] of a sparse attention of whole sequences, with dense attention in padding that is read.

        A classifier reads its first row and a language model predicts a token from the row before it, whatever stands
        there, and transformers lets these rows see tokens. Padding that ends a row is read by nothing and keeps what
        the sparse attention gave it, as padding that begins a causal row does, which sees nothing.
        """
        if self.segments is None or self.q.shape[2] != self.k.shape[2]:
            return out
        segments = self.segments
        read_bt = found_once(segments, ("read", self.causal), lambda: _read_padding(segments, self.causal))
        return out if read_bt is None else self.with_dense_rows(out, read_bt)

    def with_dense_rows(self, out: Tensor, rows_bt: Tensor) -> Tensor:
        """out [b, h, t, d], with dense attention in the rows where bool [b, t] is True.

        Equals: where(rows, dense(), out), in values and gradients.
        """
        e = KeyValues(self.k, self.v, self.causal, self.scale, self.segments, self.window, self.looks_at)
        dense_nhd = attention_of_queries(self.q, e, rows_bt)
        out_bthd = out.transpose(1, 2)
        index_n = found_once(rows_bt, "flat", lambda: rows_bt.flatten().nonzero().flatten())
        return out_bthd.flatten(0, 1).index_copy(0, index_n, dense_nhd.to(out.dtype)).view_as(out_bthd).transpose(1, 2)


def _read_padding(segments_bt: Tensor, causal: bool) -> Tensor | None:
    """Padding that something reads, bool [b, t]; None if nothing does."""
    valid_bt = segments_bt > 0
    read_bt = ~valid_bt & (valid_bt.flip(1).cumsum(1).flip(1) > 0)
    if causal:
        read_bt &= valid_bt.cumsum(1) > 0
    return read_bt if read_bt.any() else None


StandIn = Callable[[AttentionCall], Tensor]
"""An attention call -> its output [b, h, t, d]."""


class SparseAttention(Site):
    """An attention that a method installs."""

    def forward(self, call: AttentionCall) -> Tensor:
        """[b, h, t, d]."""
        raise NotImplementedError

    def with_auxiliary_loss(self, out: Tensor, call: AttentionCall) -> Tensor:
        """out, with the method's own loss on the queries and keys of a call attached in training, if it has one."""
        return out


@cache
def say_dense(method: str, timed: str) -> None:
    """Once a shape: a sparse attention runs dense, because that was faster here."""
    warnings.warn(f"{method} attends densely where that is faster on this machine: {timed}.", stacklevel=2)


def stand_in_of(attention: nn.Module) -> StandIn | None:
    """What answers in place of the dense attention, or None."""
    return getattr(attention, CHILD, None)


def install_attention(model: nn.Module, site: AttentionSite, module: Site) -> Undo:
    """Make `module` the attention of a site; returns the undo.

    Raises:
        ValueError: the site has a sparse attention already.
    """
    attention = submodule(model, site.name)
    if stand_in_of(attention) is not None:
        raise ValueError(f"{site.name} has a sparse attention already. Call handle.restore() first.")
    uninstall = let_in(describe(model))(model)
    module.to(next(attention.parameters()).device).train(attention.training)
    attention.add_module(CHILD, module)

    def undo() -> None:
        delattr(attention, CHILD)
        uninstall()

    return undo


def let_in(anatomy: Anatomy) -> Callable[[nn.Module], Undo]:
    """What makes the attentions of a model ask for stand-ins."""
    assert anatomy.install_attention is not None, "edits() refuses a model without a way into attention"
    return anatomy.install_attention


def attention_names(anatomy: Anatomy) -> list[str]:
    """The attentions that a method can take."""
    return [] if anatomy.install_attention is None else [site.name for site in anatomy.attentions]


def attention_claim(site: AttentionSite) -> tuple[str, ...]:
    """What an edit of an attention owns."""
    return (f"the attention function of {site.name}",)


def refuse_attention(method: str, site: AttentionSite, anatomy: Anatomy) -> None:
    """Raise ValueError if a sparse attention cannot take a site: no way in, or attention dropout."""
    if anatomy.install_attention is None:
        raise ValueError(
            f"{method} cannot take {site.name}: the anatomy of {anatomy.model_class} has no way into attention "
            "(install_attention). Leave this model's attention dense."
        )
    if site.dropout > 0:
        raise ValueError(
            f"{method} cannot take {site.name}: attention dropout is {site.dropout}, and sparse attention has none. "
            "Load the model with attention dropout 0 (attention_dropout=0.0; BERT and ViT: "
            "attention_probs_dropout_prob=0.0; GPT-2: attn_pdrop=0.0)."
        )


@contextmanager
def standing_in(attention: nn.Module, stand_in: StandIn) -> Iterator[None]:
    """Inside, `stand_in` answers for one attention.

    It stands in the instance's dictionary, which Python asks before a module's children, so that a sparse attention
    installed there stays where it is.
    """
    vars(attention)[CHILD] = stand_in
    try:
        yield
    finally:
        del vars(attention)[CHILD]


@contextmanager
def watching(model: nn.Module, watches: Mapping[str, StandIn]) -> Iterator[None]:
    """Inside, a watch answers for each named attention of the model, whatever is installed there."""
    uninstall = let_in(describe(model))(model)
    try:
        for name, watch in watches.items():
            vars(submodule(model, name))[CHILD] = watch
        yield
    finally:
        for name in watches:
            vars(submodule(model, name)).pop(CHILD, None)
        uninstall()
