"""ParallelGrid: a grid of devices on `torch.distributed`, its collectives, and a count of what they move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from sparsetrain.core import ranks
from sparsetrain.parallel.shape import AXES, GridShape
from sparsetrain.parallel.volume import gathered, reduced, scattered

# renamed in torch 2.13; the floor is 2.11
all_gather_single: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter_single: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


@dataclass
class Pending:
    """A collective that may still run: `wait()` gives its result."""

    result: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


@dataclass
class Traffic:
    """What this rank has moved: `gather_z`, `reduce_x`, … -> elements of a ring's sends, as in `volume`."""

    moved: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, axis: str, elements: float) -> None:
        self.moved[f"{kind}_{axis}"] += elements  # type: ignore[assignment]


class ParallelGrid:
    """The grid of this run's ranks; close it before `destroy_process_group()`.

    The mesh's axes are (data, x, y, z) whatever the order of ranks (x is fastest): a DTensor wants z last.

    Args:
        data, z, x, y: devices along each axis; their product is the number of ranks.
        device: device type of the mesh, `cpu` (gloo) or `cuda` (NCCL).

    Raises:
        ValueError: another number of ranks was started, or none; on every rank, before anything is sent.
    """

    def __init__(self, data: int = 1, z: int = 1, x: int = 1, y: int = 1, *, device: str = "cpu") -> None:
        self.shape = GridShape(data=data, z=z, x=x, y=y)
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                f"grid {self.shape} needs torch.distributed, and no process group is there. Start the program with "
                f"torchrun --nproc-per-node {self.shape.world}, and call init_process_group() first."
            )
        self.shape.check_world(distributed.get_world_size())
        self.device = device
        self.rank = distributed.get_rank()
        self.place = self.shape.place(self.rank)
        order = torch.arange(self.shape.world).view(data, z, y, x).permute(0, 3, 2, 1)
        self.mesh: DeviceMesh | None = DeviceMesh(device, order, mesh_dim_names=("data", "x", "y", "z"))
        self._groups: dict[str, Any] = {axis: self.mesh.get_group(axis) for axis in AXES}
        self.traffic = Traffic()

    def tell_methods(self, *, rows_everywhere: bool) -> None:
        """Say which ranks have other samples (`core.ranks`, axis data): all, or those of another data or z.

        Args:
            rows_everywhere: every rank has rows of its own (plain mode).
        """
        if rows_everywhere:
            ranks.register_groups({"data": distributed.group.WORLD})  # type: ignore[dict-item]
            return
        cell = self.shape.x * self.shape.y
        for first in range(cell):  # every rank makes every group
            group = distributed.new_group(list(range(first, self.shape.world, cell)))
            if self.rank % cell == first:
                self._groups["samples"] = group
        groups = {"data": self._groups["samples"], "x": self._groups["x"], "y": self._groups["y"]}
        ranks.register_groups(groups)

    def close(self) -> None:
        """Let go of the process groups: held until the process ends, they would take it down."""
        ranks.register_groups({})
        self._groups.clear()
        self.mesh = None

    def __enter__(self) -> ParallelGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seed(self, seed: int, *, rows_everywhere: bool) -> None:
        """Seed torch for dropout: apart where tokens differ, alike where activations are copies.

        Args:
            rows_everywhere: every rank has rows of its own (plain mode); else only those of other data and z do.
        """
        torch.manual_seed(seed + (self.rank if rows_everywhere else self.rank // (self.shape.x * self.shape.y)))

    def all_reduce(self, x: Tensor, axis: str) -> Pending:
        """Sum over an axis, in place."""
        size = self.shape.size(axis)
        if size == 1:
            return Pending(x)
        self.traffic.add("reduce", axis, reduced(x.numel(), size))
        return Pending(x, distributed.all_reduce(x, group=self._groups[axis], async_op=True))

    def all_gather(self, x: Tensor, axis: str) -> Pending:
        """[s, …] -> [G s, …]: the ranks' tensors after one another along their first dimension."""
        size = self.shape.size(axis)
        if size == 1:
            return Pending(x)
        self.traffic.add("gather", axis, gathered(x.numel(), size))
        found = x.new_empty((size * x.shape[0], *x.shape[1:]))
        return Pending(found, all_gather_single(found, x.contiguous(), group=self._groups[axis], async_op=True))

    def reduce_scatter(self, x: Tensor, axis: str) -> Pending:
        """[G s] -> [s]: this rank's part of the sum."""
        size = self.shape.size(axis)
        if size == 1:
            return Pending(x)
        self.traffic.add("scatter", axis, scattered(x.numel(), size))
        found = x.new_empty((x.shape[0] // size, *x.shape[1:]))
        return Pending(found, reduce_scatter_single(found, x.contiguous(), group=self._groups[axis], async_op=True))

    def gather_features(self, x: Tensor, axis: str) -> Tensor:
        """[…, f] -> […, G f]."""
        size = self.shape.size(axis)
        if size == 1:
            return x
        parts = self.all_gather(x.unsqueeze(0), axis).wait()
        return parts.movedim(0, -2).reshape(*x.shape[:-1], size * x.shape[-1])

    def own_features(self, x: Tensor, axis: str) -> Tensor:
        """[…, G f] -> […, f]: this rank's part along an axis."""
        return x.chunk(self.shape.size(axis), -1)[getattr(self.place, axis)]

    def gather_rows(self, x: Tensor) -> Tensor:
        """[r, …] -> [x y r, …]: the rows of all ranks that share data and z, in the order of ranks."""
        return self.all_gather(self.all_gather(x, "x").wait(), "y").wait()

    def own_rows(self, x: Tensor) -> Tensor:
        """[x y r, …] -> [r, …]; the inverse of `gather_rows`."""
        return x.chunk(self.shape.x * self.shape.y, 0)[self.rank % (self.shape.x * self.shape.y)]
