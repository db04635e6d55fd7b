"""Units of a dimension merged by groups, and spread again: the width and depth operators of multi-level training.

With groups g_0, g_1, … that cover the units, F [tgt, src] holds 1/|g_t| on the units of g_t, and A = rownorm(Fᵀ) has a
single 1 in every row (arXiv 2404.07999, section 3). A weight W [out, in] is coalesced as F W A and de-coalesced as
A W rownorm(Aᵀ); the four ways here are those factors along one dimension.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sparsetrain.core.backend import choose
from sparsetrain.core.config import one_of
from sparsetrain.ops.unit_groups.groups import Groups as Groups
from sparsetrain.ops.unit_groups.groups import check_groups as check_groups
from sparsetrain.ops.unit_groups.groups import num_units as num_units
from sparsetrain.ops.unit_groups.groups import read_groups as read_groups
from sparsetrain.ops.unit_groups.groups import units_above as units_above
from sparsetrain.ops.unit_groups.reference import reference_map
from sparsetrain.ops.unit_groups.torch import gathered_map

How = Literal["mean", "sum", "copy", "split"]
WAYS = ("mean", "sum", "copy", "split")
MERGES = ("mean", "sum")


def map_units(x: Tensor, groups: Groups, how: How, *, dim: int = 0, unit: int = 1, backend: str = "auto") -> Tensor:
    """Merge the units along `dim` by their groups, or spread merged ones again.

    Equals, for the units u along `dim` (M = F, Aᵀ, A, A / |g|):
        mean:  y_t = Σ_{u in g_t} x_u / |g_t|        sum:   y_t = Σ_{u in g_t} x_u
        copy:  y_u = x_t for u in g_t                split: y_u = x_t / |g_t| for u in g_t

    So mean undoes copy, and sum undoes split: exactly for groups of 1, 2, 4, …, else within rounding.

    Args:
        x: any shape. Along `dim` lie whole copies of all units, each unit `unit` entries wide: a fused q, k, v of h
            heads of d channels is 3 copies of h units of d.
        groups: the units of each group.
        how: mean, sum merge; copy, split spread.
        backend: auto, torch or reference.

    Returns:
        x's shape with another size along `dim`.

    Raises:
        ValueError: `dim` does not divide; a group is empty, or a unit is in none or in several.
    """
    one_of("map_units", "how", how, WAYS)
    check_groups(groups, "map_units")
    units = num_units(groups) if how in MERGES else len(groups)
    if unit < 1 or x.shape[dim] % (units * unit) or not x.shape[dim]:
        raise ValueError(
            f"map_units: dimension {dim} of {tuple(x.shape)} is no whole number of copies of {units} units of {unit}. "
            "Choose groups for the units that are there."
        )
    name = choose("map_units", backend, {"torch": None, "reference": None})
    return (gathered_map if name == "torch" else reference_map)(x, groups, how, dim, unit)
