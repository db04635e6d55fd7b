"""TPLinear: a linear whose weight is cut over x and y, and its pieces over z (arXiv 2305.13525, algorithm 1).

Legend: m rows of this data and z, k inputs, n outputs, G_in and G_out devices of the axes that cut them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sparsetrain.parallel.cut import cut_bias, cut_weight, output_order
from sparsetrain.parallel.exchange import features_to_rows, rows_to_features
from sparsetrain.parallel.flow import Flow
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.shape import axes_of_linear, check_linear

Mode = Literal["plain", "expert"]


class _Product(Function):
    """[m, k / G_in] -> [m, n / G_out]; the weight's gradient goes through the flow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: TPLinear) -> Tensor:
        block = linear.flow.weight(linear, x, 1)
        ctx.linear, ctx.block = linear, block if linear.flow.keep_weights else None
        ctx.save_for_backward(x)
        return linear.flow.grid.all_reduce(x @ block.T, linear.in_axis).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (x,), linear = grads, ctx.saved_tensors, ctx.linear
        flow, grid, (wants_x, wants_w) = linear.flow, linear.flow.grid, ctx.needs_input_grad[:2]
        block = flow.weight(linear, dy, -1) if ctx.block is None else ctx.block
        # without a sum over the outputs' axis there is nothing to hide dW behind: its own scatter hides behind dX
        first = grid.shape.size(linear.out_axis) == 1
        if wants_w and first:
            flow.gradient(linear.weight, dy.T @ x)
        dx = grid.all_reduce(dy @ block, linear.out_axis) if wants_x else None
        if dx is not None and not flow.overlap.input_gradient:
            dx.wait()
        if wants_w and not first:
            flow.gradient(linear.weight, dy.T @ x)
        return None if dx is None else dx.wait(), None, None


class TPLinear(nn.Module):
    """y = x W^T + b on a grid. `weight` is the flat shard [k n / (x y z)], `bias` its part [n / G_out].

    Made like `nn.Linear`: the same seed gives the same full weight on any grid. After the backward, gradients of this
    rank's rows are in `.grad`; `model.GridModel.finish_gradients` sums them over the axes that split tokens.

    Args:
        transposed: x cuts the outputs and y the inputs, so that it takes what an ordinary one has left.
        mode: plain, the input is this rank's rows with all features, and so is the output; expert, the input is
            [rows of data and z, k / G_in], the output [the same rows, n / G_out].
        parts: outputs of the projections of a fused one; in expert mode every rank gets its part of each.
        stored_transposed: full weights are read and written as [k, n] (GPT-2).
        flow: that of the model; its own if not given.
        weights: full weight and bias to begin with, as a dense checkpoint stores them; random if not given.

    Raises:
        ValueError: the grid cannot cut it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: ParallelGrid,
        transposed: bool = False,
        mode: Mode = "plain",
        parts: tuple[int, ...] = (),
        stored_transposed: bool = False,
        flow: Flow | None = None,
        weights: tuple[Tensor, Tensor | None] | None = None,
        dtype: torch.dtype | None = None,
        name: str = "the linear",
    ) -> None:
        super().__init__()
        check_linear(grid.shape, name, in_features, out_features, transposed)
        self.in_features, self.out_features = in_features, out_features
        self.in_axis, self.out_axis = axes_of_linear(transposed)
        self.transposed, self.mode, self.stored_transposed = transposed, mode, stored_transposed
        pieces = grid.shape.size(self.out_axis)
        for part in parts if mode == "expert" else ():
            if part % pieces:
                raise ValueError(f"grid {grid.shape}: {part} outputs of {name} do not divide by {self.out_axis}.")
        self.parts = parts if mode == "expert" and pieces > 1 else ()
        self.local = (out_features // pieces, in_features // grid.shape.size(self.in_axis))
        self.flow = flow or Flow(grid)
        self.flow.enter(self)
        if weights is None:
            made = nn.Linear(in_features, out_features, bias, dtype=dtype)
            weights = made.weight.detach().T if stored_transposed else made.weight.detach(), made.bias
        self.weight = nn.Parameter(self.cut("weight", weights[0].detach()))
        self.bias = None if weights[1] is None else nn.Parameter(self.cut("bias", weights[1].detach()))

    @property
    def grid(self) -> ParallelGrid:
        return self.flow.grid

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.reshape(-1, x.shape[-1])
        if self.mode == "plain":
            rows = rows_to_features(rows, self.grid, self.in_axis)
        y = _Product.apply(rows, self.weight, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.mode == "plain":
            y = features_to_rows(y, self.grid, self.out_axis)
        return y.view(*x.shape[:-1], y.shape[-1])

    def full(self, name: str, shard: Tensor) -> Tensor:
        """The full `weight` [n, k] (stored_transposed: [k, n]) or `bias` [n] of this rank's shard of it, on every rank.

        Takes anything cut like them: gradients, an optimizer's moments.
        """
        if name == "bias":
            return self._ordered(self.grid.all_gather(shard, self.out_axis).wait())
        block = self.grid.all_gather(shard, "z").wait().view(self.local)
        rows = self._ordered(self.grid.all_gather(self.grid.gather_features(block, self.in_axis), self.out_axis).wait())
        return rows.T.contiguous() if self.stored_transposed else rows

    def cut(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a full `weight` or `bias`, as stored in a dense checkpoint; the inverse of `full`."""
        rows = full.T if name == "weight" and self.stored_transposed else full
        if self.parts:
            rows = rows[output_order(self.parts, self.grid.shape.size(self.out_axis)).to(rows.device)]
        cutting = cut_bias if name == "bias" else cut_weight
        return cutting(rows, self.grid.shape, self.grid.place, self.transposed)

    def _ordered(self, rows: Tensor) -> Tensor:
        """Undo the order of a fused projection's outputs."""
        if not self.parts:
            return rows
        found = torch.empty_like(rows)
        found[output_order(self.parts, self.grid.shape.size(self.out_axis)).to(rows.device)] = rows
        return found

    def extra_repr(self) -> str:
        pair = ", transposed" if self.transposed else ""
        return f"{self.in_features} -> {self.out_features}{pair}, {self.mode}, grid {self.grid.shape}"
