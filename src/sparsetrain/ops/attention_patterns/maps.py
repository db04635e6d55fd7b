"""Mean attention maps, pooled to blocks while they are computed: never a [t, t] map, only a strip of `block` rows.

Softmax is taken over whole rows, so a strip of query rows stands alone. The diagonal convolution and the pooling are
linear: a strip's convolution reaches (edge - 1) / 2 rows above and below, and its sums are added to those blocks.

Legend: b batch, h query heads, g key/value heads, t tokens, d head width, p patterns (1 or g), n = ceil(t / block).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.flood_fill import check_edge, diagonal_sums


@dataclass
class MapSums:
    """Sums over the visible pairs of each cell: attention, convolved attention, and the number of pairs.

    `mean / pairs` are the maps. Sums of several calls add up, also of unequal lengths (upper left corners add).
    """

    raw_pnn: Tensor
    filtered_pnn: Tensor
    pairs_nn: Tensor

    def __add__(self, other: Self) -> MapSums:
        n = max(len(self.pairs_nn), len(other.pairs_nn))
        grown = []
        for name in ("raw_pnn", "filtered_pnn", "pairs_nn"):
            parts = [getattr(x, name) for x in (self, other)]
            mine, theirs = (F.pad(x, (0, n - x.shape[-1], 0, n - x.shape[-1])) for x in parts)
            grown.append(mine + theirs)
        return MapSums(*grown)

    @property
    def seen_nn(self) -> Tensor:
        return self.pairs_nn > 0

    def means(self) -> tuple[Tensor, Tensor]:
        """(mean attention, mean convolved attention), [p, n, n], zero where no pair is visible."""
        pairs = self.pairs_nn.clamp(min=1)
        return self.raw_pnn / pairs, self.filtered_pnn / pairs


def pooled_maps(
    q_bhtd: Tensor,
    k_bgtd: Tensor,
    *,
    block: int,
    filter_edge: int,
    causal: bool,
    scale: float,
    window: int | None = None,
    segments_bt: Tensor | None = None,
    share_heads: bool = True,
    row_normalise: bool = False,
) -> MapSums:
    """Post-softmax attention, averaged over heads and sequences and pooled to blocks (SPION, arXiv 2309.12578, 3.1).

    Equals, for one sequence and `share_heads`, and with A = softmax(scale * q k^T under the mask).mean(heads):
        raw = pool_blocks(A, block) * block**2;  filtered = pool_blocks(diagonal_convolution(A, filter_edge)) * block**2
        pairs = pool_blocks(visible.float(), block) * block**2

    Args:
        block: tokens a block edge; the last block may be short.
        filter_edge: odd; 1 leaves the map unfiltered.
        window: keys at a distance of `window` or more are invisible.
        segments_bt: 0 = padding, equal neighbours = one sequence; each is measured from its own first token.
        share_heads: one map, else one a key/value head, the mean over its query heads.
        row_normalise: multiply row i by the number of its visible keys, so that early rows of a causal map weigh less.

    Raises:
        ValueError: an even filter edge, or q and k of unequal length.

    Cost: the scores once; scratch of (h / g) * block * t numbers and a few strips.
    """
    check_edge(filter_edge)
    if q_bhtd.shape[2] != k_bgtd.shape[2]:
        raise ValueError(f"{q_bhtd.shape[2]} queries and {k_bgtd.shape[2]} keys: a map needs equal lengths (no cache).")
    sums: MapSums | None = None
    for row, (start, stop) in _sequences(segments_bt, q_bhtd):
        visible = _Visible(stop - start, block, causal, window, q_bhtd.device)
        q, k = q_bhtd[row, :, start:stop], k_bgtd[row, :, start:stop]
        found = _one_sequence(q, k, visible, filter_edge, scale, share_heads, row_normalise)
        sums = found if sums is None else sums + found
    if sums is None:
        raise ValueError("every token of the probe rows is padding, so there is no attention to measure.")
    return sums


def _sequences(segments_bt: Tensor | None, q_bhtd: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """(row, (first token, token after the last)) of every sequence."""
    b, _, t, _ = q_bhtd.shape
    if segments_bt is None:
        return [(row, (0, t)) for row in range(b)]
    found = []
    for row, ids in enumerate(segments_bt.tolist()):
        cuts = [0, *(i for i in range(1, t) if ids[i] != ids[i - 1]), t]
        found += [(row, (a, z)) for a, z in pairwise(cuts) if ids[a] > 0]
    return found


class _Visible:
    """Which keys of a sequence each query sees: an interval [low, high] a query."""

    def __init__(self, tokens: int, block: int, causal: bool, window: int | None, device: torch.device) -> None:
        self.tokens, self.block, self.num_blocks = tokens, block, -(-tokens // block)
        self.row = torch.arange(tokens, device=device)
        reach = tokens if window is None else window
        self.low = (self.row - reach + 1).clamp(min=0)
        self.high = self.row if causal else (self.row + reach - 1).clamp(max=tokens - 1)

    def pairs_nn(self) -> Tensor:
        """Visible pairs of every cell."""
        first = torch.arange(self.num_blocks, device=self.row.device) * self.block
        last = (first + self.block).clamp(max=self.tokens) - 1
        overlap = torch.minimum(self.high[:, None], last) - torch.maximum(self.low[:, None], first) + 1
        pairs = overlap.new_zeros(self.num_blocks, self.num_blocks)
        return pairs.index_add_(0, self.row // self.block, overlap.clamp(min=0)).float()


def _one_sequence(
    q_htd: Tensor,
    k_gtd: Tensor,
    visible: _Visible,
    edge: int,
    scale: float,
    share_heads: bool,
    row_normalise: bool,
) -> MapSums:
    (h, t, _), g, n, block = q_htd.shape, len(k_gtd), visible.num_blocks, visible.block
    work = torch.promote_types(q_htd.dtype, torch.float32)
    raw = torch.zeros(1 if share_heads else g, n, n, dtype=work, device=q_htd.device)
    filtered = torch.zeros_like(raw)
    for start in range(0, t, block):
        stop = min(start + block, t)
        low, high = visible.low[start:stop, None], visible.high[start:stop, None]
        first, last = int(low.min()), int(high.max()) + 1
        keys = torch.arange(first, last, device=q_htd.device)
        hidden = (keys < low) | (keys > high)
        some_hidden = bool(hidden.any())
        strip = torch.zeros(len(raw), stop - start, last - first, dtype=work, device=q_htd.device)
        for head in range(g):
            q = q_htd[head * (h // g) : (head + 1) * (h // g), start:stop].to(work) * scale
            scores = q @ k_gtd[head, first:last].to(work).mT
            if some_hidden:
                scores.masked_fill_(hidden, -torch.inf)
            strip[0 if share_heads else head] += scores.softmax(-1).mean(0)
        strip = strip / g if share_heads else strip
        if row_normalise:
            strip = strip * (high - low + 1)
        strip = F.pad(strip, (first, t - last))
        _add_rows(raw, strip, start, block)
        _add_rows(filtered, _convolved_strip(strip, edge), start - edge // 2, block)
    pairs = visible.pairs_nn().to(work)
    return MapSums(raw, filtered, pairs)


def _convolved_strip(strip_prt: Tensor, edge: int) -> Tensor:
    """What rows of a map add to its diagonal convolution: rows + edge - 1 rows, from (edge - 1) / 2 above them on."""
    reach = edge // 2
    return diagonal_sums(F.pad(strip_prt, (reach, reach, 2 * reach, 2 * reach)), edge)


def _add_rows(sums_pnn: Tensor, strip_prt: Tensor, start: int, block: int) -> None:
    """Add the rows of a strip, the first of which is row `start` of the map, to the sums of their blocks."""
    t = strip_prt.shape[-1]
    row = torch.arange(start, start + strip_prt.shape[1], device=strip_prt.device)
    inside = (row >= 0) & (row < t)
    strip_prt = F.pad(strip_prt[:, inside], (0, -t % block))
    sums_pnn.index_add_(1, row[inside] // block, strip_prt.unflatten(-1, (-1, block)).sum(-1))
