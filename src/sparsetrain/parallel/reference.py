"""The 4-D algorithm with all ranks in one process: what each rank holds is a list, one tensor a rank.

The specification of `linear` and `grid`, readable in one scroll; no process group. arXiv 2305.13525, algorithm 1:

    forward   W = gather_z(w);  Y = reduce_in(X W^T) + b
    backward  dX = reduce_out(dY W);  dw = scatter_z(dY^T X);  db = sum of dY over the rank's rows
    step      dw += over data;  db += over data and z

"in" is the axis that cuts the linear's inputs: x, or y of a transposed one; "out" is the other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetrain.parallel.cut import cut_bias, cut_weight, join_bias, join_weight
from sparsetrain.parallel.shape import GridShape, axes_of_linear, check_linear
from sparsetrain.parallel.volume import gathered, reduced, scattered

Ranks = list[Tensor]


@dataclass
class Simulated:
    """A grid whose ranks are places in a list; counts what one rank moves."""

    shape: GridShape
    moved: Counter[str] = field(default_factory=Counter)

    def _count(self, kind: str, axis: str, elements: float) -> None:
        if elements:
            self.moved[f"{kind}_{axis}"] += elements  # type: ignore[assignment]  (thirds of elements occur)

    def all_reduce(self, parts: Ranks, axis: str) -> Ranks:
        self._count("reduce", axis, reduced(parts[0].numel(), self.shape.size(axis)))
        groups = [self.shape.group(rank, axis) for rank in range(self.shape.world)]
        return [sum((parts[other] for other in group), torch.zeros_like(parts[0])) for group in groups]

    def all_gather(self, parts: Ranks, axis: str) -> Ranks:
        """Flat shards -> flat wholes."""
        self._count("gather", axis, gathered(parts[0].numel(), self.shape.size(axis)))
        groups = [self.shape.group(rank, axis) for rank in range(self.shape.world)]
        return [torch.cat([parts[other].reshape(-1) for other in group]) for group in groups]

    def reduce_scatter(self, parts: Ranks, axis: str) -> Ranks:
        """Flat wholes -> flat shards of their sum."""
        size = self.shape.size(axis)
        self._count("scatter", axis, scattered(parts[0].numel(), size))
        found = []
        for rank in range(self.shape.world):
            group = self.shape.group(rank, axis)
            whole = sum((parts[other].reshape(-1) for other in group), torch.zeros_like(parts[0].reshape(-1)))
            found.append(whole.chunk(size)[group.index(rank)])
        return found


@dataclass
class SimulatedLinear:
    """One linear on a simulated grid: `w` and `b` are shards, `dw` and `db` the gradients of them."""

    grid: Simulated
    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        shape, (n, k) = self.grid.shape, self.weight.shape
        check_linear(shape, "the linear", k, n, self.transposed)
        places = [shape.place(rank) for rank in range(shape.world)]
        self.in_axis, self.out_axis = axes_of_linear(self.transposed)
        self.local = (n // shape.size(self.out_axis), k // shape.size(self.in_axis))
        self.w = [cut_weight(self.weight, shape, place, self.transposed) for place in places]
        self.b = None if self.bias is None else [cut_bias(self.bias, shape, p, self.transposed) for p in places]

    def forward(self, x: Ranks) -> Ranks:
        """[rows / (data z), k / G_in] -> [rows / (data z), n / G_out], a rank each."""
        self.x = x
        blocks = [w.view(self.local) for w in self.grid.all_gather(self.w, "z")]
        y = self.grid.all_reduce([x @ w.T for x, w in zip(x, blocks, strict=True)], self.in_axis)
        return y if self.b is None else [y + b for y, b in zip(y, self.b, strict=True)]

    def backward(self, dy: Ranks) -> Ranks:
        """The gradient of the input; leaves `dw` and `db`, not yet summed over data (and z)."""
        blocks = [w.view(self.local) for w in self.grid.all_gather(self.w, "z")]
        dx = self.grid.all_reduce([dy @ w for dy, w in zip(dy, blocks, strict=True)], self.out_axis)
        self.dw = self.grid.reduce_scatter([dy.T @ x for dy, x in zip(dy, self.x, strict=True)], "z")
        self.db = [dy.sum(0) for dy in dy]
        return dx

    def finish(self) -> None:
        """Sum the gradients over every axis that splits tokens."""
        self.dw = self.grid.all_reduce(self.dw, "data")
        if self.b is not None:
            self.db = self.grid.all_reduce(self.grid.all_reduce(self.db, "z"), "data")

    def full(self, shards: Ranks) -> Tensor:
        """The full weight, or its gradient, of shards."""
        n, k = self.weight.shape
        return join_weight(shards, self.grid.shape, n, k, self.transposed)

    def full_bias(self, shards: Ranks) -> Tensor:
        return join_bias(shards, self.grid.shape, self.transposed)


def cut_input(x_mk: Tensor, shape: GridShape, axis: str) -> Ranks:
    """Each rank's rows and features of a full input: rows over data and z, features over `axis`."""
    found = []
    for rank in range(shape.world):
        place = shape.place(rank)
        rows = x_mk.chunk(shape.data * shape.z, 0)[place.data * shape.z + place.z]
        found.append(rows.chunk(shape.size(axis), -1)[getattr(place, axis)].contiguous())
    return found


def join_output(parts: Ranks, shape: GridShape, axis: str) -> Tensor:
    """The full activation of all ranks' parts; the inverse of `cut_input`."""
    rows = []
    for data in range(shape.data):
        for z in range(shape.z):
            first = (data * shape.z + z) * shape.x * shape.y
            rows.append(torch.cat([parts[other] for other in shape.group(first, axis)], -1))
    return torch.cat(rows, 0)


def squared_norm(linears: list[SimulatedLinear]) -> Tensor:
    """Sum of squares of all gradients: every shard once, what is copied divided by its copies."""
    shape = linears[0].grid.shape
    weights = sum(float(dw.square().sum()) for linear in linears for dw in linear.dw) / shape.data
    biases = sum(
        float(db.square().sum()) * shape.size(linear.out_axis) / shape.world
        for linear in linears
        if linear.b is not None
        for db in linear.db
    )
    return torch.tensor(weights + biases, dtype=torch.float64)
