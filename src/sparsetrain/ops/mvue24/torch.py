"""MVUE on four slices at a time: element-wise passes over pieces that stay in cache, and no sort, scan, gather or mask.

Masks are slow on a CPU: `where` and comparisons to bool take five to ten times as long as arithmetic, so an entry is
kept by a factor, floor(end) − floor(start) of its interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.mvue24.reference import magnitudes

_GROUPS_AT_ONCE = 1 << 16  # 256 KiB a slice in fp32; 1 << 15 takes 1.15 times as long, 1 << 12 2.7 times, in calls


def sliced_mvue(x_g4c: Tensor, row_g: Tensor, column_c: Tensor, offset: Tensor, out_g4c: Tensor) -> None:
    """x [g, 4, c] groups along dim 1, whose intervals begin at row_g + column_c; writes out [g, 4, c]."""
    step = max(1, _GROUPS_AT_ONCE // x_g4c.shape[2]) if x_g4c.device.type == "cpu" else len(x_g4c)
    for begin in range(0, len(x_g4c), step):
        part = slice(begin, begin + step)
        _piece(x_g4c[part], row_g[part, None] + column_c, offset, out_g4c[part])


def _piece(x_g4c: Tensor, end: Tensor, offset: Tensor, out_g4c: Tensor) -> None:
    p = _inclusion(magnitudes(x_g4c, offset))
    scaled = x_g4c / p
    before = first = end.floor()
    for k, probability in enumerate(p.unbind(1)):
        # the last interval ends at first + 2, however the sum of p was rounded
        after = end.add_(probability).floor() if k < 3 else first + 2
        torch.mul(scaled[:, k], after - before, out=out_g4c[:, k])
        before = after


def _inclusion(a_g4c: Tensor) -> Tensor:
    """p, in the memory of a: with h_j = a_j / (Σ − a_j), p_i = a_i / Σ · (1 + Σ_{j≠i} h_j)."""
    a = a_g4c.unbind(1)
    front, back = a[0] + a[1], a[2] + a[3]
    odds = [a[0] / (a[1] + back), a[1] / (a[0] + back), a[2] / (front + a[3]), a[3] / (front + a[2])]
    a_g4c.mul_(front.add_(back).reciprocal_().unsqueeze(1))
    front, back = odds[0] + odds[1], odds[2] + odds[3]
    for own, rest in zip(a, (odds[1] + back, odds[0] + back, front + odds[3], front + odds[2])):
        own.addcmul_(own, rest)
    return a_g4c
