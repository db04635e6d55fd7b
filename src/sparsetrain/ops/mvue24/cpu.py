"""MVUE on four slices at a time: element-wise passes over pieces that stay in cache, and no sort, scan or gather."""

from __future__ import annotations

from torch import Tensor

from sparsetrain.ops.mvue24.reference import magnitudes

_GROUPS_AT_ONCE = 1 << 15  # 128 KiB a slice in fp32; about twelve slices are alive at once


def sliced_mvue(x_g4c: Tensor, uniform_2gc: Tensor, out_g4c: Tensor) -> None:
    """x [g, 4, c] groups along dim 1, uniform numbers [2, g, c]; writes out [g, 4, c]."""
    step = max(1, _GROUPS_AT_ONCE // x_g4c.shape[2]) if x_g4c.device.type == "cpu" else len(x_g4c)
    for start in range(0, len(x_g4c), step):
        part = slice(start, start + step)
        _piece(x_g4c[part], uniform_2gc[0, part], uniform_2gc[1, part], out_g4c[part])


def _piece(x_g4c: Tensor, u: Tensor, v: Tensor, out_g4c: Tensor) -> None:
    a = [magnitudes(place) for place in x_g4c.unbind(1)]
    front, back = a[0] + a[1], a[2] + a[3]
    total = front + back
    # the first: entry k where the cumulative weights bracket u · Σ
    u = u * total
    in_back = u >= front
    past0, past2 = u >= a[0], u >= front + a[2]
    first = (~past0, past0 & ~in_back, in_back & ~past2, in_back & past2)
    # the second: the same on the weights without the first
    rest = [weight.masked_fill(drawn, 0) for weight, drawn in zip(a, first)]
    front = rest[0] + rest[1]
    v = v * (front + rest[2] + rest[3])
    in_back = (v >= front) & ((rest[2] + rest[3]) > 0)
    past0 = (v >= rest[0]) & (rest[1] > 0)
    past2 = (v >= front + rest[2]) & (rest[3] > 0)
    second = (~(past0 | in_back), past0 & ~in_back, in_back & ~past2, in_back & past2)
    # p_i = t_i + a_i (Σ_j t_j / (Σ − a_j) − t_i / (Σ − a_i)), with t / (Σ − a) = 1 / (Σ − a) − 1 / Σ
    inverse = total.reciprocal()
    odds = [weight * inverse / (total - weight) for weight in a]
    all_odds = odds[0] + odds[1] + odds[2] + odds[3]
    for k in range(4):
        probability = a[k] * (inverse + all_odds - odds[k])
        out_g4c[:, k] = x_g4c[:, k] / probability * (first[k] | second[k])
