"""What the host does in a step, a layer: operations launched, values read from the device, and Python's time.

Counted on a CPU, so no figure is a GPU's. `as on a GPU` runs the path that a GPU takes, with an operation in place of
each of our kernels that computes nothing; a layer's share is that of four layers less that of two. Tensors are so small
that the time of a step is nearly all the host's: a GPU that is done sooner waits for it.
"""

from __future__ import annotations

import cProfile
import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

from bench import runner
from bench.gpu.sides import Methods, Side, batches_of, config_of
from bench.gpu.steps import methods_of, targets_of
from sparsetrain.core.backend import planning_for
from sparsetrain.measure.launches import CountLaunches
from sparsetrain.methods.token_selection import policies, selector
from sparsetrain.ops.selected_rows import Rows, planned

FEW, MANY = 2, 4
"""Layers."""
SIZES = {"keys": 64, "block": 16}
WAYS: dict[str, tuple[str | None, bool, Callable[[], AbstractContextManager[Any]]]] = {
    "dense": (None, False, nullcontext),
    "dense + checkpointing": (None, True, nullcontext),
    "tokens r=.3, as on a GPU": ("tokens r=.3", False, functools.partial(planning_for, "cuda")),
    "targets at the end r=.1, as on a GPU": ("targets at the end r=.1", False, functools.partial(planning_for, "cuda")),
    "tokens r=.3, keys train, as on a GPU": ("tokens r=.3, keys train", False, functools.partial(planning_for, "cuda")),
    "tokens r=.3, tiles": ("tokens r=.3", False, nullcontext),
    "spt, as on a CPU": ("spt", False, nullcontext),
}
"""Name -> (side or None, with checkpointing, where it runs). Tiles and SPT are counted as a CPU runs them."""


def counted(side: Side, batch: Any) -> CountLaunches:
    """Of a second step, with the first one's draw: it is on the host with the batch, and asks no device."""
    kept: list[Rows] = []

    def draw(*arguments: Any, **more: Any) -> Rows:
        if not kept:
            kept.append(policies.draw(*arguments, **more))
        rows = kept[0]
        anew = Rows(rows.index_bk, rows.counts, rows.num_tokens, rows.weight_bk)
        vars(anew)["positions"] = rows.positions
        return anew

    with mock.patch.object(selector, "draw", draw), mock.patch.object(planned, "_pairs", lambda *_: 0):
        seconds(side, batch)
        with CountLaunches() as found:
            side.loss(batch).backward()
    side.optimizer.zero_grad(set_to_none=True)
    return found


def seconds(side: Side, batch: Any) -> float:
    start = time.process_time()
    side.loss(batch).backward()
    spent = time.process_time() - start
    side.optimizer.zero_grad(set_to_none=True)
    return spent


def calls(side: Side, batch: Any) -> int:
    """Functions that Python calls in a step, its own and C's: what takes the host its time, and does not vary."""
    profile = cProfile.Profile()
    profile.enable()
    side.loss(batch).backward()
    profile.disable()
    side.optimizer.zero_grad(set_to_none=True)
    return sum(entry.callcount for entry in profile.getstats())


def measure(way: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Of a layer, and of all that a step has once."""
    named, again, where = WAYS[way]
    methods: Methods = methods_of(named, SIZES) if named else ()
    sides = []
    with where():
        for layers in (FEW, MANY):
            config = config_of("1b", layers, 32)
            side = Side(config, torch.device("cpu"), methods)
            if again:
                side.recompute()
            sides.append(side)
        batch = batches_of(config, tokens, torch.device("cpu"), targets_of(named, tokens) if named else None)[0]
        for side in sides:
            seconds(side, batch)
        counts = [counted(side, batch) for side in sides]
        called = [calls(side, batch) for side in sides]
        taken = [[seconds(side, batch) for side in sides] for _ in range(rounds)]
    few, many = (statistics.median(column) for column in zip(*taken, strict=True))
    per_layer = statistics.median((b - a) / (MANY - FEW) for a, b in taken)
    launches = [found.launches for found in counts]
    reads = [sum(found.reads.values()) for found in counts]
    of_a_layer = (launches[1] - launches[0]) / (MANY - FEW)
    return {
        "launches_per_layer": of_a_layer,
        "launches_once": launches[0] - FEW * of_a_layer,
        "reads_per_layer": (reads[1] - reads[0]) / (MANY - FEW),
        "reads_per_step": reads[1],
        "reads": dict(counts[1].reads),
        "calls_per_layer": (called[1] - called[0]) / (MANY - FEW),
        "host_ms_per_layer": 1e3 * per_layer,
        "host_ms_per_step": {str(FEW): 1e3 * few, str(MANY): 1e3 * many},
    }


def cells(asked: runner.Asked) -> list[runner.Cell]:
    return [
        runner.Cell(way, functools.partial(measure, way, asked.settings["tokens"], asked.settings["rounds"]))
        for way in WAYS
    ]


BENCHMARKS = [
    runner.Benchmark(
        name="host_work",
        measures="launches, reads and Python's time of a layer's step, dense and selected, counted on a CPU",
        cells=cells,
        settings={"tokens": 160, "rounds": 15},
        quick={"rounds": 3},
        threads=1,
        shows=(
            "launches_per_layer",
            "launches_once",
            "reads_per_layer",
            "reads_per_step",
            "calls_per_layer",
            "host_ms_per_layer",
        ),
    )
]
