"""Products of parameters, of which the quick tests take a part and the slow ones the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(names: str, *axes: Sequence[Any], turns: int) -> pytest.MarkDecorator:
    """A parametrization by the product of `axes`, of which every `turns`-th cell is quick, diagonal by diagonal.

    Every two values of two axes meet in a quick cell where a third axis has at least `turns` values.
    """
    cells = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, places, strict=True)]
        cells.append(pytest.param(*values, marks=() if sum(places) % turns == 0 else pytest.mark.slow))
    return pytest.mark.parametrize(names.split(", "), cells)
