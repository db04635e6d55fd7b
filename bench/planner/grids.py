"""Steps on grids of 2, 4 and 8 gloo processes of this machine against the simulator, calibrated on the first of them.

The processes share the machine's cores and its memory instead of links, so the device's rate, the bandwidth and the
time of a hop are fitted for each number of processes: the rate to products in a row, bandwidth and hop to all-reduces
of four sizes. What is tested is the event model, on grids that were not fitted, with messages beside the
arithmetic and in turn with it.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.runner import Asked, Benchmark, Cell
from sparsetrain.parallel.flow import Overlap

WORLDS = (2, 4, 8)
FITTED = ("flops", "bytes_per_s", "hop_s")
IN_TURN = Overlap(False, False, False)
GRIDS = ("x=2", "y=2", "z=2", "data=2", "x=2,y=2", "z=2,x=2", "data=2,y=2", "z=4", "data=2,x=2,y=2", "z=2,x=2,y=2")


def layers(hidden: int, blocks: int) -> tuple[Any, ...]:
    from sparsetrain.parallel.cost import GridLayer

    kinds = (
        ("qkv", hidden, 3 * hidden),
        ("o", hidden, hidden),
        ("up", hidden, 4 * hidden),
        ("down", 4 * hidden, hidden),
    )
    return tuple(GridLayer(name=n, k=k, n=m, transposed=n in ("o", "down"), count=blocks) for n, k, m in kinds)


def _on_rank(rank: int, world: int, folder: str, grid_text: str | None, settings: dict[str, Any]) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found = _rates(settings) if grid_text is None else _step(grid_text, settings)
        if rank == 0:
            torch.save(found, f"{folder}/found")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _timed(work: Any, rounds: int) -> float:
    from torch import distributed

    times = []
    for _ in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _rates(settings: dict[str, Any]) -> dict[str, Any]:
    """The messages of this machine with all processes at work (as `doctor --network` times them), and flops,
    bytes_per_s and hop_s of the simulator's device and links."""
    from torch import distributed

    from sparsetrain.parallel.network import measure_network

    rows, hidden = settings["rows"], settings["hidden"]
    a, b = torch.randn(rows, hidden), torch.randn(hidden, hidden)
    series = 16  # one product can fit into a turn of a shared core: a step cannot
    flops = series * 2 * rows * hidden * hidden / _timed(lambda: [a @ b for _ in range(series)], settings["rounds"])
    sizes = (4096, 64 * 1024, 1024**2, 4 * rows * hidden)
    link = measure_network(distributed.get_world_size(), torch.device("cpu"), sizes, settings["rounds"]).node
    assert link is not None
    speed, hop_s = link.line()
    seconds = {"all_reduce_s": link.seconds, "all_gather_s": link.gathers}
    return {"flops": flops, "bytes_per_s": speed, "hop_s": hop_s} | seconds


def _step(grid_text: str, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step with messages beside the arithmetic, and with each waited for at once."""
    from sparsetrain.parallel.flow import Flow
    from sparsetrain.parallel.grid import ParallelGrid
    from sparsetrain.parallel.linear import TPLinear
    from sparsetrain.parallel.shape import GridShape

    shape = GridShape.from_text(grid_text)
    with ParallelGrid(shape.data, shape.z, shape.x, shape.y) as grid:
        flow = Flow(grid)
        block = layers(settings["hidden"], 1)
        model = torch.nn.ModuleList()
        for _ in range(settings["blocks"]):
            for layer in block:
                model.append(
                    TPLinear(
                        layer.k, layer.n, bias=False, grid=grid, transposed=layer.transposed, mode="expert", flow=flow
                    )
                )
        x = torch.randn(settings["rows"] // (shape.data * shape.z), settings["hidden"] // shape.x)
        third = settings["hidden"] // shape.y

        def step() -> None:
            y = x.clone().requires_grad_()
            for i, linear in enumerate(model):
                y = linear(y)
                y = y[:, :third].contiguous() if i % 4 == 0 else y  # of q, k and v one part goes on
            y.sum().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                grid.all_reduce(parameter.grad, "data").wait()
                parameter.grad = None

        beside = _timed(step, settings["rounds"])
        flow.overlap = IN_TURN
        return {"measured_s": beside, "in_turn_s": _timed(step, settings["rounds"])}


def _spawn(world: int, grid_text: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (world, folder, grid_text, settings), nprocs=world)  # type: ignore[attr-defined]
        return torch.load(Path(folder) / "found")


@functools.cache
def _calibrated(world: int, items: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return _spawn(world, None, dict(items))


def network(world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What the machine is taken for with so many processes."""
    return _calibrated(world, tuple(settings.items()))


def cells(asked: Asked) -> list[Cell]:
    settings = asked.settings
    links = [Cell(f"network of {world}", functools.partial(network, world, settings)) for world in WORLDS]
    return links + [Cell(name, functools.partial(both, name, settings)) for name in GRIDS]


def both(grid_text: str, settings: dict[str, Any]) -> dict[str, float]:
    """Measured and simulated seconds of one grid, and what the machine was taken for."""
    from sparsetrain.parallel.cost import GridTask, Network
    from sparsetrain.parallel.shape import GridShape
    from sparsetrain.parallel.simulate import Device, simulate

    shape = GridShape.from_text(grid_text)
    rates = {name: value for name, value in network(shape.world, settings).items() if name in FITTED}
    task = GridTask(
        layers=layers(settings["hidden"], settings["blocks"]), rows=settings["rows"], tokens=1, dtype_bytes=4
    )
    speed = rates["bytes_per_s"]
    links = Network(devices_per_node=shape.world, node_bytes_per_s=speed, inter_bytes_per_s=speed)
    device = Device(flops=rates["flops"], attention_flops=rates["flops"], hop_s=rates["hop_s"])
    return {
        **_spawn(shape.world, grid_text, settings),
        "simulated_s": simulate(shape, task, links, device).step_s,
        "simulated_in_turn_s": simulate(shape, task, links, device, IN_TURN).step_s,
        **rates,
    }


BENCHMARKS = [
    Benchmark(
        name="planner_grids",
        measures="time of a step on grids of 2 to 8 gloo processes: simulated against measured",
        cells=cells,
        settings={"hidden": 512, "blocks": 2, "rows": 1024, "rounds": 9},
        quick={"hidden": 128, "rows": 256, "rounds": 3},
        under="rows",
        shows=("measured_s", "simulated_s", "in_turn_s", "simulated_in_turn_s", "flops", "bytes_per_s", "hop_s"),
    )
]
