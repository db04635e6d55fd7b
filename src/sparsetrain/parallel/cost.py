"""What a grid costs a step: seconds of each collective by bandwidth alone, and bytes of memory a rank.

Seconds are elements of `volume` times bytes an element over the bandwidth of the axis. Latency, arithmetic and what
hides behind it are left to `simulate`. arXiv 2305.13525, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.parallel.shape import GridShape, axes_of_linear, linear_error
from sparsetrain.parallel.volume import linear_volumes, reduced

TERMS = ("gather_z", "scatter_z", "reduce_x", "reduce_y", "reduce_data", "reduce_whole")
"""The collectives of a linear, and the sums of what no axis cuts."""
STATE_BYTES = 16
"""Bytes a trained parameter takes: weight and gradient in half precision, weight and two moments of AdamW in fp32."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bandwidths of a machine of nodes.

    node_bytes_per_s: of one device to the others of its node.
    inter_bytes_per_s: of one node to other nodes, all its devices together.
    """

    devices_per_node: int
    node_bytes_per_s: float
    inter_bytes_per_s: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"network: {name}={value}. Give a positive number.")

    def bandwidth(self, shape: GridShape, axis: str) -> float:
        """Bytes per second of one group of an axis.

        Axes lie inside one another, x innermost, then y, z, data. A group inside a node has the node's bandwidth;
        else the node's link is shared by the groups that leave it together. A rule of thumb: nobody has measured it.
        """
        order = ("x", "y", "z", "data")
        inner = 1
        for other in order[: order.index(axis)]:
            inner *= shape.size(other)
        if inner * shape.size(axis) <= self.devices_per_node:
            return self.node_bytes_per_s
        return self.inter_bytes_per_s / min(self.devices_per_node, inner)


@dataclass(frozen=True, kw_only=True)
class GridLayer:
    """`count` linears alike: k inputs, n outputs."""

    name: str
    k: int
    n: int
    transposed: bool = False
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class GridTask:
    """A training step to place on a grid.

    layers: the linears of the blocks. rows, tokens: of a global batch, and in a row.
    whole_parameters: that no axis cuts (embedding and head), kept and trained on every rank.
    heads, kv_heads: of the attentions, cut over y; 0: not known.
    attention_flops: of one row's forward, of all attentions (no axis but y, z and data cuts it).
    """

    layers: tuple[GridLayer, ...]
    rows: int
    tokens: int
    dtype_bytes: int = 2
    whole_parameters: int = 0
    heads: int = 0
    kv_heads: int = 0
    attention_flops: float = 0.0

    @property
    def parameters(self) -> int:
        """All parameters of the linears."""
        return sum(layer.k * layer.n * layer.count for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class GridCost:
    """Of one grid: seconds a step by term, and bytes a rank."""

    shape: GridShape
    seconds: dict[str, float]
    state_bytes: float
    activation_bytes: float

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        return self.state_bytes + self.activation_bytes


def refusal(shape: GridShape, task: GridTask) -> str | None:
    """Why a grid cannot run a task, or None."""
    if task.rows % (shape.data * shape.z):
        return f"{task.rows} rows do not divide by data * z = {shape.data * shape.z}"
    for count, what in ((task.heads, "heads"), (task.kv_heads, "key/value heads")):
        if count % shape.y:
            return f"{count} {what} do not divide by y={shape.y}"
    for layer in task.layers:
        if why := linear_error(shape, layer.k, layer.n, layer.transposed):
            return f"{layer.name}: {why}"
    return None


def cost(shape: GridShape, task: GridTask, network: Network) -> GridCost:
    """Seconds of every collective of a step, one after the other, and memory a rank.

    Memory: 16 bytes a parameter over x y z, whole ones on every rank, and the input of every linear, m k / (z G_in).
    """
    seconds: dict[str, float] = dict.fromkeys(TERMS, 0.0)
    tokens = task.rows * task.tokens // shape.data
    activations = 0.0
    for layer in task.layers:
        moved = linear_volumes(shape, layer.k, layer.n, tokens, transposed=layer.transposed)
        for term, elements in moved.items():
            speed = network.bandwidth(shape, term.rpartition("_")[2])
            seconds[term] += layer.count * elements * task.dtype_bytes / speed
        in_axis, _ = axes_of_linear(layer.transposed)
        inputs = tokens * layer.k / (shape.z * shape.size(in_axis))
        activations += layer.count * inputs * task.dtype_bytes
    for axis in ("z", "data"):  # whole parameters are summed over every axis that splits tokens
        elements = reduced(task.whole_parameters, shape.size(axis))
        seconds["reduce_whole"] += elements * task.dtype_bytes / network.bandwidth(shape, axis)
    cut = task.parameters / (shape.x * shape.y * shape.z)
    return GridCost(
        shape=shape,
        seconds=seconds,
        state_bytes=STATE_BYTES * (cut + task.whole_parameters),
        activation_bytes=activations,
    )
