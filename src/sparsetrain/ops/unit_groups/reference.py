"""The maps as matrices: F, its row-normalised transpose A, and products with them."""

from __future__ import annotations

import torch
from torch import Tensor


def merging_matrix(groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """F [tgt, src], fp64: 1/|g_t| on the units of g_t."""
    f_ts = torch.zeros(len(groups), sum(map(len, groups)), dtype=torch.float64)
    for t, group in enumerate(groups):
        f_ts[t, list(group)] = 1 / len(group)
    return f_ts


def row_normalised(m: Tensor) -> Tensor:
    """Every row divided by its sum."""
    return m / m.sum(1, keepdim=True)


def reference_map(x: Tensor, groups: tuple[tuple[int, ...], ...], how: str, dim: int, unit: int) -> Tensor:
    """(M ⊗ I_unit) x along `dim`, in fp64."""
    f_ts = merging_matrix(groups)
    a_st = row_normalised(f_ts.T)
    matrix = {"mean": f_ts, "sum": a_st.T, "copy": a_st, "split": row_normalised(a_st.T).T}[how]
    units = x.movedim(dim, -1).unflatten(-1, (-1, matrix.shape[1], unit))
    mapped = torch.einsum("...cnu,mn->...cmu", units.double(), matrix.to(x.device))
    return mapped.flatten(-3).movedim(-1, dim).to(x.dtype).contiguous()
