"""Which component of a model is running: attention, FFN, norms, embedding, head and loss, adapters, or other.

Modules named by the model's anatomy are hooked while a measurement lasts; a module without a hook belongs to whatever
called it. So converted and PEFT-wrapped models need no table of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from sparsetrain.core.anatomy import Anatomy, Block, known_parts, submodule
from sparsetrain.core.components import COMPONENTS as COMPONENTS


@dataclass(frozen=True)
class Place:
    """A component and the layer it is in; layer None: that of the caller, or outside the blocks."""

    component: str
    layer: int | None = None


def places(model: nn.Module) -> dict[str, Place]:
    """Module name -> place, for every module whose place is not simply its caller's.

    The block's child that holds the attention is attention (BERT: `attention`, with its output projection), the
    children that hold the FFN's linears and activation are FFN, and norms count as norms wherever they stand between
    those. What stands beside a `base_layer` is an adapter.
    """
    anatomy = known_parts(model)
    named = dict(model.named_modules())
    found: dict[str, Place] = {}
    for block in anatomy.blocks:
        found |= _in_block(block)
    if anatomy.embedding is not None:
        found[anatomy.embedding] = Place("embedding")
    if anatomy.head is not None:
        found[anatomy.head] = Place("head_and_loss")
    found |= _norms(anatomy, named, found)
    found |= {name: Place("adapters") for name in _adapters(named)}
    return {name: place for name, place in found.items() if name in named}


def _in_block(block: Block) -> dict[str, Place]:
    layer = block.layer
    attention = [] if block.attention is None else [block.attention.name]
    parts = []
    if (ffn := block.ffn) is not None:
        whole = [] if ffn.name == block.name else [ffn.name]
        inner = [ffn.up, ffn.gate, ffn.down, *ffn.bypass]
        parts = whole or [f"{ffn.name}.{part}" if ffn.name else part for part in inner if part]
    children = {_child(block.name, name) for name in attention}
    both = children & {_child(block.name, name) for name in parts}
    found = {block.name: Place("ffn" if ffn is not None and ffn.name == block.name else "other", layer)}
    for component, names in (("ffn", parts), ("attention", attention)):
        for name in names:
            child = _child(block.name, name)
            # a child that holds both (one module for the whole layer) is not a component: take the exact name
            found[name if child in both else child] = Place(component, layer)
    return found


def _child(block: str, name: str) -> str:
    """The direct child of `block` that is or holds the module `name`."""
    prefix = f"{block}." if block else ""
    if not name.startswith(prefix):
        return name
    return prefix + name.removeprefix(prefix).split(".", 1)[0]


def _norms(anatomy: Anatomy, named: dict[str, nn.Module], found: dict[str, Place]) -> dict[str, Place]:
    """The anatomy's norms, and by class name those outside the blocks (the final norm, BERT's embedding norm)."""
    norms = {name: Place("norms", block.layer) for block in anatomy.blocks for name in block.norms}
    inside = tuple(f"{name}." for name in found)
    for name, module in named.items():
        if "norm" in type(module).__name__.lower() and name not in norms and not name.startswith(inside):
            norms[name] = Place("norms")
    return norms


def _adapters(named: dict[str, nn.Module]) -> Iterator[str]:
    for name, module in named.items():
        if not isinstance(getattr(module, "base_layer", None), nn.Module):
            continue
        for child, inner in module.named_children():
            if child != "base_layer":
                yield from (found for found, _ in inner.named_modules(prefix=f"{name}.{child}".lstrip(".")))


class Locates(Protocol):
    """Knows whose operation runs now."""

    @property
    def place(self) -> Place: ...


@dataclass
class Running:
    """The stack of running modules during a measurement; `place` is where the next operation belongs.

    What runs outside the model, and what runs in the model's own forward after its last block, is head and loss.
    """

    on_change: Callable[[], None] | None = None
    on_leave: Callable[[Any], None] | None = None
    _stack: list[Place] = field(default_factory=list)
    _past_blocks: bool = False
    _next_block: int | None = None

    @property
    def place(self) -> Place:
        if not self._stack:
            return Place("head_and_loss")
        top = self._stack[-1]
        if top != Place("other"):
            return top
        # between two blocks: the input that checkpointing keeps is of the block to come
        return Place("head_and_loss") if self._past_blocks else Place("other", self._next_block)

    def _enter(self, place: Place) -> None:
        self._changed()
        inherited = self._stack[-1].layer if self._stack and place.layer is None else place.layer
        self._stack.append(Place(place.component, inherited))

    def _leave(self, output: Any) -> None:
        self._changed()
        if self.on_leave is not None:
            self.on_leave(output)
        left = self._stack.pop()
        if left.layer is not None and self._stack and self._stack[-1].layer is None:
            self._next_block = left.layer + 1

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


@contextmanager
def running(model: nn.Module, at: dict[str, Place] | None = None) -> Iterator[Running]:
    """Follow which component of `model` runs inside the `with` block; every hook is removed at its end.

    The model may be converted, PEFT-wrapped or neither. Set `on_change` to be called just before the place changes,
    and `on_leave` to be given what a module returns, after that and while its place still stands.

    Args:
        at: module name -> place, instead of the model's `places`.
    """
    now = Running()
    blocks = [block.name for block in known_parts(model).blocks]
    hooks: list[Any] = []

    def start_model(*_: Any) -> None:
        now._past_blocks, now._next_block = not blocks, None
        now._enter(Place("other"))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        now._leave(output)

    def end_of_blocks(*_: Any) -> None:
        now._past_blocks = True

    try:
        hooks.append(model.register_forward_pre_hook(start_model, prepend=True))
        hooks.append(model.register_forward_hook(leave, always_call=True))
        for name, place in (places(model) if at is None else at).items():
            if name == "":
                continue
            module = submodule(model, name)
            hooks.append(module.register_forward_pre_hook(lambda *_, place=place: now._enter(place), prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        if blocks:
            hooks.append(submodule(model, blocks[-1]).register_forward_hook(end_of_blocks))
        yield now
    finally:
        for hook in hooks:
            hook.remove()
