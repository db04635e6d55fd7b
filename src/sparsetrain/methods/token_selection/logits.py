"""Logits of all rows for whoever reads them: gradient through the selected rows alone, computed when asked for.

In a training forward with labels the head runs on selected rows, inside of the loss. A trainer's own loss, or a metric,
that reads `outputs.logits` finds an object that becomes the tensor [b, t, v] at its first use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sparsetrain.core.autograd import as_output
from sparsetrain.ops.selected_rows import Rows

_OPERATORS = (
    "getitem len iter bool float int neg abs add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow rpow "
    "eq ne lt le gt ge and or invert array repr format"
)


class LogitsOnDemand:
    """Stands for the logits [b, t, v] = hidden · Wᵀ + b; every use of it is one of the tensor.

    Attributes:
        hidden_btd: what the head was given; None before it was.
    """

    def __init__(self, linear: nn.Linear, rows: Rows) -> None:
        self.linear, self.rows = linear, rows
        self.hidden_btd: Tensor | None = None
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """The logits."""
        if self._tensor is None:
            assert self.hidden_btd is not None, "the head has not run"
            self._tensor = cut_rows(F.linear(self.hidden_btd, self.linear.weight, self.linear.bias), self.rows)
        return self._tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for is not the tensor's
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        plain = pytree.tree_map(lambda x: x.tensor() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _operator(name: str) -> Any:
    def apply(self: LogitsOnDemand, *args: Any) -> Any:
        plain = [x.tensor() if isinstance(x, LogitsOnDemand) else x for x in args]
        return getattr(self.tensor(), name)(*plain)

    return apply


for _name in (f"__{name}__" for name in _OPERATORS.split()):
    setattr(LogitsOnDemand, _name, _operator(_name))


def cut_rows(x_btv: Tensor, rows: Rows) -> Tensor:
    """x, whose gradient is zero at rows that are not selected."""
    return _CutRows.apply(x_btv, rows.to(x_btv.device).selected_bt) if not rows.everything else x_btv  # type: ignore


class _CutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btv: Tensor, selected_bt: Tensor) -> Tensor:
        ctx.save_for_backward(selected_bt)
        return as_output(x_btv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (selected_bt,) = ctx.saved_tensors
        return grads[0] * selected_bt[..., None], None
