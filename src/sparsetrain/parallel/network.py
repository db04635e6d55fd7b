"""What the network between ranks carries: all-reduces and all-gathers timed inside a node and between nodes.

An all-reduce of n ranks moves 2 (n - 1) / n times its bytes over each rank's link, whatever its algorithm; that over
its time is the rank's bandwidth, as `cost.Network` counts it. An all-gather moves (n - 1) / n of what it ends with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from sparsetrain.core import ranks
from sparsetrain.parallel.grid import all_gather_single

SIZES = (64 * 1024, 1024**2, 16 * 1024**2, 64 * 1024**2)
"""Bytes of the messages; the bandwidth is that of the largest all-reduce."""
ROUNDS, WARM = 7, 2


@dataclass(frozen=True, kw_only=True)
class Link:
    """Messages among `ranks` ranks: bytes -> median seconds, each those of the slowest rank.

    seconds: of all-reduces. gathers: of all-gathers that end with so many bytes.
    shared_by: groups that go over one link at once.
    """

    ranks: int
    seconds: dict[int, float]
    gathers: dict[int, float]
    shared_by: int = 1

    def bytes_per_s(self, size: int | None = None) -> float:
        """Of the link, with all-reduces of this size; of the largest if none is given."""
        size = size or max(self.seconds)
        return self.shared_by * 2 * (self.ranks - 1) / self.ranks * size / self.seconds[size]

    def line(self) -> tuple[float, float]:
        """(bytes a second of one group, seconds a hop) of a ring whose all-reduces take, as nearly as may be, what was
        measured at every size: 2 (n - 1) hops each, least squares of the relative error."""
        hops, share = 2 * (self.ranks - 1), 2 * (self.ranks - 1) / self.ranks
        terms = torch.tensor([[hops / s, share * size / s] for size, s in self.seconds.items()], dtype=torch.float64)
        scale = terms.amax(0)
        ones = terms.new_ones(len(terms), 1)
        hop_s, byte_s = (torch.linalg.lstsq(terms / scale, ones).solution[:, 0] / scale).tolist()
        if hop_s < 0 or byte_s <= 0:  # no slope, or one through less than nothing: bytes alone
            hop_s, byte_s = 0.0, float((terms[:, 1] / terms[:, 1].square().sum()).sum())
        return 1 / byte_s, hop_s


@dataclass(frozen=True, kw_only=True)
class Measured:
    """latency_s: of an all-reduce of one number among all ranks. node, inter: inside a node, and between nodes; None
    where there is one rank a node, or one node."""

    nodes: int
    devices_per_node: int
    latency_s: float
    node: Link | None
    inter: Link | None

    @property
    def flag(self) -> str:
        """For `plan --gpus`: node=1.2GB/s,inter=0.5GB/s; what was not measured is left out."""
        found = {"node": self.node, "inter": self.inter}
        return ",".join(
            f"{name}={link.bytes_per_s() / 1e9:.3g}GB/s" for name, link in found.items() if link is not None
        )


def measure_network(
    devices_per_node: int, device: torch.device, sizes: Sequence[int] = SIZES, rounds: int = ROUNDS
) -> Measured:
    """Time messages of `sizes` bytes; every rank calls this. Between nodes all devices of a node send at once.

    Args:
        devices_per_node: ranks of each node, which are numbered node by node, as launchers do.

    Raises:
        ValueError: one rank, or nodes with other numbers of ranks.
    """
    count = ranks.total()
    if count == 1:
        raise ValueError(
            "a network is between ranks, and this is one process. Start as many as will train, on every node: "
            "torchrun --nproc-per-node 2 -m sparsetrain doctor --network"
        )
    if count % devices_per_node:
        raise ValueError(f"{count} ranks are not nodes of {devices_per_node}. Start as many on each node.")
    nodes = count // devices_per_node
    inside = [range(node * devices_per_node, (node + 1) * devices_per_node) for node in range(nodes)]
    across = [range(place, count, devices_per_node) for place in range(devices_per_node)]
    one = torch.zeros(1, device=device)
    return Measured(
        nodes=nodes,
        devices_per_node=devices_per_node,
        latency_s=_median(lambda: distributed.all_reduce(one), rounds, device),
        node=_link(inside, 1, device, sizes, rounds) if devices_per_node > 1 else None,
        inter=_link(across, devices_per_node, device, sizes, rounds) if nodes > 1 else None,
    )


def _link(groups: Sequence[range], shared_by: int, device: torch.device, sizes: Sequence[int], rounds: int) -> Link:
    made: list[Any] = [distributed.new_group(list(group)) for group in groups]  # every rank makes all of them
    own = next(group for group, members in zip(made, groups, strict=True) if distributed.get_rank() in members)
    try:
        seconds, gathers, count = {}, {}, len(groups[0])
        for size in sizes:
            x: Tensor = torch.zeros(size // 4, device=device)
            part = torch.zeros(size // 4 // count, device=device)
            whole = torch.zeros(count * part.numel(), device=device)

            def reduce(x: Tensor = x) -> object:
                return distributed.all_reduce(x, group=own)

            def gather(part: Tensor = part, whole: Tensor = whole) -> object:
                return all_gather_single(whole, part, group=own)

            seconds[size], gathers[size] = (_median(each, rounds, device) for each in (reduce, gather))
        return Link(ranks=count, seconds=seconds, gathers=gathers, shared_by=shared_by)
    finally:
        distributed.destroy_process_group(own)


def _median(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of `run`, all ranks starting together; of each round the slowest rank's."""
    times = torch.zeros(WARM + rounds, dtype=torch.float64)
    for i in range(len(times)):
        ranks.wait()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[i] = time.perf_counter() - start
    times = times.to(device)
    distributed.all_reduce(times, op=distributed.ReduceOp.MAX)
    return statistics.median(times[WARM:].tolist())
