"""Rows that hold several sequences or padding, laid out so that every sequence starts at a block boundary.

Block-sparse attention cuts a row into blocks of tokens. A sequence that starts in the middle of a block would be cut
elsewhere than the same sequence alone, and keep other keys. Moving each one to the next boundary makes padding and
packing change nothing.

Legend: b rows, s tokens of a row, w tokens of an aligned row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.found_once import found_once


class Aligned(NamedTuple):
    """source_bw: token of the row that stands at each aligned place (0 in gaps); segments_bw: its segment id, 0 in
    gaps; place_bs: aligned place of each token (w for padding, which has none)."""

    source_bw: Tensor
    segments_bw: Tensor
    place_bs: Tensor

    def gather(self, x_bhsd: Tensor) -> Tensor:
        """[b, h, s, d] -> [b, h, w, d]; gaps hold copies of token 0, which no query sees."""
        index = self.source_bw[:, None, :, None].expand(-1, x_bhsd.shape[1], -1, x_bhsd.shape[3])
        return x_bhsd.gather(2, index)

    def scatter(self, y_bhwd: Tensor) -> Tensor:
        """[b, h, w, d] -> [b, h, s, d]; padding gets 0."""
        index = self.place_bs[:, None, :, None].expand(-1, y_bhwd.shape[1], -1, y_bhwd.shape[3])
        return F.pad(y_bhwd, (0, 0, 0, 1)).gather(2, index)


def places_in_segments(segments_bs: Tensor) -> tuple[Tensor, Tensor]:
    """(place of each token in its own segment, padding left out; whether it is the first of its segment), [b, s].

    Padding inside a segment does not end it and takes no place; the place of padding itself means nothing.

    Args:
        segments_bs: int [b, s], 0 = padding, equal ids = one segment; other ids do not come between.
    """
    valid = segments_bs > 0
    index = torch.arange(segments_bs.shape[1], device=segments_bs.device).expand_as(segments_bs)
    before = F.pad(torch.where(valid, index, -1).cummax(1).values[:, :-1], (1, 0), value=-1)  # the last token before
    starts = valid & ((before < 0) | (segments_bs.gather(1, before.clamp(min=0)) != segments_bs))
    rank = valid.cumsum(1) - 1
    return rank - torch.where(starts, rank, 0).cummax(1).values, starts


def has_gaps(segments_bs: Tensor) -> bool:
    """Is there padding inside a segment?"""

    def find() -> bool:
        place, _ = places_in_segments(segments_bs)
        after_padding = F.pad(segments_bs[:, :-1] == 0, (1, 0)) & (segments_bs > 0)
        return bool((after_padding & (place > 0)).any())

    return found_once(segments_bs, "gaps", find)


def align_segments(segments_bs: Tensor, multiple: int) -> Aligned:
    """Give every segment a place that starts at a multiple of `multiple`; found once for the layers that share them.

    Args:
        segments_bs: int [b, s], 0 = padding, equal ids = one segment; padding inside a segment is taken out.
        multiple: tokens of a block; every segment takes a whole number of blocks.
    """
    return found_once(segments_bs, ("aligned", multiple), lambda: _aligned(segments_bs, multiple))


def _aligned(segments_bs: Tensor, multiple: int) -> Aligned:
    b, s = segments_bs.shape
    device = segments_bs.device
    valid = segments_bs > 0
    place_in_run, starts = places_in_segments(segments_bs)
    run = (starts.cumsum(1) - 1).clamp(min=0)  # -1 before the first segment
    position = torch.arange(s, device=device).expand(b, -1)
    length = torch.zeros(b, s + 1, dtype=torch.int64, device=device).scatter_add_(1, run, valid.to(torch.int64))
    blocks = -(-length // multiple) * multiple
    offset = blocks.cumsum(1) - blocks
    width = max(int(blocks.sum(1).max()), multiple)
    place = torch.where(valid, offset.gather(1, run) + place_in_run, width)
    source = torch.zeros(b, width + 1, dtype=torch.int64, device=device).scatter_(1, place, position)[:, :width]
    aligned = torch.zeros(b, width + 1, dtype=segments_bs.dtype, device=device).scatter_(1, place, segments_bs)
    return Aligned(source, aligned[:, :width].contiguous(), place)
