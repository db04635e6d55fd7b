"""A model whose own forward is ours, and stays outermost: what others assign as `model.forward` runs inside of it.

TRL's loss head, accelerate's autocast and offload hooks read `model.forward`, and assign a function that calls what
they read. A forward that selects tokens must see labels before and outputs after all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import nn

from sparsetrain.surgery.reclass import height

INNER = "inner_forward"
"""Where a model keeps what was assigned to its `forward`."""


class OutermostForward:
    """`forward` of a re-classed model's class.

    Read from the class it is a function with the dense forward's signature, by which trainers filter columns and
    `generate` checks arguments. Read from a model it is bound to what was assigned until then, so that a chain of
    assignments runs from the last to the first, and ends at the dense forward. Assigning what was read undoes what was
    assigned in between.

    Args:
        mixins: each has `around(self, forward, *args, **kwargs)`, which calls `forward` in its place, and may have
            `extra_arguments`, names of keyword arguments that the dense forward has not. The first is outermost.
        dense: the class that they are mixed into.
    """

    def __init__(self, mixins: tuple[Any, ...], dense: Any) -> None:
        self.dense = dense
        signature = inspect.signature(dense.forward)
        names = dict.fromkeys(name for mixin in mixins for name in getattr(mixin, "extra_arguments", ()))
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        own = list(signature.parameters.values())
        place = len(own) - (own[-1].kind is inspect.Parameter.VAR_KEYWORD)
        self.of_class = signature.replace(parameters=[*own[:place], *more, *own[place:]])
        self.of_model = self.of_class.replace(parameters=list(self.of_class.parameters.values())[1:])

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return BoundForward(self, model, None)(*args, **kwargs)

        forward.__qualname__, forward.__module__ = dense.forward.__qualname__, dense.forward.__module__
        forward.__doc__, forward.__signature__ = dense.forward.__doc__, self.of_class  # type: ignore[attr-defined]
        self.function = forward

    def __get__(self, model: Any, kind: Any = None) -> Any:
        return self.function if model is None else BoundForward(self, model, vars(model).get(INNER))

    def __set__(self, model: Any, forward: Any) -> None:
        if isinstance(forward, MethodType) and isinstance(forward.__func__, BoundForward):
            forward = forward.__func__  # accelerate binds what it hands back once more
        if isinstance(forward, BoundForward):
            forward = forward.inner
        if forward is None:
            vars(model).pop(INNER, None)
        else:
            vars(model)[INNER] = forward

    def __delete__(self, model: Any) -> None:
        if vars(model).pop(INNER, None) is None:
            raise AttributeError("forward")

    def __deepcopy__(self, memo: Any) -> OutermostForward:
        return self  # it belongs to the class


@dataclass(frozen=True, slots=True)
class BoundForward:
    """`model.forward` as it was when it was read; `inner` is what had been assigned, None for nothing."""

    of: OutermostForward
    model: Any
    inner: Callable[..., Any] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(self.of.dense.forward, self.model) if self.inner is None else self.inner
        # as the model is now: it may have been restored while somebody holds what was read before
        for mixin in reversed(getattr(type(self.model), "mixins", ())):
            forward = partial(mixin.around, self.model, forward)
        return forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return self.of.of_model

    @property
    def __wrapped__(self) -> Any:  # accelerate walks along these to find the forward that it had read
        if self.inner is None:
            raise AttributeError("__wrapped__")
        return self.inner


@cache
def _subclass(mixins: tuple[Any, ...], dense: Any) -> type:
    # the dense class's names: `config.architectures`, transformers' registries and trainers go by them
    names = {"__module__": dense.__module__, "__qualname__": dense.__qualname__, "__doc__": dense.__doc__}
    ours = {"forward": OutermostForward(mixins, dense), "mixins": mixins, "dense_class": dense}
    return type(dense.__name__, (*mixins, dense), names | ours)


def reclass_model(model: nn.Module, mixin: type) -> None:
    """Make `model` an instance of `mixin` and of its own class, under its own name.

    The mixin lies outside of those that the model has, unless their `height` is more than its own (0 if it has none).

    A forward that is assigned on the model already goes inside.

    Raises:
        ValueError: it is an instance of the mixin already.
    """
    if isinstance(model, mixin):
        raise ValueError(f"{type(model).__name__} is converted already. Call handle.restore() first.")
    kind: Any = type(model)
    assigned = vars(model).pop("forward", None)
    mixins = sorted((mixin, *getattr(kind, "mixins", ())), key=height, reverse=True)
    model.__class__ = _subclass(tuple(mixins), getattr(kind, "dense_class", kind))
    if assigned is not None:
        model.forward = assigned


def declass_model(model: nn.Module, mixin: type) -> None:
    """Undo `reclass_model`, in any order; what was assigned as `forward` meanwhile stays assigned."""
    kind: Any = type(model)
    if left := tuple(other for other in kind.mixins if other is not mixin):
        model.__class__ = _subclass(left, kind.dense_class)
        return
    assigned = vars(model).pop(INNER, None)
    model.__class__ = kind.dense_class
    if assigned is not None:
        model.forward = assigned
