"""Changes of layout that a gradient flows through: what the other layers hold, and what a cut linear wants.

Plain mode: other layers are data-parallel over every rank. Before a linear, rows are gathered over x and y and a rank
keeps its features; after it, features are gathered and a rank keeps its rows. Each is the other's backward, since an
activation that is copied has the whole gradient on every copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from sparsetrain.parallel.grid import ParallelGrid


def _rows_to_features(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    return grid.own_features(grid.gather_rows(x), axis)


def _features_to_rows(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    return grid.own_rows(grid.gather_features(x, axis))


class _RowsToFeatures(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
        ctx.layout = grid, axis
        return _rows_to_features(x, grid, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _features_to_rows(grads[0], *ctx.layout), None, None


class _FeaturesToRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
        ctx.layout = grid, axis
        return _features_to_rows(x, grid, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _rows_to_features(grads[0], *ctx.layout), None, None


class _OwnFeatures(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
        ctx.layout = grid, axis
        return grid.own_features(x, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.layout[0].gather_features(grads[0].contiguous(), ctx.layout[1]), None, None


class _AllFeatures(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
        ctx.layout = grid, axis
        return grid.gather_features(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.layout[0].own_features(grads[0], ctx.layout[1]).contiguous(), None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
        ctx.layout = grid, axis
        return grid.all_reduce(x.clone(), axis).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grid, axis = ctx.layout
        return grid.all_reduce(grads[0].clone(), axis).wait(), None, None


def rows_to_features(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    """[r, f] of this rank's rows -> [x y r, f / G]."""
    return _RowsToFeatures.apply(x, grid, axis)  # type: ignore[return-value]


def features_to_rows(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    """[x y r, f / G] -> [r, f] of this rank's rows."""
    return _FeaturesToRows.apply(x, grid, axis)  # type: ignore[return-value]


def own_features(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    """[…, f], a copy on every rank of the axis -> […, f / G]."""
    return _OwnFeatures.apply(x, grid, axis)  # type: ignore[return-value]


def all_features(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    """[…, f / G] -> […, f], a copy on every rank of the axis."""
    return _AllFeatures.apply(x, grid, axis)  # type: ignore[return-value]


def summed(x: Tensor, grid: ParallelGrid, axis: str) -> Tensor:
    """The sum over an axis of what each rank has of a whole that all of them go on with."""
    return _Sum.apply(x, grid, axis)  # type: ignore[return-value]
