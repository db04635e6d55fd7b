"""Which ranks a sum runs over: one process group an axis (data, x, y, z), the default group where none is registered.

What one rank does for all of them (files, records, what is said) goes through `is_first`, `by_first` and `wait`, which
are about the whole run and no axis.

Axes: `data` holds the ranks with other samples and the same weights; `x`, `y` and `z` those that share one sample's
work. In a run without `torch.distributed` every axis has one rank, and each call returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from sparsetrain.core.errors import RankFailed

T = TypeVar("T")

AXES = ("data", "x", "y", "z")
_groups: dict[str, distributed.ProcessGroup] = {}


def register_groups(groups: Mapping[str, distributed.ProcessGroup]) -> None:
    """Set the process groups of all axes, in place of those registered before; `{}` forgets them.

    Forget them before `destroy_process_group()`: a group that is held until the process ends takes it down then.
    Once some axis is registered, an axis that is not has one rank.

    Raises:
        ValueError: a name that is not one of `AXES`.
    """
    if unknown := sorted(set(groups) - set(AXES)):
        raise ValueError(f"axes {', '.join(unknown)} are unknown. Choose from {', '.join(AXES)}.")
    _groups.clear()
    _groups.update(groups)


def group_of(axis: str = "data") -> distributed.ProcessGroup | None:
    """The group of an axis, or None where it has one rank.

    Without registered groups `data` is the default group of an initialised run.

    Raises:
        ValueError: `axis` is not one of `AXES`.
    """
    if axis not in AXES:
        raise ValueError(f"axis {axis!r} is unknown. Choose one of {', '.join(AXES)}.")
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if _groups:
        return _groups.get(axis)
    return distributed.group.WORLD if axis == "data" else None


def rank(axis: str = "data") -> int:
    """This process's place along an axis."""
    group = group_of(axis)
    return 0 if group is None else distributed.get_rank(group)


def size(axis: str = "data") -> int:
    """Ranks along an axis."""
    group = group_of(axis)
    return 1 if group is None else distributed.get_world_size(group)


def all_reduce_(x: Tensor, axis: str = "data") -> Tensor:
    """Sum `x` over the ranks of an axis, in place; returns it."""
    if (group := group_of(axis)) is not None:
        distributed.all_reduce(x, group=group)
    return x


def broadcast_(x: Tensor, src: int = 0, axis: str = "data") -> Tensor:
    """Overwrite `x` with that of place `src` along the axis; returns it."""
    if (group := group_of(axis)) is not None:
        distributed.broadcast(x, group=group, group_src=src)
    return x


def all_gather(x: Tensor, axis: str = "data") -> list[Tensor]:
    """`x` of every rank of an axis, in order."""
    if (group := group_of(axis)) is None:
        return [x]
    found = [torch.empty_like(x) for _ in range(size(axis))]
    distributed.all_gather(found, x, group=group)
    return found


def total() -> int:
    """Ranks of the whole run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Is this the rank that writes, records and speaks for all?"""
    return total() == 1 or distributed.get_rank() == 0


def wait() -> None:
    """Go on when every rank of the run is here."""
    if total() > 1:
        distributed.barrier()


def by_first(make: Callable[[], T]) -> T:
    """What the first rank makes, handed to every rank (it is pickled); the others wait for it.

    Raises:
        RankFailed: on the others, where the first rank failed; there, whatever `make` raises.
    """
    if total() == 1:
        return make()
    told: list[Any] = [False, None]
    try:
        if is_first():
            told = [True, make()]
    finally:
        distributed.broadcast_object_list(told)
    if not told[0]:
        raise RankFailed("the first rank failed, and said why.")
    return told[1]


def check_same(what: str, digest: str, do: str) -> None:
    """Raise ValueError, on every rank, if something is not the same on all of them.

    Args:
        what: the thing, for the message.
        digest: of this rank's.
        do: what a user can do about it.
    """
    if total() == 1:
        return
    found: list[Any] = [None] * total()
    distributed.all_gather_object(found, digest)
    if other := [place for place, theirs in enumerate(found) if theirs != found[0]]:
        shown = ", ".join(map(str, other[:4])) + (", …" if len(other) > 4 else "")
        raise ValueError(f"rank {shown} of {total()} has another {what} than rank 0. {do}")
