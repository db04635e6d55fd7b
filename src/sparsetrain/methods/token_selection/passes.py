"""One block, run twice: on all rows without gradient, then on the selected rows with gradient and looked-up values.

The first pass is the block's own dense forward. It notes what every linear, dropout and attention said at the selected
rows. The second pass is the same code on [b, k, d]: linears, dropouts and the attention take their values from the
notes and only norms, activations and residuals are computed again, on k rows. So the forward is exact, autograd sees
selected rows alone, and every gradient inside the block is compact.

What a block calls besides (a quantised linear, a mixture of experts) is not noted and is computed again on its rows,
which is right for whatever treats tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.ops.selected_rows import (
    KeyValues,
    Rows,
    adapted_linear,
    adapted_product,
    selected_dropout,
    selected_linear,
)
from sparsetrain.surgery.lora import LinearParts, runs_as

Adapters = Mapping[nn.Module, LinearParts]
"""Linears with their LoRA, as `surgery.lora.plain_lora` finds them."""
Context = tuple[Tensor, Tensor]
"""Keys and values of all rows [b, g, s, d], with gradient to what made them."""
_KINDS: dict[Any, str] = {F.linear: "linear", torch.addmm: "addmm", F.dropout: "dropout"}


class Note(NamedTuple):
    """What one call said: its kind, its selected rows, its weight, and for a dropout the mask of what it kept."""

    kind: str
    known: Tensor
    weight: Tensor | None = None
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
        self.paused = False  # inside a sparse attention, whose own products are no calls of the block

    def take(self, kind: str, x: Tensor, weight: Tensor | None = None) -> Note | None:
        """The note of the next call of this kind on `x` with this weight.

        None where the first pass has none: it ended at the attention, or the weight is made for each call anew. A
        product of weights alone (DoRA's) that looked like rows in the first pass is skipped.
        """
        for place in range(self.next, len(self.said)):
            note = self.said[place]
            assert note is not None
            if note.kind == kind and note.weight is weight and note.known.shape[:-1] == x.shape[:-1]:
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


class AllRows(TorchFunctionMode):
    """The first pass: everything runs as it is, and is noted; `only`: of one kind alone."""

    def __init__(self, notes: Notes, only: str | None = None) -> None:
        super().__init__()
        self.notes, self.only = notes, only
        self.shape = (notes.rows.shape[0], notes.rows.num_tokens)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = None if "out" in kwargs or self.notes.paused else _KINDS.get(func)  # an op's own products are no layer's
        if kind is None or self.only not in (None, kind):
            return func(*args, **kwargs)
        if not _stream(args[1] if kind == "addmm" else args[0], self.shape):
            return func(*args, **kwargs)
        if kind == "dropout":
            return self._dropout(*args, **kwargs)
        out = func(*args, **kwargs)
        weight = args[2] if kind == "addmm" else args[1] if len(args) > 1 else kwargs["weight"]
        self.notes.said.append(Note(kind, self.notes.rows.gather(out.detach()), weight))
        return out

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        out, mask = torch.native_dropout(x, p, True)
        gather = self.notes.rows.gather
        self.notes.said.append(Note("dropout", gather(out.detach()), keep_mask=gather(mask)))
        return out


@contextmanager
def adapters_on_all_rows(adapters: Adapters, notes: Notes | None) -> Iterator[None]:
    """Inside, a linear and its LoRA are noted as one product; without notes they are only run as fast.

    PEFT forms the update in the factors' dtype, scales it and adds it: where the model is bf16 and the factors fp32,
    five passes over [b, t, out] in fp32. Without gradient one product does it (SmolLM2's up projection, 1,024 tokens:
    34 ms -> 8). In one dtype that gains nothing, and the arithmetic stays PEFT's to the last bit.
    """
    with runs_as({module: partial(_adapted, module, parts, notes) for module, parts in adapters.items()}):
        yield


def _adapted(module: Any, parts: LinearParts, notes: Notes | None, x: Tensor) -> Tensor:
    mixed = parts.lora is not None and parts.lora[0].dtype != parts.weight.dtype
    noted = notes is not None and not notes.paused and _stream(x, (notes.rows.shape[0], notes.rows.num_tokens))
    paused = notes is not None and notes.paused
    if notes is not None:
        notes.paused = True
    try:
        if mixed:
            out = adapted_linear(x, parts) if torch.is_grad_enabled() else adapted_product(x, parts)
        else:
            out = type(module).forward(module, x)
    finally:
        if notes is not None:
            notes.paused = paused
    if noted:
        assert notes is not None
        notes.said.append(Note("adapted", notes.rows.gather(out.detach()), module.weight))
    return out


@contextmanager
def adapters_on_selected_rows(adapters: Adapters, notes: Notes) -> Iterator[None]:
    """Inside, a linear and its LoRA take their value from the notes and are one node of the backward.

    It keeps x once, in the model's dtype; PEFT keeps a copy in fp32 for every linear beside a bf16 model.
    """
    with runs_as({module: partial(_adapted_rows, module, parts, notes) for module, parts in adapters.items()}):
        yield


def _adapted_rows(module: Any, parts: LinearParts, notes: Notes, x: Tensor) -> Tensor:
    note = notes.take("adapted", x, module.weight) if _stream(x, notes.rows.shape) else None
    return adapted_linear(x, parts, known=None if note is None or notes.diverged else note.known)


class SelectedRows(TorchFunctionMode):
    """The second pass: what was noted is not computed again."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes
        self.shape = notes.rows.shape

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = None if "out" in kwargs else _KINDS.get(func)  # an op's own products are no layer's
        if kind is None or not _stream(args[1] if kind == "addmm" else args[0], self.shape):
            return func(*args, **kwargs)
        return getattr(self, f"_{kind}")(func, *args, **kwargs)

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        known = self._known("linear", input, weight, func, input, weight, bias)
        return selected_linear(input, weight, bias, known=known)

    def _addmm(self, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor:
        known = self._known("addmm", mat1, mat2, func, input, mat1, mat2)
        return selected_linear(mat1, mat2, input, known=known, transposed=True)

    def _known(self, kind: str, x: Tensor, weight: Tensor, func: Any, *args: Any) -> Tensor:
        note = self.notes.take(kind, x, weight)
        if note is not None and not self.notes.diverged:
            return note.known
        with torch.no_grad():
            return func(*args)

    def _dropout(self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        scale = 1 / (1 - p) if p < 1 else 0.0
        note = self.notes.take("dropout", x)
        assert note is not None or self.notes.ends_at_attention, "a dropout that the block's first pass has not had"
        mask = self._mask(x, p) if note is None else note.keep_mask
        assert mask is not None
        known = x.detach() * mask * scale if note is None or self.notes.diverged else note.known
        return selected_dropout(x, mask, scale, known=known)

    def _mask(self, x: Tensor, p: float) -> Tensor:
        """The mask that the forward drew for all rows, drawn again from the same state of the generator."""
        b, t = self.shape[0], self.notes.rows.num_tokens
        whole = (b * t, *x.shape[1:]) if x.ndim == 2 else (b, t, *x.shape[2:])
        return self.notes.rows.gather(torch.native_dropout(x.new_ones(whole), p, True)[1])
