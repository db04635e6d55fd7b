"""Sums of gradients over the axes that split tokens, their norm, and clipping."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsetrain.parallel.grid import ParallelGrid


@dataclass(frozen=True)
class Spread:
    """How a parameter lies on the grid.

    sums: axes whose ranks saw other tokens, so that its gradient is their sum.
    copies: ranks that hold the same entries of it.
    """

    sums: tuple[str, ...]
    copies: int


def finish(grid: ParallelGrid, parameters: list[tuple[nn.Parameter, Spread]], max_norm: float | None) -> Tensor:
    """Sum, measure, clip; the norm of the whole gradient before clipping, the same on every rank."""
    buckets: dict[tuple[tuple[str, ...], torch.dtype], list[nn.Parameter]] = defaultdict(list)
    for parameter, spread in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:  # a rank without a gradient still takes part in the sum
                parameter.grad = torch.zeros_like(parameter)
            buckets[spread.sums, parameter.dtype].append(parameter)
    for (axes, _), same in buckets.items():
        _sum_together(grid, same, axes)
    squares = torch.zeros((), dtype=torch.float64)
    for parameter, spread in parameters:
        if parameter.grad is not None:
            squares += parameter.grad.detach().double().square().sum().cpu() / spread.copies
    squares = squares.to(grid.device)
    for axis in ("x", "y", "z", "data"):
        squares = grid.all_reduce(squares, axis).wait()
    norm = squares.sqrt()
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for parameter, _ in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad))
    return norm


def _sum_together(grid: ParallelGrid, parameters: list[nn.Parameter], axes: tuple[str, ...]) -> None:
    """One message an axis for all gradients that need the same sum."""
    axes = tuple(axis for axis in axes if grid.shape.size(axis) > 1)
    if not axes:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])  # type: ignore[union-attr]
    for axis in axes:
        flat = grid.all_reduce(flat, axis).wait()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
