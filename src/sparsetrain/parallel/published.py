"""Published runs of the 4-D algorithm, as tasks that the simulator can predict (arXiv 2305.13525, 2502.08145).

The abstracts give devices and FLOP/s. What they leave open is assumed here, and named in `assumed`: so an error of the
prediction is one of these assumptions and of the model together.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.parallel.cost import GridLayer, GridTask, Network
from sparsetrain.parallel.plan import plan_grids
from sparsetrain.parallel.shape import GridShape
from sparsetrain.parallel.simulate import Device, model_flops, simulate


@dataclass(frozen=True, kw_only=True)
class Published:
    """One run.

    flops_per_s: published, of all devices. assumed: what the source leaves open. error: of the prediction, as the docs
    state it (predicted / published - 1).
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
    error: float


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the simulator says of the best of the planner's first grids."""

    shape: GridShape
    flops_per_s: float
    exposed_ratio: float


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
        error=0.12,
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
        error=0.32,
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
        error=0.73,
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
        error=0.1,
    ),
)


def predicted(run: Published, tries: int = 20) -> Predicted:
    """Simulate the cheapest grids by bandwidth that fit, and take the fastest."""
    plan = plan_grids(run.task, run.devices, run.network)
    # with recomputation what is held of activations is little: half of the memory is left for it and for the rest
    fit = [priced.shape for priced in plan.grids if priced.state_bytes <= run.memory_bytes / 2]
    work = model_flops(run.task, recompute=True)
    steps = [(simulate(s, run.task, run.network, run.device, recompute=True), s) for s in fit[:tries]]
    step, shape = min(steps, key=lambda one: one[0].step_s)
    return Predicted(shape=shape, flops_per_s=work / step.step_s, exposed_ratio=step.exposed_s / step.step_s)
