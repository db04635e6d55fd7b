"""Elements that one rank moves for one linear in one step, by collective and axis.

Of rings: gathering a shard of s elements over G ranks moves (G-1) s, reducing and scattering N moves (G-1)/G N, and
reducing N to all moves 2 (G-1)/G N. arXiv 2305.13525, section 4; the same figures are counted in `grid.Traffic`.
"""

from __future__ import annotations

from sparsetrain.parallel.shape import GridShape, axes_of_linear

Volumes = dict[str, float]
"""`gather_z`, `reduce_x`, … -> elements."""


def gathered(shard: int, ranks: int) -> float:
    """Elements of an all-gather of a shard."""
    return (ranks - 1) * shard


def scattered(elements: int, ranks: int) -> float:
    """Elements of a reduce-scatter."""
    return (ranks - 1) * elements / ranks


def reduced(elements: int, ranks: int) -> float:
    """Elements of an all-reduce."""
    return 2 * (ranks - 1) * elements / ranks


def linear_volumes(
    shape: GridShape, k: int, n: int, m: int, *, transposed: bool = False, gathers: int = 2, input_gradient: bool = True
) -> Volumes:
    """Forward, backward and the sum over data of one linear without bias.

    Args:
        k, n: inputs and outputs of the linear.
        m: tokens of one copy of the data axis (they are cut over z again).
        gathers: 2 where the weight is gathered again for the backward, 1 where it is kept.
        input_gradient: the linear's input takes a gradient.
    """
    in_axis, out_axis = axes_of_linear(transposed)
    g_in, g_out = shape.size(in_axis), shape.size(out_axis)
    block, tokens = k * n // (g_in * g_out), m // shape.z
    found = {
        "gather_z": gathers * gathered(block // shape.z, shape.z),
        "scatter_z": scattered(block, shape.z),
        f"reduce_{in_axis}": reduced(tokens * (n // g_out), g_in),
        f"reduce_{out_axis}": reduced(tokens * (k // g_in), g_out) if input_gradient else 0.0,
        "reduce_data": reduced(block // shape.z, shape.data),
    }
    return {key: value for key, value in found.items() if value}


def total(volumes: list[Volumes]) -> Volumes:
    """The sum of several linears' volumes."""
    keys = sorted({key for one in volumes for key in one})
    return {key: sum(one.get(key, 0.0) for one in volumes) for key in keys}
