"""What a few exact queries of a query block look at: the attention they give each key block, or pooled products.

Legend as in the package; r probes of a query block, c query blocks of a tile, n key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.key_selection.visibility import Sequences, Visibility

TILE_ELEMENTS = 2**18
"""Probe scores of a tile: 1 MiB, which stays in the L2 cache of one core."""
MASKED = -1e30
"""Score of an invisible pair: finite, so that the softmax of a row without any visible key stays a number."""


def attention_mass(
    q: Tensor,
    k: Tensor,
    place_ir: Tensor,
    valid_bir: Tensor,
    block_k: int,
    scale: float,
    visibility: Visibility,
    seq: Sequences,
) -> Tensor:
    """[b, g, i, n]: softmax attention of the probes, summed over probes and heads of the group, per key block."""
    b, h, _, d = q.shape
    g, s = k.shape[1:3]
    num_blocks, num_probes = place_ir.shape
    # on a GPU the product stays in the inputs' dtype, for the tensor cores; the statistics are fp32 everywhere
    work = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    mass = torch.zeros(b, g, num_blocks, -(-s // block_k), dtype=torch.float32, device=q.device)
    step = max(1, TILE_ELEMENTS // (h // g * num_probes * s))
    for start in range(0, num_blocks, step):
        tile = slice(start, min(start + step, num_blocks))
        place_cr = place_ir[tile].clamp(min=0, max=s - 1)
        place_n = torch.arange(s, device=q.device)
        for row in range(b):
            seen = visibility.pairs(place_cr[:, None, :, None], place_n, seq.segment_bs[row])
            counted_crs = valid_bir[row, tile].repeat(1, h // g)[:, None].float()  # [c, 1, h / g · r]
            for group in range(g):
                heads = slice(group * (h // g), (group + 1) * (h // g))
                probes = q[row, heads][:, place_cr].transpose(0, 1).to(work)  # [c, h / g, r, d]
                # what no probe of the row may see can hold anything, NaN included: it is masked before the softmax
                scores = (probes.reshape(-1, d) @ k[row, group].to(work).mT).float().view(*probes.shape[:3], s)
                weights = (scores * scale).masked_fill_(~seen, MASKED).softmax(-1)
                per_key = (counted_crs @ weights.flatten(1, 2))[:, 0]
                mass[row, group, tile] = F.pad(per_key, (0, -s % block_k)).unflatten(1, (-1, block_k)).sum(-1)
    return mass


def mean_products(q: Tensor, k: Tensor, place_ir: Tensor, valid_bir: Tensor, block_k: int, seq: Sequences) -> Tensor:
    """[b, g, i, n]: mean probe times mean key of a block; padding counts in neither."""
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    probes = q.view(b, g, h // g, t, d)[:, :, :, place_ir.clamp(min=0)].float().mean(2)
    counted = valid_bir[:, None, ..., None]
    probes = (probes * counted).sum(3) / counted.sum(3).clamp(min=1)
    valid = (seq.segment_bs > 0)[:, None, :, None]
    filled = F.pad(torch.where(valid, k.float(), 0), (0, 0, 0, -s % block_k)).unflatten(2, (-1, block_k))
    count = F.pad(valid.float(), (0, 0, 0, -s % block_k)).unflatten(2, (-1, block_k)).sum(3)
    return probes @ (filled.sum(3) / count.clamp(min=1)).mT
