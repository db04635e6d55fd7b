"""Which keys a query may see, and where its sequence starts.

Legend: b batch, s tokens of a row, r queries, n keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see. Positions count from the first key; t queries sit at the end of s keys.

    segments_bs: integers [b, s], 0 = padding, equal positive ids see each other; None: one segment.
    window: keys at a distance of `window` or more are invisible; None: no window.
    places_bs: integers [b, s], place of every key in its own sequence where a cache has dropped first keys; None: a
        sequence begins at its first key.
    """

    causal: bool
    segments_bs: Tensor | None = None
    window: int | None = None
    places_bs: Tensor | None = None

    def pairs(self, place_r: Tensor, place_n: Tensor, segment_s: Tensor) -> Tensor:
        """bool: whether the query sees the key, for broadcastable places in a row of segment ids."""
        distance = place_r - place_n
        segment_r = segment_s[place_r]
        seen = (segment_r == segment_s[place_n]) & (segment_r > 0)
        if self.causal:
            seen = seen & (distance >= 0)
        return seen if self.window is None else seen & (distance.abs() < self.window)


class Sequences(NamedTuple):
    """segment_bs: ids, 0 = padding; first_bs: index of the first key of every token's sequence, -1 if it is gone."""

    segment_bs: Tensor
    first_bs: Tensor


def sequences(visibility: Visibility, batch: int, num_keys: int, device: torch.device) -> Sequences:
    """Describe every token's sequence, without a [s, s] tensor and without waiting for the device."""
    place = torch.arange(num_keys, device=device).expand(batch, -1)
    segments_bs, places_bs = visibility.segments_bs, visibility.places_bs
    if segments_bs is None:
        return Sequences(torch.ones_like(place), torch.zeros_like(place))
    ids, order = segments_bs.sort(dim=1, stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(starts, place, 0).cummax(1).values
    first = order.gather(1, start).gather(1, order.argsort(dim=1))
    if places_bs is not None:
        first = torch.where(places_bs.gather(1, first) == 0, first, -1)
    return Sequences(segments_bs, first)
