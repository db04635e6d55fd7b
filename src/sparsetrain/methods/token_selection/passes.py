"""One block, run twice: on all rows without gradient, then on the selected rows with gradient and nothing computed twice.

The first pass is the block's own dense forward. It notes what every linear, dropout and attention said at the selected
rows. The second pass is the same code on [b, k, d]: linears, dropouts and the attention take their values from the
notes and only norms, activations and residuals are computed again, on k rows. So the forward is exact, autograd sees
selected rows alone, and every gradient inside the block is compact.

What a block calls besides (a quantised linear, a mixture of experts) is not noted and is computed again on its rows,
which is right for whatever treats tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.ops.selected_rows import KeyValues, Rows, selected_attention, selected_dropout, selected_linear

_KINDS: dict[Any, str] = {F.linear: "linear", torch.addmm: "addmm", F.dropout: "dropout"}


class Note(NamedTuple):
    """What one call said: its kind, its selected rows, and for a dropout the mask of what it kept."""

    kind: str
    known: Tensor
    keep_mask: Tensor | None = None


class FoundKeys(Exception):
    """Ends a pass that was only to find keys and values."""


class Notes:
    """What passes from the first pass over a block to the second.

    Attributes:
        everything: keys and values of all rows.
        diverged: the second pass computes other values than the first from here on, so notes no longer hold.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.said: list[Note] = []
        self.next = 0
        self.everything: KeyValues | None = None
        self.attended: Tensor | None = None
        self.diverged = False

    def take(self, kind: str) -> Note | None:
        if self.diverged:
            return None
        assert self.next < len(self.said) and self.said[self.next].kind == kind, (
            f"the block's second pass calls {kind} where its first pass did not (call {self.next})"
        )
        note = self.said[self.next]
        self.said[self.next] = Note(kind, note.known[:0])  # autograd alone decides how long it lives
        self.next += 1
        return note

    def check_all_taken(self) -> None:
        assert self.diverged or self.next == len(self.said), (
            f"the block's second pass made {self.next} of the {len(self.said)} calls of its first pass"
        )


def _stream(x: Any, first: tuple[int, int]) -> bool:
    """Does x hold one row a token: [b, t, ...] or [b·t, ...]?"""
    if not isinstance(x, Tensor) or x.ndim < 2:
        return False
    return tuple(x.shape[:2]) == first if x.ndim > 2 else x.shape[0] == first[0] * first[1]


class AllRows(TorchFunctionMode):
    """The first pass: everything runs as it is, and is noted."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes
        self.shape = (notes.rows.shape[0], notes.rows.num_tokens)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or not _stream(args[1] if kind == "addmm" else args[0], self.shape):
            return func(*args, **kwargs)
        if kind == "dropout":
            return self._dropout(*args, **kwargs)
        out = func(*args, **kwargs)
        self.notes.said.append(Note(kind, self.notes.rows.gather(out)))
        return out

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        out, mask = torch.native_dropout(x, p, True)
        gather = self.notes.rows.gather
        self.notes.said.append(Note("dropout", gather(out), gather(mask)))
        return out


class SelectedRows(TorchFunctionMode):
    """The second pass: what was noted is not computed again."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes
        self.shape = notes.rows.shape

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func)
        if kind is None or not _stream(args[1] if kind == "addmm" else args[0], self.shape):
            return func(*args, **kwargs)
        return getattr(self, f"_{kind}")(func, *args, **kwargs)

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        note = self.notes.take("linear")
        return func(input, weight, bias) if note is None else selected_linear(input, weight, bias, known=note.known)

    def _addmm(self, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor:
        note = self.notes.take("addmm")
        if note is None:
            return func(input, mat1, mat2)
        return selected_linear(mat1, mat2, input, known=note.known, transposed=True)

    def _dropout(
        self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        note = self.notes.take("dropout")
        if note is None:
            return func(x, p, training)
        assert note.keep_mask is not None
        return selected_dropout(x, note.keep_mask, 1 / (1 - p) if p < 1 else 0.0, known=note.known)


class AttentionOfAllRows:
    """Stands where the attention function looks for a sparse attention, during the first pass."""

    def __init__(self, notes: Notes, sparse: Any, keys_only: bool = False) -> None:
        self.notes, self.sparse, self.keys_only = notes, sparse, keys_only

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, dense: Callable[[], Tensor], causal: bool, scale: float,
        segments_bs: Tensor | None, window: int | None,
    ) -> Tensor:  # fmt: skip
        notes = self.notes
        notes.everything = KeyValues(_compact(k), _compact(v), causal, scale, segments_bs, window)
        if self.keys_only:
            raise FoundKeys
        if self.sparse is not None:
            return self.sparse(
                q, k, v, dense=dense, causal=causal, scale=scale, segments_bs=segments_bs, window=window
            )
        out = dense()
        notes.attended = notes.rows.gather(out.transpose(1, 2)).transpose(1, 2)
        return out


class AttentionOfSelectedRows:
    """The same place during the second pass. Where other rows attend sparsely, selected rows attend to every key."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        notes = self.notes
        assert notes.everything is not None, "the second pass attends where the first did not"
        known, notes.attended = notes.attended, None
        notes.diverged = notes.diverged or known is None
        return selected_attention(q, k, v, notes.everything, notes.rows, known=known)


def _compact(x: Tensor) -> Tensor:
    """x without the rest of a larger storage that it is a view of (GPT-2 makes q, k and v in one product)."""
    shared = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if shared else x
