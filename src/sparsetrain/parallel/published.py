"""Published runs of the 4-D algorithm, as tasks that the simulator can predict (arXiv 2305.13525, 2502.08145).

The abstracts give devices and FLOP/s. What they leave open is assumed here, and named in `assumed`: so an error of the
prediction is one of these assumptions and of the model together. Which one it may be, `Predicted` says: by how much the
device's rates alone, or the links' bandwidth alone, would have to fall short of what is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsetrain.parallel.cost import GridLayer, GridTask, Network
from sparsetrain.parallel.plan import plan_grids
from sparsetrain.parallel.shape import GridShape
from sparsetrain.parallel.simulate import Device, SimulatedStep, model_flops, simulate


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the simulator says of the best of the planner's first grids.

    exposed_ratio: share of the step in which arithmetic waits for messages.
    rate_ratio, link_ratio: share of the assumed rates of a device, or of both bandwidths, with which this grid's
    prediction is the published figure; None where that alone cannot be it.
    """

    shape: GridShape
    flops_per_s: float
    exposed_ratio: float
    rate_ratio: float | None
    link_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """One run.

    flops_per_s: published, of all devices. assumed: what the source leaves open. found: the prediction, as the docs
    state it; a test holds it.
    """

    name: str
    devices: int
    flops_per_s: float
    task: GridTask
    network: Network
    device: Device
    memory_bytes: float
    assumed: str
    source: str
    found: Predicted


def gpt(hidden: int, layers: int, heads: int, rows: int, tokens: int = 2048) -> GridTask:
    """A GPT as the papers train it: four linears a block (GPT-2's shape), vocabulary left out."""
    kinds = (
        ("qkv", hidden, 3 * hidden),
        ("o", hidden, hidden),
        ("up", hidden, 4 * hidden),
        ("down", 4 * hidden, hidden),
    )
    return GridTask(
        layers=tuple(
            GridLayer(name=name, k=k, n=n, transposed=name in ("o", "down"), count=layers) for name, k, n in kinds
        ),
        rows=rows,
        tokens=tokens,
        heads=heads,
        kv_heads=heads,
        attention_flops=layers * 4 * hidden * tokens * tokens / 2,
    )


_A100_NODES = Network(devices_per_node=4, node_bytes_per_s=200e9, inter_bytes_per_s=100e9)
_MI250X_NODES = Network(devices_per_node=8, node_bytes_per_s=100e9, inter_bytes_per_s=100e9)
_GH200_NODES = Network(devices_per_node=4, node_bytes_per_s=300e9, inter_bytes_per_s=100e9)
_A100 = Device(flops=2.3e14, attention_flops=1.8e14, hop_s=5e-6)
_SHAPE = "42 layers of 12,288 with 96 heads, 2,048 tokens, recomputation; links and rates of data sheets"

RUNS: tuple[Published, ...] = (
    Published(
        name="GPT-80B, 1,024 A100",
        devices=1024,
        flops_per_s=182e15,
        task=gpt(12288, 42, 96, rows=2048),
        network=_A100_NODES,
        device=_A100,
        memory_bytes=40e9,
        assumed=f"{_SHAPE}; 2,048 rows a step",
        source="arXiv 2305.13525, abstract",
        found=Predicted(
            shape=GridShape(data=8, z=128),
            flops_per_s=2.043e17,
            exposed_ratio=0.129,
            rate_ratio=0.872,
            link_ratio=0.628,
        ),
    ),
    Published(
        name="620 PFLOP/s, 4,096 A100",
        devices=4096,
        flops_per_s=620.1e15,
        task=gpt(12288, 84, 96, rows=8192),
        network=_A100_NODES,
        device=_A100,
        memory_bytes=40e9,
        assumed="84 layers of 12,288 with 96 heads, 8,192 rows of 2,048 tokens; 4,096 devices",
        source="arXiv 2502.08145, abstract",
        found=Predicted(
            shape=GridShape(data=32, z=128),
            flops_per_s=8.169e17,
            exposed_ratio=0.129,
            rate_ratio=0.725,
            link_ratio=0.466,
        ),
    ),
    Published(
        name="1.381 EFLOP/s, 32,768 MI250X dies",
        devices=32768,
        flops_per_s=1.381e18,
        task=gpt(16384, 96, 128, rows=8192),
        network=_MI250X_NODES,
        device=Device(flops=1.1e14, attention_flops=6e13, hop_s=5e-6),
        memory_bytes=64e9,
        assumed="96 layers of 16,384 with 128 heads, 8,192 rows of 2,048 tokens; 0.57 of the data sheet's rate",
        source="arXiv 2502.08145, abstract",
        found=Predicted(
            shape=GridShape(data=64, z=16, y=32),
            flops_per_s=2.394e18,
            exposed_ratio=0.330,
            rate_ratio=0.473,
            link_ratio=0.370,
        ),
    ),
    Published(
        name="1.423 EFLOP/s, 6,144 H100",
        devices=6144,
        flops_per_s=1.423e18,
        task=gpt(12288, 60, 96, rows=6144),
        network=_GH200_NODES,
        device=Device(flops=6.6e14, attention_flops=4.4e14, hop_s=5e-6),
        memory_bytes=96e9,
        assumed="60 layers of 12,288 with 96 heads, 6,144 rows of 2,048 tokens; this package's rates of an H100",
        source="arXiv 2502.08145, abstract",
        found=Predicted(
            shape=GridShape(data=128, z=6, x=4, y=2),
            flops_per_s=1.559e18,
            exposed_ratio=0.586,
            rate_ratio=0.724,
            link_ratio=0.895,
        ),
    ),
)


def predicted(run: Published, tries: int = 20) -> Predicted:
    """Simulate the cheapest grids by bandwidth that fit, and take the fastest."""
    plan = plan_grids(run.task, run.devices, run.network)
    # with recomputation what is held of activations is little: half of the memory is left for it and for the rest
    fit = [priced.shape for priced in plan.grids if priced.state_bytes <= run.memory_bytes / 2]
    step, shape = min(((_step(run, shape), shape) for shape in fit[:tries]), key=lambda one: one[0].step_s)
    return Predicted(
        shape=shape,
        flops_per_s=model_flops(run.task, recompute=True) / step.step_s,
        exposed_ratio=step.exposed_s / step.step_s,
        rate_ratio=_closing(run, lambda ratio: _step(run, shape, rates=ratio).step_s),
        link_ratio=_closing(run, lambda ratio: _step(run, shape, links=ratio).step_s),
    )


def _step(run: Published, shape: GridShape, rates: float = 1.0, links: float = 1.0) -> SimulatedStep:
    """A step on devices and links that reach these shares of what is assumed."""
    device = replace(run.device, flops=run.device.flops * rates, attention_flops=run.device.attention_flops * rates)
    network = replace(
        run.network,
        node_bytes_per_s=run.network.node_bytes_per_s * links,
        inter_bytes_per_s=run.network.inter_bytes_per_s * links,
    )
    return simulate(shape, run.task, network, device, recompute=True)


def _closing(run: Published, step_s: Callable[[float], float]) -> float | None:
    """The ratio, to a thousandth, at which a step takes as long as published; None if none from 0.01 to 1 is."""
    wanted = model_flops(run.task, recompute=True) / run.flops_per_s
    low, high = 0.01, 1.0
    if not step_s(high) <= wanted <= step_s(low):
        return None
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if step_s(middle) < wanted else (middle, high)
    return high
