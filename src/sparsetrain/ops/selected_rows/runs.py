"""Runs: stretches of tokens that hold the selected rows, for attention kernels that know no single positions.

A query that is not selected but lies in a stretch is a zero whose output is dropped: it costs its share of the time,
and sends no gradient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FULL = 0.75
"""Share of the queries in stretches that must be selected where nothing is timed. Not measured on a GPU."""
LEAST = 0.5
"""The same where it is timed. Queries that are not selected are kept for the backward, too: at most as many again."""


@dataclass(frozen=True)
class Run:
    """Every sample's rows are its `first` first tokens, and of the tokens begin..end-1 some.

    Attributes:
        exact: all of these are selected in every sample.
    """

    first: int
    begin: int
    end: int
    exact: bool

    @property
    def width(self) -> int:
        """Queries of a sample, the first ones included."""
        return self.first + self.end - self.begin

    def places(self, index_bk: Tensor, used_bk: Tensor | None) -> Tensor:
        """int64 [b, k]: the query that each slot is; `width` for unused slots."""
        places = torch.where(index_bk < self.first, index_bk, index_bk - (self.begin - self.first))
        return places if used_bk is None else torch.where(used_bk, places, self.width)


def run_of(positions: Sequence[Sequence[int]], least: float = FULL) -> Run | None:
    """The stretches that hold the rows of all samples; None where a smaller share of them than `least` is selected.

    Args:
        positions: ascending, of each sample.
    """
    held = [p for p in positions if p]
    if not held:
        return None
    first = min(leading(p) for p in held)
    rest = [p for p in held if len(p) > first]
    if rest:
        begin, end = min(p[first] for p in rest), max(p[-1] for p in rest) + 1
    else:
        first, begin, end = 0, 0, first
    selected, queries = sum(map(len, held)), len(positions) * (first + end - begin)
    return Run(first, begin, end, selected == queries) if selected >= least * queries else None


def leading(positions: Sequence[int]) -> int:
    """How many of ascending positions are 0, 1, 2 and so on."""
    return bisect_left(range(len(positions)), 1, key=lambda i: int(positions[i] != i))


def spread(x_bhkd: Tensor, places_bk: Tensor, width: int) -> Tensor:
    """Slots [b, h, k, d] at their places among `width` queries, the others 0."""
    b, h, _, d = x_bhkd.shape
    index = places_bk[:, None, :, None].expand(x_bhkd.shape)
    return x_bhkd.new_zeros(b, h, width + 1, d).scatter(2, index, x_bhkd)[:, :, :width]


def collected(x_bhwd: Tensor, places_bk: Tensor) -> Tensor:
    """The slots [b, h, k, d] of queries [b, h, width, d]; 0 in unused ones."""
    index = places_bk[:, None, :, None].expand(-1, x_bhwd.shape[1], -1, x_bhwd.shape[3])
    return F.pad(x_bhwd, (0, 0, 0, 1)).gather(2, index)
