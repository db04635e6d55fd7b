"""simulate(): how long a step on a grid takes where messages run beside arithmetic, for machines that are not here.

An event model of one rank (all are alike): an arithmetic queue, and a queue of messages for each kind of link, inside
a node and between nodes. A message starts when it is asked for and its link is free; arithmetic waits where `linear`
waits. Latency is a time a hop of the ring. arXiv 2305.13525, section 5, has no such model: this is ours.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from sparsetrain.parallel.cost import GridLayer, GridTask, Network
from sparsetrain.parallel.flow import Overlap
from sparsetrain.parallel.shape import GridShape, axes_of_linear
from sparsetrain.parallel.volume import gathered, reduced, scattered


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device reaches.

    flops: FLOP/s of large matrix products; attention_flops: of fused attention. hop_s: seconds a message takes to the
    next rank of a ring, however short it is.
    """

    flops: float
    attention_flops: float
    hop_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """Seconds of one step.

    exposed_s: arithmetic waited for messages. sent_s: axis -> seconds of its messages, hidden or not.
    """

    step_s: float
    compute_s: float
    exposed_s: float
    sent_s: dict[str, float]


@dataclass
class _Clock:
    shape: GridShape
    network: Network
    hop_s: float
    now: float = 0.0
    compute_s: float = 0.0
    exposed_s: float = 0.0
    free: dict[bool, float] = field(default_factory=lambda: defaultdict(float))
    sent_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.compute_s += seconds

    def send(self, axis: str, num_bytes: float, hops: int) -> float:
        """When a message will have arrived that is asked for now."""
        if self.shape.size(axis) == 1:
            return self.now
        speed = self.network.bandwidth(self.shape, axis)
        link = speed == self.network.node_bytes_per_s
        seconds = num_bytes / speed + hops * self.hop_s
        self.free[link] = max(self.now, self.free[link]) + seconds
        self.sent_s[axis] += seconds
        return self.free[link]

    def wait(self, until: float) -> None:
        self.exposed_s += max(0.0, until - self.now)
        self.now = max(self.now, until)


@dataclass
class _Step:
    """The messages and products of a step, in the order of `linear` and `flow`."""

    clock: _Clock
    task: GridTask
    device: Device
    overlap: Overlap

    def __post_init__(self) -> None:
        self.shape = self.clock.shape
        self.blocks = max(layer.count for layer in self.task.layers)
        self.block = list(self.task.layers)
        self.tokens = self.task.rows * self.task.tokens / (self.shape.data * self.shape.z)
        self.order = [layer for i in range(self.blocks) for layer in self.block if i < layer.count]
        self.ahead: dict[int, float] = {}
        self.scattered: list[float] = []

    def gather(self, place: int) -> float:
        layer, z = self.order[place], self.shape.z
        shard = layer.k * layer.n // (self.shape.x * self.shape.y * z)
        return self.clock.send("z", gathered(shard, z) * self.task.dtype_bytes, z - 1)

    def weight(self, place: int, step: int) -> None:
        end = self.ahead.pop(place, None)
        self.clock.wait(self.gather(place) if end is None else end)
        other = place + step
        if self.overlap.next_weight and 0 <= other < len(self.order) and other not in self.ahead:
            self.ahead[other] = self.gather(other)

    def product(self, layer: GridLayer) -> float:
        in_axis, out_axis = axes_of_linear(layer.transposed)
        work = 2 * self.tokens * layer.k * layer.n / (self.shape.size(in_axis) * self.shape.size(out_axis))
        return work / self.device.flops

    def reduce(self, axis: str, elements: float) -> float:
        size = self.shape.size(axis)
        return self.clock.send(axis, reduced(elements, size) * self.task.dtype_bytes, 2 * (size - 1))  # type: ignore

    def attention(self, factor: float) -> None:
        rows = self.task.rows / (self.shape.data * self.shape.z * self.shape.y)
        self.clock.run(factor * self.task.attention_flops * rows / self.blocks / self.device.attention_flops)

    def forward(self, place: int) -> None:
        layer = self.order[place]
        in_axis, out_axis = axes_of_linear(layer.transposed)
        if layer.name == "o":
            self.attention(1.0)
        self.weight(place, 1)
        self.clock.run(self.product(layer))
        self.clock.wait(self.reduce(in_axis, self.tokens * layer.n / self.shape.size(out_axis)))

    def backward(self, place: int) -> None:
        layer = self.order[place]
        in_axis, out_axis = axes_of_linear(layer.transposed)
        first = self.shape.size(out_axis) == 1
        self.weight(place, -1)
        if first:
            self.weight_gradient(layer)
        self.clock.run(self.product(layer))
        end = self.reduce(out_axis, self.tokens * layer.k / self.shape.size(in_axis))
        if not self.overlap.input_gradient:
            self.clock.wait(end)
        if not first:
            self.weight_gradient(layer)
        self.clock.wait(end)
        if layer.name == "o":
            self.attention(2.5)  # five products for the forward's two

    def weight_gradient(self, layer: GridLayer) -> None:
        self.clock.run(self.product(layer))
        block, z = layer.k * layer.n // (self.shape.x * self.shape.y), self.shape.z
        end = self.clock.send("z", scattered(block, z) * self.task.dtype_bytes, z - 1)
        if self.overlap.weight_gradient:
            self.scattered.append(end)
        else:
            self.clock.wait(end)

    def finish(self) -> None:
        self.clock.wait(max(self.scattered, default=0.0))
        cut = self.task.parameters / (self.shape.x * self.shape.y * self.shape.z)
        whole = self.task.whole_parameters
        self.clock.wait(self.reduce("data", cut + whole))
        if whole:
            self.clock.wait(self.reduce("z", whole))


def simulate(
    shape: GridShape,
    task: GridTask,
    network: Network,
    device: Device,
    overlap: Overlap | None = None,
    *,
    recompute: bool = False,
) -> SimulatedStep:
    """One step of forward, backward and the sums, without optimizer, embedding and head.

    Args:
        recompute: every block's forward runs again before its backward (activation checkpointing).
    """
    clock = _Clock(shape=shape, network=network, hop_s=device.hop_s)
    step = _Step(clock, task, device, overlap or Overlap())
    places = list(range(len(step.order)))
    for place in places:
        step.forward(place)
    size = len(places) // step.blocks
    for block in reversed([places[i : i + size] for i in range(0, len(places), size)]):
        if recompute:
            step.ahead.clear()
            for place in block:
                step.forward(place)
            step.ahead.clear()
        for place in reversed(block):
            step.backward(place)
    step.finish()
    return SimulatedStep(
        step_s=clock.now, compute_s=clock.compute_s, exposed_s=clock.exposed_s, sent_s=dict(clock.sent_s)
    )


def model_flops(task: GridTask, *, recompute: bool = False) -> float:
    """FLOPs of a step: linears and attention, forward and backward (recomputation counted, if any)."""
    passes = 4 if recompute else 3
    linears = 2 * task.rows * task.tokens * task.parameters
    return passes * linears + (passes + 0.5) * task.attention_flops * task.rows
