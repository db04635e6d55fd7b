"""Functions timed one after the other, round by round, until it is known which is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from sparsetrain.measure.timing import clock

Key = TypeVar("Key")
FEW = 0.1
"""A ratio from one round is taken to be right within 10 %: noise on a shared machine."""


def time_in_turns(
    functions: Mapping[Key, Callable[[], object]],
    more: Callable[[dict[Key, list[float]]], bool],
    *,
    device: torch.device | str = "cpu",
) -> dict[Key, list[float]]:
    """Seconds of each call, in the order of the rounds; the order within a round is turned each time.

    Args:
        functions: what is timed, at least one.
        more: (times so far) -> whether there shall be another round; asked after each.
        device: where they compute.
    """
    _, now = clock(torch.device(device))
    times: dict[Key, list[float]] = {key: [] for key in functions}
    order = list(functions)
    while True:
        for key in order:
            start = now()
            functions[key]()
            times[key].append(now() - start)
        order.reverse()
        if not more(times):
            return times


def interval(baseline_s: list[float], candidate_s: list[float]) -> tuple[float, float, float]:
    """(low, median, high) of baseline / candidate over the rounds.

    Quartiles from three rounds on, the extremes of two, and 10 % on both sides of one.
    """
    ratios = sorted(b / max(c, 1e-12) for b, c in zip(baseline_s, candidate_s, strict=True))
    if len(ratios) == 1:
        return ratios[0] * (1 - FEW), ratios[0], ratios[0] * (1 + FEW)
    if len(ratios) == 2:
        return ratios[0], statistics.median(ratios), ratios[1]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high
