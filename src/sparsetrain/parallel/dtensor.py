"""The same linear by DTensor: PyTorch places the tensors and chooses the collectives. Slower, and a second opinion.

Placements on the mesh (x, y, z): weight [Shard(1), Shard(0), Shard(0)], input [Shard(1), Replicate, Shard(0)], output
[Partial, Shard(1), Shard(0)], redistributed to whole sums. z is the last axis, or a weight is gathered twice.
A transposed linear swaps x and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.shape import axes_of_linear, check_linear


class DTensorLinear(nn.Module):
    """y = x W^T + b in expert layout: [rows of data and z, k / G_in] -> [the same rows, n / G_out].

    Equals: `TPLinear(mode="expert")`, up to the order of sums. `weight` and `bias` are DTensors over (x, y, z); their
    gradients are summed over z by themselves, and over data by whoever trains.

    Args:
        weights: the full weight [n, k] and bias [n], the same on every rank.

    Raises:
        ValueError: the grid cannot cut it; or z does not divide its local outputs, which DTensor cuts it along.
    """

    def __init__(self, weights: tuple[Tensor, Tensor | None], *, grid: ParallelGrid, transposed: bool = False) -> None:
        super().__init__()
        n, k = weights[0].shape
        check_linear(grid.shape, "the linear", k, n, transposed)
        self.in_axis, self.out_axis = axes_of_linear(transposed)
        local = n // grid.shape.size(self.out_axis)
        if local % grid.shape.z:
            raise ValueError(
                f"grid {grid.shape}: DTensor cuts the {local} outputs of a rank over z={grid.shape.z}, which does not "
                "divide them. Use another z, or TPLinear, which cuts the flat weight."
            )
        assert grid.mesh is not None, "the grid is closed"
        self.mesh = grid.mesh["x", "y", "z"]
        held, gathered = ([Shard(1), Shard(0), Shard(0)], [Shard(1), Shard(0), Replicate()])
        along, bias_along = [Shard(1), Replicate(), Shard(0)], [Replicate(), Shard(0), Replicate()]
        whole = [Replicate(), Shard(1), Shard(0)]
        if transposed:
            held, gathered = [Shard(0), Shard(1), Shard(0)], [Shard(0), Shard(1), Replicate()]
            along, bias_along = [Replicate(), Shard(1), Shard(0)], [Shard(0), Replicate(), Replicate()]
            whole = [Shard(1), Replicate(), Shard(0)]
        self.gathered, self.along, self.whole = gathered, along, whole
        self.weight = nn.Parameter(_placed(weights[0], self.mesh, held))
        self.bias = None if weights[1] is None else nn.Parameter(_placed(weights[1], self.mesh, bias_along))

    def forward(self, x: Tensor) -> Tensor:
        given = DTensor.from_local(x, self.mesh, self.along, run_check=False)
        weight = cast(DTensor, self.weight).redistribute(self.mesh, self.gathered)
        y = cast(DTensor, torch.mm(given, weight.t())).redistribute(self.mesh, self.whole)
        if self.bias is not None:
            y = y + self.bias
        return cast(DTensor, y).to_local()


def _placed(full: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Cut what every rank has; nothing is sent."""
    whole = DTensor.from_local(full.detach(), mesh, [Replicate()] * 3, run_check=False)
    return whole.redistribute(mesh, placements).detach()
