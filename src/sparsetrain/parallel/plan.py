"""plan_grids(): every grid of a number of devices, cheapest first, with what each costs and why others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsetrain.core.units import bytes_text
from sparsetrain.parallel.cost import GridCost, GridTask, Network, cost, refusal
from sparsetrain.parallel.shape import AXES, GridShape


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """All grids of a number of devices.

    grids: those that can run it, the smallest sum of seconds first (then the least memory).
    refused: the others and why; a grid that only lacks memory has its cost too.
    """

    grids: tuple[GridCost, ...]
    refused: tuple[tuple[GridShape, str, GridCost | None], ...]

    @property
    def leanest(self) -> GridCost | None:
        """Of the grids that only lack memory, the one that needs the least."""
        lacking = [priced for _, _, priced in self.refused if priced is not None]
        return min(lacking, key=lambda priced: priced.memory_bytes, default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "grids": [_row(priced) for priced in self.grids],
            "refused": [{"grid": _sizes(shape), "why": why} for shape, why, _ in self.refused],
        }


def grids_of(devices: int) -> Iterator[GridShape]:
    """Every grid with so many devices."""
    for data in _divisors(devices):
        for z in _divisors(devices // data):
            for x in _divisors(devices // data // z):
                yield GridShape(data=data, z=z, x=x, y=devices // data // z // x)


def plan_grids(task: GridTask, devices: int, network: Network, memory_bytes: float | None = None) -> GridPlan:
    """Price every grid of `devices`.

    Args:
        memory_bytes: what a rank may use; None: no limit.

    Raises:
        ValueError: fewer than one device.
    """
    if devices < 1:
        raise ValueError(f"gpus={devices}. A grid has one device or more.")
    fit, refused = [], []
    for shape in grids_of(devices):
        if why := refusal(shape, task):
            refused.append((shape, why, None))
            continue
        priced = cost(shape, task, network)
        if memory_bytes is not None and priced.memory_bytes > memory_bytes:
            why = f"needs {bytes_text(priced.memory_bytes)} a rank, and {bytes_text(memory_bytes)} are allowed"
            refused.append((shape, why, priced))
        else:
            fit.append(priced)
    fit.sort(key=lambda priced: (priced.total_s, priced.memory_bytes))
    return GridPlan(grids=tuple(fit), refused=tuple(refused))


def _row(priced: GridCost) -> dict[str, Any]:
    return {
        "grid": _sizes(priced.shape),
        "seconds": priced.seconds,
        "total_s": priced.total_s,
        "state_bytes": priced.state_bytes,
        "activation_bytes": priced.activation_bytes,
        "memory_bytes": priced.memory_bytes,
    }


def _sizes(shape: GridShape) -> dict[str, int]:
    return {axis: shape.size(axis) for axis in AXES}


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
