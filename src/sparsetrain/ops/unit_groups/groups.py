"""Groups of units, written as words: which heads, hidden units or layers become one."""

from __future__ import annotations

from itertools import chain

from sparsetrain.core.fields import shown

Groups = tuple[tuple[int, ...], ...]
"""The units of each group; together all units from 0 on, each once."""


def num_units(groups: Groups) -> int:
    return sum(map(len, groups))


def check_groups(groups: Groups, what: str, units: int | None = None) -> None:
    """Raise ValueError unless every one of `units` units is in exactly one group, and no group is empty."""
    found = sorted(chain.from_iterable(groups))
    wanted = len(found) if units is None else units
    if not found or min(map(len, groups)) == 0 or found != list(range(wanted)):
        raise ValueError(
            f"{what}: groups {shown(written(groups))} hold units {shown(found)}. Every one of the {wanted} units, "
            "counted from 0, must be in exactly one group."
        )


def read_groups(scheme: str, units: int, size: int, what: str) -> Groups:
    """The groups of a scheme.

    Args:
        scheme: `far` (j with j + units / size), `adjacent` (j with j + 1), or the groups themselves: `0+3|1+4|2+5`.
        units: how many there are.
        size: units in a group of a named scheme.
        what: the units' name, for messages.

    Raises:
        ValueError: `size` does not divide `units`; the scheme is no such word; groups that do not cover all units.
    """
    if scheme in ("far", "adjacent"):
        if units % size:
            fitting = [str(k) for k in range(1, units + 1) if units % k == 0]
            raise ValueError(
                f"{what}: {units} cannot be merged {size} to one. Take {', '.join(fitting)}, or say the groups "
                "(0+1|2+3+4) with allow_uneven."
            )
        count = units // size
        if scheme == "far":
            return tuple(tuple(range(j, units, count)) for j in range(count))
        return tuple(tuple(range(j * size, (j + 1) * size)) for j in range(count))
    try:
        groups = tuple(tuple(int(unit) for unit in group.split("+")) for group in scheme.split("|"))
    except ValueError:
        raise ValueError(
            f"{what}: {shown(scheme)} is no scheme. Write far, adjacent, or the groups as 0+3|1+4|2+5."
        ) from None
    check_groups(groups, what, units)
    return groups


def units_above(scheme: str, merged: int, size: int) -> int:
    """How many units a scheme has merged into so many."""
    return sum(len(group.split("+")) for group in scheme.split("|")) if "+" in scheme else merged * size


def written(groups: Groups) -> str:
    return "|".join("+".join(map(str, group)) for group in groups)
