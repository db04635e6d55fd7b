"""What passes from the first pass over a block to the second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from sparsetrain.ops.selected_rows import KeyValues, Rows

Context = tuple[Tensor, Tensor]
"""Keys and values of all rows [b, g, s, d], with gradient to what made them."""


class Note(NamedTuple):
    """What one call said: its kind, its selected rows, its layer or weight, and for a dropout what it kept."""

    kind: str
    known: Tensor
    of: Any = None
    keep_mask: Tensor | None = None


class FoundKeys(Exception):
    """Ends a pass that was only to find keys and values."""


class Notes:
    """What passes from the first pass over a block to the second.

    Attributes:
        everything: keys and values of all rows.
        with_loss: attaches the auxiliary loss of a sparse attention, on the queries and keys of all rows.
        diverges: it will, at the latest behind the attention: selected rows run dense where others do not.
        trains_keys: what makes keys and values of the other rows gets gradient too, one block down and no further.
        context: those of all rows with their graph, then.
        functional: a pass has called one of `_KINDS` on rows outside of the layers that are noted.
        paused: inside such a layer or a sparse attention, whose own products are no calls of the block.
        diverged: the second pass has other values than the first from here on: it attends to every key where the first
            attended sparsely, or the first pass ended at the attention. What was noted of linears is then not used;
            masks of dropouts are.
    """

    def __init__(self, rows: Rows, diverges: bool = False, trains_keys: bool = False) -> None:
        self.rows, self.diverges, self.trains_keys = rows, diverges, trains_keys
        self.said: list[Note | None] = []
        self.next = 0
        self.everything: KeyValues | None = None
        self.context: Context | None = None
        self.with_loss: Callable[[Tensor], Tensor] | None = None
        self.attended: Tensor | None = None
        self.diverged = False
        self.ends_at_attention = False
        self.functional = self.paused = False

    def say(self, kind: str, out: Tensor, of: Any = None, mask: Tensor | None = None) -> None:
        """Note what a call said on all rows."""
        gather = self.rows.gather
        self.said.append(Note(kind, gather(out.detach()), of, None if mask is None else gather(mask)))

    def holds(self, x: Any, *, all_rows: bool) -> bool:
        """Does a layer that is no part of another treat rows here: all of them, or the selected ones?"""
        if self.paused:
            return False
        return _stream(x, (self.rows.shape[0], self.rows.num_tokens) if all_rows else self.rows.shape)

    @contextmanager
    def pause(self) -> Iterator[None]:
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused

    def take(self, kind: str, x: Tensor, of: Any = None) -> Note | None:
        """The note of the next call of this kind on `x`, by this layer or with this weight.

        None where the first pass has none: it ended at the attention, or the weight is made for each call anew. A
        product of weights alone (DoRA's) that looked like rows in the first pass is skipped.
        """
        for place in range(self.next, len(self.said)):
            note = self.said[place]
            assert note is not None
            if note.kind == kind and note.of is of and note.known.shape[:-1] == x.shape[:-1]:
                for i in range(self.next, place + 1):
                    self.said[i] = None  # autograd alone decides how long it lives
                self.next = place + 1
                return note
        return None


def _stream(x: Any, first: tuple[int, int]) -> bool:
    """Does x hold one row a token: [b, t, ...] or [b·t, ...]?"""
    if not isinstance(x, Tensor) or x.ndim < 2:
        return False
    return tuple(x.shape[:2]) == first if x.ndim > 2 else x.shape[0] == first[0] * first[1]
