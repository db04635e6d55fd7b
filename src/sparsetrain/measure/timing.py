"""Time, as ratios of interleaved runs: on a shared machine, runs apart from each other moved by up to 45 %."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsetrain.measure.components import COMPONENTS, running
from sparsetrain.measure.intervals import signed_rank_interval

MARGIN = 0.02
"""A ratio within 2 % of 1 is a tie, however surely it is known: nobody changes a method for less."""
LOOKS = 3
"""How often the interval is looked at before more pairs are taken or it stays undecided."""
LEVEL = 1 - 0.05 / LOOKS
"""Of the interval at each look, so that all looks together err in at most 5 % (Bonferroni); it takes 7 pairs."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much faster the candidate is: baseline time / candidate time, above 1 when the candidate wins.

    median, q1, q3 are over the per-round ratios; times are seconds in the order of the rounds.
    low, high: the interval of the ratio, of `LEVEL`: Wilcoxon's signed-rank interval of the logarithms of the rounds'
        ratios (`measure.intervals`); None for fewer than 7 pairs.
    verdict: win if the whole interval is above 1 + `MARGIN`, loss if it is below 1 / (1 + `MARGIN`), else tie.
    """

    median: float
    q1: float
    q3: float
    low: float | None
    high: float | None
    verdict: str
    clock: str
    baseline_s: tuple[float, ...]
    candidate_s: tuple[float, ...]

    @property
    def decided(self) -> bool:
        """The interval lies in one piece: outside the margin, or inside. More pairs would narrow it, and no more."""
        if self.low is None or self.high is None:
            return False
        return self.verdict != "tie" or (self.low >= 1 / (1 + MARGIN) and self.high <= 1 + MARGIN)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Median seconds of one training step and of its parts, over `num_steps` steps."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    total_s: float
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    rounds: int = 9,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> Ratio:
    """Time two functions in one loop, baseline then candidate, the order flipped each round.

    After `rounds` pairs the interval of their ratio is looked at (`Ratio`); while it is undecided, as many pairs again
    are taken, up to `LOOKS` times. The clock is CPU time of the process with one thread, wall time otherwise, and wall
    time around a synchronised device on CUDA. Everything a user pays for belongs inside the functions (selection and
    its bookkeeping too); rotating inputs is theirs to do.

    Args:
        baseline: the strongest thing a user could pick instead.
        candidate: what is judged.
        rounds: timed pairs of the first look, at least 3; up to `LOOKS` times as many are taken.
        warmup: calls of each before timing.
        device: where the functions compute.

    Raises:
        ValueError: fewer than 3 rounds.
    """
    if rounds < 3:
        raise ValueError(f"rounds={rounds} gives no quartiles. Use at least 3; 9 is the default.")
    name, now = clock(torch.device(device))
    for _ in range(warmup):
        baseline()
        candidate()
    times: dict[str, list[float]] = {"baseline": [], "candidate": []}
    pair = [("baseline", baseline), ("candidate", candidate)]
    for i in range(LOOKS * rounds):
        for side, function in pair if i % 2 == 0 else reversed(pair):
            start = now()
            function()
            times[side].append(now() - start)
        if (i + 1) % rounds == 0 and ratio(times["baseline"], times["candidate"]).decided:
            break
    return ratio(times["baseline"], times["candidate"], clock=name)


def ratio(baseline_s: list[float], candidate_s: list[float], *, clock: str = "wall") -> Ratio:
    """The ratio of times that were taken in pairs.

    Raises:
        ValueError: unequal counts, or fewer than 3 pairs.
    """
    if len(baseline_s) != len(candidate_s) or len(baseline_s) < 3:
        raise ValueError(f"{len(baseline_s)} and {len(candidate_s)} times do not pair. Give at least 3 of each.")
    # a coarse clock can read 0 for a very short call
    ratios = [max(b, 1e-12) / max(c, 1e-12) for b, c in zip(baseline_s, candidate_s, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    logarithms = signed_rank_interval([math.log(each) for each in ratios], LEVEL)
    low, high = (None, None) if logarithms is None else map(math.exp, logarithms)
    return Ratio(
        median=median,
        q1=q1,
        q3=q3,
        low=low,
        high=high,
        verdict=verdict(low, high),
        clock=clock,
        baseline_s=tuple(baseline_s),
        candidate_s=tuple(candidate_s),
    )


def verdict(low: float | None, high: float | None) -> str:
    """win, tie or loss, by the rule of `Ratio`."""
    if low is not None and low > 1 + MARGIN:
        return "win"
    if high is not None and high < 1 / (1 + MARGIN):
        return "loss"
    return "tie"


def time_step(
    forward: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> StepTime:
    """Time training steps: forward, backward, and optimizer (with the clearing of gradients). It trains the model.

    Args:
        forward: runs model and loss and returns the scalar loss.
        optimizer: steps after each backward.
        steps: timed steps; medians are over these.
        warmup: steps before timing, in which the optimizer makes its state.
        device: where the model lives.
    """
    _, now = clock(torch.device(device))
    rows: list[tuple[float, float, float]] = []
    for _ in range(warmup + steps):
        t0 = now()
        loss = forward()
        t1 = now()
        loss.backward()
        t2 = now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append((t1 - t0, t2 - t1, now() - t2))
    timed = rows[warmup:]
    forward_s, backward_s, optimizer_s = (statistics.median(column) for column in zip(*timed, strict=True))
    return StepTime(
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        total_s=statistics.median(sum(row) for row in timed),
        num_steps=steps,
    )


def forward_time_by_component(
    model: nn.Module,
    forward: Callable[[], object],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median seconds of one forward, by component (those of `COMPONENTS`; they sum to the whole but for rounding).

    Each moment belongs to the innermost component that is running. On CUDA the device is synchronised at every change
    of component, which costs overlap: read the shares, and take the total from `time_step`. There is no such split of
    the backward: autograd runs it in an order of its own.

    Raises:
        UnknownFamily: no anatomy adapter knows the model.
    """
    _, now = clock(torch.device(device))
    rows = []
    for i in range(warmup + rounds):
        spent = _one_forward(model, forward, now)
        if i >= warmup:
            rows.append(spent)
    return {name: statistics.median(row[name] for row in rows) for name in COMPONENTS}


def _one_forward(model: nn.Module, forward: Callable[[], object], now: Callable[[], float]) -> dict[str, float]:
    spent = dict.fromkeys(COMPONENTS, 0.0)
    with running(model) as running_now:
        since = now()

        def settle() -> None:
            nonlocal since
            spent[running_now.place.component] += now() - since
            since = now()

        running_now.on_change = settle
        forward()
        settle()
    return spent


def clock(device: torch.device) -> tuple[str, Callable[[], float]]:
    """(name, a clock in seconds) for work on a device, as `compare` says."""
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return "wall, device synchronised", synchronised
    if torch.get_num_threads() == 1:
        return "process CPU time", time.process_time
    # with more threads, OpenMP's spinning makes CPU time useless
    return "wall", time.perf_counter
