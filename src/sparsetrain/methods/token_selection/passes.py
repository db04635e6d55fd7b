"""One block, run twice: on all rows without gradient, then on the selected rows with gradient and looked-up values.

The first pass is the block's own dense forward. It notes what every linear, dropout and attention said at the selected
rows. The second pass is the same code on [b, k, d]: linears, dropouts and the attention take their values from the
notes and only norms, activations and residuals are computed again, on k rows. So the forward is exact, autograd sees
selected rows alone, and every gradient inside the block is compact.

What a block calls besides (a quantised linear, a mixture of experts) is not noted and is computed again on its rows,
which is right for whatever treats tokens one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.methods.token_selection.layers import Adapters, Layers, kind_of
from sparsetrain.methods.token_selection.notes import Notes
from sparsetrain.ops.selected_rows import (
    Rows,
    adapted_as_peft,
    adapted_linear,
    adapted_product,
    selected_dropout,
    selected_linear,
)
from sparsetrain.surgery.lora import LinearParts, runs_as

_KINDS: dict[Any, str] = {F.linear: "linear", torch.addmm: "addmm", F.dropout: "dropout"}


@contextmanager
def on_all_rows(layers: Layers, notes: Notes, *, watched: bool, only_dropouts: bool = False) -> Iterator[None]:
    """The first pass runs inside: everything computes what it does, and is noted.

    Args:
        watched: so are functions that are called outside of the layers.
        only_dropouts: nothing else is noted.
    """
    forwards: dict[nn.Module, Any] = {layer: partial(_dropout, layer, notes) for layer in layers.dropouts}
    adapted = _unnoted if only_dropouts else _layer
    forwards |= {layer: partial(adapted, layer, notes, parts) for layer, parts in layers.adapters.items()}
    if not only_dropouts:
        forwards |= {layer: partial(_layer, layer, notes, None) for layer in layers.linears}
    with AllRows(notes, only_dropouts) if watched else nullcontext(), runs_as(forwards):
        yield


@contextmanager
def on_selected_rows(layers: Layers, notes: Notes, *, watched: bool) -> Iterator[None]:
    """The second pass runs inside: what was noted is not computed again.

    A linear and its LoRA are one node of the backward. It keeps x once, in the model's dtype; PEFT keeps a copy in
    fp32 for every linear beside a bf16 model.
    """
    forwards: dict[nn.Module, Any] = {layer: partial(_dropout_rows, layer, notes) for layer in layers.dropouts}
    forwards |= {layer: partial(_adapted_rows, layer, notes, parts) for layer, parts in layers.adapters.items()}
    forwards |= {layer: partial(_linear_rows, layer, notes) for layer in layers.linears}
    with SelectedRows(notes) if watched else nullcontext(), runs_as(forwards):
        yield


@contextmanager
def adapters_on_all_rows(adapters: Adapters) -> Iterator[None]:
    """Inside, a linear and its LoRA are run as fast as in the first pass."""
    with runs_as({layer: partial(_adapted, layer, parts) for layer, parts in adapters.items()}):
        yield


def _adapted(layer: Any, parts: LinearParts, x: Tensor) -> Tensor:
    """A linear and its LoRA on all rows.

    PEFT forms the update in the factors' dtype, scales it and adds it: where the model is bf16 and the factors fp32,
    five passes over [b, t, out] in fp32. Without gradient one product does it (SmolLM2's up projection, 1,024 tokens:
    34 ms -> 8). In one dtype that gains nothing, and the arithmetic stays PEFT's to the last bit.
    """
    if parts.lora is not None and parts.lora[0].dtype != parts.weight.dtype:
        return adapted_linear(x, parts) if torch.is_grad_enabled() else adapted_product(x, parts)
    if parts.lora_scale is None:  # several adapters
        return type(layer).forward(layer, x)
    return adapted_as_peft(x, layer.base_layer(x), parts)  # less PEFT's questions: 91 us for 179


def _unnoted(layer: Any, notes: Notes, parts: LinearParts | None, x: Tensor) -> Tensor:
    paused, notes.paused = notes.paused, True  # no context manager: it takes 4 us a layer
    try:
        return type(layer).forward(layer, x) if parts is None else _adapted(layer, parts, x)
    finally:
        notes.paused = paused


def _layer(layer: Any, notes: Notes, parts: LinearParts | None, x: Tensor) -> Tensor:
    noted = notes.holds(x, all_rows=True)
    out = _unnoted(layer, notes, parts, x)
    if noted:
        notes.say("layer", out, layer)
    return out


def _adapted_rows(layer: Any, notes: Notes, parts: LinearParts, x: Tensor) -> Tensor:
    note = notes.take("layer", x, layer) if notes.holds(x, all_rows=False) else None
    if note is not None and not notes.diverged:
        return adapted_linear(x, parts, known=note.known)
    with notes.pause():
        return adapted_linear(x, parts)


def _linear_rows(layer: Any, notes: Notes, x: Tensor) -> Tensor:
    if not notes.holds(x, all_rows=False):
        return _unnoted(layer, notes, None, x)
    note = notes.take("layer", x, layer)
    if note is None or notes.diverged:
        with torch.no_grad():
            known = _unnoted(layer, notes, None, x)
    else:
        known = note.known
    return selected_linear(x, layer.weight, layer.bias, known=known, transposed=kind_of(type(layer)) == "addmm")


def _dropout(layer: Any, notes: Notes, x: Tensor) -> Tensor:
    if not layer.training or layer.p == 0:
        return x
    if not notes.holds(x, all_rows=True):
        return _unnoted(layer, notes, None, x)
    return _drop(x, layer.p, notes)


def _drop(x: Tensor, p: float, notes: Notes) -> Tensor:
    out, mask = torch.native_dropout(x, p, True)
    notes.say("dropout", out, mask=mask)
    return out


def _dropout_rows(layer: Any, notes: Notes, x: Tensor) -> Tensor:
    if not layer.training or layer.p == 0:
        return x
    return _drop_rows(x, layer.p, notes) if notes.holds(x, all_rows=False) else _unnoted(layer, notes, None, x)


def _drop_rows(x: Tensor, p: float, notes: Notes) -> Tensor:
    scale = 1 / (1 - p) if p < 1 else 0.0
    note = notes.take("dropout", x)
    assert note is not None or notes.ends_at_attention, "a dropout that the block's first pass has not had"
    mask = _mask_again(x, p, notes.rows) if note is None else note.keep_mask
    assert mask is not None
    known = x.detach() * mask * scale if note is None or notes.diverged else note.known
    return selected_dropout(x, mask, scale, known=known)


def _mask_again(x: Tensor, p: float, rows: Rows) -> Tensor:
    """The mask that the forward drew for all rows, drawn again from the same state of the generator."""
    b, t = rows.shape[0], rows.num_tokens
    whole = (b * t, *x.shape[1:]) if x.ndim == 2 else (b, t, *x.shape[2:])
    return rows.gather(torch.native_dropout(x.new_ones(whole), p, True)[1])


class AllRows(TorchFunctionMode):
    """Notes what a block calls, in the first pass, outside of its layers; `only_dropouts`: of one kind alone."""

    def __init__(self, notes: Notes, only_dropouts: bool = False) -> None:
        super().__init__()
        self.notes, self.only_dropouts = notes, only_dropouts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, _KINDS.get(func)
        if kind is None or "out" in kwargs or (self.only_dropouts and kind != "dropout"):
            return func(*args, **kwargs)  # an op's own products are no layer's
        if not self.notes.holds(args[1 if kind == "addmm" else 0], all_rows=True):
            return func(*args, **kwargs)
        self.notes.functional = True
        if kind == "dropout":
            return self._dropout(*args, **kwargs)
        out = func(*args, **kwargs)
        self.notes.say(kind, out, args[2] if kind == "addmm" else args[1] if len(args) > 1 else kwargs["weight"])
        return out

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return _drop(x, p, self.notes) if training and p > 0 else x


class SelectedRows(TorchFunctionMode):
    """The same in the second pass: what was noted is not computed again."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, _KINDS.get(func)
        if kind is None or "out" in kwargs or not self.notes.holds(args[1 if kind == "addmm" else 0], all_rows=False):
            return func(*args, **kwargs)  # an op's own products are no layer's
        self.notes.functional = True
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
        return _drop_rows(x, p, self.notes) if training and p > 0 else x
