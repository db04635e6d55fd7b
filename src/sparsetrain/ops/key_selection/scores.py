"""Scores of keys for queries, each a function of its query and its key alone, whatever else is in the call.

A matrix product rounds an entry by where it stands, so equal keys would differ in the last bit and a query would rank
them one way alone and another in company. Here every sum has one order.

Legend: r queries, n keys, m sub-spaces, e codewords, w width of a sub-space, d = m w.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def query_tables(q_rd: Tensor, codebook_mew: Tensor) -> Tensor:
    """<q_m, C[m, e]>, [m, e, r] in fp32 (fp64 for fp64), added up channel by channel."""
    work = torch.promote_types(q_rd.dtype, torch.float32)
    m, _, w = codebook_mew.shape
    q_mwr, codebook = q_rd.to(work).T.unflatten(0, (m, w)), codebook_mew.to(work)[..., None]
    total = q_mwr[:, None, 0] * codebook[:, :, 0]
    for channel in range(1, w):
        total += q_mwr[:, None, channel] * codebook[:, :, channel]  # two roundings: a fused one differs between lanes
    return total


def table_scores(table_mer: Tensor, codes_nm: Tensor) -> Tensor:
    """sum_m table[m, code[m]], [r, n], from the first sub-space to the last.

    A bag of rows takes the time of the matrix product with the quantised keys; gathers take two to four times that.
    """
    m, e, _ = table_mer.shape
    bags = codes_nm.long() + e * torch.arange(m, device=codes_nm.device)
    return F.embedding_bag(bags, table_mer.flatten(0, 1), mode="sum").T.contiguous()


def products(q_rd: Tensor, k_nd: Tensor) -> Tensor:
    """<q, k>, [r, n] in fp32: summed in fp64, whose rounding the last one hides."""
    return (q_rd.double() @ k_nd.double().mT).float()
