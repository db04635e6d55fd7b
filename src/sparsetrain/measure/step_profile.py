"""profile(): one training step of any model under the glass: memory by part, component and layer, time by component."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sparsetrain.measure.components import COMPONENTS, Place
from sparsetrain.measure.cuda_history import allocator_history
from sparsetrain.measure.follow import PHASES, following
from sparsetrain.measure.live import LiveMemory, live_memory
from sparsetrain.measure.memory import (
    PeakMemory,
    SavedActivations,
    StaticMemory,
    peak_memory,
    reset_peak,
    static_memory,
)
from sparsetrain.measure.timing import clock


@dataclass(frozen=True, kw_only=True)
class ComponentTime:
    """Median seconds of a step by phase, and by component within forward and backward; layers where they have one.

    by_component[phase][component] and by_layer[layer][phase] sum to by_phase but for rounding and what no layer owns.
    """

    step_s: float
    by_phase: dict[str, float]
    by_component: dict[str, dict[str, float]]
    by_layer: dict[int, dict[str, float]]
    clock: str
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one training step holds and takes.

    static: with every gradient there, just before the optimizer steps.
    saved: what the forward keeps for the backward.
    live: tensors alive over the step; None on a CUDA device that gave its allocator's history instead.
    process: resident memory of the process, and PyTorch's count on CUDA, over the plain steps before any tracing.
    history: (seconds, bytes) of CUDA's allocator over the step.
    """

    static: StaticMemory
    saved: SavedActivations
    live: LiveMemory
    time: ComponentTime
    process: PeakMemory
    history: tuple[tuple[float, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"static": self.static.to_dict(), "saved": self.saved.to_dict()}


def profile(
    model: nn.Module,
    step: Callable[[], object],
    *,
    steps: int = 1,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> Profile:
    """Measure a training step of your own loop.

        def step():
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        print(profile(model, step).saved.by_component)

    `step` is called `warmup + steps + 1` times and trains the model: first to let the optimizer make its state, then
    on the clock, last under the tracer, whose own work would be on the clock.

    Args:
        model: the model that `step` trains: converted, PEFT-wrapped, or any module with a method `anatomy()`.
        step: one whole training step. Its optimizer is found by itself.
        steps: timed steps; medians are over these.
        warmup: steps before, at least 1.
        device: where the model computes. On CUDA the device is synchronised where the component changes, which costs
            overlap: read the shares.

    Raises:
        UnknownFamily: no anatomy adapter knows the model.
        ValueError: steps or warmup below 1, or no backward ran within `step`.
    """
    if steps < 1 or warmup < 1:
        raise ValueError(f"steps={steps}, warmup={warmup}: both must be at least 1.")
    device = torch.device(device)
    reset_peak(device)
    optimizers = _warm_up(model, step, warmup)
    static, time = _on_the_clock(model, step, steps, optimizers, device)
    process = peak_memory(device)
    with following(model) as found, live_memory(model, found, optimizers) as record, allocator_history(device) as past:
        step()
    if record.saved is None:
        raise ValueError("no backward ran within the step. Let `step` call loss.backward() of what `model` returned.")
    return Profile(
        static=static,
        saved=record.saved,
        live=record.result(),
        time=time,
        process=process,
        history=tuple(past),
    )


def _warm_up(model: nn.Module, step: Callable[[], object], warmup: int) -> list[torch.optim.Optimizer]:
    """Steps in which the optimizers make their state; returns those that stepped."""
    optimizers: list[torch.optim.Optimizer] = []
    with following(model) as found:
        found.on_optimizer = lambda optimizer: optimizers.append(optimizer) if optimizer not in optimizers else None
        for _ in range(warmup):
            step()
    return optimizers


def _on_the_clock(
    model: nn.Module,
    step: Callable[[], object],
    steps: int,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
) -> tuple[StaticMemory, ComponentTime]:
    """Timed steps, and what is held just before the optimizer of the last one."""
    static: list[StaticMemory] = []
    rows = []
    name, now = clock(device)
    with following(model, now) as found:
        found.on_optimizer = lambda _: static.append(static_memory(model, _together(optimizers)))
        for _ in range(steps):
            found.spent = {}
            found.start()
            step()
            found.settle()
            rows.append(found.spent)
    return static[-1] if static else static_memory(model), _times(rows, name)


def _together(optimizers: list[torch.optim.Optimizer]) -> Any:
    return SimpleNamespace(state={key: value for each in optimizers for key, value in each.state.items()})


def _times(rows: list[dict[tuple[str, Place], float]], clock_name: str) -> ComponentTime:
    """Medians over steps of the sums by phase, component and layer."""

    def median(chosen: Callable[[str, Place], bool]) -> float:
        return statistics.median(sum(s for (phase, place), s in row.items() if chosen(phase, place)) for row in rows)

    layers = sorted({place.layer for row in rows for _, place in row if place.layer is not None})
    both = ("forward", "backward")
    return ComponentTime(
        step_s=median(lambda *_: True),
        by_phase={name: median(lambda phase, _, name=name: phase == name) for name in PHASES},
        by_component={
            name: {
                part: median(lambda phase, place, name=name, part=part: phase == name and place.component == part)
                for part in COMPONENTS
            }
            for name in both
        },
        by_layer={
            layer: {
                name: median(lambda phase, place, name=name, layer=layer: phase == name and place.layer == layer)
                for name in both
            }
            for layer in layers
        },
        clock=clock_name,
        num_steps=len(rows),
    )
