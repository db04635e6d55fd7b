"""The usual shape of edits: one at each site that the config takes, a child of ours on the module and a new forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.surgery.method import Edit
from sparsetrain.surgery.reclass import declass, reclass
from sparsetrain.surgery.site import Site


class Place(Protocol):
    """A site of the anatomy: attention, FFN, linear, convolution, block."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


def no_cost(_place: Any, _tokens: int) -> tuple[Cost, Cost]:
    """Nothing before, nothing after: what is changed costs what it did."""
    return Cost(), Cost()


def edits_at(
    config: MethodConfig,
    anatomy: Anatomy,
    places: Iterable[Place],
    install: Callable[[nn.Module, dict[str, Tensor], Any, Any], tuple[Undo, Site | None]],
    *,
    cost: Callable[[Any, int], tuple[Cost, Cost]] = no_cost,
    check: Callable[[Any], None] = lambda _place: None,
    claims: Callable[[Any], Iterable[str]] = lambda place: (place.name,),
    replaces: Callable[[Any], Iterable[str]] = lambda _place: (),
    blank: Callable[[Any], dict[str, Tensor]] | None = None,
    note: Callable[[Any], str] = lambda _place: "",
) -> list[Edit]:
    """One edit at each of the places that the config takes; a place outside the blocks counts as layer 0.

    Args:
        install: (model, tensors of the site, config, place) -> undo, and the installed module if there is one.
        cost: (place, sequence length in tokens) -> (dense, after), per token.
        check: raises ValueError for a place that is taken and cannot be.
        claims, replaces, blank, note: place -> what `Edit` calls so.
    """

    def edit(place: Place) -> Edit:
        check(place)
        return Edit(
            config=config,
            site=place.name,
            layer=place.layer or 0,
            claims=frozenset(claims(place)),
            replaces=frozenset(replaces(place)),
            cost=lambda tokens: cost(place, tokens),
            install=lambda model, tensors: install(model, tensors, config, place),
            blank=None if blank is None else partial(blank, place),
            note=note(place),
        )

    depth = max(1, len(anatomy.blocks))
    return [edit(place) for place in places if config.takes(place.name, place.layer or 0, depth)]


def equip(module: nn.Module, name: str, child: Site, mixin: type) -> tuple[Undo, Site]:
    """Give a module a child of ours and the forward of `mixin`; returns the undo, and the child."""
    reclass(module, mixin)
    module.add_module(name, child.train(module.training))

    def undo() -> None:
        delattr(module, name)
        declass(module)

    return undo, child


def nothing_to_do() -> tuple[Undo, None]:
    """What an edit installs whose config keeps everything."""
    return (lambda: None), None
