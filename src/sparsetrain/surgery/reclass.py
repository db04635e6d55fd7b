"""Changing what a module does while it stays where it is: its parameters, children, hooks and names are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn


@cache
def _subclass(mixin: Any, dense: Any) -> type:
    name = f"{mixin.__name__}{dense.__name__}"
    own: Any = mixin.forward

    @wraps(dense.forward)  # its signature: the next mixin, and libraries, look there for a module's arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    about = {"__module__": mixin.__module__, "mixin": mixin, "dense_class": dense}
    return type(name, (mixin, dense), {**about, "forward": forward})


def reclass(module: nn.Module, mixin: type) -> None:
    """Make `module` an instance of `mixin` and of its own class.

    Its forward runs around those of mixins that came before, unless the mixins' `height` says otherwise.

    Raises:
        ValueError: the module carries a patched forward or an offload hook, which would go on running the old code.
    """
    if "forward" in vars(module) or hasattr(module, "_hf_hook"):
        found = "an offload hook" if hasattr(module, "_hf_hook") else "a forward patched on the instance"
        raise ValueError(
            f"{type(module).__name__} carries {found}, so a new forward would be ignored. "
            "Convert the model before it is dispatched or patched (load without device_map, without kernel patches)."
        )
    if isinstance(module, mixin):
        raise ValueError(f"{type(module).__name__} is converted already. Call handle.restore() first.")
    module.__class__ = with_mixin(type(module), mixin, _subclass)


def declass(module: nn.Module, mixin: type | None = None) -> None:
    """Undo `reclass`: take out `mixin`, wherever it lies, or the last one."""
    module.__class__ = without_mixin(type(module), mixin or type(module).mixin, _subclass)  # type: ignore[attr-defined]


def with_mixin(kind: type, mixin: Any, build: Callable[[Any, Any], type]) -> type:
    """A class with one more mixin, above those of its own `height` (0 for a mixin that has none) and below higher ones.

    Args:
        build: (mixin, class) -> the class with the mixin on top.
    """
    dense, mixins = _taken_apart(kind)
    return reduce(lambda below, each: build(each, below), sorted([*mixins, mixin], key=height), dense)


def without_mixin(kind: type, mixin: Any, build: Callable[[Any, Any], type]) -> type:
    """Undo `with_mixin`."""
    dense, mixins = _taken_apart(kind)
    return reduce(lambda below, each: build(each, below), (each for each in mixins if each is not mixin), dense)


def height(mixin: Any) -> int:
    """A mixin's place among others: higher ones run around lower ones."""
    return getattr(mixin, "height", 0)


def _taken_apart(kind: Any) -> tuple[type, list[Any]]:
    """(a class without our mixins, these from the lowest to the highest)."""
    mixins = []
    while "dense_class" in vars(kind):
        mixins.insert(0, vars(kind)["mixin"])
        kind = vars(kind)["dense_class"]
    return kind, mixins


def dense_forward(mixin: type, module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward that `module` had before `mixin` was mixed in; other mixins may lie below and above.

    Args:
        mixin: the caller's own class.
        module: a module, or a `View` of one.
    """
    kind = type(module.__dict__["_module"]) if isinstance(module, View) else type(module)
    below = next(c for c in kind.__mro__ if c.__dict__.get("mixin") is mixin).dense_class  # type: ignore[attr-defined]
    if isinstance(module, View):
        on_view: Any = _on_view
        return on_view(below, module, *args, **kwargs)
    return below.forward(module, *args, **kwargs)


@torch.compiler.disable  # dynamo takes a view for its module, and would run the dense forward without a word
def _on_view(kind: Any, view: View, *args: Any, **kwargs: Any) -> Any:
    return kind.forward(view, *args, **kwargs)


class View:
    """A module seen with some of its attributes replaced: a forward can run on the view, the module is untouched.

    Used where an FFN's linears stand in a larger forward (OPT, BERT): on the view, the first linear computes the whole
    FFN, and the activation and the last linear pass through.
    """

    # transformers asks `type(self).forward` whether it is the outermost forward, which alone is checkpointed
    forward = None

    def __init__(self, module: nn.Module, replaced: dict[str, Any]) -> None:
        self._module = module
        self._replaced = {}
        for name, value in replaced.items():
            head, _, rest = name.partition(".")
            if rest:
                inner = self._replaced.setdefault(head, View(getattr(module, head), {}))
                inner._replaced[rest] = value
            else:
                self._replaced[head] = value

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_replaced"]:
            return self.__dict__["_replaced"][name]
        module = self.__dict__["_module"]
        found = getattr(module, name)
        # a method of the module must see the view too (BERT hands `self.feed_forward_chunk` on)
        return MethodType(found.__func__, self) if getattr(found, "__self__", None) is module else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.__dict__["_module"]).forward(self, *args, **kwargs)


def pass_through(x: Any, *_: Any) -> Any:
    """The identity, for what a view leaves out."""
    return x
