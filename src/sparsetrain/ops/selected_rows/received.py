"""How much attention every key receives from the selected queries.

mass_s = Σ over heads and selected queries of p_s,   p = softmax(q Kᵀ · scale): no value is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.core.autograd import unwatched
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.tiles import _accurate, _of_sample, _probabilities, _rows_of, _tiles


@torch.no_grad()
@unwatched
def received_mass(q_bhkd: Tensor, everything: KeyValues, rows: Rows) -> Tensor:
    """fp32 or fp64 [b, s]; of a sample, it sums to heads · its selected queries that see a key.

    Equals:
        softmax(q_bhkd @ K.transpose(2, 3) * scale, masked as `everything` says).sum((1, 2))

    Args:
        q_bhkd: the selected queries.
        everything: keys of all rows.
        rows: the positions of the selected queries.

    Cost: |S| · s products of d for each head, a tile of queries at a time.
    """
    b, groups, s, _ = everything.k_bgsd.shape
    mass_bs = q_bhkd.new_zeros(b, s, dtype=torch.promote_types(q_bhkd.dtype, torch.float32))
    for sample, index_k, tiles in _tiles(everything, rows, q_bhkd.shape[1]):
        q = _of_sample(q_bhkd * everything.scale, sample, groups)
        for tile in tiles:
            p = _probabilities(_rows_of(q, tile), everything.k_bgsd[sample], tile, index_k, _accurate(q.dtype))
            mass_bs[sample, tile.s_from : tile.s_to] += p.sum((0, 1))
    return mass_bs
